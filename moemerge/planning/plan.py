"""The merge plan: every output tensor, where its bytes come from and where they go."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Final, Literal

from moemerge.checkpoint.derived import Derived, leaves
from moemerge.checkpoint.files import File, Stamp, fingerprint_of, size_of
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.index import SAFETENSORS_INDEX, build_index
from moemerge.checkpoint.pieces import Band, Piece
from moemerge.checkpoint.shards import Shard
from moemerge.config.schema import CARD, CONFIG_COPY, MergeConfig
from moemerge.engines import Engine
from moemerge.errors import CheckpointError
from moemerge.families.dense import DenseModel
from moemerge.families.family import MoeFamily
from moemerge.families.mixture import Mixture
from moemerge.planning.tokenizer_files import BaseFiles
from moemerge.planning.tokenizer_proof import ProvedTokenizer
from moemerge.sources.model_folder import ModelFolder
from moemerge.sources.reference import Reference
from moemerge.texts.documents import matching_files

# What a stamp holds, in words.
_STAMPED: Final = {
    "size": "size", "modified": "time of writing", "changed": "time of a change of content, links or permissions",
    "inode": "inode",
}  # fmt: skip
# Resident memory beside the data, measured on Linux with torch 2.13 and transformers 5.23: the program alone, what
# torch with transformers, and what the classes and threads of a pass add to it.
_PROGRAM_BYTES: Final = 70_000_000
_LIBRARIES_BYTES: Final = 300_000_000
_PASS_BYTES: Final = 110_000_000
# The Hub's client, at work in several threads.
_HUB_BYTES: Final = 50_000_000
# What loading a tokenizer takes for each byte of its tokenizer.json.
_TOKENIZER_FACTOR: Final = 14
# What a layer holds at a time for each of 1024 tokens: four rows of the FFN's width in float32.
_STATES_BYTES: Final = 1024 * 4 * 4


@dataclass(frozen=True)
class Computed:
    """A tensor that is made from prompts, or drawn, while the others are written."""

    layer: int
    kind: Literal["router", "shared gate"]


@dataclass(frozen=True)
class Output:
    """A tensor of the merged model."""

    shape: tuple[int, ...]
    origin: tuple[Band, ...] | Computed
    """The pieces that it is made of, or what it is computed from later."""
    is_expert: bool = False
    """Whether it belongs to experts that are chosen between."""

    @property
    def bands(self) -> tuple[Band, ...]:
        """What it is made of; nothing yet where it is computed."""
        return () if isinstance(self.origin, Computed) else self.origin

    @property
    def pieces(self) -> list[Piece]:
        """The same, from left to right and from top to bottom."""
        return [piece for band in self.bands for piece in band]

    @property
    def is_converted(self) -> bool:
        """Whether any of its bytes are computed, or in another order than in the source."""
        return any(not piece.is_unchanged for piece in self.pieces)

    @property
    def copied_from(self) -> TensorInfo | None:
        """The one source whose bytes it holds as they are; None where it is made in another way."""
        match self.pieces:
            case [Piece(source=TensorInfo() as source, is_unchanged=True)]:
                return source
        return None


@dataclass(frozen=True)
class MergePlan:
    """A merge, completely decided; nothing has been written yet."""

    config: MergeConfig
    family: MoeFamily
    mixture: Mixture
    base: DenseModel
    base_folder: Path
    base_tensors: dict[str, TensorInfo]
    experts: tuple[tuple[DenseModel, Mapping[str, TensorInfo]], ...]
    """The models whose FFNs are chosen between, in the order of the config."""
    sources: tuple[ModelFolder, ...]
    """The base, then every expert, then every shared expert."""
    stamps: Mapping[Path, Stamp]
    """Of each local file that was read of the models, what told it from others when it was first read."""
    references: Mapping[File, str]
    """Of each file of weights, the model that it belongs to, as the config names it."""
    reread: tuple[TensorInfo, ...]
    """What is read more than once: for routers, for several tensors, or to find out how models are mixed."""
    dtype: str
    output_config: dict[str, Any]
    """The merged model's `config.json`."""
    outputs: dict[str, Output]
    """Every tensor of the merged model, by name, in the order of the layers; routers last."""
    shards: tuple[Shard, ...]
    base_files: BaseFiles
    """What is copied from the base model beside its weights."""
    tokenizer: ProvedTokenizer | None
    """The output's, where it was proved already."""
    notes: tuple[str, ...]
    """What the user should know."""
    warnings: tuple[str, ...]
    """What looks like a mistake: an engine that computes something else, experts that are no fine-tunes of the base, or
    the base itself."""
    advice: tuple[str, ...]
    """What measured better than what the config asks for."""
    family_notes: tuple[str, ...]
    """Those of them that a user of the merged model should know too: what readers of its family, or of its
    tokenizer, get wrong."""
    right_in: tuple[Engine, ...]
    """Engines that compute such a mixture as transformers 5 does, as measured."""
    compared_bytes: int
    """Bytes of weights that the plan itself has read on other machines, to compare the experts with the base."""
    shared_bytes: int
    """Bytes of the output that take no room on the disk: its files share them with the sources'."""
    runs_base: bool
    """Whether the prompts pass through the base model: for the routers, or for the routing table."""
    total_parameters: int
    active_parameters: int
    """Parameters that a token passes through."""

    @property
    def folders(self) -> list[Path]:
        """Of the sources; of a snapshot in the Hub's cache, that of its repository."""
        return [folder for source in self.sources for folder in source.folders]

    @property
    def copied_files(self) -> Mapping[str, Path]:
        """Of the base model, beside its weights, by their paths in the output."""
        return self.base_files.copied

    @property
    def made_files(self) -> tuple[str, ...]:
        """What may be made of the base's tokenizer beside or instead of them, by their paths in the output."""
        return self.base_files.made(self.family.model_type)

    @property
    def inputs(self) -> list[Path]:
        """Files that were read, or will be: the config, texts, and those of models, which links may lead to."""
        experts = [*self.config.experts, *self.config.shared_experts]
        patterns = [text for expert in experts for text in (*expert.positive_texts, *expert.negative_texts)]
        files = [
            path for path in (*self.stamps, *self.references, *self.copied_files.values()) if isinstance(path, Path)
        ]
        config = [self.config.file] if self.config.file else []
        return [*config, *files, *matching_files([*patterns, *self.config.router.calibration_texts])]

    @property
    def file_names(self) -> list[str]:
        """Paths in the output of the files that the merge writes, or may write."""
        index = [SAFETENSORS_INDEX] if len(self.shards) > 1 else []
        others = ["config.json", CONFIG_COPY, CARD, *self.copied_files, *self.made_files]
        return [*(shard.name for shard in self.shards), *index, *others]

    @property
    def computed(self) -> dict[str, Computed]:
        """The tensors that are made last, by name."""
        return {name: o.origin for name, o in self.outputs.items() if isinstance(o.origin, Computed)}

    @property
    def weight_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without headers: what a merge moves."""
        return sum(shard.nbytes - len(shard.header) for shard in self.shards)

    @property
    def remote_bytes(self) -> int:
        """Size of the files of weights that are on other machines."""
        return sum(file.nbytes for file in self.references if not isinstance(file, Path))

    @property
    def download_bytes(self) -> int:
        """Of them, the bytes that the merge reads."""
        pieces = [piece.source for output in self.outputs.values() for piece in output.pieces]
        return _remote_bytes([*self.reread, *(piece for piece in pieces if isinstance(piece, TensorInfo))])

    @property
    def kept_bytes(self) -> int:
        """Of them, those that are kept on the disk until the end, for they are read more than once."""
        return _remote_bytes(self.reread)

    def keep_reread(self, folder: Path) -> None:
        """Have what is read more than once from other machines kept in `folder`, for the merge to remove at the end."""
        for tensor in self.reread:
            tensor.keep(folder)

    @property
    def output_bytes(self) -> int:
        """Disk space of the merged model."""
        return self.weight_bytes + sum(path.stat().st_size for path in self.copied_files.values())

    @property
    def peak_memory_bytes(self) -> int:
        """Estimate of the resident memory: the libraries that are needed, one layer for the pass over the prompts."""
        layer = sum(
            4 * math.prod(tensor.shape)
            for name, tensor in self.base_tensors.items()
            if name.startswith("model.layers.0.")
        )
        reads_prompts = self.runs_base or self.config.reads_text
        tokenizer = self.base_folder / "tokenizer.json"
        tokenizer_bytes = tokenizer.stat().st_size if tokenizer.is_file() else 0
        imports_transformers = self.runs_base or bool(self.made_files) or (reads_prompts and not tokenizer_bytes)
        return (
            _PROGRAM_BYTES
            + _HUB_BYTES * any(isinstance(source.origin, Reference) for source in self.sources)
            + _LIBRARIES_BYTES * imports_transformers
            + _TOKENIZER_FACTOR * tokenizer_bytes * (2 if self.made_files else reads_prompts)
            + (_PASS_BYTES + layer + _STATES_BYTES * self.base.sizes["ffn"] + self._fit_bytes) * self.runs_base
        )

    @property
    def _fit_bytes(self) -> int:
        """What texts add to the pass: states and router inputs of their tokens, and what a closed form needs."""
        config, hidden = self.config, self.base.sizes["hidden"]
        described = [*config.experts, *config.shared_experts]
        kinds = sum(bool(texts) for expert in described for texts in (expert.positive_texts, expert.negative_texts))
        kinds += len(config.experts) if config.router.calibration_texts else 0
        tokens = kinds * config.router.tokens_per_expert
        # States, router inputs, those that rows are fitted to, a part of them; a matrix in float32 and two in float64.
        solves = tokens or config.way == "logistic" or config.router.load_prior or self.family.scoring == "sigmoid"
        return 4 * 4 * tokens * hidden + (20 * hidden * hidden if solves else 0)

    @property
    def shards_without_routers(self) -> list[Shard]:
        """Those that a resumed merge may keep: routers depend on more, down to the device that computed them."""
        computed = self.computed.keys()
        return [shard for shard in self.shards if computed.isdisjoint(shard.starts)]

    def fingerprint(self, seed: int) -> dict[str, Any]:
        """What decides every byte of `shards_without_routers`; a resumed merge keeps them only where it is the same."""
        used: dict[File, list[TensorInfo]] = {}
        for output in self.outputs.values():
            for piece in output.pieces:
                if isinstance(piece.source, TensorInfo):
                    for tensor in leaves(piece.source):
                        used.setdefault(tensor.path, []).append(tensor)
        headers = b"".join(shard.header for shard in self.shards)
        made = [
            (name, piece.source.path.identity)
            for name, output in self.outputs.items()
            for piece in output.pieces
            if isinstance(piece.source, TensorInfo) and isinstance(piece.source.path, Derived)
        ]
        return {
            "moemerge": version("moemerge"),
            "config": self.config.model_dump(mode="json"),
            "seed": seed,
            "layout of the shards (--max-shard-size)": hashlib.sha256(headers).hexdigest(),
            "what is computed of the sources": hashlib.sha256(repr(made).encode()).hexdigest(),
            "sources": {
                str(path): self._fingerprint_of(path)
                | {
                    "tensors": hashlib.sha256(repr(sorted(map(repr, tensors))).encode()).hexdigest(),
                }
                for path, tensors in used.items()
            },
        }

    def _fingerprint_of(self, file: File) -> dict[str, Any]:
        """What a change of a file would change: of a local one the stamp that it had when it was planned with."""
        if isinstance(file, Path) and file in self.stamps:
            return asdict(self.stamps[file])
        return {"size": size_of(file), "identity": str(fingerprint_of(file))}

    def check_sources(self, when: str) -> None:
        """Make sure that every file that was read of the models is still the same.

        Args:
            when: since when it may have changed, for the message.

        Raises:
            CheckpointError: one is not; says what of it is another.
        """
        for path, seen in self.stamps.items():
            try:
                found = asdict(Stamp.of(path))
            except OSError as error:
                raise CheckpointError(f"{path}: is gone {when}. Put it back, and merge again.") from error
            if changed := [_STAMPED[name] for name, value in asdict(seen).items() if found[name] != value]:
                raise CheckpointError(
                    f"{path}: was changed {when}: another {' and '.join(changed)}. The output would be of two models. "
                    "Merge again."
                )

    @property
    def index(self) -> str | None:
        """The text of the index, or None where one file holds everything."""
        if len(self.shards) == 1:
            return None
        weight_map = {name: shard.name for shard in self.shards for name in shard.starts}
        return build_index(weight_map, self.tensor_bytes)


def _remote_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Bytes of those tensors that are on other machines; what several have in common counts once."""
    spans: dict[File, list[tuple[int, int]]] = {}
    for leaf in chain.from_iterable(map(leaves, tensors)):
        if not isinstance(leaf.path, Path):
            spans.setdefault(leaf.path, []).append((leaf.start, leaf.start + leaf.nbytes))
    total = 0
    for found in spans.values():
        done = 0
        for start, end in sorted(found):
            total += max(0, end - max(start, done))
            done = max(done, end)
    return total

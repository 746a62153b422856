"""The merge plan: every output tensor, where its bytes come from and where they go."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint.derived import Derived, leaves
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.index import SAFETENSORS_INDEX, build_index
from moemerge.checkpoint.shards import Shard
from moemerge.config.schema import CARD, CONFIG_COPY, MergeConfig
from moemerge.engines import Engine
from moemerge.families.dense import DenseModel
from moemerge.families.family import MoeFamily
from moemerge.families.mixture import Mixture
from moemerge.planning.estimates import peak_memory_bytes
from moemerge.planning.inputs import Parts
from moemerge.planning.layout import Layout
from moemerge.planning.models import Models
from moemerge.planning.origins import Origins, remote_bytes
from moemerge.planning.output import Computed, Output
from moemerge.planning.shape import Shape
from moemerge.planning.tokenizer_files import BaseFiles
from moemerge.planning.tokenizer_proof import ProvedTokenizer
from moemerge.routers.request import RouterRequest
from moemerge.sources.data_sets import SCHEME, HubData, parse_hub_data
from moemerge.sources.model_folder import ModelFolder
from moemerge.texts.documents import matching_files

if TYPE_CHECKING:
    from moemerge.checkpoint.files import File


@dataclass(frozen=True)
class Remarks:
    """What a plan says to the user beside what it decides."""

    notes: tuple[str, ...]
    """What the user should know."""
    warnings: tuple[str, ...]
    """What looks like a mistake: an engine that computes something else, experts that are no fine-tunes of the base, or
    the base itself."""
    advice: tuple[str, ...]
    """What measured better than what the config asks for."""


@dataclass(frozen=True)
class MergePlan:
    """A merge, completely decided; nothing has been written yet, and nothing of the plan changes any more."""

    config: MergeConfig
    models: Models
    shape: Shape
    """What the merged model is."""
    parts: Parts
    """What the base and each expert bring."""
    dtype: str
    outputs: Mapping[str, Output]
    """Every tensor of the merged model, by name, in the order of the layers; routers last."""
    layout: Layout
    """Where each of them is written."""
    origins: Origins
    """The files that they come from."""
    remarks: Remarks
    compared_bytes: int
    """Bytes of weights that the plan itself has read on other machines, to compare the experts with the base."""

    @property
    def family(self) -> MoeFamily:
        """The output's."""
        return self.shape.family

    @property
    def mixture(self) -> Mixture:
        """Its layers and experts."""
        return self.shape.mixture

    @property
    def base(self) -> DenseModel:
        """The model that gives all but the experts."""
        return self.models.base.model

    @property
    def base_folder(self) -> Path:
        """Where that model's small files are."""
        return self.models.base.folder.folder

    @property
    def base_tensors(self) -> Mapping[str, TensorInfo]:
        """Its tensors, or what is made of all models' in their place."""
        return MappingProxyType(self.parts.base)

    @property
    def experts(self) -> tuple[tuple[DenseModel, Mapping[str, TensorInfo]], ...]:
        """The models whose FFNs are chosen between, in the order of the config."""
        return self.models.routed(self.parts.experts)

    @property
    def sources(self) -> tuple[ModelFolder, ...]:
        """The base, then every expert, then every shared expert."""
        return self.models.sources

    @property
    def output_config(self) -> dict[str, Any]:
        """The merged model's `config.json`."""
        return self.family.config(self.base, self.mixture, self.dtype)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files of weights."""
        return self.layout.shards

    @property
    def shared_bytes(self) -> int:
        """Bytes of the output that take no room on the disk: its files share them with the sources'."""
        return self.layout.shared_bytes

    @property
    def base_files(self) -> BaseFiles:
        """What is copied from the base model beside its weights."""
        return self.shape.base_files

    @property
    def tokenizer(self) -> ProvedTokenizer | None:
        """The output's, where it was proved already."""
        return self.shape.tokenizer

    @property
    def runs_base(self) -> bool:
        """Whether the prompts pass through the base model: for the routers, or for the routing table."""
        return self.shape.runs_base

    @property
    def right_in(self) -> tuple[Engine, ...]:
        """Engines that compute such a mixture as transformers 5 does, as measured."""
        return self.shape.choice.right_in

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Remarks`."""
        return self.remarks.notes

    @property
    def family_notes(self) -> tuple[str, ...]:
        """Those of the notes that a user of the merged model should know too.

        That is what readers of its family, or of its tokenizer, get wrong.
        """
        return (*self.base_files.reader_notes, *self.shape.choice.notes)

    @property
    def warnings(self) -> tuple[str, ...]:
        """See `Remarks`."""
        return self.remarks.warnings

    @property
    def advice(self) -> tuple[str, ...]:
        """See `Remarks`."""
        return self.remarks.advice

    @property
    def total_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(output.shape) for output in self.outputs.values())

    @property
    def active_parameters(self) -> int:
        """Those of them that a token passes through."""
        in_experts = sum(math.prod(output.shape) for output in self.outputs.values() if output.is_expert)
        experts, chosen = len(self.config.experts), self.config.experts_per_token
        return self.total_parameters - in_experts * (experts - chosen) // experts

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
    def data_sets(self) -> list[HubData]:
        """Data sets on the Hub that routers are made from."""
        if not (self.runs_base or self.config.method.reads_text):
            return []
        return [parse_hub_data(text, "config") for text in self._patterns if text.startswith(SCHEME)]

    @property
    def _patterns(self) -> list[str]:
        """What the config names of text."""
        experts = [*self.config.experts, *self.config.shared_experts]
        patterns = [text for expert in experts for text in (*expert.positive_texts, *expert.negative_texts)]
        return [*patterns, *self.config.router.calibration_texts]

    @property
    def inputs(self) -> list[Path]:
        """Files that were read, or will be: the config, texts, and those of models, which links may lead to."""
        files = [
            path
            for path in (*self.origins.stamps, *self.origins.references, *self.copied_files.values())
            if isinstance(path, Path)
        ]
        config = [self.config.file] if self.config.file else []
        return [*config, *files, *matching_files(self._patterns)]

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
    def router_request(self) -> RouterRequest:
        """What its routers are to be made from."""
        return RouterRequest(
            config=self.config,
            folder=self.base_folder,
            base=self.base,
            tensors=self.base_tensors,
            experts=self.experts,
            mixture=self.mixture,
            scoring=self.family.scoring,
            dtype=self.dtype,
            shared_gate=any(computed.kind == "shared gate" for computed in self.computed.values()),
            chat_prompts=self.shape.chat_prompts,
            runs_base=self.runs_base,
        )

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
        return self.origins.remote_bytes

    @property
    def download_bytes(self) -> int:
        """Of them, the bytes that the merge reads."""
        pieces = [piece.source for output in self.outputs.values() for piece in output.pieces]
        return remote_bytes([*self.origins.reread, *(piece for piece in pieces if isinstance(piece, TensorInfo))])

    @property
    def kept_bytes(self) -> int:
        """Of them, those that are kept on the disk until the end, for they are read more than once."""
        return self.origins.kept_bytes

    @property
    def output_bytes(self) -> int:
        """Disk space of the merged model."""
        return self.weight_bytes + sum(path.stat().st_size for path in self.copied_files.values())

    @property
    def peak_memory_bytes(self) -> int:
        """Estimate of the resident memory."""
        return peak_memory_bytes(self.config, self.models, self.shape, self.parts)

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
                str(path): self.origins.fingerprint_of(path)
                | {
                    "tensors": hashlib.sha256(repr(sorted(map(repr, tensors))).encode()).hexdigest(),
                }
                for path, tensors in used.items()
            },
        }

    @property
    def index(self) -> str | None:
        """The text of the index, or None where one file holds everything."""
        if len(self.shards) == 1:
            return None
        weight_map = {name: shard.name for shard in self.shards for name in shard.starts}
        return build_index(weight_map, self.tensor_bytes)

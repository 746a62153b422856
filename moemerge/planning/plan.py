"""The merge plan: every output tensor, where its bytes come from and where they go."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.shards import Shard
from moemerge.config.schema import CARD, CONFIG_COPY, MergeConfig
from moemerge.dtypes import DType
from moemerge.engines import Engine
from moemerge.families.dense import DenseModel, ModelTensors
from moemerge.families.family import MoeFamily
from moemerge.families.mixture_shape import Mixture
from moemerge.planning.estimates import peak_memory_bytes
from moemerge.planning.layout import Layout
from moemerge.planning.models import Models
from moemerge.planning.origins import Origins, remote_bytes
from moemerge.planning.output import Computed, Output
from moemerge.planning.parts import Parts
from moemerge.planning.pass_work import PassWork, pass_work
from moemerge.planning.shape import Shape
from moemerge.planning.shared_choice import SharedChoice
from moemerge.planning.tokenizer_files import BaseFiles
from moemerge.planning.tokenizer_proof import ProvedTokenizer
from moemerge.planning.vision import around
from moemerge.routers.request import RouterRequest
from moemerge.sources.data_sets import SCHEME, HubData, parse_hub_data
from moemerge.sources.model_folder import ModelFolder
from moemerge.texts.documents import matching_files


@dataclass(frozen=True)
class Remarks:
    """Notes, warnings and advice of a plan, for the user."""

    notes: tuple[str, ...]
    """Facts that the user should know."""
    quantised: tuple[str, ...]
    """Those of them that say which models are stored quantised."""
    warnings: tuple[str, ...]
    """Likely mistakes: an engine that computes something else, experts that are no fine-tunes of the base, or are the
    base itself."""
    advice: tuple[str, ...]
    """Settings that measured better than those of the config."""


@dataclass(frozen=True)
class MergePlan:
    """A merge, completely decided and immutable; nothing has been written yet."""

    config: MergeConfig
    models: Models
    shape: Shape
    """The mixture, its output family and its tokenizer."""
    parts: Parts
    """The tensors that the base and each expert contribute."""
    dtype: DType
    outputs: Mapping[str, Output]
    """All tensors of the merged model by name, in the order of the layers; routers last."""
    layout: Layout
    """The output files, and the place of each tensor in them."""
    origins: Origins
    """The files that the weights come from."""
    remarks: Remarks
    compared_bytes: int
    """Bytes that the plan has read from other machines to compare the experts with the base."""
    to_store: bool
    """Whether the client of an object store will send the output."""
    remake: Callable[[MergeConfig], "MergePlan"] = field(repr=False, compare=False)
    """A function that plans the same models, in the same shape, with other shared weights."""
    shared_choice: SharedChoice | None = None
    """The shared weights that were chosen for a config that asks for it."""
    candidates: Mapping[str, "MergePlan"] = field(default_factory=dict, repr=False, compare=False)
    """The plan with each method of sharing weights that the merge has to choose from; empty where nothing is open."""

    @property
    def is_open(self) -> bool:
        """Whether the merge still has to choose its shared weights."""
        return self.config.shared_weights.is_open

    @property
    def family(self) -> MoeFamily:
        """The output family."""
        return self.shape.family

    @property
    def model_type(self) -> str:
        """The `model_type` of the output: its family's, or that of a multimodal class around it."""
        return self.shape.model_type

    @property
    def mixture(self) -> Mixture:
        """The layers and experts of the merged model."""
        return self.shape.mixture

    @property
    def base(self) -> DenseModel:
        """The base model's config, as its family reads it, with the size of the output's vocabulary."""
        return self.parts.base.model

    @property
    def base_folder(self) -> Path:
        """The folder with the base model's small files."""
        return self.models.base.folder.folder

    @property
    def experts(self) -> tuple[ModelTensors, ...]:
        """Config and tensors of each routed expert, in the order of the config."""
        return self.parts.experts[: len(self.config.experts)]

    @property
    def sources(self) -> tuple[ModelFolder, ...]:
        """The base, then all experts, then all shared experts."""
        return self.models.sources

    @property
    def output_config(self) -> dict[str, Any]:
        """The merged model's `config.json`."""
        text = self.family.config(self.base, self.mixture, self.dtype)
        return around(self.shape.vision, self.models.base.folder, text)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files of weights."""
        return self.layout.shards

    @property
    def shared_bytes(self) -> int:
        """Bytes of the output that take no space on the disk, since the file system shares them with the sources."""
        return self.layout.shared_bytes

    @property
    def base_files(self) -> BaseFiles:
        """The files that are copied from the base model beside its weights."""
        return self.shape.base_files

    @property
    def tokenizer(self) -> ProvedTokenizer | None:
        """The output's tokenizer, if it has already been proved."""
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
        """The notes that also concern users of the merged model: how it was made, and what readers get wrong."""
        return (*self.base_files.reader_notes, *self.shape.choice.notes, *self.remarks.quantised)

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
        """Number of parameters in all tensors."""
        return sum(math.prod(output.shape) for output in self.outputs.values())

    @property
    def active_parameters(self) -> int:
        """Number of parameters that one token passes through."""
        in_experts = sum(math.prod(output.shape) for output in self.outputs.values() if output.is_expert)
        experts, chosen = len(self.config.experts), self.config.experts_per_token
        return self.total_parameters - in_experts * (experts - chosen) // experts

    @property
    def folders(self) -> list[Path]:
        """Folders of the sources; for a snapshot in the Hub's cache, the folder of its repository."""
        return [folder for source in self.sources for folder in source.folders]

    @property
    def copied_files(self) -> Mapping[str, Path]:
        """Files that are copied from the base model beside its weights, by their paths in the output."""
        return self.base_files.copied

    @property
    def made_files(self) -> tuple[str, ...]:
        """Paths in the output of files that are made, or may be, beside or instead of the copied ones."""
        return tuple(dict.fromkeys([*self.base_files.edited, *self.base_files.made(self.model_type)]))

    @property
    def data_sets(self) -> list[HubData]:
        """Data sets on the Hub that routers are made from, or that shared weights are chosen by."""
        patterns: list[str] = []
        if self.runs_base or self.config.method.reads_text:
            patterns = self._patterns
        elif self.is_open or (self.shared_choice and self.shared_choice.losses):
            patterns = [text for expert in self.config.experts for text in expert.positive_texts]
        return [parse_hub_data(text, "config") for text in patterns if text.startswith(SCHEME)]

    @property
    def _patterns(self) -> list[str]:
        """What the config names of text."""
        experts = [*self.config.experts, *self.config.shared_experts]
        patterns = [text for expert in experts for text in (*expert.positive_texts, *expert.negative_texts)]
        return [*patterns, *self.config.router.calibration_texts]

    @property
    def inputs(self) -> list[Path]:
        """Files that were read, or will be: the config, texts, and those of models, which links may lead to."""
        read = (*self.origins.stamps, *self.origins.references, *self.copied_files.values())
        files = [path for path in read if isinstance(path, Path)]
        config = [self.config.file] if self.config.file else []
        return [*config, *files, *matching_files(self._patterns)]

    @property
    def file_names(self) -> list[str]:
        """Paths in the output of all files that the merge may write."""
        others = ["config.json", CONFIG_COPY, CARD, *self.copied_files, *self.made_files]
        return [*self.layout.file_names, *others]

    @property
    def computed(self) -> dict[str, Computed]:
        """Tensors that are computed while the others are copied, by name: routers and shared gates."""
        return {name: o.origin for name, o in self.outputs.items() if isinstance(o.origin, Computed)}

    @property
    def router_request(self) -> RouterRequest:
        """The request for the merged model's routers, with the models that they are made from."""
        return RouterRequest(
            config=self.config,
            folder=self.base_folder,
            base=self.parts.base,
            experts=self.experts,
            expert_folders=tuple(expert.folder.own_folders for expert in self.models.experts),
            mixture=self.mixture,
            scoring=self.family.scoring,
            dtype=self.dtype,
            shared_gate=any(computed.kind == "shared gate" for computed in self.computed.values()),
            chat_prompts=self.shape.chat_prompts,
            runs_base=self.runs_base,
        )

    @property
    def weight_bytes(self) -> int:
        """Total size of all shards in bytes."""
        return self.layout.weight_bytes

    @property
    def tensor_bytes(self) -> int:
        """Total size of all tensors in bytes, without headers."""
        return self.layout.tensor_bytes

    @property
    def remote_bytes(self) -> int:
        """Total size in bytes of the files of weights on other machines."""
        return self.origins.remote_bytes

    @property
    def download_bytes(self) -> int:
        """Bytes that the merge reads from other machines."""
        pieces = [piece.source for output in self.outputs.values() for piece in output.pieces]
        return remote_bytes([*self.origins.reread, *(piece for piece in pieces if isinstance(piece, TensorInfo))])

    @property
    def kept_bytes(self) -> int:
        """Bytes from other machines that are kept on the disk until the merge ends, as they are read more than once."""
        return self.origins.kept_bytes

    @property
    def output_bytes(self) -> int:
        """Size of the merged model in bytes, copied files included."""
        return self.weight_bytes + sum(path.stat().st_size for path in self.copied_files.values())

    @property
    def peak_memory_bytes(self) -> int:
        """Estimated peak of resident memory in bytes."""
        return peak_memory_bytes(self.config, self.models, self.shape, self.parts, self.outputs, to_store=self.to_store)

    @property
    def pass_work(self) -> PassWork | None:
        """What the base model reads for the routers, and the arithmetic of it; None where it is not run."""
        return pass_work(self.config, self.shape, self.parts)

    @property
    def shards_without_routers(self) -> list[Shard]:
        """Shards that a resumed merge may keep; routers are computed again, since they depend on the device too."""
        computed = self.computed.keys()
        return [shard for shard in self.shards if computed.isdisjoint(shard.starts)]

"""Models that can be run: stored ones, or ones made of stored models while they run, never written to the disk."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from moemerge.checkpoint.files import fingerprint_of
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.numbers import read_rows
from moemerge.checkpoint.unreadable import reasons
from moemerge.config.schema import MergeConfig
from moemerge.config.tokenizer_choice import BASE
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.errors import CheckpointError, IncompatibleError
from moemerge.evaluation.foreign_tokens import refusing_foreign_tokens
from moemerge.families.choosing import Choosing
from moemerge.families.dense import decoded, read_dense
from moemerge.families.family import ROUTER_SCALE, SWITCHED_OFF, MoeFamily
from moemerge.families.layer_names import layer_prefix
from moemerge.families.stored_mixture import StoredMixture, per_token_key
from moemerge.passes.weights import read_into
from moemerge.sources.model_folder import ModelFolder, open_merged, open_model
from moemerge.sources.stored_mixtures import kept_config, read_stored_mixture
from moemerge.sources.tensor_tables import read_tensor_tables

_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Runnable:
    """A causal language model: a class of transformers, its settings and its tensors."""

    name: str
    model_type: str
    keys: Mapping[str, Any]
    """Settings of the class."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every tensor, by its name in the checkpoint."""
    read: Callable[[str], torch.Tensor]
    """A function from a name to the tensor's values on the CPU, in the dtype that they are stored in."""
    rows: Callable[[str, list[int]], torch.Tensor]
    """A function that reads rows (token, width) of a table of embeddings, by its name in the checkpoint."""
    identity: str = ""
    """A value that any other model or a change of its files changes; empty where it is not known."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.keys["num_hidden_layers"])

    def names(self, layer: int | None) -> list[str]:
        """Names of a layer's tensors; for None, of those outside of all layers."""
        found = {name: _LAYER.match(name) for name in self.shapes}
        return [name for name, match in found.items() if (int(match[1]) if match else None) == layer]

    @property
    def layer_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the first layer's tensors."""
        return [self.shapes[name] for name in self.names(0)]

    @property
    def norm(self) -> str:
        """Path within the decoder to the norm after the layers."""
        for name in self.names(None):
            if match := re.fullmatch(r"model\.((?!per_layer_)\w*norm\w*)\.weight", name):
                return match[1]
        raise CheckpointError(f"{self.name}: no tensor is the norm after the layers.")


@dataclass(frozen=True)
class MixtureModel:
    """A mixture in a folder."""

    folder: Path
    family: MoeFamily
    runnable: Runnable
    experts: tuple[str, ...]
    """Names of the experts."""
    experts_per_token: int
    """How many experts take each token; where layers differ, the most."""
    choosing: Choosing
    """How its routers choose."""
    config: MergeConfig | None
    """The config that it was merged from, if its folder has a copy."""
    tensors: Mapping[str, TensorInfo]
    """The stored tensors by their names in released checkpoints; see `moemerge.families.in_memory`."""

    @property
    def ids_of(self) -> Path | None:
        """The folder of its tokenizer, where that has not the base's ids; see `open_dense`."""
        return self.folder if self.config and self.config.vocabulary != BASE else None

    @property
    def moe_layers(self) -> list[int]:
        """Layers that have a router."""
        return [layer for layer in range(self.runnable.layers) if self.router(layer) in self.runnable.shapes]

    @property
    def scales_router_inputs(self) -> bool:
        """Whether a router has factors on what enters it, so that something else enters the experts."""
        return any(extra.name == ROUTER_SCALE for extra in self.family.extras)

    @property
    def as_stored(self) -> StoredMixture:
        """The same mixture as it is stored, with the settings of the class."""
        return StoredMixture(self.family, self.runnable.keys, self.tensors, self.experts)

    def router(self, layer: int) -> str:
        """Name of a layer's router tensor, which has the shape (expert, hidden)."""
        return layer_prefix(layer) + self.family.router

    def absent(self, layer: int) -> list[int]:
        """Experts that a layer's selection bias switches off."""
        bias = self.selection_bias(layer)
        return [] if bias is None else (bias < SWITCHED_OFF / 2).nonzero()[:, 0].tolist()

    def selection_bias(self, layer: int) -> torch.Tensor | None:
        """A layer's selection bias (expert,), if it has one."""
        return self._vector(layer, self.family.selection_bias)

    def weight_factors(self, layer: int) -> torch.Tensor | None:
        """The factors (expert,) on the weights of a layer's chosen experts, if it has some."""
        return self._vector(layer, self.family.weight_factors)

    def _vector(self, layer: int, name: str) -> torch.Tensor | None:
        path = layer_prefix(layer) + name
        return self.runnable.read(path).float().flatten() if path in self.runnable.shapes else None

    def per_token(self, layer: int) -> int:
        """How many experts of a layer take each token."""
        given = self.runnable.keys[per_token_key(self.family)]
        return given if isinstance(given, int) else given[layer]

    def with_rows(self, name: str, rows: Callable[[int], torch.Tensor]) -> "MixtureModel":
        """Make the same model with other router rows; `rows` is a function from a layer to (expert, hidden)."""
        routers = {self.router(layer): layer for layer in self.moe_layers}
        given = self.runnable.read

        def read(tensor: str) -> torch.Tensor:
            return rows(routers[tensor]) if tensor in routers else given(tensor)

        return replace(self, runnable=replace(self.runnable, name=name, read=read))


def open_mixture(folder: Path | str, *, in_stores: bool = False) -> MixtureModel:
    """Open the mixture in a folder, merged or released.

    Args:
        folder: the folder.
        in_stores: whether it may be in an object store, too.

    Raises:
        RefusedError: it is in an object store, and may not be.
        SourceError: there is no such folder or no model in it.
        IncompatibleError: the model is no mixture of a family that moemerge reads.
        CheckpointError: its files are damaged.
    """
    model = replace(open_merged(folder, in_stores=in_stores), reference=str(folder))
    stored_mixture = read_stored_mixture(model, lambda _: None)
    if "num_hidden_layers" not in model.config:
        raise IncompatibleError(
            f"{folder}: its config.json has no num_hidden_layers, which a {stored_mixture.family.model_type} has.", []
        )
    return replace(
        as_model(stored_mixture, Path(folder) if isinstance(model.origin, Path) else model.folder),
        config=kept_config(model, lambda _: None),
    )


def as_model(mixture: StoredMixture, folder: Path) -> MixtureModel:
    """Make a mixture that can be run of one as it is stored; its folder has the tokenizer."""
    family = mixture.family
    # Only keys that cannot name code.
    keys = {key: decoded(value) for key, value in mixture.config.items() if key in family.read_keys}
    return MixtureModel(
        folder,
        family,
        stored(str(folder), family.model_type, keys, mixture.tensors),
        mixture.names,
        mixture.experts_per_token,
        mixture.choosing,
        None,
        mixture.tensors,
    )


def open_dense(reference: str, name: str, announce: Callable[[str], None], *, ids_of: Path | None = None) -> Runnable:
    """Open a dense model by a reference, as a config writes it.

    Args:
        reference: the reference.
        name: the model's name in messages.
        announce: called with a line about each step that takes long.
        ids_of: the folder of the tokenizer that makes its ids, where that may not be its own: tokens that it has not
            under the same id are then refused when it runs.

    Raises:
        SourceError: the reference leads nowhere.
        IncompatibleError: the model is of no dense family.
        CheckpointError: its files are damaged.
    """
    folder: ModelFolder = open_model(reference, announce)
    dense = read_dense(folder.config)
    if isinstance(dense, str):
        raise IncompatibleError(f"{reference}: {dense}", [])
    (tensors,) = read_tensor_tables([folder], announce, dense=True)
    lost = reasons(tensors)
    needed = {*dense.outside(), dense.family.head}
    needed |= {tensor for layer in range(dense.layers) for tensor in (*dense.tensors(layer), *dense.ffn(layer))}
    lost |= {
        tensor: f"is stored as {tensors[tensor].dtype}; expected one of {', '.join(CONFIG_DTYPES.values())}"
        for tensor in needed & tensors.keys() - lost.keys()
        if tensors[tensor].dtype not in CONFIG_DTYPES
    }
    if problems := sorted(f"{tensor} {reason}" for tensor, reason in lost.items() if tensor in needed):
        raise IncompatibleError(f"{reference}: cannot be run:", problems)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in lost}
    made = stored(name, dense.family.model_type, dense.class_keys, tensors)
    made = replace(made, identity=_identity(dense.class_keys, tensors))
    return made if ids_of is None else refusing_foreign_tokens(made, folder.own_folders, ids_of)


def _identity(keys: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    try:
        files = sorted(
            (name, tensor.start, str(tensor.path), str(fingerprint_of(tensor.path))) for name, tensor in tensors.items()
        )
    except OSError:  # a file that went away is noticed when it is read
        return ""
    return hashlib.sha256(repr((sorted(keys.items()), files)).encode()).hexdigest()


def stored(name: str, model_type: str, keys: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Runnable:
    """Make a model of tensors that are stored, or computed while they are read.

    Args:
        name: the name of the model in messages.
        model_type: the class of transformers.
        keys: the settings of the class.
        tensors: all tensors of the model, by name.
    """

    def read(tensor: str) -> torch.Tensor:
        if tensors[tensor].dtype not in CONFIG_DTYPES:
            raise CheckpointError(
                f"{name}: {tensor} is stored as {tensors[tensor].dtype}: quantised models are not run. Name the model "
                "that it was made from."
            )
        values = torch.empty(tensors[tensor].shape, dtype=getattr(torch, CONFIG_DTYPES[tensors[tensor].dtype]))
        if values.numel():
            read_into(tensors[tensor], values)
        return values

    def rows(table: str, ids: list[int]) -> torch.Tensor:
        return torch.from_numpy(read_rows(tensors[table], ids))

    return Runnable(name, model_type, keys, {key: tensor.shape for key, tensor in tensors.items()}, read, rows)

"""The tensors that the base and each expert contribute to a merge: their own, or computed as the config asks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from moemerge.checkpoint.header import TensorInfo
from moemerge.config.schema import MergeConfig
from moemerge.dtypes import HeaderDType
from moemerge.families.dense import DenseModel, ModelTensors
from moemerge.families.mixture_shape import Mixture
from moemerge.planning.norm_folding import fold_norms
from moemerge.planning.shared_weights import can_share, share_weights

_AVERAGE: Final = (
    "attention and norms are the base model's alone; with `shared_weights: average` they are the experts' mean, which "
    "measured better for fine-tunes of one model; `shared_weights: auto` tries it on the experts' texts "
    "(docs/quality.md)"
)


@dataclass(frozen=True)
class Parts:
    """The models of a merge with the tensors that it takes of them."""

    base: ModelTensors
    """The base model, with what the experts share and its own FFNs."""
    experts: tuple[ModelTensors, ...]
    """Every expert, then every shared expert."""
    notes: Sequence[str]
    advice: Sequence[str] = ()
    """Advice: settings that measured better than those of the config."""


def take_parts(
    config: MergeConfig,
    mixture: Mixture,
    base: DenseModel,
    models: Sequence[tuple[str, DenseModel]],
    *,
    tables: Mapping[str, dict[str, TensorInfo]],
    dtype: HeaderDType,
) -> Parts:
    """Mix the shared tensors and fold norms, as the config asks.

    Args:
        config: the merge.
        mixture: its layers.
        base: the base model.
        models: every expert, then every shared expert, each with its name in messages.
        tables: tensors by reference.
        dtype: dtype of the merged model, as a safetensors header spells it.

    Raises:
        IncompatibleError: what is asked for cannot be made of these models exactly.
    """
    every_expert = [*config.experts, *config.shared_experts]
    own_base = ModelTensors(base, tables[config.base_model])
    own = [
        (name, ModelTensors(model, tables[expert.source_model]))
        for (name, model), expert in zip(models, every_expert, strict=True)
    ]
    routed = dict(own[: len(config.experts)])
    shared, notes = share_weights(config.shared_weights, own_base, routed, dtype)
    merged = ModelTensors(base, shared)
    advice = []
    if config.shared_weights.method == "base" and can_share(merged, routed):
        advice = [_AVERAGE]
    if not config.fold_norms:
        return Parts(merged, tuple(expert for _, expert in own), notes, advice)
    # The base may lack FFNs where none of them is used.
    layers = [layer for layer in range(base.layers) if shared.keys() >= base.ffn(layer).keys()]
    ours = fold_norms("base_model", own_base, merged, layers)
    ffn = [name for layer in layers for name in base.ffn(layer)]
    folded = tuple(
        ModelTensors(expert.model, fold_norms(name, expert, merged, mixture.moe_layers)) for name, expert in own
    )
    return Parts(ModelTensors(base, shared | {name: ours[name] for name in ffn}), folded, notes, advice)

"""Check and list what routers are made from: texts, and weights of the models."""

from collections.abc import Iterator, Sequence

from moemerge.checkpoint.header import TensorInfo
from moemerge.config.schema import MergeConfig
from moemerge.errors import RefusedError
from moemerge.families.dense import DenseModel, ModelTensors
from moemerge.families.mixture import Mixture
from moemerge.families.names import layer_prefix
from moemerge.texts.documents import find_files, read_documents


def check_texts(config: MergeConfig) -> None:
    """Refuse text files that are missing or empty, before any weights are downloaded."""
    for key, experts in (("experts", config.experts), ("shared_experts", config.shared_experts)):
        for number, expert in enumerate(experts):
            _check_documents(expert.positive_texts, f"{key}[{number}].positive_texts")
            _check_documents(expert.negative_texts, f"{key}[{number}].negative_texts")
    _check_documents(config.router.calibration_texts, "router.calibration_texts")


def _check_documents(patterns: Sequence[str], place: str) -> None:
    if patterns and not read_documents(find_files(patterns, place)):
        raise RefusedError(f"{place}: these files hold no text.")


def check_widths(config: MergeConfig, base: DenseModel, models: Sequence[DenseModel]) -> list[str]:
    """List experts whose FFN width a method cannot compare with the base's, as problems."""
    if not config.method.reads_weights:
        return []
    return [
        f"experts[{number}]: its FFN has {model.sizes['ffn']} neurons, the base model's {base.sizes['ffn']}, so the "
        f"weights cannot be compared as gate_mode {config.method.name} does: give the experts prompts, or choose random"
        for number, model in enumerate(models)
        if model.sizes["ffn"] != base.sizes["ffn"]
    ]


def base_ffn_layers(config: MergeConfig, mixture: Mixture, base: DenseModel, *, runs_base: bool) -> Sequence[int]:
    """Layers in which the base needs an FFN: those that stay dense, or all if the base is run or compared."""
    return range(base.layers) if runs_base or config.method.reads_weights else mixture.dense_layers


def router_reads(
    config: MergeConfig,
    mixture: Mixture,
    base: ModelTensors,
    experts: Sequence[ModelTensors],
    *,
    runs_base: bool,
) -> Iterator[TensorInfo]:
    """Yield the source tensors that are read to make the routers, most of them more than once."""
    last = max(mixture.moe_layers)
    layers = [layer_prefix(layer) for layer in range(last + 1)] if runs_base else []
    never_run = f"{layer_prefix(last)}{base.model.family.ffn_module}."
    for name, tensor in base.tensors.items():
        is_embeddings = name == base.model.family.embeddings and (runs_base or config.method.reads_embeddings)
        if is_embeddings or (name.startswith(tuple(layers)) and not name.startswith(never_run)):
            yield tensor
    if config.method.reads_weights:
        for source in (base, *experts):
            for layer in mixture.moe_layers:
                yield source.projection(layer, "gate")
                yield source.projection(layer, "up")

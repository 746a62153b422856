"""May these models be merged? From configs and headers alone; every problem is listed, none is only the first."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from moemerge.checkpoint.header import StoredTensor
from moemerge.dtypes import NAMED
from moemerge.formats.dense import DenseModel, Shape, read_dense
from moemerge.formats.family import MoeFamily

# Of an expert's config: what its FFNs must share with the base to compute the same way in its place.
_FFN_KEYS: Final = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "hidden_act",
    "mlp_bias",
    "attention_bias",
)
# Keys that say nothing about the computation, or are resolved into others.
_SILENT_KEYS: Final = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "pretraining_tp",
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "sliding_window",
    "layer_types", "attention_bias", "mlp_bias", "partial_rotary_factor", "_attn_implementation_autoset",
    "_model_name_or_path", "unk_token_id", "unsloth_version", "unsloth_fixed",
}  # fmt: skip


@dataclass
class Findings:
    """What a comparison found."""

    problems: list[str] = field(default_factory=list)
    """Each makes the merge impossible."""
    notes: list[str] = field(default_factory=list)
    """Worth knowing; nothing is wrong."""


def check_configs(base: Mapping[str, Any], experts: Sequence[tuple[str, Mapping[str, Any]]]) -> Findings:
    """Compare `config.json` of the base with those of the experts, given as (name, config).

    Nothing else is needed, so that a merge can be refused before weights are downloaded.
    """
    found = Findings()
    base_model = _read(base, "base_model", found)
    for name, config in experts:
        expert = _read(config, name, found)
        if base_model is None or expert is None:
            continue
        for key in _FFN_KEYS:
            ours, theirs = base_model.config.get(key), expert.config.get(key)
            if ours != theirs:
                found.problems.append(f"{name}: {key} is {theirs!r}, but the base model's is {ours!r}")
        if expert.config["vocab_size"] != base_model.config["vocab_size"]:
            found.notes.append(
                f"{name}: vocabulary of {expert.config['vocab_size']}, the base's of "
                f"{base_model.config['vocab_size']} is kept; only FFNs are taken from experts"
            )
    return found


def check_base(model: DenseModel, family: MoeFamily, tensors: Mapping[str, StoredTensor]) -> Findings:
    """Check that the base model's tensors are those that its config announces; none is left without a place."""
    dense = model.family
    found = Findings()
    expected = dict(dense.outside) | _per_layer(model, dense.shared)
    head = {dense.head: ("vocab", "hidden")}
    if dense.head in tensors or not model.config["tie_word_embeddings"]:
        expected |= head
    ffn = _per_layer(model, dict(dense.ffn.values()))
    _check_tensors("base_model", model, tensors, required=expected, allowed=ffn, found=found)
    dropped = sorted(set(model.config) - set(family.carried) - _SILENT_KEYS)
    if dropped:
        found.notes.append(
            f"base_model: {family.model_type} has no use for these keys of its config.json: {', '.join(dropped)}"
        )
    return found


def check_expert(name: str, model: DenseModel, tensors: Mapping[str, StoredTensor], base: DenseModel) -> Findings:
    """Check that an expert has the FFNs that will be taken, and nothing that would be lost with the rest."""
    dense = model.family
    found = Findings()
    ffn = _per_layer(base, dict(dense.ffn.values()))
    rest = dict(dense.outside) | {dense.head: ("vocab", "hidden")} | _per_layer(base, dense.shared)
    _check_tensors(name, model, tensors, required=ffn, allowed=rest, found=found)
    return found


def _read(config: Mapping[str, Any], name: str, found: Findings) -> DenseModel | None:
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        found.problems.append(
            f"{name}: is quantised ({method}); its scales would be lost. Use the original weights, or dequantise it"
        )
    model = read_dense(config)
    if isinstance(model, str):
        found.problems.append(f"{name}: {model}")
        return None
    return model


def _per_layer(model: DenseModel, templates: Mapping[str, Shape]) -> dict[str, Shape]:
    return {template.format(layer=layer): axes for layer in range(model.layers) for template, axes in templates.items()}


def _check_tensors(
    name: str, model: DenseModel, tensors: Mapping[str, StoredTensor], *,
    required: Mapping[str, Shape], allowed: Mapping[str, Shape], found: Findings,
) -> None:  # fmt: skip
    dense = model.family
    missing = [tensor for tensor in required if tensor not in tensors]
    extra = [t for t in tensors if t not in required and t not in allowed and not t.endswith(dense.derived)]
    found.problems += _listed(name, "is missing", missing)
    found.problems += _listed(name, "has no place in a merge", extra)
    strange = [tensor for tensor in required if tensor in tensors and tensors[tensor].dtype not in NAMED]
    found.problems += _listed(
        name,
        "is not stored as float32, float16 or bfloat16 (quantised?)",
        [f"{t} ({tensors[t].dtype})" for t in strange],
    )
    wrong = [
        f"{tensor} (expected {list(model.shape(axes))}, found {list(tensors[tensor].shape)})"
        for tensor, axes in required.items()
        if tensor in tensors and tensor not in strange and tensors[tensor].shape != model.shape(axes)
    ]
    found.problems += _listed(name, "has another shape than config.json says", wrong)


def _listed(name: str, what: str, tensors: Iterable[str]) -> list[str]:
    """One line for many tensors with the same problem."""
    listed = list(tensors)
    if not listed:
        return []
    more = f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""
    return [f"{name}: tensor {listed[0]} {what}{more}"]

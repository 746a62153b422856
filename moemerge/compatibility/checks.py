"""Check from configs and headers alone that models may be merged; every problem is listed, not only the first."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from moemerge.checkpoint.derived import derivation, kinds_of
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.packed import notes_on
from moemerge.checkpoint.unreadable import Unreadable, is_no_tensor
from moemerge.compatibility.causes import said_once
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.families.dense import SILENT_KEYS, Axes, DenseModel, read_dense
from moemerge.families.family import MoeFamily
from moemerge.sources.model_folder import ModelFolder
from moemerge.sources.quantised.table import METHODS
from moemerge.sources.reference import Reference

# What an expert's FFNs must share with the base's to compute the same way in its place.
_EXPERT_KEYS: Final = ("num_hidden_layers", "hidden_size")
# Tensors that readers compute themselves, or that belong to quantised keys and values.
_BUFFER: Final = re.compile(r"(^|\.)rotary_emb\.\w+$|\.self_attn\.(\w+\.)?(q|k|v|kv|prob)_(scale|zero_point)$")
# Tensors that a base may have beside those of a language model.
_OTHER_HEAD: Final = re.compile(r"(score|classifier|v_head|value_head|reward_head)\.")
_IN_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(\w+)")
# Methods that store plain numbers, and round them when the model is loaded.
_QUANTISED_WHEN_LOADED: Final = {"bitnet"}


@dataclass
class Findings:
    """The result of a comparison."""

    problems: list[str] = field(default_factory=list)
    """Problems, each of which makes the merge impossible."""
    notes: list[str] = field(default_factory=list)
    """Notes worth knowing, where nothing is wrong."""


def check_configs(base: Mapping[str, Any], experts: Sequence[tuple[str, Mapping[str, Any]]]) -> Findings:
    """Compare `config.json` of the base with those of the experts, given as (name, config).

    Nothing else is needed, so that a merge can be refused before weights are downloaded.
    """
    found, problems = Findings(), list[tuple[str, str]]()
    base_model = _read(base, "base_model", problems, found.notes)
    if base_model and "mlp_bias" in base_model.facts:
        problems.append(("base_model", "its FFNs have biases, which the experts of no output family have"))
    for name, config in experts:
        expert = _read(config, name, problems, found.notes)
        if base_model is None or expert is None:
            continue
        problems += [(name, difference) for difference in _differences(base_model, expert)]
        scales = [model.values["residual_multiplier"] for model in (base_model, expert)]
        if scales[0] != scales[1]:
            found.notes.append(
                f"{name}: residual_multiplier is {scales[1]:g}, but the base's {scales[0]:g} will scale its FFNs; "
                f"residual_scale: {scales[1] / scales[0]:g} makes up for it"
            )
    found.problems = said_once(problems)
    return found


def _differences(base: DenseModel, expert: DenseModel) -> Iterator[str]:
    """Yield why an expert's FFNs would not compute in the base what they do in their own model.

    Attention may be another: the base's takes its place.
    """
    pairs = {key: (base.config[key], expert.config[key]) for key in _EXPERT_KEYS}
    pairs["hidden_act"] = (base.hidden_act, expert.hidden_act)
    for key, (ours, theirs) in pairs.items():
        if ours != theirs:
            yield f"{key} is {theirs!r}, but the base model's is {ours!r}"
    if base.family.ffn_place != expert.family.ffn_place:
        theirs, ours = (f"a {model.family.model_type} {model.family.ffn_place}" for model in (expert, base))
        yield f"{theirs}, so its FFNs cannot take the place of the base model's: {ours}"
    if "mlp_bias" in expert.facts - base.facts:
        yield "its FFNs have biases, the base model's have none"


def check_base(
    model: DenseModel, family: MoeFamily, tensors: Mapping[str, TensorInfo], ffn_layers: Iterable[int]
) -> Findings:
    """Check that the base model's tensors are those that its config announces; none is left without a place.

    The base's FFNs are needed too in the layers `ffn_layers`.
    """
    dense = model.family
    found = Findings()
    layers = range(model.layers)
    expected = model.outside() | {name: axes for layer in layers for name, axes in model.tensors(layer).items()}
    if dense.head in tensors or not model.config["tie_word_embeddings"]:
        expected[dense.head] = ("vocab", "hidden")
    ffn = _ffns(model)
    ffn_layers = layers if family.keeps_dense_ffn else ffn_layers
    kept = {name: axes for layer in ffn_layers for name, axes in model.ffn(layer).items()}
    misfits = _check_tensors(
        "base_model",
        model,
        *_readable("base_model", tensors, expected | kept, found, takes_all=True),
        allowed=ffn,
        never_taken=lambda tensor: (
            bool(_BUFFER.search(tensor) or _OTHER_HEAD.match(tensor)) or tensor in model.unread_tensors
        ),
        found=found,
    )
    _check_quantisation("base_model", model, tensors, found, misfits)
    dropped = sorted(set(model.unread) - SILENT_KEYS)
    if dropped:
        found.notes.append(
            f"base_model: {family.model_type} does not use these keys of its config.json: {', '.join(dropped)}"
        )
    return found


def check_expert(name: str, model: DenseModel, tensors: Mapping[str, TensorInfo], *, shared: str = "base") -> Findings:
    """Check that an expert has the FFNs that will be taken, and nothing that changes what they compute.

    Its other tensors are left out with a note, unless `shared` weights are mixed and they belong to attention.
    """
    found = Findings()
    rest = model.outside() | {model.family.head: ("vocab", "hidden")}
    rest |= {tensor: axes for layer in range(model.layers) for tensor, axes in model.tensors(layer).items()}
    beside = {tensor.name.partition(".")[0] for tensor in model.family.tensors} - {model.family.ffn_module}

    def never_taken(tensor: str) -> bool:
        if _BUFFER.search(tensor) or tensor in model.unread_tensors:
            return True
        if not (inside := _IN_LAYER.match(tensor)):
            return True
        attends = inside[2] in beside and "norm" not in inside[2]
        return shared == "base" and attends and int(inside[1]) < model.layers

    misfits = _check_tensors(
        name, model, *_readable(name, tensors, _ffns(model), found), allowed=rest, never_taken=never_taken, found=found
    )
    _check_quantisation(name, model, tensors, found, misfits)
    return found


def check_adapters(
    name: str, folder: ModelFolder, model: DenseModel, tensors: Mapping[str, TensorInfo], *, shared: str
) -> Findings:
    """Check that an expert's adapters change its FFNs; the rest counts where `shared` weights are mixed."""
    found = Findings()
    found.notes += [
        f"{name}: the adapter {adapter.reference} was trained on {adapter.trained_on}, not on {folder.origin.repo}"
        for adapter in folder.adapters
        if isinstance(folder.origin, Reference)
        and adapter.trained_on
        and adapter.trained_on.lower() != folder.origin.repo.lower()
    ]
    changed = {
        tensor
        for tensor, stored in tensors.items()
        if derivation(stored) or stored.path.name.startswith("adapter_model.")
    }
    inside = changed & _ffns(model).keys()
    if not inside:
        found.problems.append(
            f"{name}: the adapter changes no FFN, so the expert would be the model before the +. Choose one that "
            "targets gate_proj, up_proj or down_proj"
        )
    rest = sum(not isinstance(tensors[tensor].path, Unreadable) for tensor in changed - inside)
    if inside and shared == "base" and rest:
        found.notes.append(
            f"{name}: what the adapter changes in {rest} tensors beside the FFNs is not used; shared_weights: average "
            "takes it in"
        )
    return found


def _read(config: Mapping[str, Any], name: str, problems: list[tuple[str, str]], notes: list[str]) -> DenseModel | None:
    model = read_dense(config)
    if isinstance(model, str):
        problems.append((name, model))
        return None
    if model.quantised in _QUANTISED_WHEN_LOADED:
        problems.append((name, _quantised(model)))
    notes += [
        f"{name}: {key} {config[key]!r} is another name of {model.hidden_act!r}"
        for key in ("hidden_act", "hidden_activation")
        if config.get(key) not in (None, model.hidden_act) and model.config.get(key) == model.hidden_act
    ]
    return model


def _quantised(model: DenseModel, shown_by: str = "") -> str:
    return (
        f"is quantised ({model.quantised}), and of the methods of quantisation {', '.join(METHODS)} alone are read"
        f"{shown_by}. Use the original weights, or dequantise it"
    )


def _check_quantisation(
    name: str, model: DenseModel, tensors: Mapping[str, TensorInfo], found: Findings, misfits: Sequence[str]
) -> None:
    """Tell a model of a method that is not read from one whose `config.json` only kept settings from its training.

    In the former, other tensors than are expected follow from the method: these `misfits` are no problems of their own.
    """
    if not model.quantised or kinds_of(tensors.values()):
        return
    if not found.problems:
        found.notes.append(
            f"{name}: its config.json speaks of quantisation ({model.quantised}), but what is taken of it is stored as "
            "plain numbers without scales, and is merged as such"
        )
    elif model.quantised not in METHODS:
        shown_by = misfits[0].removeprefix(name) if misfits else ""
        others = [problem for problem in found.problems if problem not in misfits]
        found.problems[:] = [f"{name}: {_quantised(model, shown_by)}", *others]


def _readable(
    name: str,
    tensors: Mapping[str, TensorInfo],
    required: Mapping[str, Axes],
    found: Findings,
    *,
    takes_all: bool = False,
) -> tuple[dict[str, TensorInfo], dict[str, Axes]]:
    """Split off the tensors that can be read, and the required ones among them; the rest become problems and notes."""
    lost: dict[tuple[str, bool], list[str]] = {}
    for tensor, stored in tensors.items():
        if isinstance(stored.path, Unreadable):
            is_problem = tensor in required or (takes_all and not is_no_tensor(stored))
            lost.setdefault((stored.path.reason, is_problem), []).append(tensor)
    for (reason, is_problem), names in lost.items():
        if is_problem:
            found.problems += _listed(name, reason, names)
        else:
            found.notes += _listed(f"{name}: left out", reason, names)
    found.notes += [f"{name}: {note}" for note in notes_on(tensors)]
    readable = {t: stored for t, stored in tensors.items() if not isinstance(stored.path, Unreadable)}
    return readable, {t: axes for t, axes in required.items() if t in readable or t not in tensors}


def _ffns(model: DenseModel) -> dict[str, Axes]:
    return {name: axes for layer in range(model.layers) for name, axes in model.ffn(layer).items()}


def _check_tensors(
    name: str,
    model: DenseModel,
    tensors: Mapping[str, TensorInfo],
    required: Mapping[str, Axes],
    *,
    allowed: Mapping[str, Axes],
    never_taken: Callable[[str], bool],
    found: Findings,
) -> list[str]:
    """Compare names, dtypes and shapes; returns the problems with names."""
    dense = model.family
    missing = [tensor for tensor in required if tensor not in tensors]
    extra = [t for t in tensors if t not in required and t not in allowed and not t.endswith(dense.derived)]
    misfits = _listed(name, "is missing", missing)
    misfits += _listed(name, "has no place in a merge", [tensor for tensor in extra if not never_taken(tensor)])
    found.problems += misfits
    found.notes += _listed(name, "is not used by the mixture", list(filter(never_taken, extra)))
    strange = [tensor for tensor in required if tensor in tensors and tensors[tensor].dtype not in CONFIG_DTYPES]
    found.problems += _listed(
        name,
        "is not stored as float32, float16 or bfloat16",
        [f"{t} ({tensors[t].dtype})" for t in strange],
    )
    wrong = [
        f"{tensor} (expected {list(model.shape(axes))}, found {list(tensors[tensor].shape)})"
        for tensor, axes in required.items()
        if tensor in tensors and tensor not in strange and tensors[tensor].shape != model.shape(axes)
    ]
    found.problems += _listed(name, "has another shape than config.json says", wrong)
    return misfits


def _listed(name: str, what: str, tensors: Iterable[str]) -> list[str]:
    """Put many tensors with the same problem into one line."""
    listed = list(tensors)
    if not listed:
        return []
    more = f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""
    return [f"{name}: tensor {listed[0]} {what}{more}"]

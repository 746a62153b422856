"""A mixture with equal experts, given the weights of each dense class whose tensors it has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moemerge.families.dense import DENSE_FAMILIES
from tests.support.families import DENSE
from tests.support.models import SIZES, load, logits, make_model
from tests.support.new_families.found import (
    CLOSE,
    LAYERS,
    OF_FFN,
    PLAIN,
    ROUTED,
    SHOWN,
    VARIANTS,
    Found,
    beside,
    difference,
    line,
    nearest,
)  # fmt: skip


def try_mixture(model_type: str, folder: Path) -> Found:
    """Try a class of mixtures as what each dense class becomes."""
    found = Found(model_type, "mixture")
    names: set[str] = set()
    errors: dict[str, list[str]] = {}
    for kind in dict.fromkeys(name for name, _ in DENSE.values()):
        tried: dict[float, str] = {}
        for told, keys in VARIANTS.items():
            try:
                apart, names = _with_weights_of(kind, model_type, folder / f"{kind} {told}", keys)
            except Exception as error:  # noqa: BLE001
                errors.setdefault(line(error), []).append(kind)
                continue
            if apart is None:
                break
            tried[apart] = f"{kind} {told}".rstrip()
            if apart <= CLOSE:
                break
        if tried:
            best = min(tried)
            found.apart[tried[best]] = {"": best}
    if not found.apart:
        failed = [f"{', '.join(dict.fromkeys(kinds))}: {words}" for words, kinds in errors.items()]
        found.remarks = [*([nearest(names)] if names else []), *failed][:SHOWN]
    return found


def _with_weights_of(
    kind: str, model_type: str, folder: Path, keys: Mapping[str, Any]
) -> tuple[float | None, set[str]]:
    """Give a mixture the weights of a dense class, its FFN to every expert.

    Returns:
        The difference of their logits, None where their tensors differ; and what a layer has beside its experts.
    """
    sizes = next(sizes for name, sizes in DENSE.values() if name == kind)
    given = {**PLAIN, **sizes, **keys}
    dense = load(make_model(folder, 1, kind, **given))
    said = {key: value for key, value in dense.config.to_dict().items() if key != "model_type"}
    # Where the dense class has no window, one as long as the context is none, and any class takes it.
    window = {"sliding_window": given["sliding_window"] or SIZES["max_position_embeddings"]}
    mixture = _of_kinds(model_type, {**SIZES, **said, **ROUTED, **given, **window})
    weights, own = dense.state_dict(), mixture.state_dict()
    needed = {name: tensor.shape for name, tensor in weights.items() if not OF_FFN.search(name)}
    names = {name for name in own if not OF_FFN.search(name)}
    more = {name for name in names - needed.keys() if name.endswith((".sinks", ".bias"))}
    if needed.keys() != names - more:
        return None, beside(own)
    if odd := [name for name in needed if needed[name] != own[name].shape]:
        raise ValueError(f"{odd[0]} is {list(own[odd[0]].shape)}, not {list(needed[odd[0]])}")
    module = DENSE_FAMILIES[kind].ffn_module
    with torch.no_grad():
        for name in names - more:
            own[name].copy_(weights[name])
        for name in more:
            own[name].fill_(-1e4 if name.endswith("sinks") else 0.0)
        for layer in range(LAYERS):
            _fill_experts(own, dense.model.layers[layer].get_submodule(module), f"model.layers.{layer}.")
    return difference(mixture, logits(dense)), beside(own)


def _of_kinds(model_type: str, keys: dict[str, Any]) -> Any:
    """Make a mixture; one that wants rotary settings for each kind of layer gets the same for all."""
    try:
        return _made(model_type, keys)
    except (KeyError, TypeError):
        kinds = dict.fromkeys(("full_attention", "sliding_attention"), keys["rope_parameters"])
        return _made(model_type, keys | {"rope_parameters": kinds})


def _made(model_type: str, keys: Mapping[str, Any]) -> Any:
    config = AutoConfig.for_model(model_type, **keys)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def _fill_experts(own: Mapping[str, torch.Tensor], ffn: Any, prefix: str) -> None:
    """Make every expert of a layer the FFN, and its shared expert nothing.

    Raises:
        KeyError: the layer has no experts, or the FFN no projections, of the usual names.
    """
    parts = dict(ffn.named_parameters())
    up = parts["up_proj.weight"] if "up_proj.weight" in parts else parts["gate_up_proj.weight"].chunk(2)[1]
    gate = parts["gate_proj.weight"] if "gate_proj.weight" in parts else parts["gate_up_proj.weight"].chunk(2)[0]
    names = [name for name in own if name.startswith(prefix)]
    stacked = next(name for name in names if name.endswith("experts.gate_up_proj"))
    both, down = torch.cat((gate, up)), parts["down_proj.weight"]
    for name in names:
        if name == stacked:
            own[name].copy_((both if own[name].shape[1:] == both.shape else both.T).expand_as(own[name]))
        elif name == stacked.replace("gate_up_proj", "down_proj"):
            own[name].copy_((down if own[name].shape[1:] == down.shape else down.T).expand_as(own[name]))
        elif ("shared" in name or "bias" in name) and "self_attn" not in name:
            own[name].zero_()

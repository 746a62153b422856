"""The scaling of rotary positions that a GGUF file says, as `config.json` spells it."""

from typing import Any, Final

import numpy as np

from moemerge.checkpoint.derived import read_values
from moemerge.errors import CheckpointError, NoSuchModelError
from moemerge.families.llama3_rope import llama3_factors
from moemerge.sources.gguf.stored_model import GgufModel

_FREQUENCIES: Final = "rope_freqs.weight"
_SCALING: Final = "rope.scaling."
_READ: Final = frozenset({"rope.dimension_count", "rope.freq_base", "rope.scale_linear"})
# Keys of yarn beside its factor and context, with their names in config.json.
_YARN: Final = {
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_LINEAR, _YARN_KIND = "linear", "yarn"
_CONTEXT: Final = "original_context_length"
# llama3's scaling with Llama's own factors; the file has the frequencies that result alone.
_LOW, _HIGH = 1.0, 4.0
_CONTEXTS: Final = (8192, *(2**power for power in range(3, 20)))


def rope_scaling_of(model: GgufModel, theta: float, width: int) -> dict[str, Any]:
    """Find the scaling of rotary positions; empty where there is none.

    Args:
        model: the model.
        theta: the base of its frequencies.
        width: the width of a head.

    Raises:
        NoSuchModelError: the file says one that `config.json` cannot say.
        CheckpointError: a setting is no number.
    """
    settings = model.own_settings
    said = {key.removeprefix(_SCALING): value for key, value in settings.items() if key.startswith(_SCALING)}
    kind = said.pop("type", "none")
    said.pop("finetuned", None)
    if "rope.scale_linear" in settings and kind == "none":  # as files of 2023 spell it
        kind, said["factor"] = _LINEAR, settings["rope.scale_linear"]
    found: dict[str, Any] = {}
    if kind in {_LINEAR, _YARN_KIND}:
        found = {"rope_type": kind, "factor": said.pop("factor", None)}
    if kind == _YARN_KIND:
        found["original_max_position_embeddings"] = said.pop(_CONTEXT, None)
        found |= {own: said.pop(key) for key, own in _YARN.items() if key in said}
    elif _FREQUENCIES in model.stored and kind == "none":
        found = _llama3(model, theta, width)
    odd = [f"{_SCALING}{key}" for key in said] + [
        key for key in settings if key.startswith("rope.") and not key.startswith(_SCALING) and key not in _READ
    ]
    if odd or (kind != "none" and not found):
        raise NoSuchModelError(
            f"{model.reference}: scales its rotary positions in a way that is not read: type {kind!r}"
            f"{f' with {odd[0]}' if odd else ''}. Name the model that it was written from."
        )
    wrong = [key for key, value in found.items() if key != "rope_type" and type(value) not in {int, float}]
    if wrong:
        raise CheckpointError(f"{model.first.path}: names no {wrong[0]} for its rotary positions, which {kind} needs.")
    return found


def _llama3(model: GgufModel, theta: float, width: int) -> dict[str, Any]:
    """Find the settings of llama3's scaling that give the file's frequencies; empty where all are unscaled."""
    stored = model.stored[_FREQUENCIES]
    if stored.dtype != "F32" or stored.shape != (width // 2,):
        raise CheckpointError(f"{stored.path}: tensor {_FREQUENCIES!r} is no vector of {width // 2} float32.")
    factors = read_values(stored)
    if (factors == 1).all():
        return {}
    for context in _CONTEXTS:
        found = {
            "rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": _LOW, "high_freq_factor": _HIGH,
            "original_max_position_embeddings": context,
        }  # fmt: skip
        if np.allclose(llama3_factors({"rope_theta": theta, **found}, width), factors, rtol=1e-5, atol=0):
            return found
    raise NoSuchModelError(
        f"{model.reference}: its tensor {_FREQUENCIES!r} holds frequencies that no llama3 scaling with low_freq_factor "
        f"{_LOW:g} and high_freq_factor {_HIGH:g} gives. Name the model that it was written from."
    )

"""Rotary settings of a dense model's `config.json`, in one spelling."""

import math
from collections.abc import Mapping
from typing import Any, Final

from moemerge.families.dense.config_checks import UnreadableError
from moemerge.families.dense.family import ROPES, DenseFamily

_ROPE_TYPES: Final = ("default", *ROPES)


def read_rope(family: DenseFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """Bring rotary settings into one spelling, read as transformers 5 reads them (`convert_rope_params_to_dict`)."""
    settings = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in settings.values()):
        raise UnreadableError(f"its rope settings differ between layers: {settings!r:.80}")
    theta = settings.pop("rope_theta", config["rope_theta"])
    partial = settings.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    for name, number in {"rope_theta": theta, "partial_rotary_factor": partial}.items():
        if type(number) not in {int, float} or not 0 < number < math.inf:
            raise UnreadableError(f"its {name} is {number!r:.40}, no positive number")
    if partial != 1.0 and "partial_rotary_factor" not in family.defaults:
        raise UnreadableError(
            f"its partial_rotary_factor is {partial!r}, which {family.model_type} does not read in all versions"
        )
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    kind = family.rope_kinds.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in _ROPE_TYPES:
        raise UnreadableError(f"its rope type is {kind!r:.40}; known: {', '.join(_ROPE_TYPES)}")
    read = {"rope_theta": theta, "rope_scaling": None, "partial_rotary_factor": partial}
    if kind == "default":
        return read
    if config.get("original_max_position_embeddings"):
        settings["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    elif kind == "longrope" and type(original := settings.get("original_max_position_embeddings")) is int:
        read["original_max_position_embeddings"] = original  # where transformers 4 looks for it
    return read | {"rope_scaling": {"rope_type": kind, **settings}}

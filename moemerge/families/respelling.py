"""Restore keys of an output family's `config.json` that transformers 5 drops or spells otherwise when it saves it.

Measured with 5.23: of a family's keys these alone differ from what a merge writes. Readers that know the released
spelling silently fall back to defaults: transformers 4.57, for one, to its class's `rope_theta`.
"""

from collections.abc import Mapping
from typing import Any, Final

from moemerge.families.family import MoeFamily

# Keys with the same meaning; each is saved in place of the other, by some class.
_TWINS: Final = (("num_experts", "num_local_experts"), ("dtype", "torch_dtype"))
_IN_ROPE_ALONE: Final = ("rope_theta", "partial_rotary_factor")


def lost_keys(family: MoeFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the family that follow from others in a `config.json`, with their values: those that may be put back."""
    wanted = family.keys | {"dtype", "torch_dtype"}
    found = _from_rope(config) | _from_layers(config)
    for twins in _TWINS:
        said = [config[key] for key in twins if key in config]
        found |= dict.fromkeys(twins, said[0]) if said else {}
    return {key: value for key, value in found.items() if key in wanted}


def respelled_keys(family: MoeFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys whose values transformers 5 saves in its own spelling, with the values of the released checkpoints."""
    found: dict[str, Any] = {}
    kinds, named = config.get("layer_types"), config.get("architectures")
    if isinstance(kinds, list):
        found["layer_types"] = [family.kinds.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    if isinstance(named, list) and [str(name).lower() for name in named] == [family.architecture.lower()]:
        found["architectures"] = [family.architecture]
    if config.get("sliding_window") == 0 and "sliding_window" in family.keys:
        found["sliding_window"] = None  # what is switched off
    return {key: value for key, value in found.items() if value != config[key]}


def _from_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings in the spelling of transformers 4, where all layers share them."""
    given = config.get("rope_parameters")
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        return {}
    scaled = given.get("rope_type", "default") != "default"
    scaling = {key: value for key, value in given.items() if key not in _IN_ROPE_ALONE}
    found = {key: given[key] for key in _IN_ROPE_ALONE if key in given}
    found["rope_scaling"] = scaling if scaled else None
    if given.get("rope_type") == "longrope" and "original_max_position_embeddings" in given:
        found["original_max_position_embeddings"] = given["original_max_position_embeddings"]
    return found


def _from_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 4's settings for all its layers with full attention."""
    by_layer = config.get("per_layer_config")
    own = list(by_layer.values()) if isinstance(by_layer, dict) else []
    if not own or not isinstance(own[0], dict) or any(other != own[0] for other in own):
        return {}
    keys = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    return {name: own[0][key] for key, name in keys.items() if key in own[0]}

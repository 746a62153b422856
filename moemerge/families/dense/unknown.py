"""A `config.json` of a type that is not read: which family is nearest to it, and what keeps them apart."""

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, Final

from moemerge.families.dense.config_checks import REQUIRED, SILENT_KEYS, is_read
from moemerge.families.dense.family import DenseFamily
from moemerge.families.dense.tables import DENSE_FAMILIES

_SHOWN: Final = 3
_ALIKE: Final = 0.6


def not_read(config: Mapping[str, Any]) -> str:
    """Say in a sentence that a model's type is not read, with the nearest family and why it is not that."""
    model_type = config.get("model_type")
    keys = [key for key, value in config.items() if value is not None and key not in SILENT_KEYS]
    name = model_type if isinstance(model_type, str) else ""
    nearest = max(DENSE_FAMILIES.values(), key=lambda family: _nearness(family, keys, name))
    missing = [key for key in REQUIRED if key not in _spelled(nearest, keys)]
    unread = [key for key in keys if not is_read(nearest, nearest.aliases.get(key, key))]
    apart = [
        *([f"needs {_listed(missing)}"] if missing else []),
        *([f"does not read {_listed(unread)}"] if unread else []),
    ]
    why = (
        f"which {' and '.join(apart)}"
        if apart
        else "which reads all keys of its config.json: if it computes like one, merge a copy with that model_type"
    )
    return (
        f"its model_type is {model_type!r:.60}, which moemerge does not read (`moemerge families` lists what it does); "
        f"the nearest is {nearest.model_type}, {why}"
    )


def _nearness(family: DenseFamily, keys: Sequence[str], name: str) -> tuple[int, float]:
    """How near a config is to a family: how many of its keys that reads, then names that are alike; llama is first."""
    alike = SequenceMatcher(None, name, family.model_type).ratio()
    return sum(is_read(family, key) for key in _spelled(family, keys)), alike if alike >= _ALIKE else 0.0


def _spelled(family: DenseFamily, keys: Sequence[str]) -> list[str]:
    return [family.aliases.get(key, key) for key in keys]


def _listed(keys: Sequence[str]) -> str:
    more = len(keys) - _SHOWN
    return ", ".join(f"{key:.40}" for key in keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

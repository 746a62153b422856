"""The `config.json` of a renamed model, as that of the dense model that it is."""

from collections.abc import Mapping
from typing import Any

from moemerge.families.dense.config_checks import UnreadableError
from moemerge.families.dense.renamed.family import Renamed


def plain_config(renamed: Renamed, config: Mapping[str, Any]) -> dict[str, Any]:
    """Write a `config.json` in the keys of the dense family that a renamed model is read as.

    A null is like an absent key. Keys that the released code computes nothing with are left out.

    Raises:
        UnreadableError: the model computes something that no such family does.
    """
    full = {**renamed.defaults, **{key: value for key, value in config.items() if value is not None}}
    if reason := renamed.refusals(full):
        raise UnreadableError(reason)
    spelled = {renamed.keys.get(key, key): value for key, value in full.items() if key not in renamed.silent}
    return {**spelled, "model_type": renamed.plain, **renamed.values(full)}

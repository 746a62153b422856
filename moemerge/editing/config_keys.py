"""The `config.json` of an edited mixture: that of the mixture, with other numbers of experts."""

from typing import Any, Final

from moemerge.errors import IncompatibleError
from moemerge.families.stored_mixture import StoredMixture

# Other spellings of keys, which some versions of transformers save.
_SPELLINGS: Final = {"experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")}


def edited_config(mixture: StoredMixture, experts: int, per_token: int, width: int) -> dict[str, Any]:
    """Write the `config.json` of a mixture with other experts; every key that need not change stays as it is.

    Args:
        mixture: the mixture that is edited.
        experts: the number of experts of the result.
        per_token: how many of them take each token.
        width: the neurons of each expert.

    Raises:
        IncompatibleError: the family cannot hold such experts beside what the mixture has; lists every reason.
    """
    config, problems = dict(mixture.config), _group_problems(mixture, experts)
    values = {"experts": experts, "experts_per_token": per_token, "expert_width": width}
    if (shared := _shared_count(mixture, width)) is None:
        problems.append(
            f"its shared experts are counted in experts' widths, and {width} does not divide what they have: choose "
            "another granularity"
        )
    elif shared >= 0:
        values["shared_count"] = shared
    if problems:
        raise IncompatibleError(f"This {mixture.family.model_type} cannot be edited so:", problems)
    before = {"experts_per_token": mixture.experts_per_token, "expert_width": mixture.expert_width}
    for key, named in mixture.family.named.items():
        name = named.removeprefix("by_layer.")
        if name in values and key in config and values[name] != before.get(name):  # layers may differ, and stay so
            value = values[name]
            config[key] = [value] * len(config[key]) if isinstance(config[key], list) else value
    for key in _SPELLINGS["experts"]:
        if isinstance(config.get(key), int):
            config[key] = experts
    return config


def _shared_count(mixture: StoredMixture, width: int) -> int | None:
    """How many shared experts of a width the config names; -1 where it names no such number, None for a fraction."""
    keys = [key for key, name in mixture.family.named.items() if name.removeprefix("by_layer.") == "shared_count"]
    given = next((mixture.config[key] for key in keys if key in mixture.config), None)
    count = max(given, default=0) if isinstance(given, list) else given
    if not count or width == mixture.expert_width:
        return -1
    neurons = int(count) * mixture.expert_width
    return neurons // width if neurons % width == 0 else None


def _group_problems(mixture: StoredMixture, experts: int) -> list[str]:
    groups = mixture.config.get("n_group") or 1
    if groups == 1 or experts % groups == 0:
        return []
    return [
        f"its router chooses among {groups} groups of experts (n_group), which {experts} experts do not fill evenly"
    ]

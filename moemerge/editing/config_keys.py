"""The `config.json` of an edited mixture: that of the mixture, with other numbers of experts."""

from typing import Any, Final

from moemerge.editing.shared_width import shared_width
from moemerge.errors import IncompatibleError
from moemerge.families.stored_mixture import StoredMixture, per_token_key

# Spellings of the key for the number of experts, some of which some versions of transformers save beside the family's.
_SPELLINGS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def edited_config(mixture: StoredMixture, experts: int, per_token: int, width: int, parts: int = 1) -> dict[str, Any]:
    """Write the `config.json` of a mixture with other experts; every key that need not change stays as it is.

    Args:
        mixture: the mixture that is edited.
        experts: the number of experts of the result, before they are split.
        per_token: how many of them take each token; as many as before leaves layers that differ as they are.
        width: the neurons of each expert, or of each part.
        parts: the number of parts that each expert is split into.

    Raises:
        IncompatibleError: the family cannot hold such experts beside what the mixture has; lists every reason.
    """
    config, problems = dict(mixture.config), _group_problems(mixture, experts, per_token)
    values = {"experts": experts * parts, "experts_per_token": per_token * parts, "expert_width": width}
    down = mixture.shared_projection(mixture.moe_layers[0], "down") if width != mixture.expert_width else None
    if down and (shared := shared_width(mixture.family, down, width)) is None:
        problems.append(f"its shared expert has {down.shape[-1]} neurons, and can have no more than the others")
    elif down and shared:
        values["shared_count"] = shared // width
    if problems:
        raise IncompatibleError(f"This {mixture.family.model_type} cannot be edited so:", problems)
    before = {"experts_per_token": mixture.experts_per_token, "expert_width": mixture.expert_width}
    for key, named in mixture.family.named.items():
        name = named.removeprefix("by_layer.")
        if name in values and key in config and values[name] != before.get(name):
            config[key] = _changed(config[key], values[name])
    if per_token == mixture.experts_per_token and isinstance(
        given := mixture.config[per_token_key(mixture.family)], list
    ):
        config[per_token_key(mixture.family)] = [min(count, experts) * parts for count in given]
    for key in _SPELLINGS:
        if isinstance(config.get(key), int):
            config[key] = values["experts"]
    return config


def _changed(given: Any, value: int) -> Any:
    """The new value of a key that holds a number, or one for each layer."""
    return [value] * len(given) if isinstance(given, list) else value


def _group_problems(mixture: StoredMixture, experts: int, per_token: int) -> list[str]:
    groups, ranked = mixture.choosing.groups, mixture.choosing.best_of_group
    chosen, same = mixture.choosing.chosen_groups, (mixture.experts, mixture.experts_per_token)
    grouped = f"its router chooses among {groups} groups of experts (n_group)"
    if experts % groups:
        return [f"{grouped}, which {experts} experts do not fill evenly"]
    if groups > 1 and experts // groups < ranked:
        return [f"{grouped} by the {ranked} best of each, and {experts} experts are {experts // groups} in each"]
    if per_token > (most := experts // groups * chosen) and (experts, per_token) != same:
        return [
            f"{grouped} and takes experts of {chosen} (topk_group), which hold {most} of the {experts} experts: "
            f"experts_per_token is {per_token}, and at most {most} here. Set it (--top-k)"
        ]
    return []

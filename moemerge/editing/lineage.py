"""The config that a mixture keeps of itself after an edit in place, which leaves nothing that it was made from."""

from contextlib import suppress
from typing import Any

from moemerge.checkpoint.derived import read_values
from moemerge.config.loading import load_config
from moemerge.config.schema import MergeConfig
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.editing.changes import description_of
from moemerge.editing.plan import EditPlan
from moemerge.editing.slots import Kept, Slot
from moemerge.errors import ConfigError
from moemerge.sources.stored_mixtures import kept_config, names_itself


def config_after(plan: EditPlan) -> MergeConfig:
    """The config of a mixture after an edit in place, as if it had been made so from the models that it was made from.

    Where it could not be made so, the config names the mixture itself, for all experts, and keeps no more than their
    names, prompts and texts.
    """
    before = kept_config(plan.folder, lambda _: None)
    if before and _still_holds(before, plan):
        with suppress(ConfigError):  # its router method needs what a new expert does not have
            return load_config(_made_so(before, plan), allow_identical_experts=True)
    mixture = plan.folder.reference
    experts = [
        {"source_model": f"{mixture}#{name}", "name": name, **description_of(expert)}
        for name, expert in zip(plan.config.expert_names, plan.config.experts, strict=True)
    ]
    document = {"base_model": mixture, "experts": experts, "experts_per_token": plan.config.experts_per_token}
    return load_config(document, allow_identical_experts=True)


def _still_holds(before: MergeConfig, plan: EditPlan) -> bool:
    """Whether the result could be made of the models in the config that the mixture was made from."""
    if len(before.experts) != plan.mixture.experts or names_itself(before, plan.folder.folder):
        return False
    kept = [slot for slot in plan.slots if isinstance(slot, Kept)]
    if plan.config.shared_weights.method != "base" or not all(map(_is_stored, kept)):
        return False
    places = [_number(slot) for slot in kept]
    if len(plan.slots) == len(kept) and places == [*range(plan.mixture.experts)]:
        return True
    # What is drawn, and what all experts have changed, is another for other experts; so is their width.
    drawn = any(expert.noise_scale or expert.reinit for expert in before.experts)
    of_base = before.shared_weights.method == before.vocabulary == "base"
    return of_base and not drawn and any(_fills(slot, plan) for slot in plan.slots)


def _fills(slot: Slot, plan: EditPlan) -> bool:
    """Whether an expert has as many neurons as the mixture stores, so that the last is no padding with zeros."""
    mixture = plan.mixture
    if slot.width(mixture) < mixture.expert_width:
        return False
    gate = slot.projection(mixture, mixture.moe_layers[0], "gate")
    return gate.dtype not in CONFIG_DTYPES or bool(read_values(gate.rows(mixture.expert_width - 1, 1)).any())


def _is_stored(slot: Kept) -> bool:
    """Whether it is an expert as it is stored, the same in all layers."""
    return slot.is_whole and len({*slot.numbers.values()}) == 1


def _number(slot: Kept) -> int:
    return next(iter(slot.numbers.values()))


def _made_so(before: MergeConfig, plan: EditPlan) -> dict[str, Any]:
    """Write the config from before the edit with the experts of the result."""
    experts = []
    for name, expert, slot in zip(plan.config.expert_names, plan.config.experts, plan.slots, strict=True):
        origin = before.experts[_number(slot)] if isinstance(slot, Kept) else expert
        experts.append(origin.model_dump(exclude_defaults=True, by_alias=True) | {"name": name})
    changed = {"experts": experts, "experts_per_token": plan.config.experts_per_token}
    return before.model_dump(exclude_defaults=True, by_alias=True) | changed

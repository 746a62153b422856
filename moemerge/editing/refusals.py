"""Why a config cannot be an edit, or its experts no mixture; each reason is one line."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from moemerge.config.expert_names import named_place
from moemerge.config.router_methods import AUTO
from moemerge.config.schema import MergeConfig, RouterSettings
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.editing.granularity import split_problems
from moemerge.editing.slots import Added, Kept, Slot
from moemerge.families.stored_mixture import StoredMixture
from moemerge.routers.random import DRAWS

# Keys of a merge that say nothing of a mixture that exists already.
_OF_MERGES: Final = (
    "architecture",
    "engine",
    "moe_layers",
    "shared_experts",
    "fold_norms",
    "dtype",
    "tokenizer",
    "tokenizer_source",
)
# In the name of a module, or in a pattern of names.
_SINGLE_EXPERT: Final = re.compile(r"experts\\?\.\d")
_ROUTER_KEYS: Final = {"lambda", "tokens_per_expert", "chat_roles", "seed", "fitted"}


def foreign_keys(config: MergeConfig, *, averages: bool) -> Iterator[str]:
    """Yield the keys that a merge of dense models has, and an edit has no use for.

    Args:
        config: the edit.
        averages: whether experts of other mixtures are added, so that shared weights can be averaged.
    """
    defaults = MergeConfig.model_fields
    for key in _OF_MERGES:
        value = getattr(config, key)
        if value != defaults[key].get_default(call_default_factory=True):
            yield f"{key}: the mixture's own stays, since base_model is a mixture. Remove the key"
    if config.keep_vision:
        yield "keep_vision: of a multimodal mixture only the text model is edited. Remove the key"
    if config.gate_mode not in {AUTO, *DRAWS}:
        yield (
            f"gate_mode: {config.gate_mode} makes no routers of a mixture. Leave the key out, and kept rows stay, or "
            f"choose {' or '.join(DRAWS)}"
        )
    given, unset = config.router.model_dump(by_alias=True), RouterSettings.model_validate({}).model_dump(by_alias=True)
    for key in given:
        if given[key] != unset[key] and key not in _ROUTER_KEYS:
            yield f"router.{key}: the rows of an edited mixture are not made with it. Remove the key"
    method = config.shared_weights.method
    if method != "base" and not (method == "average" and averages):
        yield (
            f"shared_weights: {method}: the mixture's own attention and norms stay; `average` mixes them with those of "
            "other mixtures whose experts are added. Remove the key"
        )
    names = config.expert_names
    for number, expert in enumerate(config.experts):
        if expert.layers != "all":
            yield f"{named_place(number, names)}: layers: every expert of an edited mixture is in all its layers"


def fit_problems(config: MergeConfig, mixture: StoredMixture, slots: Sequence[Slot]) -> Iterator[str]:
    """Yield why these experts cannot be one mixture."""
    parts, width = config.granularity, config.expert_width
    changed = parts > 1 or any(not isinstance(slot, Kept) or not slot.is_whole for slot in slots)
    widths = {width or mixture.expert_width, *(slot.width(mixture) for slot in slots)}
    dtype = mixture.projection(mixture.moe_layers[0], 0, "down").dtype
    if (changed or widths != {mixture.expert_width}) and dtype not in CONFIG_DTYPES:
        yield (
            f"its experts are stored as {dtype}, so they can be kept, left out and put into another order, but nothing "
            "can be added beside them, and they cannot be changed or split; that needs one of "
            f"{', '.join(CONFIG_DTYPES.values())}"
        )
    elif changed or widths != {mixture.expert_width}:
        beside = set(mixture.of_expert(mixture.moe_layers[0], 0)) - set(mixture.family.experts)
        if beside:
            yield (
                f"its experts hold {min(beside).format(expert=0)} beside their projections, so they can be kept, left "
                "out and put into another order, but nothing can be added beside them, and they cannot be changed or "
                "split"
            )
    yield from split_problems(slots, mixture, parts)
    if slots and width and width < (least := max(slot.width(mixture) for slot in slots) // parts):
        yield f"expert_width: {width} is less than the {least} neurons that an expert has; neurons are never left out"
    if slots and config.experts_per_token > len(slots):
        yield f"experts_per_token: {config.experts_per_token} of {len(slots)} experts"
    yield from _row_problems(config, mixture, slots)
    yield from _outside_problems(config, mixture, slots)
    yield from _quantising_problems(mixture, slots, parts)


def _row_problems(config: MergeConfig, mixture: StoredMixture, slots: Sequence[Slot]) -> Iterator[str]:
    """Yield why new rows cannot be fitted beside those that stay, where none stays."""
    if config.gate_mode != AUTO or not any(isinstance(slot, Added) for slot in slots):
        return
    for layer in mixture.moe_layers:
        off = mixture.switched_off(layer)
        if all(not isinstance(slot, Kept) or slot.numbers[layer] in off for slot in slots):
            yield (
                f"no expert of the mixture stays in layer {layer}, and router rows of new ones are fitted beside those "
                "that stay. Merge the models into a new mixture, or set gate_mode: random"
            )
            return


def _outside_problems(config: MergeConfig, mixture: StoredMixture, slots: Sequence[Slot]) -> Iterator[str]:
    """Yield why experts in modules outside the layers, which stay as they are, would not fit the others."""
    width = config.expert_width or max((slot.width(mixture) for slot in slots), default=0) // config.granularity
    same = len(slots) * config.granularity == mixture.experts and width == mixture.expert_width
    if slots and not same and (outside := mixture.experts_outside):
        yield (
            f"it has experts outside its layers, in {outside[0]} and {len(outside) - 1} more tensors, which predict "
            "further tokens and are not edited, so the number and width of experts must stay. transformers does not "
            "use them: edit a copy without them, such as it saves"
        )


def _quantising_problems(mixture: StoredMixture, slots: Sequence[Slot], parts: int) -> Iterator[str]:
    """Yield why experts cannot have other numbers, where `quantization_config` treats some apart by their numbers."""
    stays = [isinstance(slot, Kept) and {*slot.numbers.values()} == {number} for number, slot in enumerate(slots)]
    named = next(_names_of_experts(mixture.config.get("quantization_config")), None)
    if named and (parts > 1 or not all(stays)):
        yield (
            f"quantization_config in its config.json names {named}, and experts would have other numbers. Leave out "
            "no expert but the last ones, or take names of single experts out of config.json first"
        )


def _names_of_experts(given: Any) -> Iterator[str]:
    """Yield names of single experts' modules, or patterns of such names, anywhere within a setting."""
    if isinstance(given, str) and _SINGLE_EXPERT.search(given):
        yield given
    elif isinstance(given, Mapping):
        yield from chain.from_iterable(map(_names_of_experts, (*given, *given.values())))
    elif isinstance(given, list):
        yield from chain.from_iterable(map(_names_of_experts, given))

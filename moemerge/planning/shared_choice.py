"""What `shared_weights: auto` chooses between, and the plan of what was chosen.

A plan reads headers, so it only finds out whether there is anything to choose. The losses that decide are measured
when the merge begins (`moemerge.evaluation.shared_weights`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from moemerge.chats import COUNTED_ROLES, Document, as_chat
from moemerge.config.expert_names import named_place
from moemerge.config.schema import MergeConfig, SharedWeights
from moemerge.errors import IncompatibleError
from moemerge.planning.shared_weights import any_changed
from moemerge.texts.documents import find_files, read_documents

if TYPE_CHECKING:
    from moemerge.planning.plan import MergePlan

BASE: Final = "base"
MIXED: Final = ("average", "ties")
"""Methods that may take the base's place, the simplest first. DARE is the average, with noise."""
TOKENS: Final = 2048
"""Tokens of each expert's text that losses are measured on, at most."""
FEWEST_TOKENS: Final = 256
"""Fewer tokens of an expert's text say too little: the shared weights stay the base's."""


@dataclass(frozen=True)
class SharedChoice:
    """The method that `auto` stands for in one merge, and why."""

    method: str
    why: str
    """The reason, in words that follow the method's name."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Mean loss in nats per token over the experts' texts, by method; empty where nothing was measured."""
    tokens: int = 0
    """Number of tokens that each loss was measured on."""

    @property
    def sentence(self) -> str:
        """The choice as a line for the user."""
        return f"shared_weights: auto chose {self.method}: {self.why}"


def expert_texts(plan: "MergePlan", number: int) -> Sequence[Document]:
    """Read the text that belongs to an expert: its texts, or without any its prompts.

    Raises:
        RefusedError: a text cannot be read.
        SourceError: a data set on the Hub cannot be reached.
    """
    expert = plan.config.experts[number]
    if expert.positive_texts:
        return read_documents(find_files(expert.positive_texts, f"experts[{number}].positive_texts"))
    if not plan.shape.chat_prompts:
        return expert.positive_prompts
    return list(map(as_chat, expert.positive_prompts))


def with_method(config: MergeConfig, method: str) -> MergeConfig:
    """The same config with a method of its own for the shared weights, and the default settings of that method."""
    return config.model_copy(update={"shared_weights": SharedWeights.model_validate({"method": method})})


def settle(plan: "MergePlan", choice: SharedChoice) -> "MergePlan":
    """The plan of a merge whose choice has been made; its config names the method."""
    config = with_method(plan.config, choice.method)
    return _noted(plan.candidates[choice.method], choice.sentence, config=config, shared_choice=choice)


def settle_as(plan: "MergePlan", config: MergeConfig) -> "MergePlan":
    """Plan a merge whose choice was made before, as the config of its output names it."""
    return plan.remake(plan.config.model_copy(update={"shared_weights": config.shared_weights}))


def postpone(plan: "MergePlan", config: MergeConfig, *, strangers: bool, needs_texts: bool) -> "MergePlan":
    """Leave the choice to the merge; or make it, where only the base's shared weights are possible.

    Args:
        plan: the plan with the base's shared weights.
        config: the config, which asks for a choice.
        strangers: whether an expert is no fine-tune of the base.
        needs_texts: whether the texts have to exist, since the plan is for a merge.

    Raises:
        RefusedError: there are no such texts.
        SourceError: a data set on the Hub cannot be reached.
    """
    found = _candidates(plan, strangers=strangers)
    if isinstance(found, str):
        choice = SharedChoice(BASE, found)
        return _noted(plan, choice.sentence, shared_choice=choice)
    candidates = {BASE: plan, **found}
    if not needs_texts:
        return replace(plan, config=config, candidates=candidates)
    lengths = [_characters(expert_texts(plan, number)) for number in range(len(config.experts))]
    note = (
        f"shared_weights: auto is chosen when the merge begins, from {', '.join(candidates)}, by the losses on "
        f"{FEWEST_TOKENS} to {TOKENS} tokens of each expert's text, which has {min(lengths)} to {max(lengths)} "
        f"characters; with fewer tokens it is {BASE}"
    )
    return _noted(plan, note, config=config, candidates=candidates)


def _characters(documents: Sequence[Document]) -> int:
    return sum(len(one if isinstance(one, str) else one.said_by(COUNTED_ROLES)) for one in documents)


def _candidates(plan: "MergePlan", *, strangers: bool) -> Mapping[str, "MergePlan"] | str:
    """The plan with each method that may take the base's place; or why there is none, without running a model."""
    if strangers:
        return "not all experts are fine-tunes of the base model"
    plans, problems = {}, []
    for method in MIXED:
        try:
            plans[method] = plan.remake(with_method(plan.config, method))
        except IncompatibleError as error:  # noqa: PERF203  each has its own
            problems.append(error.problems[0])
    if not plans:
        return f"others are not possible, since {problems[0]}"
    if not any_changed(plan.parts.base, {f"experts[{n}]": expert for n, expert in enumerate(plan.experts)}):
        return "the models have all the same"
    if untold := [number for number, expert in enumerate(plan.config.experts) if not expert.is_described]:
        expert = named_place(untold[0], plan.config.expert_names)
        return f"{expert} has neither positive_texts nor positive_prompts to compare losses on"
    return plans


def _noted(plan: "MergePlan", note: str, **changes: Any) -> "MergePlan":
    """The plan with one more note and other changes, without advice on what is chosen for the user."""
    advice = tuple(advice for advice in plan.advice if advice not in plan.parts.advice)
    return replace(plan, remarks=replace(plan.remarks, notes=(*plan.notes, note), advice=advice), **changes)

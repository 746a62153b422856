"""What `moemerge init` proposes for some models, before and after a person has looked at it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from moemerge.compatibility.differences import NamedModel
from moemerge.compatibility.distances import Distance, Known, check_deltas
from moemerge.config.expert_names import expert_names
from moemerge.config.schema import MergeConfig
from moemerge.drafting.bases import base_remarks, measure_from, nearer_base
from moemerge.drafting.cards import CardMetadata, read_card
from moemerge.drafting.domains import GENERAL, Guess, all_domains, guess_domain
from moemerge.dtypes import DType
from moemerge.families.dense import ModelTensors
from moemerge.planning.options import PlanOptions
from moemerge.planning.plan import MergePlan
from moemerge.planning.planner import plan_merge
from moemerge.planning.vision import keeping_towers
from moemerge.sources.model_folder import ModelFolder
from moemerge.sources.tensor_tables import read_tensor_tables

_TWO: Final = 2


@dataclass(frozen=True)
class DraftExpert:
    """One expert of a draft."""

    reference: str
    name: str
    distance: Distance | None
    """How far its FFNs are from the base's; None for the base itself."""
    domain: str | None = None
    """A built-in domain; None for none."""
    reason: str = ""
    """Why that domain was chosen."""
    prompts: tuple[str, ...] = ()
    """Prompts that should be routed to it: the domain's, or somebody's own."""

    def of_domain(self, domain: str | None, reason: str = "") -> "DraftExpert":
        """The expert with another domain and its prompts."""
        prompts = all_domains()[domain].prompts if domain else ()
        return replace(self, domain=domain, reason=reason, prompts=prompts)


@dataclass(frozen=True)
class Draft:
    """A merge config before it is written."""

    base: str
    experts: tuple[DraftExpert, ...]
    dtype: DType
    experts_per_token: int
    averages: bool
    """Whether the experts' attention and norms can be averaged, which measured better for fine-tunes of one model."""
    chats: bool
    """Whether all models have a chat template."""
    unites: bool
    """Whether an expert with a chat template has added tokens that the base lacks."""
    needs_prompts: bool
    """Whether the weights alone cannot make the routers: an expert is the base itself, or no fine-tune of it."""
    remarks: tuple[str, ...]
    """What speaks for another base."""
    warnings: tuple[str, ...]
    """The plan's warnings: experts that are no fine-tunes of the base, for one."""
    vision: str = ""
    """The model type of the mixture that can keep the base's towers; empty for none."""

    @property
    def undescribed(self) -> list[DraftExpert]:
        """Experts without prompts of their own: without any, or with those of an earlier expert."""
        seen: set[frozenset[str]] = set()
        found = []
        for expert in self.experts:
            prompts = frozenset(expert.prompts)
            if not prompts or prompts in seen:
                found.append(expert)
            seen.add(prompts)
        return found

    @property
    def is_random(self) -> bool:
        """Whether routers can only be random for now."""
        return self.needs_prompts and bool(self.undescribed)


def draft_merge(base: str, experts: Sequence[str], announce: Callable[[str], None]) -> Draft:
    """Open the models of a merge, and propose its config.

    Headers, small files and a few rows of weights are read. Models that cannot be merged are refused as by a plan.

    Args:
        base: reference of the base model.
        experts: references of the experts.
        announce: called with a line about each step that takes long.

    Raises:
        ConfigError: there are too few experts, or they are all the same model.
        SourceError: a model cannot be reached.
        CheckpointError: a model's files are damaged.
        IncompatibleError: the models cannot be merged; lists every reason.
    """
    per_token = 1 if len(experts) == _TWO else _TWO
    keys = {"base_model": base, "experts": [{"source_model": expert} for expert in experts]}
    config = MergeConfig(**keys, experts_per_token=per_token)
    # Random routers refuse nothing that prompts could save.
    plan = plan_merge(
        config.model_copy(update={"gate_mode": "random"}), PlanOptions(weights="stream"), announce=announce
    )
    folders = plan.models.by_reference
    models = _tensors(plan, folders, announce)
    cards = {reference: read_card(folder) for reference, folder in folders.items()}
    known: Known = {}
    distances = measure_from(base, models, known)
    templates = [bool(NamedModel("", folder, models[name].model).templates) for name, folder in folders.items()]
    nearer = nearer_base(base, folders, models, known)
    return Draft(
        base=base,
        experts=tuple(
            _expert(folders[reference], name, folders[base], cards, distances)
            for reference, name in zip(experts, expert_names(experts), strict=True)
        ),
        dtype=plan.dtype,
        experts_per_token=per_token,
        averages=bool(plan.parts.advice) and not any(distance.is_stranger for distance in distances.values()),
        chats=all(templates),
        unites=_unites(plan),
        needs_prompts=_needs_prompts(config, folders, distances),
        remarks=(
            *([nearer] if nearer else []),
            *base_remarks(folders[base], cards[base], _others(cards, base), templates=templates[0]),
            *(note for note in plan.notes if note.startswith("base_model: ")),
        ),
        warnings=plan.warnings,
        vision=could.model_type if (could := keeping_towers(folders[base])) else "",
    )


def _others(cards: Mapping[str, CardMetadata], base: str) -> list[CardMetadata]:
    return [card for reference, card in cards.items() if reference != base]


def _tensors(
    plan: MergePlan, folders: Mapping[str, ModelFolder], announce: Callable[[str], None]
) -> dict[str, ModelTensors]:
    tables = read_tensor_tables(folders.values(), announce, weights="stream", dense=True)
    dense = {member.folder.reference: member.model for member in (plan.models.base, *plan.models.experts)}
    return {name: ModelTensors(dense[name], table) for name, table in zip(folders, tables, strict=True)}


def _unites(plan: MergePlan) -> bool:
    return any(
        member.name in plan.shape.lost_tokens and NamedModel("", member.folder, member.model).templates
        for member in plan.models.experts
    )


def _needs_prompts(config: MergeConfig, folders: Mapping[str, ModelFolder], distances: Mapping[str, Distance]) -> bool:
    opened = [folders[expert.source_model] for expert in config.experts]
    return bool(
        check_deltas(config, folders[config.base_model], opened, {config.base_model: Distance({}, 0), **distances})
    )


def _expert(
    folder: ModelFolder,
    name: str,
    base: ModelFolder,
    cards: Mapping[str, CardMetadata],
    distances: Mapping[str, Distance],
) -> DraftExpert:
    reference = folder.reference
    if folder.folder == base.folder and not folder.adapters:
        guess = guess_domain(cards[reference], None)
        guess = guess or Guess(GENERAL, "it is the base model, for what belongs to no other expert")
        return DraftExpert(reference, name, None).of_domain(guess.domain, guess.reason)
    guess = guess_domain(cards[reference], cards[base.reference])
    expert = DraftExpert(reference, name, distances[reference])
    return expert.of_domain(guess.domain, guess.reason) if guess else expert

"""Choose the output family: one that holds exactly what was asked for and is right in as many engines as can be."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from moemerge.engines import ENGINES, Engine
from moemerge.errors import IncompatibleError
from moemerge.families.deepseek_like import DEEPSEEK_V3, DOTS1, EXAONE_MOE, GLM4_MOE, HY_V3, MIMO_V2_FLASH, SOLAR_OPEN
from moemerge.families.dense import DenseModel
from moemerge.families.engines import MAIN, Trouble, facts_of, right_in, trouble_of
from moemerge.families.family import MoeFamily
from moemerge.families.granite_moe import GRANITEMOE, GRANITEMOE_SWA, GRANITEMOEHYBRID, GRANITEMOESHARED
from moemerge.families.mixtral import MIXTRAL
from moemerge.families.mixture_shape import Mixture
from moemerge.families.qwen_moe import MELLUM, QWEN2_MOE, QWEN3_5_MOE, QWEN3_MOE
from moemerge.families.siblings import COHERE2_MOE, ERNIE4_5_MOE, FLEX_OLMO, GEMMA4_MOE, HUNYUAN_V1_MOE, LFM2_MOE

__all__ = ["MOE_FAMILIES", "Choice", "Mixture", "MoeFamily", "select_family"]

MOE_FAMILIES: Final = {
    family.model_type: family
    for family in (
        MIXTRAL, QWEN3_MOE, GRANITEMOE, GRANITEMOESHARED, GLM4_MOE, DOTS1, QWEN2_MOE, FLEX_OLMO, ERNIE4_5_MOE,
        HUNYUAN_V1_MOE, LFM2_MOE, COHERE2_MOE, QWEN3_5_MOE, GEMMA4_MOE, DEEPSEEK_V3, GRANITEMOEHYBRID, GRANITEMOE_SWA,
        MELLUM, EXAONE_MOE, HY_V3, MIMO_V2_FLASH, SOLAR_OPEN,
    )
}  # fmt: skip
"""Output families, in the order in which they are preferred among equals."""

_MERGEKIT_NAMES: Final = {"qwen": "qwen2_moe", "qwen3": "qwen3_moe"}
_DEEPSEEK: Final = (
    "architecture: deepseek is DeepSeek-V1, which transformers reads only with code from a repository; "
    "{} is the nearest family"
)
_CLAMPS: Final = frozenset[Engine]({"llamacpp", "converter"})
"""Engines that raise a sum of the chosen experts' sigmoids below 6.1e-5 to 6.1e-5, which transformers does not."""


@dataclass(frozen=True)
class Choice:
    """The output family of a mixture, with notes and warnings about it."""

    family: MoeFamily
    right_in: tuple[Engine, ...]
    """The engines that compute such a mixture as transformers 5 does."""
    untried: tuple[Engine, ...]
    """The engines of which that is not known, since they were not tried with such a mixture."""
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    """Warnings of engines that silently compute something else."""


def select_family(
    base: DenseModel,
    mixture: Mixture,
    architecture: str | None = None,
    engine: Engine | None = None,
    *,
    preferred: Engine | None = None,
    inside: str = "",
) -> Choice:
    """Choose the output family for a mixture of models that compute like `base`.

    Of those that hold it exactly, the choice is the one that most of transformers 4.57, vLLM and llama.cpp read
    rightly, then the one that most engines do, then the first of the table. With sigmoid routers llama.cpp breaks ties.

    Args:
        base: the base model.
        mixture: the mixture that the family has to hold.
        architecture: the family's `model_type`, its beginning, or a name of mergekit-moe; None for any.
        engine: the engine that has to read it rightly; None for any.
        preferred: an engine that should read it rightly, if it can.
        inside: the `model_type` of the multimodal class that it is written in, about which engines were asked then;
            `architecture` is the family of that class's text model.

    Raises:
        IncompatibleError: no family fits; says why for each candidate.
    """
    asked = (architecture or "").lower()
    notes = [_DEEPSEEK] if asked == "deepseek" else []
    asked = "" if notes else _MERGEKIT_NAMES.get(asked, asked)
    candidates, facts = _candidates(asked, architecture), facts_of(base, mixture)
    problems, others, fitting = [], [], []
    for family in candidates:
        if base.family.block not in family.blocks:
            others.append(family.model_type)
        elif reasons := _refusals(family, base, mixture, by_name=bool(asked)) or _troubles(
            engine, inside or family.model_type, facts
        ):
            problems.append(f"{inside or family.model_type}: {'; '.join(reasons)}")
        else:
            fitting.append(family)
    if fitting:
        best = max(fitting, key=lambda family: _worth(family, facts, preferred))
        return _choice(best, base, facts, [note.format(best.model_type) for note in notes], inside)
    if others:
        verb = "does" if len(others) == 1 else "do"
        problems.append(f"{', '.join(others)}: {verb} not compute like {base.family.model_type}")
    key = f"keep_vision: {inside!r}" if inside else f"architecture: {architecture!r}" if asked else ""
    raise IncompatibleError(f"{_headline(key, engine)}:", problems)


def _candidates(asked: str, given: str | None) -> list[MoeFamily]:
    """List the family of this name, or those whose names begin like it; `given` is the name as it was written.

    Raises:
        IncompatibleError: there are none.
    """
    if asked in MOE_FAMILIES:
        return [MOE_FAMILIES[asked]]
    if found := [family for name, family in MOE_FAMILIES.items() if name.startswith(asked)]:
        return found
    known = ", ".join(MOE_FAMILIES)
    raise IncompatibleError(f"architecture: {given!r} is not an output family; known: {known}.", [])


def _headline(key: str, engine: Engine | None) -> str:
    """Say why no family was chosen, as the first line of the error; the key is what asks for a family, if anything."""
    asked = f"{ENGINES[engine]}, which --for or `engine` asks for" if engine else ""
    if asked and key:
        name = key.partition(":")[0]
        return f"{key} is not read rightly by {asked}. Leave out `{name}`, and another family may fit"
    if asked:
        return f"{asked}, reads no output family rightly that can hold this merge"
    if key:
        return f"{key} cannot hold this merge; without the key the best that fits is taken"
    return "No output family can hold this merge"


def _worth(family: MoeFamily, facts: frozenset[str], preferred: Engine | None) -> tuple[bool, bool, int, int, int]:
    """The key by which families are compared: the engines that are right with each, most of all without a condition."""
    right = set(right_in(family.model_type, facts))
    sure = right - _CLAMPS if family.scoring == "sigmoid" else right
    return preferred in sure, preferred in right, len(sure & set(MAIN)), len(sure), len(right)


def _refusals(family: MoeFamily, base: DenseModel, mixture: Mixture, *, by_name: bool) -> list[str]:
    """List why a family that computes like the base cannot be chosen; `by_name` says whether it was asked for."""
    if reasons := family.refusals(base, mixture):
        return reasons
    if not by_name and mixture.shared_widths and family.appends_shared:
        return ["it has no shared experts; with `architecture: mixtral` their neurons are appended to every expert"]
    return []


def _troubles(engine: Engine | None, model_type: str, facts: frozenset[str]) -> list[str]:
    """List why a family does not serve for the engine that was asked for."""
    trouble = trouble_of(engine, model_type, facts) if engine else None
    if engine is None or trouble is None:
        return []
    return [f"{ENGINES[engine]} {trouble.words if isinstance(trouble, Trouble) else trouble}"]


def _choice(family: MoeFamily, base: DenseModel, facts: frozenset[str], notes: list[str], inside: str) -> Choice:
    notes = [*notes, *family.notes]
    model_type = inside or family.model_type
    troubles = {engine: trouble_of(engine, model_type, facts) for engine in ENGINES}
    right = tuple(engine for engine, trouble in troubles.items() if trouble is None)
    untried = tuple(engine for engine, trouble in troubles.items() if isinstance(trouble, str))
    if family.in_gguf and _is_same_kind(troubles["converter"], troubles["llamacpp"]):
        del troubles["converter"]
    told = {engine: trouble for engine, trouble in troubles.items() if isinstance(trouble, Trouble)}
    warnings = [_in_full(engine, trouble, model_type) for engine, trouble in told.items() if trouble.is_silent]
    notes += _failures({engine: trouble for engine, trouble in told.items() if not trouble.is_silent}, model_type)
    original = base.config.get("original_max_position_embeddings")
    notes += [
        note.format(family=family.model_type, original=original)
        for fact, note in base.family.notes
        if not fact or fact in base.facts
    ]
    return Choice(family, right, untried, tuple(notes), tuple(warnings))


def _in_full(engine: Engine, trouble: Trouble, model_type: str) -> str:
    return f"{ENGINES[engine]} {trouble.words}: {model_type}, as measured with {trouble.version}"


def _failures(troubles: Mapping[Engine, Trouble], kind: str) -> list[str]:
    """Say which engines fail with a mixture: of one, how; of several, their names."""
    if len(troubles) <= 1:
        return [_in_full(engine, trouble, kind) for engine, trouble in troubles.items()]
    *others, last = (
        f"{ENGINES[engine]}{f' (with {trouble.with_what})' if trouble.facts else ''}"
        for engine, trouble in troubles.items()
    )
    return [f"{kind}: {', '.join(others)} and {last} fail, as measured; `moemerge families {kind}` says how each does"]


def _is_same_kind(trouble: Trouble | str | None, other: Trouble | str | None) -> bool:
    """Whether two troubles are of one kind, so that naming one is enough: both fail, or both compute something else."""
    return isinstance(trouble, Trouble) and isinstance(other, Trouble) and trouble.is_silent == other.is_silent

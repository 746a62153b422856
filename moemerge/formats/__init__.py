"""Output families and how one is chosen: the first in the table that holds the request exactly."""

from typing import Final

from moemerge.errors import IncompatibleError
from moemerge.formats.deepseek_like import DEEPSEEK_V3, DOTS1, EXAONE_MOE, GLM4_MOE, HY_V3, MIMO_V2_FLASH, SOLAR_OPEN
from moemerge.formats.dense import DenseModel
from moemerge.formats.family import MoeFamily
from moemerge.formats.granite_moe import GRANITEMOE, GRANITEMOE_SWA, GRANITEMOEHYBRID, GRANITEMOESHARED
from moemerge.formats.mixtral import MIXTRAL
from moemerge.formats.mixture import Mixture
from moemerge.formats.qwen_moe import MELLUM, QWEN2_MOE, QWEN3_5_MOE, QWEN3_MOE
from moemerge.formats.siblings import COHERE2_MOE, ERNIE4_5_MOE, FLEX_OLMO, GEMMA4_MOE, HUNYUAN_V1_MOE, LFM2_MOE

__all__ = ["MOE_FAMILIES", "Mixture", "MoeFamily", "select_family"]

MOE_FAMILIES: Final = {
    family.model_type: family
    for family in (
        MIXTRAL, QWEN3_MOE, GRANITEMOE, GRANITEMOESHARED, GLM4_MOE, DOTS1, QWEN2_MOE, FLEX_OLMO, ERNIE4_5_MOE,
        HUNYUAN_V1_MOE, LFM2_MOE, COHERE2_MOE, QWEN3_5_MOE, GEMMA4_MOE, DEEPSEEK_V3, GRANITEMOEHYBRID, GRANITEMOE_SWA,
        MELLUM, EXAONE_MOE, HY_V3, MIMO_V2_FLASH, SOLAR_OPEN,
    )
}  # fmt: skip
"""In the order in which they are tried: what most engines read exactly comes first."""

_MERGEKIT_NAMES: Final = {"qwen": "qwen2_moe", "qwen3": "qwen3_moe"}
_DEEPSEEK: Final = (
    "architecture: deepseek is DeepSeek-V1, which transformers reads only with code from a repository; "
    "{} is the nearest family"
)


def select_family(base: DenseModel, architecture: str | None, mixture: Mixture) -> tuple[MoeFamily, list[str]]:
    """The output family for a mixture of models that compute like `base`, and what to tell about the choice.

    Args:
        base: the base model.
        architecture: the family's `model_type`, its beginning, or a name of mergekit-moe; None for the first that fits.
        mixture: what the family has to hold.

    Raises:
        IncompatibleError: none fits; says why for each candidate.
    """
    asked = (architecture or "").lower()
    notes = [_DEEPSEEK] if asked == "deepseek" else []
    asked = "" if notes else _MERGEKIT_NAMES.get(asked, asked)
    candidates = [MOE_FAMILIES[asked]] if asked in MOE_FAMILIES else [
        family for name, family in MOE_FAMILIES.items() if name.startswith(asked)
    ]  # fmt: skip
    if not candidates:
        known = ", ".join(MOE_FAMILIES)
        raise IncompatibleError(f"architecture: {architecture!r} is no output family; known: {known}.", [])
    problems, others = [], []
    for family in candidates:
        if base.family.block not in family.blocks:
            others.append(family.model_type)
            continue
        reasons = family.refusals(base, mixture)
        if not asked and mixture.shared_widths and family.appends_shared and not reasons:
            reasons = [
                "it has no shared experts; with `architecture: mixtral` their neurons are appended to every expert"
            ]
        if not reasons:
            original = base.config.get("original_max_position_embeddings")
            own = [
                note.format(family=family.model_type, original=original)
                for fact, note in base.family.notes
                if not fact or fact in base.facts
            ]
            return family, [*(note.format(family.model_type) for note in notes), *family.told(base, mixture), *own]
        problems.append(f"{family.model_type}: {'; '.join(reasons)}")
    if others:
        problems.append(
            f"{', '.join(others)}: {'does' if len(others) == 1 else 'do'} not compute like {base.family.model_type}"
        )
    what = "No output family can hold this merge"
    if asked:
        what = f"architecture: {architecture!r} cannot hold this merge; without the key the first that fits is taken"
    raise IncompatibleError(f"{what}:", problems)

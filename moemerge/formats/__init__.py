"""Output families and how one is chosen: the first in the table that holds the request exactly."""

from typing import Final

from moemerge.errors import IncompatibleError
from moemerge.formats.dense import DenseModel
from moemerge.formats.family import MoeFamily
from moemerge.formats.mixtral import MIXTRAL

__all__ = ["MOE_FAMILIES", "select_family"]

MOE_FAMILIES: Final = {family.model_type: family for family in (MIXTRAL,)}


def select_family(base: DenseModel, architecture: str | None, *, shared_experts: bool) -> MoeFamily:
    """The output family for this base model.

    Args:
        base: the base model.
        architecture: the family's `model_type`, or its beginning; None for the first that fits.
        shared_experts: whether the config asks for shared experts.

    Raises:
        IncompatibleError: none fits; says why for each candidate.
    """
    candidates = [family for name, family in MOE_FAMILIES.items() if name.startswith((architecture or "").lower())]
    if not candidates:
        known = ", ".join(MOE_FAMILIES)
        raise IncompatibleError(f"architecture: {architecture!r} is no output family; known: {known}.", [])
    problems = []
    for family in candidates:
        reasons = family.refusals(base)
        if shared_experts and not family.holds_shared_experts:
            reasons.append("it has no shared experts: remove shared_experts")
        if not reasons:
            return family
        problems += [f"{family.model_type}: {reason}" for reason in reasons]
    raise IncompatibleError("No output family can hold this merge:", problems)

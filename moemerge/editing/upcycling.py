"""Configs of mixtures whose experts are copies of one model's FFNs, or of a mixture's experts, to be trained.

The copies of a dense model are equal, so that any router gives what the model computes, as long as it divides the
weights by their sum. The copies of a mixture's experts have equal router rows, so that N times as many are chosen: all
copies of those that were. Their weights add up to what they were, or, with sigmoids that are not divided, to N times
as much, which a factor of 1/N on the experts makes good.
"""

from dataclasses import dataclass
from typing import Any

from moemerge.editing.granularity import copies_problems, weights_are_shared
from moemerge.errors import IncompatibleError, RefusedError
from moemerge.families.stored_mixture import StoredMixture

_USUAL_PER_TOKEN = 2


@dataclass(frozen=True)
class Copies:
    """How many copies there are, and how they differ."""

    experts: int
    """How many experts the result has."""
    experts_per_token: int | None = None
    """How many of them take each token; None for 2, or, of a mixture, for all copies of those chosen before."""
    noise_scale: float | None = None
    """Standard deviation of noise on the weights."""
    reinit: float | None = None
    """Share of the neurons that is drawn anew."""
    seed: int = 0
    """Seed of `reinit`."""

    @property
    def changes(self) -> dict[str, Any]:
        """The keys of an expert that change its weights."""
        reinit = {"share": self.reinit, "seed": self.seed} if self.seed else self.reinit
        return {
            **({"noise_scale": self.noise_scale} if self.noise_scale else {}),
            **({"reinit": reinit} if self.reinit else {}),
        }


def upcycled_dense(model: str, copies: Copies, gate_mode: str) -> dict[str, Any]:
    """Write the config of a merge of equal experts, as keys and values.

    Args:
        model: the dense model, as the config shall name it.
        copies: the copies.
        gate_mode: how the routers are drawn.

    Raises:
        RefusedError: each token is to go to more experts than there are.
    """
    per_token = copies.experts_per_token or min(_USUAL_PER_TOKEN, copies.experts)
    _check(per_token, copies.experts)
    experts = [{"source_model": model, "name": str(number), **copies.changes} for number in range(copies.experts)]
    return {"base_model": model, "experts": experts, "gate_mode": gate_mode, "experts_per_token": per_token}


def upcycled_mixture(model: str, mixture: StoredMixture, copies: Copies) -> dict[str, Any]:
    """Write the config of an edit with each expert of a mixture several times, as keys and values.

    Args:
        model: the mixture, as the config shall name it.
        mixture: the mixture.
        copies: the copies.

    Raises:
        RefusedError: the experts are not a multiple of those that there are, or fewer than take each token.
        IncompatibleError: the copies would not be chosen together, or not weigh as much.
    """
    times, left = divmod(copies.experts, mixture.experts)
    if left or times < 2:  # noqa: PLR2004
        wanted = ", ".join(str(mixture.experts * number) for number in (2, 3, 4))
        raise RefusedError(
            f"--experts: {model} has {mixture.experts} experts, each of which is to be there several times: expected "
            f"{wanted} or another multiple, found {copies.experts}."
        )
    if problems := list(copies_problems(mixture)):
        raise IncompatibleError("This mixture cannot be upcycled:", problems)
    per_token = copies.experts_per_token or mixture.experts_per_token * times
    _check(per_token, copies.experts)
    scale = {} if weights_are_shared(mixture) else {"residual_scale": 1 / times}
    experts = [
        {"source_model": f"{model}#{own}", "name": f"{own}-{number}", **scale, **copies.changes}
        for own in mixture.names
        for number in range(times)
    ]
    return {"base_model": model, "experts": experts, "experts_per_token": per_token}


def _check(per_token: int, experts: int) -> None:
    if per_token > experts:
        raise RefusedError(f"--experts-per-token: {per_token} of {experts} experts. Choose a smaller number.")

"""The results of a search: what was tried, what was chosen, and how it does on text that the search did not see."""

from collections.abc import Mapping
from dataclasses import dataclass

from moemerge.config.schema import MergeConfig
from moemerge.evaluation.figures import Estimate
from moemerge.searching.settings import Cost, Objective


@dataclass(frozen=True)
class Trial:
    """A recipe that was tried."""

    number: int
    values: Mapping[str, str]
    """The recipe's open values, by their place."""
    failure: str = ""
    """Why it could not be tried; empty where it was."""
    tokens: int = 0
    """Tokens that it was tried on."""
    complete: bool = False
    """Whether these are all tokens that the search had."""
    loss: float | None = None
    """Mean loss over domains in nats per token; of a recipe that was stopped early, that of the chosen one, and what it
    was above that on the text that both read."""
    worst: float | None = None
    """The most that its loss on a domain is above that of the domain's dense model, on the same text."""
    losses: Mapping[str, float] | None = None
    """Loss by domain, on the text that it was tried on."""
    weight_bytes: int = 0
    """Size of its weights in bytes."""
    active_parameters: int = 0
    """Number of parameters that a token passes through."""


@dataclass(frozen=True)
class HeldOut:
    """Losses on held-out text, with 95 % intervals over documents."""

    documents: Mapping[str, int]
    """Documents by domain that were read."""
    losses: Mapping[str, Estimate]
    """The chosen recipe's loss by domain."""
    mean: float
    """Its mean over domains."""
    dense: Mapping[str, float]
    """The loss of each domain's dense model."""
    against_dense: Estimate
    """How much higher the chosen recipe's mean loss is than that of the dense models, on the same documents."""
    against_first: Estimate | None
    """How much higher it is than that of the recipe's first options; None where these were chosen, or failed."""


@dataclass(frozen=True)
class SearchResult:
    """A search, and the recipe that it chose."""

    recipe: str
    """The recipe's name: its file."""
    objective: Objective
    cost: Cost | None
    seed: int
    dtype: str
    """What every model was run in: `float32` or `bfloat16`."""
    dense: Mapping[str, str]
    """The dense model that each domain was measured beside."""
    trials: tuple[Trial, ...]
    chosen: int
    """Number of the chosen trial: the one with the smallest objective, of those that were tried on all text."""
    front: tuple[int, ...]
    """Numbers of the trials on all text that no other beats in objective and cost; the chosen one without a cost."""
    config: MergeConfig
    """The chosen recipe's merge config."""
    held_out: HeldOut

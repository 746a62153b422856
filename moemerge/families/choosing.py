"""How the routers of a mixture choose experts and weigh them, by its family and its `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from moemerge.families.family import MoeFamily, Scoring

SCALES: Final = ("routed_scaling_factor", "router_scaling_factor")
"""Keys for the factor on what the experts add together."""


@dataclass(frozen=True)
class Choosing:
    """How routers turn logits into chosen experts and their weights."""

    scoring: Scoring
    normalises: bool = True
    """Whether the chosen experts' scores are divided by their sum."""
    added: float = 0.0
    """A number that is added to the sum."""
    least: float = 0.0
    """The smallest divisor: a sum below it counts as it."""
    scale: float = 1.0
    """The factor on all weights."""
    groups: int = 1
    """Number of equal runs that the experts are in."""
    chosen_groups: int = 1
    """How many groups a token's experts may be from."""
    best_of_group: int = 1
    """How many of a group's highest scores are added up to rank it."""


def choosing(family: MoeFamily, config: Mapping[str, Any]) -> Choosing:
    """Read from a `config.json` how the routers of a mixture choose, as transformers' class of its family does."""
    given = {key: config[key] for key in family.read_keys if config.get(key) is not None}
    said: dict[str, Any] = {**family.router_defaults, **given}
    scoring: Scoring = said.get("expert_selection_fn", family.scoring)
    # deepseek_v2 alone has groups with softmax: by their best score, and only by this method.
    grouped = scoring == "sigmoid" or said.get("topk_method") == "group_limited_greedy"
    # cohere2_moe takes the softmax of the chosen logits.
    always = "expert_selection_fn" in family.read_keys and scoring == "softmax"
    return Choosing(
        scoring,
        always or bool(said.get("norm_topk_prob", True)),
        added=family.added_to_sum,
        least=_number(said, "moe_norm_min", 0.0),
        scale=next((_number(said, key, 1.0) for key in SCALES if key in said), 1.0),
        groups=int(_number(said, "n_group", 1)) if grouped else 1,
        chosen_groups=int(_number(said, "topk_group", 1)) if grouped else 1,
        best_of_group=2 if scoring == "sigmoid" else 1,
    )


def _number(said: Mapping[str, Any], key: str, otherwise: float) -> float:
    """A setting's value; what is no number is left to transformers' class, which refuses it."""
    value = said.get(key, otherwise)
    return value if isinstance(value, int | float) else otherwise

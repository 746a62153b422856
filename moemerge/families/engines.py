"""How engines compute each output family, as measured by running them: `engines.json` and what follows from it.

`make test-engines` runs every engine over tiny mixtures of every kind and writes that file. `export`
refuses the files that llama.cpp does not load, with more detail.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Final

from moemerge.engines import ENGINES, Engine
from moemerge.families.dense import NON_LLAMA_FACTS, ROPES, DenseModel
from moemerge.families.mixture_shape import ASKED, Mixture

MAIN: Final[tuple[Engine, ...]] = ("transformers", "vllm", "llamacpp")
"""Engines that count most in the choice of a family that nobody asked for."""
FACTS: Final = {
    **ROPES, "mscale": "yarn's mscale", "state_spaces": "state-space layers", **NON_LLAMA_FACTS,
    "tied": "tied embeddings", "untied": "untied embeddings", **ASKED,
    "later_dense_layers": "dense layers after others", "absent": "experts absent from layers",
    "no_window": "full attention in every layer", "gelu": "GELU for SiLU", "gelu_tanh": "GELU by tanh for SiLU",
    "other_activation": "an activation beside SiLU and GELU",
    "grouped_heads": "fewer key heads than query heads", "positions": "rotary positions beside state spaces",
    "foreign_tokens": "other tokens than GLM's",
}  # fmt: skip
"""Facts that set mixtures of a family apart, in words; where several explain as much, the first is named."""
# Which scaling it is, other facts say.
_TOLD_IN_DETAIL: Final = frozenset({"scaled_rope"})
_BY_TANH: Final = ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast", "gelu_accurate")
_ACTIVATIONS: Final = {"gelu": "gelu", **dict.fromkeys(_BY_TANH, "gelu_tanh")}
# Distances of log-probabilities in float32: rounding makes 3e-4, GELU from a table 3e-3; faults make 1.
TOLERANCE: Final = 5e-3
NAN: Final = "computes NaN"
"""The record's entry for a distance that is not a number."""


@dataclass(frozen=True)
class Trouble:
    """A combination of facts with which an engine computes something else, or fails."""

    facts: frozenset[str]
    """The facts that cause it when all hold together; empty if it happens with every mixture of the family."""
    apart: float | None
    """The largest distance of log-probabilities from transformers'; infinite for NaN, None where the engine failed."""
    message: str
    """The engine's message where it failed."""
    version: str
    """Name and version of the engine."""

    @property
    def is_silent(self) -> bool:
        """Whether the engine computes something else without a message."""
        return self.apart is not None

    @property
    def words(self) -> str:
        """The trouble and the facts that cause it, in words."""
        what = f"fails ({self.message})"
        if self.apart is not None:
            what = f"computes something else, log-probabilities up to {self.apart:.2g} off,"
            what = "computes NaN" if math.isinf(self.apart) else what
        return f"{what} with {self.with_what}" if self.facts else f"{what} always"

    @property
    def with_what(self) -> str:
        """The facts, in words."""
        return " and ".join(FACTS[fact] for fact in FACTS if fact in self.facts)


@dataclass(frozen=True)
class Reading:
    """How an engine reads the mixtures of a family."""

    version: str
    troubles: tuple[Trouble, ...]
    tried: frozenset[str]
    """Facts of mixtures that were right, or that cause troubles."""
    dates: str
    """The day of the measurement, or the first and the last one."""

    def of(self, facts: frozenset[str]) -> "Trouble | str | None":
        """The engine's trouble with a mixture: None where it is right, or words for why that is not known."""
        found = [trouble for trouble in self.troubles if trouble.facts <= facts]
        if found:
            return max(found, key=lambda trouble: (trouble.is_silent, len(trouble.facts)))
        untried = self.untried(facts)
        return f"was not tried with {' or '.join(untried)}" if untried else None

    def untried(self, facts: frozenset[str]) -> list[str]:
        """Words for those of some facts of mixtures that the engine was not tried with."""
        return [words for fact, words in FACTS.items() if fact in facts - self.tried - _TOLD_IN_DETAIL]


def facts_of(base: DenseModel, mixture: Mixture) -> frozenset[str]:
    """The facts that set a mixture apart from others of its family, as far as engines have been seen to care."""
    config = base.config
    said = {
        "untied": "tied" not in base.facts,
        "no_window": "window" not in base.facts,
        "grouped_heads": base.sizes["key"] < base.sizes["query"],
        "mscale": "mscale" in (config.get("rope_scaling") or {}),
        "state_spaces": "mamba" in base.layer_types,
        "positions": config.get("position_embedding_type") == "rope",
        "later_dense_layers": bool(set(mixture.dense_layers) - set(range(mixture.moe_layers[0]))),
        "absent": bool(mixture.absent),
        "foreign_tokens": base.family.model_type != "glm",
        _ACTIVATIONS.get(base.hidden_act, "other_activation"): base.hidden_act != "silu",
    }
    held = base.facts | mixture.facts | {fact for fact, holds in said.items() if holds}
    return frozenset(fact for fact in FACTS if fact in held) - _TOLD_IN_DETAIL


def trouble_of(engine: Engine, family: str, facts: frozenset[str]) -> Trouble | str | None:
    """An engine's trouble with a mixture of a family: None where it is right, words where that is not known."""
    found = readings()[engine].get(family)
    return "was not tried with this family" if found is None else found.of(facts)


def is_right(found: float | str) -> bool:
    """Whether an entry of the record means what transformers computes, but for rounding."""
    return isinstance(found, float) and found <= TOLERANCE


def right_in(family: str, facts: frozenset[str]) -> list[Engine]:
    """The engines that compute a mixture of a family as transformers 5 does."""
    return [engine for engine in ENGINES if trouble_of(engine, family, facts) is None]


@cache
def readings() -> Mapping[Engine, Mapping[str, Reading]]:
    """Read how each engine treats each family that it was tried with."""
    measured = json.loads(Path(__file__).with_name("engines.json").read_text(encoding="utf-8"))
    return {
        engine: {
            family: _read(about, [(frozenset(row["facts"]), _found(row[engine])) for row in rows if engine in row])
            for family, rows in measured["families"].items()
            if any(engine in row for row in rows)
        }
        for engine, about in measured["engines"].items()
    }


def _read(about: Mapping[str, str], rows: Sequence[tuple[frozenset[str], float | str]]) -> Reading:
    version = about["version"]
    wrong = [facts for facts, found in rows if not is_right(found)]
    right = [facts for facts, found in rows if is_right(found)]
    troubles = []
    while wrong:
        # The facts that are never in a mixture that was right, and explain the most with the least.
        culprit = max(_suspects(wrong, right), key=lambda facts: (-len(facts), sum(facts <= row for row in wrong)))
        happened = [found for facts, found in rows if culprit <= facts and facts in wrong]
        apart = [found for found in happened if isinstance(found, float)]
        messages = [found for found in happened if isinstance(found, str)]
        troubles.append(Trouble(culprit, max(apart) if apart else None, messages[0] if messages else "", version))
        wrong = [facts for facts in wrong if not culprit <= facts]
    # Nothing is known of facts that were tried only together with a trouble.
    known = frozenset().union(*right, *(trouble.facts for trouble in troubles))
    dates = " to ".join(about[key] for key in ("date", "last_date") if key in about)
    return Reading(version, tuple(troubles), known, dates)


def _found(written: float | str) -> float | str:
    return math.inf if written == NAN else written


def _suspects(wrong: Iterable[frozenset[str]], right: Sequence[frozenset[str]]) -> Iterator[frozenset[str]]:
    """Yield the smallest sets of facts that are in wrong mixtures and in no right one, in the order of `FACTS`."""
    for size in range(len(FACTS)):
        found = [
            facts
            for together in combinations(FACTS, size)
            if any((facts := frozenset(together)) <= row for row in wrong) and not any(facts <= row for row in right)
        ]
        if found:
            yield from found
            return

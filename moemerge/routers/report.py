"""The routing table: which experts take the tokens of which prompts, with warnings where that looks wrong."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

# An expert with a tenth of its fair share of tokens hardly takes part.
_DEAD_FRACTION: Final = 0.1
# Random routers stray from chance by less than this.
_CLEARLY_LESS: Final = 0.9
# An expert is weak that unseen text reaches for less than this share of the way from chance to all of it.
_WEAK: Final = 0.25
# |a - b| / (|a| + |b|): 0 for equal rows, 1 for opposite ones; 0.1 is an angle of about 11 degrees.
_PARALLEL_DISTANCE: Final = 0.1


@dataclass(frozen=True)
class LayerRouting:
    """One layer's routing of the prompts' tokens; None stands for an expert that is absent from the layer."""

    layer: int
    hit_rate: tuple[float | None, ...]
    """Share of each expert's own positive-prompt tokens that have it in their top k."""
    top1_accuracy: tuple[float | None, ...]
    """Share of each expert's own positive-prompt tokens that have it as their first choice."""
    load: tuple[float | None, ...]
    """Share of all positive-prompt tokens that have each expert in their top k; each expert's tokens weigh the same."""
    top_weight: float
    """Mean weight of the first choice."""
    held_out: tuple[float | None, ...] | None = None
    """Share of tokens whose expert comes first by rows made without the token's document; None without such rows."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The hit rates as percentages, for people."""
        return tuple("-" if share is None else f"{share:.0%}" for share in self.hit_rate)


@dataclass(frozen=True)
class RoutingReport:
    """The routing table of all layers."""

    experts: tuple[str, ...]
    """Names of the experts."""
    experts_per_token: int
    layers: tuple[LayerRouting, ...]
    """Empty where there were no prompts."""
    distances: dict[tuple[int, int], float]
    """Distance `|a - b| / (|a| + |b|)` of each pair of experts' router rows, averaged over layers."""
    writers: frozenset[int] = frozenset()
    """Numbers of the experts that wrote the text that their rows are made from."""
    from_prompts: bool = False
    """Whether the rows are made from prompts alone, which are shorter and plainer than most text."""
    computed_in: str = ""
    """The dtype that models were run in; empty where none was run."""
    kept_texts: tuple[int, int] | None = None
    """Groups of text whose router inputs an earlier merge had kept, and all groups; None without `kept_states`."""

    @property
    def chance(self) -> float:
        """Share of tokens that an expert gets under random routing, averaged over layers."""
        present = [sum(share is not None for share in row.hit_rate) for row in self.layers] or [len(self.experts)]
        return math.fsum(self.experts_per_token / experts for experts in present) / len(present)

    @property
    def hit_rate(self) -> tuple[float, ...]:
        """Share of each expert's own prompts' tokens that reach it, averaged over the layers that it is in."""
        return _mean_over_layers(layer.hit_rate for layer in self.layers)

    @property
    def top1_accuracy(self) -> tuple[float, ...]:
        """Share of each expert's own prompts' tokens that choose it first, averaged over the layers that it is in."""
        return _mean_over_layers(layer.top1_accuracy for layer in self.layers)

    @property
    def load(self) -> tuple[float, ...]:
        """Share of all prompts' tokens that reach each expert, averaged over the layers that it is in."""
        return _mean_over_layers(layer.load for layer in self.layers)

    @property
    def rows(self) -> tuple[tuple[str, float, float, float], ...]:
        """Name, hit rate, top-1 accuracy and load of each expert."""
        return tuple(zip(self.experts, self.hit_rate, self.top1_accuracy, self.load, strict=True))

    @property
    def top_weight(self) -> float:
        """Mean weight of the first choice, averaged over layers."""
        return math.fsum(row.top_weight for row in self.layers) / len(self.layers)

    @property
    def held_out(self) -> tuple[float, ...] | None:
        """Share of each expert's own tokens that choose it first by rows made without the token's document.

        It is averaged over the layers that the expert is in; None where no document could be held out.
        """
        known = [row.held_out for row in self.layers if row.held_out is not None]
        return _mean_over_layers(known) if known else None

    def on_unseen_text(self) -> str:
        """Say for each expert how often it is the first choice for its own text that the rows were not made from."""
        if self.held_out is None:
            return (
                "Nothing is known of unseen text: no document could be held out. Give every expert two prompts or "
                "more, or texts"
            )
        chance = self.chance / self.experts_per_token
        weak = chance + _WEAK * (1 - chance)
        shares = [
            f"{name} {share:.0%}"
            + (" of what it wrote" if number in self.writers else "")
            + (" (weak: give it texts, or more prompts)" if share < weak else "")
            for number, (name, share) in enumerate(zip(self.experts, self.held_out, strict=True))
        ]
        if self.from_prompts and not self.writers:
            return (
                "Held-out prompts: each expert is the first choice for this share of the tokens of its own prompts, by "
                f"routers that were made without them (chance {chance:.0%}): {', '.join(shares)}. Longer text is "
                "routed less well; `moemerge eval` measures it"
            )
        return (
            f"Unseen text: each expert is the first choice for this share of its own tokens, by routers that were made "
            f"without their document (chance {chance:.0%}): {', '.join(shares)}"
        )

    def warnings(self) -> list[str]:
        """Warnings about experts that are rarely chosen, and about pairs that the router can hardly tell apart."""
        found = []
        for name, hit_rate, top1, load in self.rows if self.layers else ():
            if load < _DEAD_FRACTION * self.chance:
                found.append(f"expert {name} is almost never chosen: {load:.1%} of the prompts' tokens reach it")
            elif top1 < _DEAD_FRACTION / len(self.experts):
                found.append(
                    f"expert {name} is almost never the first choice, not even for its own prompts: {top1:.1%}"
                )
            elif hit_rate < _CLEARLY_LESS * self.chance:
                found.append(
                    f"expert {name} gets fewer of its own prompts' tokens than chance would give it: "
                    f"{hit_rate:.1%} against {self.chance:.1%}"
                )
        found += [
            f"the router can hardly tell {self.experts[a]} from {self.experts[b]}: their rows are almost parallel"
            for (a, b), distance in self.distances.items()
            if distance < _PARALLEL_DISTANCE
        ]
        return found


def _mean_over_layers(shares: Iterable[tuple[float | None, ...]]) -> tuple[float, ...]:
    """Mean of shares by expert over the layers that it is in; 0 for one that is in none."""
    by_expert = [[share for share in of_expert if share is not None] for of_expert in zip(*shares, strict=True)]
    return tuple(math.fsum(found) / max(len(found), 1) for found in by_expert)

"""What a tuning is asked for, what it found, and what of its documents is held out."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from moemerge.errors import RefusedError
from moemerge.evaluation.figures import Estimate

Method = Literal["gates", "phatgoose"]

_HELD_OUT: Final = 4
"""One document of so many is held out, of each domain."""
# Distillation helps early and hurts late: https://arxiv.org/abs/2201.05596, section 4.2.
_DISTILLED: Final = 0.6


def distillation_weight(step: int, steps: int) -> float:
    """1 at first, 0 from 60 % of the steps on, a straight line between."""
    return max(0.0, 1 - step / (_DISTILLED * steps))


@dataclass(frozen=True)
class Settings:
    """The options of `moemerge tune`."""

    steps: int = 40
    tokens_per_step: int = 512
    lr: float = 0.07
    """How far a step of Adam moves a logit, about: it is divided by the length of the layer's router inputs."""
    seed: int = 0
    noise: float = 0.0
    """Standard deviation of what is added to each logit while training."""
    distil: bool = True
    method: Method = "gates"

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RefusedError: one is out of its range.
        """
        wrong = [
            f"--{name.replace('_', '-')}: expected {what}, found {value}."
            for name, value, fits, what in (
                ("steps", self.steps, self.steps >= 1, "1 or more"),
                ("tokens_per_step", self.tokens_per_step, self.tokens_per_step >= 1, "1 or more"),
                ("lr", self.lr, 0 < self.lr < math.inf, "a number above 0"),
                ("noise", self.noise, 0 <= self.noise < math.inf, "0 or more"),
            )
            if not fits
        ]
        if wrong:
            raise RefusedError(wrong[0])


@dataclass(frozen=True)
class Held:
    """What held-out text says of a router."""

    losses: Mapping[str, Estimate]
    """By domain: nats per token."""
    mean_loss: float
    """Over domains, each weighing alike."""
    accuracy: Mapping[str, float | None]
    """By domain: share of tokens whose first choice is the domain's expert, averaged over layers; None without one."""


@dataclass(frozen=True)
class Tuned:
    """What a tuning did."""

    model: str
    """The folder that holds the tuned model, or the untouched one where nothing was better."""
    method: str
    improved: bool
    """Whether anything was written."""
    step: int
    """After which step the routers were best."""
    steps: int
    before: Held
    after: Held
    """Of the routers that the model has now."""
    held_out_tokens: Mapping[str, int]
    held_out_documents: Mapping[str, int]
    seconds_per_step: float
    notes: tuple[str, ...]


def split_documents(
    documents: Mapping[str, Sequence[str]], seed: int
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Documents to train on and to judge by, by domain.

    Raises:
        RefusedError: a domain has one document only.
    """
    training, held = {}, {}
    for name, texts in documents.items():
        if len(texts) < 2:  # noqa: PLR2004  one for each part
            raise RefusedError(
                f"--data {name}=: one of its documents is held out to judge by, so at least 2 are needed; found "
                f"{len(texts)}. Divide it by lines <|document|>, or give another file."
            )
        order = list(range(len(texts)))
        random.Random(f"{seed}:{name}").shuffle(order)  # noqa: S311  no secret
        count = max(1, len(texts) // _HELD_OUT)
        held[name] = [texts[place] for place in sorted(order[:count])]
        training[name] = [texts[place] for place in sorted(order[count:])]
    return training, held


def card_section(found: Tuned) -> str:
    """The part of the model card on the tuning, in Markdown."""
    names = list(found.before.losses)
    what = "gates alone" if found.method == "gates" else "a sigmoid gate for each expert (PHATGOOSE)"
    texts = ", ".join(
        f"{name}: {found.held_out_tokens[name]} tokens of {found.held_out_documents[name]} documents" for name in names
    )
    lines = [
        "## Router tuning",
        "",
        f"`moemerge tune` trained {what}; the best of {found.steps} steps was step {found.step}. Loss in nats per "
        f"token on documents that were held out to choose it ({texts}), with 95 % intervals over documents where "
        "there are at least 5.",
        "",
        f"| routers | {' | '.join(names)} | mean |",
        "|---" * (len(names) + 2) + "|",
    ]  # fmt: skip
    for row, held in (("before", found.before), ("after", found.after)):
        cells = [f"{held.losses[name].value:.3f}{held.losses[name].interval}" for name in names]
        lines.append(f"| {row} | {' | '.join(cells)} | {held.mean_loss:.3f} |")
    known = [name for name in names if found.before.accuracy[name] is not None]
    if known:
        lines += ["", f"| right expert first | {' | '.join(known)} |", "|---" * (len(known) + 1) + "|"]
        for row, held in (("before", found.before), ("after", found.after)):
            lines.append(f"| {row} | {' | '.join(f'{held.accuracy[name]:.1%}' for name in known)} |")
    return "\n".join(lines)

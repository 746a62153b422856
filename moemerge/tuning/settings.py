"""What a tuning is asked for, what it found, and what of its documents is held out."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from moemerge.errors import RefusedError
from moemerge.evaluation.figures import FEWEST_DOCUMENTS, Estimate
from moemerge.model_card.card import loss_table
from moemerge.model_card.markdown import as_text

Documents = Mapping[str, Sequence[str]]
"""Texts by domain."""
Method = Literal["gates", "phatgoose"]

_HELD_OUT: Final = 4
"""One document of so many is held out, of each domain; never fewer than an interval needs."""
# Distillation helps early and hurts late: https://arxiv.org/abs/2201.05596, section 4.2.
_DISTILLED: Final = 0.6


def distillation_weight(step: int, steps: int) -> float:
    """1 at first, 0 from 60 % of the steps on, a straight line between."""
    return max(0.0, 1 - step / (_DISTILLED * steps))


@dataclass(frozen=True)
class Settings:
    """The options of `moemerge tune`."""

    steps: int = 40
    """Of training; with phatgoose, of each expert."""
    tokens_per_step: int = 512
    """Of all domains together; with phatgoose, of the expert's own."""
    lr: float = 0.07
    """How far a step of Adam moves a logit, about: it is divided by the length of the layer's router inputs."""
    seed: int = 0
    """Of what is held out, of the order of texts, and of the noise."""
    noise: float = 0.0
    """Standard deviation of what is added to each logit while training."""
    distil: bool = True
    """Whether each domain's own dense expert teaches, too."""
    method: Method = "gates"
    """All gates together, or a sigmoid gate of each expert alone."""
    allow_missing_domains: bool = False
    """Whether experts may be without text: what the tuning does to theirs is not seen then."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RefusedError: names every one that is out of its range.
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
            raise RefusedError("\n".join(wrong))


@dataclass(frozen=True)
class HeldOutScores:
    """What held-out text says of a router."""

    losses: Mapping[str, Estimate]
    """By domain: nats per token."""
    mean_loss: float
    """Over domains, each weighing alike."""
    accuracy: Mapping[str, float | None]
    """By domain: share of tokens whose first choice is the domain's expert, averaged over layers; None without one."""
    documents: Mapping[str, Sequence[Sequence[float]]]
    """By domain, of each document its loss in nats and its tokens."""


@dataclass(frozen=True)
class TuningResult:
    """What a tuning did."""

    model: str
    """The folder that holds the tuned model, or the untouched one where nothing was better."""
    method: str
    improved: bool
    """Whether the gain is more than chance, its interval above 0, and so was written."""
    step: int
    """After which step the routers were best."""
    steps: int
    before: HeldOutScores
    after: HeldOutScores
    """Of the routers that were best, which the model has now if anything was written."""
    gain: Estimate
    """How much lower the mean loss is than before; the interval is over documents, the same for both."""
    gains: Mapping[str, Estimate]
    """The same of each domain; below 0 where its loss is higher."""
    missing: tuple[str, ...]
    """Experts without text: see `Settings.allow_missing_domains`."""
    held_out_tokens: Mapping[str, int]
    held_out_documents: Mapping[str, int]
    seconds_per_step: float
    notes: tuple[str, ...]

    @property
    def harm(self) -> list[str]:
        """Who loses, with the figure, and of whom that is not known, in words."""
        lost = [
            f"{name} loses: its held-out loss is higher by {gain.reversed.precise}"
            for name, gain in self.gains.items()
            if gain.value < 0
        ]
        without = f"what tuned gates do to the text of {', '.join(self.missing)} is not known: none was given"
        return [*lost, without] if self.missing else lost


def split_documents(documents: Documents, seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Documents to train on and to judge by, by domain.

    A text that comes again counts once: it would be held out and trained on.

    Raises:
        RefusedError: a domain has too few documents to judge by.
    """
    training, held = {}, {}
    for name, given in documents.items():
        texts = list(dict.fromkeys(given))
        if len(texts) < 2 * FEWEST_DOCUMENTS:
            raise RefusedError(
                f"--data {name}=: {FEWEST_DOCUMENTS} of its documents are held out to judge by, and at least as many "
                f"trained on: {2 * FEWEST_DOCUMENTS} different ones are needed, found {len(texts)}. Divide it by lines "
                "<|document|>, or give more text."
            )
        order = list(range(len(texts)))
        random.Random(f"{seed}:{name}").shuffle(order)  # noqa: S311  no secret
        count = max(FEWEST_DOCUMENTS, len(texts) // _HELD_OUT)
        held[name] = [texts[place] for place in sorted(order[:count])]
        training[name] = [texts[place] for place in sorted(order[count:])]
    return training, held


def card_section(found: TuningResult) -> str:
    """The part of the model card on the tuning, in Markdown."""
    names = list(found.before.losses)
    what = "gates alone" if found.method == "gates" else "a sigmoid gate for each expert (PHATGOOSE)"
    texts = ", ".join(
        f"{as_text(name)}: {found.held_out_tokens[name]} tokens of {found.held_out_documents[name]} documents"
        for name in names
    )
    rows = {"before": found.before, "after": found.after}
    lines = [
        "## Router tuning",
        "",
        f"`moemerge tune` trained {what}; the best of {found.steps} steps was step {found.step}. Loss in nats per "
        f"token on documents that were held out to choose it ({texts}), with 95 % intervals over documents. "
        "What stands under Routing is of the routers before.",
        "",
        *loss_table(
            "routers", names, {row: held.losses for row, held in rows.items()},
            {row: held.mean_loss for row, held in rows.items()},
        ),
        "",
        f"The mean is lower by {found.gain.precise}.",
        *(f"\n> **Note:** {as_text(harm)}." for harm in found.harm),
    ]  # fmt: skip
    known = [name for name in names if found.before.accuracy[name] is not None]
    if known:
        lines += ["", f"| right expert first | {' | '.join(map(as_text, known))} |", "|---" * (len(known) + 1) + "|"]
        for row, held in rows.items():
            lines.append(f"| {row} | {' | '.join(f'{held.accuracy[name]:.1%}' for name in known)} |")
    return "\n".join(lines)

"""The options of a tuning, its result, and which of its documents are held out."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np

from moemerge.chats import COUNTED_ROLES, Document
from moemerge.dtypes import ComputeDtype
from moemerge.errors import RefusedError
from moemerge.evaluation.figures import FEWEST_DOCUMENTS, Estimate, Sums, difference
from moemerge.model_card.card import loss_table
from moemerge.model_card.markdown import as_text

Documents = Mapping[str, Sequence[Document]]
"""Texts and chats by domain."""
Method = Literal["gates", "phatgoose"]
Trained = Literal["gates", "gates,norms"]

_HELD_OUT: Final = 4
"""One document of so many in each domain is held out; never fewer than an interval needs."""
# A domain's loss may rise by so many nats per token, even surely: less matters to no one.
_HARMLESS: Final = 0.002
# Distillation helps early and hurts late: https://arxiv.org/abs/2201.05596, section 4.2.
_DISTILLED: Final = 0.6


def distillation_weight(step: int, steps: int) -> float:
    """The weight of distillation: 1 at first, 0 from 60 % of the steps on, linear in between."""
    return max(0.0, 1 - step / (_DISTILLED * steps))


@dataclass(frozen=True)
class Settings:
    """The options of `moemerge tune`."""

    steps: int = 20
    """Number of training steps; with phatgoose, for each expert."""
    tokens_per_step: int = 512
    """Tokens of all domains in a step; with phatgoose, of the expert's own domain."""
    lr: float = 0.07
    """How far a step of Adam moves a logit, about: the rate is divided by the length of the layer's router inputs."""
    seed: int = 0
    """Seed for the held-out documents, for the order of texts, and for the noise."""
    noise: float = 0.0
    """Standard deviation of the noise that is added to each logit while training."""
    distil: bool = False
    """Whether each domain's own dense expert teaches, too: staged distillation."""
    method: Method = "gates"
    """Train all gates together, or a sigmoid gate for each expert alone."""
    train: Trained = "gates"
    """What is trained: gates alone, or the norms that are before and after attention and FFNs, too."""
    allow_missing_domains: bool = False
    """Whether experts may lack text; what the tuning does to their text is not seen then."""
    roles: tuple[str, ...] = COUNTED_ROLES
    """Whose messages of chats count."""
    compute_dtype: ComputeDtype = "auto"
    """What models are run in. With `auto`, the mixture on a CPU in what accelerate is set to, teachers in the faster
    dtype."""

    def __post_init__(self) -> None:
        """Check that numbers are in their ranges.

        Raises:
            RefusedError: names every number that is out of its range.
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
        if self.method == "phatgoose" and self.train != "gates":
            wrong.append(f"--method phatgoose: trains gates alone, found --train {self.train}.")
        if wrong:
            raise RefusedError("\n".join(wrong))


@dataclass(frozen=True)
class HeldOutScores:
    """Losses and choices of a mixture on held-out text, by domain."""

    losses: Mapping[str, Estimate]
    """Nats per token by domain."""
    mean_loss: float
    """Mean loss over domains, each weighing alike."""
    accuracy: Mapping[str, float | None]
    """Share of tokens whose first choice is the domain's expert, by domain, averaged over layers; None without one."""
    documents: Mapping[str, Sequence[Sequence[float]]]
    """Loss in nats and number of tokens of each document, by domain."""

    @property
    def sums(self) -> dict[str, Sums]:
        """Loss in nats and number of tokens (document, 2) by domain."""
        return {name: np.array(found) for name, found in self.documents.items()}

    def gains(self, before: "HeldOutScores") -> dict[str, Estimate]:
        """How much lower the loss of each domain is than before, on the same documents; below 0 where it is higher."""
        return {name: difference({name: old}, {name: self.sums[name]}) for name, old in before.sums.items()}

    def worsened(self, before: "HeldOutScores") -> list[str]:
        """Domains whose loss is surely higher than before, beyond what is harmless, with the figure, in words."""
        risen = {name: gain.reversed for name, gain in self.gains(before).items()}
        return [
            f"{name}'s is higher by {rise.precise}"
            for name, rise in risen.items()
            if rise.low is not None and rise.low > 0 and rise.value > _HARMLESS
        ]


@dataclass(frozen=True)
class TuningResult:
    """The result of a tuning."""

    model: str
    """The folder that holds the tuned model, or the untouched one where nothing was better."""
    method: str
    train: Trained
    """What was trained."""
    improved: bool
    """Whether the gain is more than chance (its interval is above 0), so that what was trained was written."""
    step: int
    """The step after which the routers were best."""
    steps: int
    before: HeldOutScores
    after: HeldOutScores
    """Scores of the best routers, which the model has now if anything was written."""
    gain: Estimate
    """How much lower the mean loss is than before; the interval is over documents, the same for both."""
    gains: Mapping[str, Estimate]
    """How much lower the loss of each domain is; below 0 where it is higher."""
    missing: tuple[str, ...]
    """Experts without text: see `Settings.allow_missing_domains`."""
    held_out_tokens: Mapping[str, int]
    held_out_documents: Mapping[str, int]
    sources: tuple[str, ...]
    """The commits of data sets on the Hub that were read, in words."""
    seconds_per_step: float
    notes: tuple[str, ...]

    @property
    def harm(self) -> list[str]:
        """Domains that lose, with the figure, and experts for which that is not known, in words."""
        lost = [
            f"{name} loses: its held-out loss is higher by {gain.reversed.precise}"
            for name, gain in self.gains.items()
            if gain.value < 0
        ]
        without = f"what tuned gates do to the text of {', '.join(self.missing)} is not known: none was given"
        return [*lost, without] if self.missing else lost


class SplitDocuments(NamedTuple):
    """Documents by domain, divided into those that are trained on and those that are held out."""

    training: dict[str, list[Document]]
    held_out: dict[str, list[Document]]
    sources: tuple[str, ...] = ()
    """The commits of data sets on the Hub that they are from, in words."""

    def of(self, domain: str) -> "SplitDocuments":
        """Give the documents of one domain alone."""
        return SplitDocuments({domain: self.training[domain]}, {domain: self.held_out[domain]})


def split_documents(documents: Documents, seed: int) -> SplitDocuments:
    """Split documents into those to train on and those to judge by, each by domain.

    A repeated text counts once, since it might be both held out and trained on.

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
    return SplitDocuments(training, held)


def card_section(found: TuningResult) -> str:
    """Write the part of the model card on the tuning, in Markdown."""
    names = list(found.before.losses)
    what = "gates alone" if found.train == "gates" else "gates and the norms that experts share"
    if found.method == "phatgoose":
        what = "a sigmoid gate for each expert (PHATGOOSE)"
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
            "routers",
            names,
            {row: held.losses for row, held in rows.items()},
            {row: held.mean_loss for row, held in rows.items()},
        ),
        "",
        f"The mean is lower by {found.gain.precise}.",
        *(f"\n> **Note:** {as_text(harm)}." for harm in (*found.sources, *found.harm)),
    ]
    known = [name for name in names if found.before.accuracy[name] is not None]
    if known:
        lines += ["", f"| right expert first | {' | '.join(map(as_text, known))} |", "|---" * (len(known) + 1) + "|"]
        for row, held in rows.items():
            lines.append(f"| {row} | {' | '.join(f'{held.accuracy[name]:.1%}' for name in known)} |")
    return "\n".join(lines)

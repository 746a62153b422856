"""Shared steps of methods that fit rows to labelled tokens: targets and weights, held-out documents, scale."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import torch

from moemerge.routers.kept_fits import hash_of, kept_rows
from moemerge.routers.pass_inputs import LayerRows, PassRequest, RouterInputs
from moemerge.routers.scaling import SHARPEST, calibrated_scale, finish_rows
from moemerge.routers.scoring import fit_scale

# Few tokens are cheap to fit several times, and need every document; many tokens do not.
_FOLDS_OF_FEW: Final = 4
_FOLDS_OF_MANY: Final = 2
_JUDGED_EVERY: Final = 4
# Pseudo-tokens of mean variance for each expert and dimension, as measured on prompts and on texts.
_LAMBDA: Final = 1 / 16


@dataclass(frozen=True)
class Labelled:
    """Tokens with the experts that should take them."""

    states: torch.Tensor
    """Router inputs (token, hidden)."""
    targets: torch.Tensor
    """Share (token, expert) that each expert should take of a token, summing to 1."""
    weights: torch.Tensor
    """Weight of each token (token,), such that every expert's tokens weigh the same in all."""
    regularisation: float
    """Penalty on the rows, relative to the mean variance of the states."""

    @cached_property
    def kind(self) -> torch.Tensor:
        """Number of each token's target (token,), the same for equal ones."""
        _, kind = torch.unique(self.targets, dim=0, return_inverse=True)
        numbers: torch.Tensor = kind
        return numbers

    @cached_property
    def contents(self) -> str:
        """A value that any change of the tokens, their labels or the penalty changes."""
        return hash_of((self.regularisation,), (self.states, self.targets, self.weights))

    def part(self, chosen: torch.Tensor) -> "Labelled":
        """Select tokens by a mask (token,), reweighted so that each target keeps its total weight.

        Otherwise an expert whose long documents are held out would lose to the others everywhere.
        """
        kind = self.kind
        whole = torch.bincount(kind, self.weights)
        left = torch.bincount(kind[chosen], self.weights[chosen], minlength=len(whole))
        weights = self.weights[chosen] * (whole / left)[kind[chosen]] * (int(chosen.sum()) / len(chosen))
        return Labelled(self.states[chosen], self.targets[chosen], weights, self.regularisation)


@dataclass(frozen=True)
class Fit:
    """A method of fitting rows to labelled tokens."""

    name: str
    solve: Callable[[Labelled], torch.Tensor]
    """A function from labelled tokens to rows (expert, hidden)."""
    given: tuple[torch.Tensor, ...] = ()
    """All that `solve` depends on beside the labelled tokens."""
    kept: Path | None = None
    """Folder that keeps rows; None for none."""

    def rows(self, data: Labelled, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """Make rows (expert, hidden) by all tokens, or by those of a mask (token,)."""

        def fit() -> torch.Tensor:
            return self.solve(data if chosen is None else data.part(chosen))

        if self.kept is None:
            return fit()
        given = self.given if chosen is None else (*self.given, chosen)
        return kept_rows(self.kept, hash_of((self.name, data.contents), given), fit)


def fit_rows(inputs: RouterInputs, request: PassRequest, fit: Fit, *, calibrated: bool = True) -> LayerRows:
    """Make rows by a method, and judge them on held-out documents.

    Args:
        inputs: the layer's router inputs.
        request: the pass's request.
        fit: the method.
        calibrated: whether the scale is calibrated on held-out documents; without it, the scale is the method's own,
            but no sharper than a calibrated one may be.
    """
    present, fit = request.present(inputs.layer), replace(fit, kept=request.kept_fits)
    data, right, folds = _label(inputs, request, present)
    rows = fit.rows(data)
    judged = right >= 0
    states = data.states if judged.all() else data.states[judged]
    logits = _held_out_logits(data, folds, fit) if calibrated or _is_judged(inputs.layer, request) else None
    if not calibrated:
        scale = min(1.0, fit_scale(rows, states, 2, SHARPEST))
    elif logits is None:
        scale = fit_scale(rows, states, request.mixture.experts_per_token)
    else:
        scale = calibrated_scale(rows, states, logits[judged], data.targets[judged], data.weights[judged])
    held_out = None if logits is None else _shares_right(logits[judged], right[judged], request, present)
    return LayerRows(finish_rows(rows * scale, states, inputs, request), held_out)


def _is_judged(layer: int, request: PassRequest) -> bool:
    """Whether a layer's rows are judged on held-out documents where nothing is fitted to these.

    That is every fourth layer, since each is fitted twice more for it; all, if experts are absent from some; and none
    where nothing is reported.
    """
    if not request.reported:
        return False
    place = request.mixture.moe_layers.index(layer)
    first = min(_JUDGED_EVERY // 2, len(request.mixture.moe_layers) - 1)
    return bool(request.mixture.absent) or place % _JUDGED_EVERY == first


def _held_out_logits(data: Labelled, folds: torch.Tensor, fit: Fit) -> torch.Tensor | None:
    """Logits (token, expert) by rows that were made without the token's document; None where there is one fold."""
    parts = sorted(set(folds.tolist()))
    if len(parts) == 1:
        return None
    logits = torch.empty(len(data.states), data.targets.shape[1])
    for fold in parts:
        held = folds == fold
        logits[held] = data.states[held] @ fit.rows(data, ~held).T
    return logits


def _shares_right(
    logits: torch.Tensor, right: torch.Tensor, request: PassRequest, present: list[int]
) -> tuple[float | None, ...]:
    """For each expert, the share of its tokens for which it has the largest logit; None for absent experts."""
    hits = (logits.argmax(dim=1) == right).float()
    shares: list[float | None] = [None] * len(request.mixture.expert_widths)
    for place, expert in enumerate(present):
        shares[expert] = float(hits[right == place].mean())
    return tuple(shares)


def _label(
    inputs: RouterInputs, request: PassRequest, present: list[int]
) -> tuple[Labelled, torch.Tensor, torch.Tensor]:
    """Label the tokens of present experts; also return each one's expert among these (-1 in negative text) and fold.

    A token of an expert's negative text should go to any other expert. Negative text weighs, in all, as much as one
    expert's positive text.
    """
    chosen = torch.isin(inputs.expert, torch.tensor(present))
    place = torch.full((len(request.mixture.expert_widths),), -1)
    place[present] = torch.arange(len(present))
    expert, positive = place[inputs.expert[chosen]], inputs.positive[chosen]
    own = torch.nn.functional.one_hot(expert, len(present)).float()
    targets = torch.where(positive[:, None], own, (1 - own) / max(len(present) - 1, 1))
    weights = torch.zeros(len(expert))
    for index in range(len(present)):
        for sign, share in ((True, 1.0), (False, 1 / len(present))):
            mine = (expert == index) & (positive == sign)
            weights[mine] = share / mine.sum()
    weights *= len(weights) / weights.sum()
    tokens = len(expert) / len(present)
    hidden = inputs.states.shape[1]
    data = Labelled(inputs.states[chosen], targets, weights, request.settings.lambda_ or default_lambda(hidden, tokens))
    folds = fold(expert, inputs.document[chosen], hidden, positive)
    return data, torch.where(positive, expert, -1), folds


def default_lambda(hidden: int, tokens: float) -> float:
    """The penalty on rows (expert, hidden) that are fitted to so many tokens for each expert."""
    return _LAMBDA * hidden / tokens


def fold(expert: torch.Tensor, document: torch.Tensor, hidden: int, positive: torch.Tensor) -> torch.Tensor:
    """Assign the documents of tokens to folds (token,), such that every expert has positive ones in each fold.

    Args:
        expert: the expert of each token (token,).
        document: the document of each token (token,).
        hidden: the number of dimensions; fewer tokens than that are divided into more folds.
        positive: mask (token,) of the tokens that are for their expert.
    """
    count = _FOLDS_OF_FEW if len(expert) < hidden else _FOLDS_OF_MANY
    folds = torch.zeros(len(expert), dtype=torch.long)
    for index in set(expert.tolist()):
        own = expert == index
        count = min(count, len(set(document[own & positive].tolist())))
    for index in set(expert.tolist()):
        for sign in (True, False):
            own = (expert == index) & (positive == sign)
            order = {number: place for place, number in enumerate(sorted(set(document[own].tolist())))}
            folds[own] = torch.tensor([order[number] % count for number in document[own].tolist()], dtype=torch.long)
    return folds

"""Router rows for experts that join a mixture whose other rows stay as they are.

With the kept rows fixed, only the share that they have together matters to a new row:

    exp(v.z) / (exp(v.z) + sum over kept experts of exp(w.z))

where the sum is a number for each token. A new row is therefore a logistic regression with a known offset: its tokens
against all others, whichever kept experts these are for. In a mixture that weighs by sigmoids, these take the place of
the exponentials.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch

from moemerge.families.family import Scoring
from moemerge.routers.combined import PRIOR_WEIGHT, trust_in
from moemerge.routers.fitting import Labelled, default_lambda
from moemerge.routers.logistic import descend
from moemerge.routers.pass_inputs import RouterInputs
from moemerge.routers.scoring import fit_scale, log_scores

# Of one, new experts without text take too much of other text, and those with text are not better.
_PRIOR_SHARE: Final = 0.5
# One row carries the whole contrast to the others, which all rows share where all are fitted.
_LAMBDA_SHARE: Final = 0.25


@dataclass(frozen=True)
class KeptRows:
    """Rows of one layer that stay as they are."""

    rows: torch.Tensor
    """Rows (kept expert, hidden) in float32, without those of experts that are absent from the layer."""
    scoring: Scoring

    def log_score(self, states: torch.Tensor) -> torch.Tensor:
        """Logarithm of the sum of the kept experts' scores (token,) for states (token, hidden)."""
        return log_scores(states @ self.rows.T, self.scoring).logsumexp(dim=1)


def first_rows(kept: KeptRows, prior: torch.Tensor | None, states: torch.Tensor, count: int) -> torch.Tensor:
    """Make rows (new expert, hidden) of new experts before any text of theirs says something.

    That is the mean of the kept rows, which wins no token that is clearly some kept expert's, and with a prior what it
    says of the new experts beside the kept ones, at half the scale that the kept rows have.

    Args:
        kept: the rows that stay.
        prior: rows (kept and new expert, hidden) from the weights, at any scale; None without one.
        states: router inputs (token, hidden) of any text.
        count: the number of new experts.
    """
    mean = kept.rows.mean(dim=0).expand(count, -1)
    if prior is None:
        return mean
    known = len(kept.rows)
    relative = prior - prior[:known].mean(dim=0)
    return mean + relative[known:] * (_PRIOR_SHARE * _scale_of(kept, relative[:known], states, prior))


def _scale_of(kept: KeptRows, relative: torch.Tensor, states: torch.Tensor, prior: torch.Tensor) -> float:
    """The factor at which a prior's logits of the kept experts are as far apart as those of the kept rows."""
    theirs = states @ (kept.rows - kept.rows.mean(dim=0)).T
    ours = states @ relative.T
    spread = float(ours.square().mean())
    if spread > 0 and len(kept.rows) > 1:
        return math.sqrt(float(theirs.square().mean()) / spread)
    return fit_scale(prior, states, 2, PRIOR_WEIGHT)


def fit_added_rows(kept: KeptRows, first: torch.Tensor, data: Labelled) -> torch.Tensor:
    """Fit rows (new expert, hidden) to labelled tokens, beginning at `first` and drawn towards it.

    What `first` says beyond the mean of the kept rows counts as far as it agrees with the labels.

    Args:
        kept: the rows that stay.
        first: rows (new expert, hidden), as `first_rows` makes them.
        data: tokens with the shares (token, 1 + new expert) that all kept experts together, and each new one, should
            take of them.
    """
    mean = kept.rows.mean(dim=0)
    said = torch.cat([torch.zeros(1, len(mean)), first - mean])
    start = mean + trust_in(said, data) * (first - mean)
    offset, known = data.states @ start.T, kept.log_score(data.states)

    def misses(moved: torch.Tensor) -> torch.Tensor:
        logits = offset + moved
        scores = torch.cat([known[:, None], log_scores(logits, kept.scoring)], dim=1)
        slope = (scores.softmax(dim=1) - data.targets)[:, 1:]
        return slope if kept.scoring == "softmax" else slope * torch.sigmoid(-logits)

    return start + descend(data, misses, len(start), accelerated=True)


def sharpened(kept: KeptRows, rows: torch.Tensor, data: Labelled) -> torch.Tensor:
    """Move fitted rows (new expert, hidden) away from the mean of the kept rows, at most to twice as far.

    Rows at the smallest cross-entropy miss too many tokens of their own for the mixture's loss. A row goes as far as it
    takes its own tokens: by their mean share `s`, it is `2 s` times as far from the mean as before. An expert that
    shares all its tokens with another has one half of them, and keeps its row.

    Args:
        kept: the rows that stay.
        rows: the rows from `fit_added_rows`.
        data: the tokens that these were fitted to.
    """
    scores = torch.cat([kept.log_score(data.states)[:, None], log_scores(data.states @ rows.T, kept.scoring)], dim=1)
    own = data.targets[:, 1:] * data.weights[:, None]
    taken = (own * scores.softmax(dim=1)[:, 1:]).sum(dim=0) / own.sum(dim=0)
    mean = kept.rows.mean(dim=0)
    return mean + (2 * taken).clamp_min(1.0)[:, None] * (rows - mean)


def label_added(inputs: RouterInputs, known: int, lambda_: float | None) -> tuple[Labelled, torch.Tensor]:
    """Label tokens by the kept experts together, or by each new one that has text; also return which tokens (token,).

    Each new expert's tokens weigh the same in all. Those of kept experts weigh as much as so many experts; where none
    of them has text, neutral text takes its place.

    Args:
        inputs: router inputs of text of kept experts, which have the first numbers, of new ones, and neutral text.
        known: the number of kept experts.
        lambda_: penalty on the rows relative to the mean variance of the states; None chooses it by the tokens.
    """
    new, of_kept = inputs.expert >= known, (inputs.expert >= 0) & (inputs.expert < known)
    chosen = new | (of_kept if of_kept.any() else inputs.neutral)
    expert = inputs.expert[chosen]
    numbers, place = torch.unique(expert, return_inverse=True)  # ascending: those of new experts come last
    count = int((numbers >= known).sum())
    others = len(numbers) - count
    label = (place - others + 1).clamp_min(0)
    weights = torch.where(label > 0, 1.0, known / max(others, 1)) / torch.bincount(place)[place]
    weights *= len(weights) / weights.sum()
    states, targets = inputs.states[chosen], torch.nn.functional.one_hot(label, count + 1).float()
    penalty = lambda_ or _LAMBDA_SHARE * default_lambda(states.shape[1], int(new.sum()) / count)
    return Labelled(states, targets, weights, penalty), chosen

"""Figures of what all experts of a layer make of the same tokens, chosen or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from moemerge.analysis.figures import Numbers
from moemerge.evaluation.expert_outputs import Expert
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.sharing_out import shared_out

# Numbers of all experts' outputs for a block of tokens, 128 MB; a block has at least, and at most, so many tokens.
_NUMBERS: Final = 2**25
_FEWEST, _MOST = 64, 2048
_NEAR: Final = 0.001


@dataclass(frozen=True)
class LayerOutputs:
    """What was measured of the outputs of a layer's experts; the absent ones have NaN throughout."""

    similarity: Numbers
    """Mean cosine of two experts' outputs (expert, expert): 0 for a token where one is 0, while tokens where both are
    do not count."""
    similarity_chosen: Numbers
    """The same over tokens that choose both."""
    similarity_others: Numbers
    """The same over tokens that choose neither."""
    lengths: Numbers
    """Length of each output (token, expert)."""
    sparsity: Numbers
    """Share of each expert's intermediate states that are near 0 (expert,)."""


@dataclass(frozen=True)
class OutputSums:
    """Sums over tokens of what all experts of a layer make of them; those of other tokens can be added."""

    lengths: torch.Tensor
    """Length of each output (token, expert)."""
    near: torch.Tensor
    """Share of each expert's intermediate states that are near 0 (expert,), summed over the tokens."""
    sums: torch.Tensor
    """Sums of cosines (kind, expert, expert): of all tokens, of those that choose both experts, and neither."""
    counts: torch.Tensor
    """Numbers of these tokens (kind, expert, expert)."""

    def figures(self, numbers: Sequence[int], count: int) -> LayerOutputs:
        """The figures of experts with some numbers among `count`."""
        similarity = [_spread(each, numbers, count) for each in (self.sums / self.counts).numpy()]
        return LayerOutputs(
            similarity[0],
            similarity[1],
            similarity[2],
            _columns(self.lengths.double().numpy(), numbers, count),
            _columns((self.near / len(self.lengths)).numpy(), numbers, count),
        )


def sum_outputs(experts: Sequence[Expert], inputs: torch.Tensor, chosen: torch.Tensor, compute: Compute) -> OutputSums:
    """Compute the outputs of all experts for all tokens, a block of tokens at a time.

    Args:
        experts: the experts that the layer has.
        inputs: what enters the experts (token, hidden).
        chosen: 1 where a token chooses an expert, else 0 (token, expert of these).
        compute: the devices and dtype to compute in.
    """
    count, (tokens, hidden) = len(experts), inputs.shape
    step = max(_FEWEST, min(_MOST, _NUMBERS // (count * hidden)))
    sums, counts = torch.zeros(3, count, count, dtype=torch.float64), torch.zeros(3, count, count, dtype=torch.float64)
    lengths = torch.zeros(tokens, count)
    near = torch.zeros(count, dtype=torch.float64)
    spans = [slice(first, first + step) for first in range(0, tokens, step)]
    computes = compute.each[: len(spans)]
    copies = [experts, *([expert.on(other.device) for expert in experts] for other in computes[1:])]
    rooms = [torch.empty(count, min(step, tokens), hidden, device=one.device) for one in computes]

    def measured(device: int, span: slice) -> _Block:
        states = inputs[span].to(device=rooms[device].device, dtype=compute.dtype)
        return _measure_block(copies[device], states, chosen[span], rooms[device][:, : len(states)])

    for span, block in zip(spans, shared_out(measured, spans, len(computes)), strict=True):
        near += block.near
        lengths[span] = block.lengths
        sums += block.sums
        counts += block.counts
    return OutputSums(lengths, near / experts[0].gate.shape[0], sums, counts)


@dataclass(frozen=True)
class _Block:
    """What was measured of some tokens; sums are over all of them, over those that choose both, and neither."""

    near: torch.Tensor
    """Number of each expert's intermediate states that are near 0 (expert,)."""
    lengths: torch.Tensor
    """Length of each output (token, expert)."""
    sums: torch.Tensor
    """Sums of cosines (kind, expert, expert)."""
    counts: torch.Tensor
    """Numbers of tokens (kind, expert, expert)."""


@torch.inference_mode()
def _measure_block(experts: Sequence[Expert], states: torch.Tensor, chosen: torch.Tensor, room: torch.Tensor) -> _Block:
    """Measure the outputs of all experts for states (token, hidden), in the room for them (expert, token, hidden)."""
    near = torch.zeros(len(experts), dtype=torch.int64)
    for place, expert in enumerate(experts):
        activated = expert.activated(states)
        near[place] = int(torch.count_nonzero(activated.abs() < _NEAR))
        room[place] = expert.output(states, activated)
    # Squares of what is very small or large would be 0 or infinite.
    largest = torch.linalg.vector_norm(room, torch.inf, dim=2, keepdim=True)
    room /= largest.clamp_min(torch.finfo(room.dtype).tiny)
    gram = torch.einsum("eth,fth->tef", room, room)
    length = gram.diagonal(dim1=1, dim2=2).sqrt()
    cosines = gram / (length[:, :, None] * length[:, None, :]).clamp_min(torch.finfo(gram.dtype).tiny)
    mine = chosen.to(room.device, torch.float32)
    sums, counts = [], []
    for weights in (torch.ones_like(mine), mine, 1 - mine):
        sums.append((cosines * weights[:, :, None] * weights[:, None, :]).sum(dim=0).cpu())
        nothing = weights * (length == 0)
        counts.append((weights.T @ weights - nothing.T @ nothing).cpu())
    return _Block(near, (length * largest[:, :, 0].T).cpu(), torch.stack(sums), torch.stack(counts))


def _spread(values: Numbers, numbers: Sequence[int], count: int) -> Numbers:
    """Put values (expert, expert) at the experts' numbers among `count`; all others are NaN."""
    spread = np.full((count, count), np.nan)
    spread[np.ix_(numbers, numbers)] = values
    return spread


def _columns(values: Numbers, numbers: Sequence[int], count: int) -> Numbers:
    """Put values (..., expert) at the experts' numbers among `count`; all others are NaN."""
    spread = np.full((*values.shape[:-1], count), np.nan)
    spread[..., numbers] = values
    return spread


def count_ranks(scores: Numbers, lengths: Numbers) -> NDArray[np.int64]:
    """Count tokens and experts by the rank of the score and of the length (token, expert): (rank, rank).

    Rank 0 is the largest. Experts whose length is NaN take part in nothing.
    """
    count = scores.shape[1]
    present = np.flatnonzero(~np.isnan(lengths[0]))
    by_score, by_length = (
        (-values[:, present]).argsort(axis=1, kind="stable").argsort(axis=1) for values in (scores, lengths)
    )
    ranks = np.zeros((count, count), np.int64)
    np.add.at(ranks, (by_score, by_length), 1)
    return ranks


def longest_first(first: NDArray[np.int64], lengths: Numbers) -> float:
    """Share of tokens whose first expert (token,) has the longest output (token, expert).

    Of several that are equally long, each has its part. Experts whose length is NaN take part in nothing.
    """
    longest = lengths == np.nanmax(lengths, axis=1, keepdims=True)
    mine = np.take_along_axis(longest, first[:, None], axis=1)[:, 0]
    return float((mine / longest.sum(axis=1)).mean())


def correlate(scores: Numbers, lengths: Numbers) -> float:
    """Pearson's correlation of scores and lengths (token, expert), each less its mean over the token's experts.

    NaN where one does not vary. Experts whose length is NaN take part in nothing.
    """
    present = ~np.isnan(lengths[0])
    one, other = (values[:, present] - values[:, present].mean(axis=1, keepdims=True) for values in (scores, lengths))
    squares = float((one**2).sum() * (other**2).sum())
    return float((one * other).sum()) / squares**0.5 if squares > 0 else np.nan

"""How much each expert matters: REAP's saliency and simpler measures over text, a layer at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from moemerge.editing.pruning.similarity import relative_differences
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.expert_outputs import ExpertOutputs
from moemerge.evaluation.layer_tokens import LayerTokens, run_by_layer
from moemerge.evaluation.runnable import MixtureModel
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.sharing_out import shared_out

Groups = Mapping[int, Sequence[Sequence[int]]]
"""Experts that belong together, by layer; those in none are by themselves."""
Numbers = NDArray[np.float64]

# Tokens of a layer on which outputs of all its experts are compared.
_COMPARED: Final = 64


@dataclass(frozen=True)
class Saliency:
    """What was measured of every expert in every layer with a router; layers are in the order of `layers`."""

    layers: tuple[int, ...]
    """Numbers of the layers."""
    domains: tuple[str, ...]
    tokens: tuple[int, ...]
    """Number of tokens of each domain."""
    choices: tuple[NDArray[np.int16], ...]
    """Chosen experts of each token (token, choice), for each layer."""
    reap: Numbers
    """REAP's saliency (layer, expert): `1/|X| sum over X of g(x) |f(x)|`, with X the tokens that choose the expert, g
    its weight and |f| the Euclidean length of its output; 0 where no token does. Experts of one group have that of
    all of them together, where g is the sum of their weights. See https://arxiv.org/abs/2510.13999, equation 9."""
    mass: Numbers
    """The same sum over X before the division, by itself for each expert (layer, expert)."""
    load: Numbers
    """Share of a domain's tokens that choose each expert (domain, layer, expert)."""
    weight: Numbers
    """Mean weight of each expert (layer, expert) over the tokens that choose it; 0 where none does."""
    router_norm: Numbers
    """Length of each expert's router row (layer, expert)."""
    differences: Numbers
    """Relative difference of experts' outputs (layer, expert, expert) on some tokens that may choose neither of them:
    0 for equal outputs, 1.41 for unrelated ones of one length."""

    @property
    def frequency(self) -> Numbers:
        """Share of all tokens that choose each expert (layer, expert)."""
        counts = np.array(self.tokens, np.float64)
        frequency: Numbers = np.tensordot(counts / counts.sum(), self.load, 1)
        return frequency


def measure_saliency(
    mixture: MixtureModel,
    texts: Texts,
    compute: Compute,
    together: Groups,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Saliency:
    """Run a mixture over text and measure its experts; a layer, its router inputs and one expert are in memory.

    Args:
        mixture: the mixture.
        texts: windows of text by domain.
        compute: the device and dtype to run in.
        together: experts with equal FFNs, which are judged together.
        progress: called with the layers done and all there are.

    Raises:
        CheckpointError: the mixture's files are damaged, or its numbers are not finite.
    """
    tally = _Tally(mixture, texts, [ExpertOutputs(mixture, one) for one in compute.each], together)
    run_by_layer(mixture, texts, compute, tally.add, progress)
    return tally.found()


class _Tally:
    """Sums up what is measured, a layer at a time."""

    def __init__(self, mixture: MixtureModel, texts: Texts, outputs: Sequence[ExpertOutputs], together: Groups) -> None:
        """Measure experts by their outputs, which are made on one device or several."""
        self._mixture, self._texts, self._outputs, self._together = mixture, texts, outputs, together
        self._places = {layer: place for place, layer in enumerate(mixture.moe_layers)}
        shape = (len(self._places), len(mixture.experts))
        self._reap, self._mass, self._weight, self._norm = (np.zeros(shape) for _ in range(4))
        self._load = np.zeros((len(texts.domains), *shape))
        self._differences = np.zeros((*shape, shape[1]))
        self._tokens = np.zeros(len(texts.domains))
        self._choices: list[NDArray[np.int16]] = []

    def add(self, tokens: LayerTokens) -> None:
        place, count = self._places[tokens.layer], len(self._mixture.experts)
        given = torch.zeros(len(tokens.weights), count).scatter_(1, tokens.experts, tokens.weights)
        chosen = torch.zeros(len(tokens.weights), count).scatter_(1, tokens.experts, 1.0)
        self._choices.append(tokens.experts.numpy().astype(np.int16))
        in_domain = torch.nn.functional.one_hot(tokens.domain, len(self._texts.domains)).float()
        self._tokens = in_domain.sum(dim=0).double().numpy()
        self._load[:, place] = (in_domain.T @ chosen).double().numpy() / self._tokens[:, None]
        self._weight[place] = (given.sum(dim=0) / chosen.sum(dim=0).clamp_min(1)).double().numpy()
        rows = self._mixture.runnable.read(self._mixture.router(tokens.layer)).float()
        self._norm[place] = rows.norm(dim=1).double().numpy()
        self._measure(place, tokens, given, chosen > 0)

    def _measure(self, place: int, tokens: LayerTokens, given: torch.Tensor, chosen: torch.Tensor) -> None:
        """Add what takes outputs: of each group of experts, for the tokens that choose one of them."""
        count = len(self._mixture.experts)
        groups = [list(group) for group in self._together.get(tokens.layer, ())]
        grouped = {expert for group in groups for expert in group}
        groups += [[expert] for expert in range(count) if expert not in grouped]
        step = max(1, len(tokens.inputs) // _COMPARED)
        compared = tokens.inputs[::step][:_COMPARED]
        samples = torch.empty(count, compared.numel())

        def of(device: int, group: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            mine = chosen[:, group].any(dim=1).nonzero()[:, 0]
            return mine, self._outputs[device](tokens.layer, group[0], torch.cat([tokens.inputs[mine], compared]))

        for group, (mine, made) in zip(groups, shared_out(of, groups, len(self._outputs)), strict=True):
            samples[group] = made[len(mine) :].flatten()
            if len(mine):
                sums = (given[mine][:, group] * made[: len(mine)].norm(dim=1, keepdim=True)).sum(dim=0).double().numpy()
                self._mass[place, group] = sums
                self._reap[place, group] = sums.sum() / len(mine)
        self._differences[place] = relative_differences(samples.numpy().astype(np.float64))

    def found(self) -> Saliency:
        return Saliency(
            tuple(self._places),
            self._texts.domains,
            tuple(int(count) for count in self._tokens),
            tuple(self._choices),
            self._reap,
            self._mass,
            self._load,
            self._weight,
            self._norm,
            self._differences,
        )

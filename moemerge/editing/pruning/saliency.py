"""How much each expert matters: REAP's saliency and simpler measures over text, a layer at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from moemerge.editing.pruning.similarity import centred_products, relative_distances
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.expert_outputs import ExpertOutputs
from moemerge.evaluation.layer_parts import LayerPart, measure_by_layer
from moemerge.evaluation.layer_tokens import LayerTokens
from moemerge.evaluation.processes import Processes
from moemerge.evaluation.runnable import MixtureModel
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.sharing_out import shared_out
from moemerge.passes.tokens import Window

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


def measure_saliency(  # noqa: PLR0917
    mixture: MixtureModel,
    texts: Texts,
    compute: Compute,
    together: Groups,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    processes: Processes | None = None,
) -> Saliency:
    """Run a mixture over text and measure its experts; a layer, its router inputs and one expert are in memory.

    Args:
        mixture: the mixture.
        texts: windows of text by domain.
        compute: the device and dtype to run in.
        together: experts with equal FFNs, which are judged together.
        progress: called with the layers done and all there are.
        processes: the processes that share the text; None for this one alone.

    Raises:
        CheckpointError: the mixture's files are damaged, or its numbers are not finite.
    """
    tally = _Tally(mixture, texts, together)
    make = partial(_Measure, together=together)
    measure_by_layer(mixture, texts, compute, make, tally.add, progress, processes)
    return tally.found()


def _groups(together: Groups, layer: int, count: int) -> list[list[int]]:
    """All experts of a layer in groups, those in none by themselves."""
    groups = [list(group) for group in together.get(layer, ())]
    grouped = {expert for group in groups for expert in group}
    return groups + [[expert] for expert in range(count) if expert not in grouped]


class _Measure:
    """Measures what takes outputs: of each group of experts, for the tokens that choose one of them."""

    def __init__(self, mixture: MixtureModel, compute: Compute, *, together: Groups) -> None:
        self._count, self._together = len(mixture.experts), together
        self._outputs = [ExpertOutputs(mixture, one) for one in compute.each]

    def __call__(self, tokens: LayerTokens) -> LayerPart:
        given = torch.zeros(len(tokens.weights), self._count).scatter_(1, tokens.experts, tokens.weights)
        chosen = torch.zeros(len(tokens.weights), self._count).scatter_(1, tokens.experts, 1.0) > 0
        step = max(1, tokens.of_all // _COMPARED)
        is_compared = (tokens.number % step == 0) & (tokens.number // step < _COMPARED)
        compared = tokens.inputs[is_compared]
        samples = torch.zeros(self._count, compared.numel())
        mass = torch.zeros(self._count, dtype=torch.float64)
        groups = _groups(self._together, tokens.layer, self._count)

        def of(device: int, group: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            mine = chosen[:, group].any(dim=1).nonzero()[:, 0]
            return mine, self._outputs[device](tokens.layer, group[0], torch.cat([tokens.inputs[mine], compared]))

        for group, (mine, made) in zip(groups, shared_out(of, groups, len(self._outputs)), strict=True):
            samples[group] = made[len(mine) :].flatten()
            lengths = made[: len(mine)].norm(dim=1, keepdim=True)
            mass[group] = (given[mine][:, group] * lengths).sum(dim=0).double()
        products, squares = centred_products(samples.numpy().astype(np.float64))
        by_token = {"experts": tokens.experts, "weights": tokens.weights}
        sums = {"mass": mass, "products": torch.from_numpy(products), "squares": torch.from_numpy(squares)}
        return LayerPart(by_token, sums)


class _Tally:
    """Sums up what is measured, a layer at a time."""

    def __init__(self, mixture: MixtureModel, texts: Texts, together: Groups) -> None:
        self._mixture, self._domains, self._together = mixture, texts.domains, together
        domain = [domain for window, domain in zip(texts.windows, texts.domain, strict=True) for _ in _of(window)]
        self._in_domain = torch.nn.functional.one_hot(torch.tensor(domain), len(texts.domains)).float()
        self._tokens = self._in_domain.sum(dim=0).double().numpy()
        self._places = {layer: place for place, layer in enumerate(mixture.moe_layers)}
        shape = (len(self._places), len(mixture.experts))
        self._reap, self._mass, self._weight, self._norm = (np.zeros(shape) for _ in range(4))
        self._load = np.zeros((len(texts.domains), *shape))
        self._differences = np.zeros((*shape, shape[1]))
        self._choices: list[NDArray[np.int16]] = []

    def add(self, layer: int, part: LayerPart) -> None:
        place, count = self._places[layer], len(self._mixture.experts)
        experts, weights = part.by_token["experts"], part.by_token["weights"]
        given = torch.zeros(len(weights), count).scatter_(1, experts, weights)
        chosen = torch.zeros(len(weights), count).scatter_(1, experts, 1.0)
        self._choices.append(experts.numpy().astype(np.int16))
        self._load[:, place] = (self._in_domain.T @ chosen).double().numpy() / self._tokens[:, None]
        self._weight[place] = (given.sum(dim=0) / chosen.sum(dim=0).clamp_min(1)).double().numpy()
        rows = self._mixture.runnable.read(self._mixture.router(layer)).float()
        self._norm[place] = rows.norm(dim=1).double().numpy()
        mass = self._mass[place] = part.sums["mass"].numpy()
        for group in _groups(self._together, layer, count):
            choosing = int(chosen[:, group].any(dim=1).sum())
            self._reap[place, group] = mass[group].sum() / max(choosing, 1)
        self._differences[place] = relative_distances(part.sums["products"].numpy(), part.sums["squares"].numpy())

    def found(self) -> Saliency:
        return Saliency(
            tuple(self._places),
            self._domains,
            tuple(int(count) for count in self._tokens),
            tuple(self._choices),
            self._reap,
            self._mass,
            self._load,
            self._weight,
            self._norm,
            self._differences,
        )


def _of(window: Window) -> list[bool]:
    """One entry for each token of a window that counts."""
    return [counts for counts in window.counted if counts]

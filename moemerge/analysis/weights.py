"""What a mixture's weights say by themselves: every figure from one reading of them, a layer at a time."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Final, Literal

import numpy as np

from moemerge.analysis.beside import shared_ffns
from moemerge.analysis.components import Numbers, correlation, cosines_of, principal
from moemerge.analysis.figures import WeightFigures
from moemerge.analysis.matching import Matching, Scores, choose_matching, match, spread
from moemerge.analysis.projection import THREADS, Sums, Wanted, read_projection
from moemerge.checkpoint.derived import read_values
from moemerge.checkpoint.finite import first_not_finite
from moemerge.checkpoint.header import TensorInfo
from moemerge.editing.pruning.similarity import Similarity, beside_projections, relative_distances
from moemerge.errors import CheckpointError
from moemerge.families.dense import ROLES, Role
from moemerge.families.expert_view import Ffn
from moemerge.families.stored_mixture import StoredMixture

# Neurons on the plane: of each FFN, and of all in a layer.
_SHOWN: Final = 32
_SHOWN_OF_ALL: Final = 512
_Kind = Literal["similarity", "mean_similarity", "matched_similarity", "matched_order", "norms", "plane"]


def analyze_weights(
    mixture: StoredMixture,
    beside: Mapping[str, Mapping[int, Ffn]] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    matching: Matching | None = None,
) -> WeightFigures:
    """Compare the FFNs of all experts in each layer; every weight is read once, in blocks of rows.

    A shared expert stands beside the experts, called `shared`, its weights as they are stored. Experts that a selection
    bias switches off are among the experts.

    Args:
        mixture: the mixture.
        beside: other FFNs to compare the experts with, by name and layer; see `moemerge.analysis.beside`. Figures of a
            layer without one are NaN.
        progress: called with the layers done and all there are.
        matching: what neurons are matched; chosen by `choose_matching` unless given.

    Raises:
        CheckpointError: a file ends too early, or weights are not finite, or too large to compare.
    """
    analysis = _Analysis(mixture, {**shared_ffns(mixture), **(beside or {})}, matching)
    with ThreadPoolExecutor(THREADS) as pool:
        for place in range(len(mixture.moe_layers)):
            analysis.read_layer(place, pool)
            progress(place + 1, len(mixture.moe_layers))
    return analysis.figures()


class _Analysis:
    """Figures that are filled in layer by layer; what cannot be said stays NaN."""

    def __init__(
        self, mixture: StoredMixture, beside: Mapping[str, Mapping[int, Ffn]], matching: Matching | None
    ) -> None:
        self._mixture, self._beside = mixture, beside
        self._names = (*mixture.names, *beside)
        layers, count = mixture.moe_layers, len(self._names)
        width = mixture.expert_width
        widths = [next(iter(ffns.values()))["up"].shape[0] for ffns in beside.values()]
        alike = mixture.experts + widths.count(width)
        self._matching = matching or choose_matching(layers, alike, width, mixture.hidden)
        shapes: dict[_Kind, tuple[int, ...]] = dict.fromkeys(
            ("similarity", "mean_similarity", "matched_similarity", "matched_order"), (count, count)
        )
        shapes |= {"norms": (count,), "plane": (count, 2)}
        self._found: dict[_Kind, dict[Role, Numbers]] = {
            kind: {role: np.full((len(layers), *shape), np.nan) for role in ROLES} for kind, shape in shapes.items()
        }
        shown = min(_SHOWN, max(2, _SHOWN_OF_ALL // count), width, *widths)
        self._neuron_plane = np.full((len(layers), count, shown, 2), np.nan)
        square = (len(layers), mixture.experts, mixture.experts)
        self._router_similarity, self._router_norms = np.zeros(square), np.zeros(square[:2])
        # Of FFNs of one shape.
        self._distances = np.full((len(layers), count, count), np.nan)
        self._equal = np.zeros((len(layers), count, count), bool)

    def read_layer(self, place: int, pool: Executor) -> None:
        """Read all FFNs of a layer and its router."""
        mixture, layer, experts = self._mixture, self._mixture.moe_layers[place], self._mixture.experts
        rows = read_values(mixture.router(layer)).astype(np.float64)
        if not np.isfinite(rows).all():
            raise CheckpointError(f"{first_not_finite([mixture.router(layer)])}. Download that file again.")
        self._router_similarity[place], self._router_norms[place] = cosines_of(rows), np.linalg.norm(rows, axis=1)
        members = [
            *range(experts),
            *(
                number
                for number, ffns in enumerate(self._beside.values(), experts)
                if self._is_like_experts(ffns, layer)
            ),
        ]
        apart, squares = np.zeros((len(members), len(members))), np.zeros(len(members))
        equal = np.ones((len(members), len(members)), bool)
        for role in ROLES:
            sums = self._read_projection(place, role, pool)
            apart += sums.apart
            squares += sums.squares
            equal &= sums.equal
        for values in beside_projections(mixture, layer):
            equal[:experts, :experts] &= [[np.array_equal(one, other) for other in values] for one in values]
        pairs = np.ix_(members, members)
        self._equal[place][pairs] = equal
        # Products less half the squared lengths of both vectors, which distances do not depend on.
        self._distances[place][pairs] = relative_distances(-apart / 2, squares)

    def _is_like_experts(self, ffns: Mapping[int, Ffn], layer: int) -> bool:
        """Whether an FFN beside the experts is there in a layer, and as wide as they are."""
        return layer in ffns and ffns[layer]["up"].shape[0] == self._mixture.expert_width

    def _read_projection(self, place: int, role: Role, pool: Executor) -> Sums:
        """Fill in the figures of one projection; gives the sums of the experts, and of what has their shape."""
        mixture, layer = self._mixture, self._mixture.moe_layers[place]
        tensors = {expert: mixture.projection(layer, expert, role) for expert in range(mixture.experts)}
        for number, ffns in enumerate(self._beside.values(), mixture.experts):
            if layer in ffns:
                tensors[number] = ffns[layer][role]
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, tensor in tensors.items():
            alike.setdefault(tensor.shape, []).append(number)
        found = [
            (members, self._read_alike(place, role, [tensors[number] for number in members], members, pool))
            for members in alike.values()
        ]
        totals = np.full((len(self._names), mixture.hidden), np.nan)
        shown = np.full((len(self._names), self._neuron_plane.shape[2], mixture.hidden), np.nan)
        for members, sums in found:
            totals[members] = sums.totals
            if role == "gate":
                shown[members] = sums.neurons
        self._found["mean_similarity"][role][place] = cosines_of(totals)
        if role == "gate":
            self._place_neurons(place, shown)
        return found[0][1]

    def _read_alike(
        self, place: int, role: Role, tensors: Sequence[TensorInfo], members: Sequence[int], pool: Executor
    ) -> Sums:
        """Read one projection of FFNs of one shape, and fill in what compares them; the experts are the first."""
        layer, experts = self._mixture.moe_layers[place], members[0] == 0
        matched = self._matching.neurons if experts and layer in self._matching.layers else 0
        width = tensors[0].shape[1 if role == "down" else 0]
        neurons = spread(self._neuron_plane.shape[2] if role == "gate" else 0, width)
        sums = read_projection(tensors, role, Wanted(neurons, matched), pool)
        pairs = np.ix_(members, members)
        self._found["norms"][role][place, members] = np.sqrt(sums.squares)
        self._found["similarity"][role][place][pairs] = sums.cosines
        if experts:
            self._found["plane"][role][place, members] = principal(sums.differences)
        if sums.scores:
            similarity, order = _matched(sums.scores, len(members), matched == width, pool)
            self._found["matched_similarity"][role][place][pairs] = similarity
            self._found["matched_order"][role][place][pairs] = order
        return sums

    def _place_neurons(self, place: int, shown: Numbers) -> None:
        """Put neurons (FFN, neuron, hidden) on the plane; FFNs that are not there have NaNs."""
        there = np.isfinite(shown).all(axis=(1, 2))
        rows = shown[there].reshape(-1, shown.shape[2])
        rows -= rows[0]
        self._neuron_plane[place, there] = principal(rows @ rows.T).reshape(-1, shown.shape[1], 2)

    def figures(self) -> WeightFigures:
        """All figures."""
        mixture, pairs = self._mixture, np.triu_indices(self._mixture.experts, 1)
        layers, found = mixture.moe_layers, self._found
        experts = mixture.experts
        similarity = Similarity(layers, self._distances[:, :experts, :experts], self._equal[:, :experts, :experts])
        equal, nearly_equal = self._found_beside(similarity.near)
        correlated = {
            role: np.array(
                [
                    correlation(one[pairs], other[pairs])
                    for one, other in zip(self._router_similarity, values, strict=True)
                ]
            )
            for role, values in found["similarity"].items()
        }
        return WeightFigures(
            layers, self._names, mixture.experts,
            **found,
            matched_neurons=self._matching.neurons,
            router_similarity=self._router_similarity,
            correlation=correlated,
            router_norms=self._router_norms,
            neuron_plane=self._neuron_plane,
            equal=similarity.groups_everywhere,
            nearly_equal=similarity.nearly_equal,
            equal_beside=equal,
            nearly_equal_beside=nearly_equal,
        )  # fmt: skip

    def _found_beside(self, near: float) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """Pairs of an expert and an FFN beside that are equal, and those that are at most so far apart."""
        equal, nearly_equal = [], []
        for number in range(self._mixture.experts, len(self._names)):
            for expert in range(self._mixture.experts):
                distances = self._distances[:, expert, number]
                if (both := ~np.isnan(distances)).any():
                    if self._equal[both, expert, number].all():
                        equal.append((expert, number))
                    elif distances[both].mean() <= near:
                        nearly_equal.append((expert, number))
        return tuple(equal), tuple(nearly_equal)


def _matched(scores: Scores, count: int, every: bool, pool: Executor) -> tuple[Numbers, Numbers]:
    """Match the neurons of all pairs of FFNs; with every neuron, a pair in turned order is matched likewise."""
    similarity, order = np.ones((count, count)), np.ones((count, count))
    pairs = [(one, other) for one in range(count) for other in range(count) if (one < other if every else one != other)]
    found = pool.map(lambda pair: match(scores.cosines(*pair)), pairs)
    for (one, other), (mean, tau) in zip(pairs, found, strict=True):
        similarity[one, other], order[one, other] = mean, tau
        if every:
            similarity[other, one], order[other, one] = mean, tau
    return similarity, order

"""Routers from the experts' weights: the change that fine-tuning made to an FFN shows which inputs it was for.

With `D` the change of an FFN's gate and up projections, `|D z|` is large for inputs like those that the expert was
trained on. Arrow (https://arxiv.org/abs/2405.11157) routes by the first right singular vector of `D`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

import torch

from moemerge.checkpoint.derived import unscaled
from moemerge.checkpoint.finite import first_not_finite
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.numbers import is_rounded
from moemerge.compatibility.distances import STRANGER, differs_too_much
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.errors import RefusedError, RouterError
from moemerge.families.dense import Role
from moemerge.passes.weights import read_into
from moemerge.routers.pass_inputs import LayerRows, PassRequest, RouterInputs
from moemerge.routers.prompts import SHARED, UNSORTED, EncodedPrompt
from moemerge.routers.scaling import finish_rows
from moemerge.routers.scoring import fit_scale

Ffn = Callable[[Role], TensorInfo]
"""A function from a projection of one FFN to its tensor."""
_CHUNK_ROWS: Final = 1024
# So many label documents as all layers and tokens do.
_SCORED_LAYERS: Final = 8
_SCORED_TOKENS: Final = 32


def delta_rows(inputs: RouterInputs, request: PassRequest) -> LayerRows:
    """Make a layer's rows `u(D'D m)`: the slope of `|D z|^2` at the mean `m` of the router inputs of any text.

    This is the first step of a power iteration for the first singular vector, started at `m`; unlike that vector it
    has a sign.
    """
    states = inputs.states[inputs.expert != SHARED]
    mean = states.mean(dim=0)
    rows = torch.stack([_slope(expert, inputs.layer, mean, request) for expert in request.present(inputs.layer)])
    rows -= rows.mean(dim=0)
    rows *= fit_scale(rows, states, request.mixture.experts_per_token)
    return LayerRows(finish_rows(rows, states, inputs, request))


def _slope(expert: int, layer: int, mean: torch.Tensor, request: PassRequest) -> torch.Tensor:
    """Compute `D'D m` (hidden,) at length 1; see `_check_change` for refusals."""
    slope, changed, whole = response_slope(expert, layer, mean, request)
    _check_change(expert, layer, changed, whole)
    return torch.nn.functional.normalize(slope, dim=0)


def response_slope(
    expert: int, layer: int, mean: torch.Tensor, request: PassRequest
) -> tuple[torch.Tensor, float, float]:
    """Compute `D'D m` (hidden,) with `|D|^2` and the base's `|W|^2`, whatever the change says.

    Raises:
        RouterError: weights of the expert or of the base are not finite.
    """
    slope = torch.zeros_like(mean)
    changed, whole = _visit_changes(expert, layer, request, _add_slope(slope, mean))
    return slope, changed, whole


def ffn_slope(expert: Ffn, base: Ffn, mean: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """Compute the same as `response_slope` of two FFNs; numbers that are not finite stay so."""
    slope = torch.zeros_like(mean)
    changed, whole = _visit(ffn_changes(expert, base), _add_slope(slope, mean))
    return slope, changed, whole


def _add_slope(slope: torch.Tensor, mean: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def add(delta: torch.Tensor) -> None:
        slope.add_(delta.T @ (delta @ mean))

    return add


def _visit_changes(
    expert: int, layer: int, request: PassRequest, visit: Callable[[torch.Tensor], None]
) -> tuple[float, float]:
    """Call `visit` with some rows of `D` (row, hidden) at a time; return `|D|^2`, and the base's `|W|^2`.

    Raises:
        RouterError: weights of the expert or of the base are not finite.
    """
    changed, whole = _visit(_changes(expert, layer, request), visit)
    if not math.isfinite(changed + whole):
        raise RouterError(f"experts[{expert}]: {_why_not_finite(expert, layer, request)}")
    return changed, whole


def _visit(
    changes: Iterable[tuple[torch.Tensor, torch.Tensor]], visit: Callable[[torch.Tensor], None]
) -> tuple[float, float]:
    changed = whole = 0.0
    for delta, base in changes:
        visit(delta)
        changed += float(delta.square().sum())
        whole += float(base.square().sum())
    return changed, whole


def _check_change(expert: int, layer: int, changed: float, whole: float) -> None:
    """Refuse a change, by `|D|^2` and the base's `|W|^2`, that says nothing of what the expert is for.

    Raises:
        RefusedError: there is no change, or one too large for a fine-tune.
    """
    if changed > STRANGER**2 * whole:
        raise RefusedError(f"{differs_too_much(expert, layer, (changed / whole) ** 0.5)}.")
    if not changed:
        raise RefusedError(
            f"experts[{expert}]: its FFN is the base model's own in layer {layer}, so its weights do not say what it "
            "is for. Give the experts prompts and choose gate_mode ridge."
        )


def _why_not_finite(expert: int, layer: int, request: PassRequest) -> str:
    for source in (request.experts[expert], request.base):
        # By name, since a projection may be some rows of a tensor.
        names = [source.projection(layer, role).name for role in ("gate", "up")]
        if broken := first_not_finite(source.tensors[name] for name in names):
            return f"{broken}, so what fine-tuning changed there is not known. Download that model again."
    return (
        f"its FFN is so far from the base model's in layer {layer} that squares of the difference overflow. Give the "
        "experts prompts and choose gate_mode ridge."
    )


def _changes(expert: int, layer: int, request: PassRequest) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return ffn_changes(
        lambda role: request.experts[expert].projection(layer, role), lambda role: request.base.projection(layer, role)
    )


def ffn_changes(expert: Ffn, base: Ffn) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the gate and up projections, a block (row, hidden) at a time, in float32: expert minus base, and base.

    These are the trained weights, without folded norms: a column behind a shared norm near zero would outweigh all
    others.
    """
    roles: tuple[Role, Role] = ("gate", "up")
    for role in roles:
        theirs, ours = unscaled(expert(role)), unscaled(base(role))
        dtypes = [CONFIG_DTYPES[ours.dtype], CONFIG_DTYPES[theirs.dtype]]
        for first in range(0, ours.shape[0], _CHUNK_ROWS):
            count = min(_CHUNK_ROWS, ours.shape[0] - first)
            before, tuned = _read(ours.rows(first, count)), _read(theirs.rows(first, count))
            if is_rounded(before.numpy(), tuned.numpy(), dtypes):
                tuned = before
            yield tuned - before, before


def _read(tensor: TensorInfo) -> torch.Tensor:
    values = torch.empty(tensor.shape)
    read_into(tensor, values)
    return values


class Labeller:
    """Labels each unsorted document with the expert whose change responds to it most, layer by layer.

    The score of expert e is the mean over tokens and layers of `log(|D_e z|^2 / |D_e|^2)`. Scores of fine-tunes of
    different kinds differ for all text; with `relative` they are compared by how far they are above their own mean over
    all documents, in standard deviations.
    """

    def __init__(self, request: PassRequest, *, relative: bool = False) -> None:
        self._request, self._relative = request, relative
        layers = request.mixture.moe_layers
        self._layers = set(layers[:: max(len(layers) // _SCORED_LAYERS, 1)])
        self._scores: dict[int, torch.Tensor] = {}
        self._seen = torch.zeros(len(request.experts))  # in how many layers

    def read(self, inputs: RouterInputs) -> None:
        """Add one layer to the scores."""
        if inputs.layer not in self._layers:
            return
        chosen = _evenly(inputs.prompt)
        states = inputs.states[chosen]
        scores = torch.zeros(len(states), len(self._request.experts))
        for expert in self._request.present(inputs.layer):

            def add(delta: torch.Tensor, score: torch.Tensor = scores[:, expert]) -> None:
                score += (states @ delta.T).square().sum(dim=1)

            changed, whole = _visit_changes(expert, inputs.layer, self._request, add)
            _check_change(expert, inputs.layer, changed, whole)
            scores[:, expert] = (scores[:, expert] / changed).clamp_min(torch.finfo(scores.dtype).tiny).log()
            self._seen[expert] += 1
        numbers, place = torch.unique(inputs.document[chosen], return_inverse=True)
        means = torch.zeros(len(numbers), scores.shape[1]).index_add_(0, place, scores)
        means /= torch.bincount(place)[:, None]
        for document, mean in zip(numbers.tolist(), means, strict=True):
            self._scores[document] = self._scores.get(document, torch.zeros_like(mean)) + mean

    def labelled(self, prompts: Sequence[EncodedPrompt]) -> tuple[EncodedPrompt, ...]:
        """Return the prompts, each unsorted one labelled with its expert.

        Raises:
            RefusedError: an expert gets no document.
        """
        means = torch.stack([*self._scores.values()]) / self._seen
        if self._relative and len(means) > 1:
            means = (means - means.mean(dim=0)) / means.std(dim=0)
        label = dict(zip(self._scores, means.nan_to_num(-math.inf).argmax(dim=1).tolist(), strict=True))
        counts = [list(label.values()).count(expert) for expert in range(len(self._request.experts))]
        sorted_before = {prompt.expert for prompt in prompts if prompt.positive}
        for expert, count in enumerate(counts):
            if not count and expert not in sorted_before:
                raise RefusedError(
                    f"router.calibration_texts: none of the {len(label)} documents is for experts[{expert}] "
                    f"({', '.join(map(str, counts))} for the experts in turn). Add text of its kind, or choose "
                    "gate_mode delta, which needs none."
                )
        return tuple(
            replace(prompt, expert=label[prompt.document]) if prompt.expert == UNSORTED else prompt
            for prompt in prompts
        )


def _evenly(prompt: torch.Tensor) -> torch.Tensor:
    """Mask (token,) of at most `_SCORED_TOKENS` tokens of each prompt, evenly spaced."""
    counts = torch.bincount(prompt)
    place = torch.arange(len(prompt)) - torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)[:-1]])[prompt]
    every = (counts // _SCORED_TOKENS).clamp_min(1)[prompt]
    return (place % every == 0) & (place // every < _SCORED_TOKENS)

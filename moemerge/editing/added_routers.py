"""Router rows of experts that are added to a mixture: fitted to what enters its routers, beside rows that stay."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import torch

from moemerge.chats import Document
from moemerge.checkpoint.header import TensorInfo
from moemerge.editing.router_inputs import RowPass
from moemerge.evaluation.runnable import MixtureModel
from moemerge.families.dense import ModelTensors, Role
from moemerge.routers.added_rows import KeptRows, first_rows, fit_added_rows, label_added, sharpened
from moemerge.routers.fitting import Labelled, fold
from moemerge.routers.pass_inputs import RouterInputs
from moemerge.routers.prior import compared, ffn_response, neutral_states
from moemerge.routers.rows import Rows
from moemerge.routers.scoring import choose

_JUDGED_EVERY: Final = 4

FfnTensors = Callable[[int, Role], TensorInfo]
"""A function from a layer and a projection of an expert's FFN to the tensor."""


@dataclass(frozen=True)
class EditedExpert:
    """An expert of an edited mixture, as far as its router rows need it."""

    name: str
    ffn: FfnTensors
    documents: Sequence[Document] = ()
    """Text that is for it; a new expert without any has rows from its weights alone."""
    numbers: Mapping[int, int] = field(default_factory=dict)
    """Its number in the old mixture by layer, of a kept expert; a new one has none."""
    row: Callable[[int], torch.Tensor] | None = None
    """The row (hidden,) of a layer that a new expert has in any case, whatever the others have."""


@dataclass(frozen=True)
class AddedExperts:
    """A mixture, and the experts that it shall have."""

    mixture: MixtureModel
    """The mixture as it is, whose rows are kept."""
    experts: tuple[EditedExpert, ...]
    """The experts of the result; kept ones keep their rows."""
    experts_per_token: int
    """Experts per token of the result."""
    base: ModelTensors | None = None
    """The model that experts were trained from; without it, weights say nothing of what they are for."""
    lambda_: float | None = None
    """Penalty on new rows relative to the mean variance of router inputs; None chooses it by the tokens."""

    @property
    def new(self) -> list[EditedExpert]:
        """The experts that are new."""
        return [expert for expert in self.experts if not expert.numbers]

    @property
    def kept(self) -> list[EditedExpert]:
        """The experts that stay."""
        return [expert for expert in self.experts if expert.numbers]


@dataclass(frozen=True)
class AddedReport:
    """What a new expert's rows do with documents that they were not fitted to, averaged over some layers."""

    name: str
    first: float | None
    """Share of the new expert's tokens for which it comes first; None where it has fewer than two documents."""
    chosen: float | None
    """Share of the new expert's tokens that choose it."""
    taken: float | None
    """Share of kept experts' tokens for which it comes first; None where they have no text."""


@dataclass(frozen=True)
class AddedRouters:
    """Routers with rows of new experts, and what is known of these."""

    rows: Mapping[int, Rows]
    """Rows (expert, hidden) of each layer with a router, those of kept experts as they were."""
    report: tuple[AddedReport, ...]
    """Of each new expert."""


def added_rows(request: AddedExperts, reading: RowPass) -> AddedRouters:
    """Make the rows of new experts by one pass of text through the new mixture.

    Args:
        request: the mixture and its experts.
        reading: the pass, through a mixture that has the new experts already.

    Raises:
        RouterError: the mixture's tokenizer cannot be used.
        RefusedError: there is no such device, or a chat cannot be read.
        CheckpointError: the mixture's numbers are not finite.
    """
    layers = request.mixture.moe_layers
    judged_layers = layers[min(_JUDGED_EVERY // 2, len(layers) - 1) :: _JUDGED_EVERY]
    judged: list[torch.Tensor] = []

    def whole(inputs: RouterInputs) -> torch.Tensor:
        layer = _Layer(request, inputs)
        if inputs.layer in judged_layers:
            judged.append(layer.judge())
        return layer.whole()

    rows = reading.make([expert.documents for expert in (*request.kept, *request.new)], whole)
    figures = torch.stack(judged).mean(dim=0).tolist()
    report = [
        AddedReport(expert.name, *(None if math.isnan(figure) else figure for figure in of))
        for expert, of in zip(request.new, figures, strict=True)
    ]
    return AddedRouters(rows, tuple(report))


class _Layer:
    """The router of one layer, to which new rows are added."""

    def __init__(self, request: AddedExperts, inputs: RouterInputs) -> None:
        mixture, layer = request.mixture, inputs.layer
        absent = mixture.absent(layer)
        present = [expert for expert in request.kept if expert.numbers[layer] not in absent]
        numbers = [expert.numbers[layer] for expert in present]
        self._stored = mixture.runnable.read(mixture.router(layer)).float()
        self._kept = KeptRows(self._stored[numbers], mixture.choosing.scoring)
        biases = mixture.selection_bias(layer)
        self._biases = None if biases is None else biases[numbers]
        self._request, self._inputs, self._known, self._new = request, inputs, len(request.kept), len(request.new)
        self._described = sorted({expert - self._known for expert in inputs.expert.tolist() if expert >= self._known})
        states = inputs.states if self._described else neutral_states(inputs)
        self._first = first_rows(self._kept, self._prior([*present, *request.new]), states, self._new)

    def _prior(self, experts: Sequence[EditedExpert]) -> torch.Tensor | None:
        """What weights say of the experts (expert, hidden); None where the model that they come from is not known."""
        base, layer = self._request.base, self._inputs.layer
        if base is None:
            return None
        states = neutral_states(self._inputs)
        mean = states.mean(dim=0)
        said = [ffn_response(partial(expert.ffn, layer), partial(base.projection, layer), mean) for expert in experts]
        return compared(torch.stack(said), states)

    def _label(self) -> tuple[Labelled, torch.Tensor]:
        return label_added(self._inputs, self._known, self._request.lambda_)

    def whole(self) -> torch.Tensor:
        """Rows (expert, hidden), those of kept experts as they were."""
        new, layer = iter(self._rows()), self._inputs.layer
        experts = self._request.experts
        made = [self._stored[e.numbers[layer]] if e.numbers else next(new) for e in experts]
        return torch.stack([e.row(layer) if e.row else row for e, row in zip(experts, made, strict=True)])

    def _rows(self) -> torch.Tensor:
        """Rows (new expert, hidden)."""
        rows = self._first.clone()
        if self._described:
            rows[self._described] = self._fit(self._label()[0])
        return rows

    def _fit(self, data: Labelled) -> torch.Tensor:
        """Rows of the experts that have text."""
        return sharpened(self._kept, fit_added_rows(self._kept, self._first[self._described], data), data)

    def judge(self) -> torch.Tensor:
        """The figures (new expert, 3) of `AddedReport` by rows made without each document; NaN where there are none."""
        figures = torch.full((self._new, 3), torch.nan)
        if not self._described:
            return figures
        data, chosen = self._label()
        label = data.targets.argmax(dim=1)
        folds = fold(
            label, self._inputs.document[chosen], data.states.shape[1], torch.ones(len(label), dtype=torch.bool)
        )
        if not folds.any():
            return figures
        logits = torch.cat([data.states @ self._kept.rows.T, torch.zeros(len(label), len(self._described))], dim=1)
        known = len(self._kept.rows)
        for part in range(int(folds.max()) + 1):
            held = folds == part
            logits[held, known:] = data.states[held] @ self._fit(data.part(~held)).T
        count = min(self._request.experts_per_token, logits.shape[1])
        # The order of the experts here is not that of the result, whose groups are therefore left aside.
        how = replace(self._request.mixture.as_stored.choosing, groups=1)
        choices = choose(logits, count, how, self._all_biases())[1]
        others = choices[(label == 0) & (self._inputs.expert[chosen] >= 0)]
        for place, expert in enumerate(self._described):
            own = choices[label == place + 1] == known + place
            taken = (others[:, 0] == known + place).float().mean()
            figures[expert] = torch.stack([own[:, 0].float().mean(), own.any(dim=1).float().mean(), taken])
        return figures

    def _all_biases(self) -> torch.Tensor | None:
        """Selection biases of the kept experts, and of new ones with text their mean, which these are written with."""
        if self._biases is None:
            return None
        return torch.cat([self._biases, self._biases.mean().expand(len(self._described))])

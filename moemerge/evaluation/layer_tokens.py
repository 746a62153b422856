"""The tokens of a layer, those of all windows together: their choices, and what enters the router."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moemerge.evaluation.choices import Choice
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.runnable import MixtureModel
from moemerge.evaluation.running import run_model
from moemerge.passes.compute_dtype import Compute


@dataclass(frozen=True)
class LayerTokens:
    """The tokens of all windows in one layer, a window after the other.

    Those that do not count, such as special ones, are left out.
    """

    layer: int
    number: torch.Tensor
    """Number of each token (token,) among those of all the text, of which these may be a part."""
    of_all: int
    """How many tokens all the text has."""
    ids: torch.Tensor
    """Token ids (token,)."""
    domain: torch.Tensor
    """Number of each token's domain (token,)."""
    experts: torch.Tensor
    """Chosen experts (token, choice)."""
    weights: torch.Tensor
    """Their weights (token, choice)."""
    logits: torch.Tensor
    """Router logits (token, expert)."""
    states: torch.Tensor
    """Router inputs (token, hidden)."""
    inputs: torch.Tensor
    """What enters the experts (token, hidden); see `Choice`."""


def run_by_layer(
    mixture: MixtureModel,
    texts: Texts,
    compute: Compute,
    use: Callable[[LayerTokens], None],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    *,
    numbers: tuple[torch.Tensor, int] | None = None,
) -> None:
    """Run a mixture over text; `use` is called with the tokens of each layer as soon as all of them are there.

    Args:
        mixture: the mixture.
        texts: windows of text by domain.
        compute: the devices and dtype to run in.
        use: called with the tokens of each layer.
        progress: called with the layers done and all there are.
        numbers: the numbers of the tokens (token,) and how many there are, where the text is a part of other text.

    Raises:
        CheckpointError: the mixture's files are damaged, or its numbers are not finite.
    """
    run_model(
        mixture.runnable,
        texts.windows,
        compute,
        mixture=mixture,
        chosen=_LayerChoices(texts, use, numbers).add,
        progress=progress,
        losses=False,
    )


class _LayerChoices:
    """Collects the choices of a layer for all windows, and hands them on together.

    Each window's are put in their place at once, so that none is kept beside them.
    """

    def __init__(
        self, texts: Texts, whole: Callable[[LayerTokens], None], numbers: tuple[torch.Tensor, int] | None
    ) -> None:
        self._whole = whole
        self._counted = [torch.tensor(window.counted) for window in texts.windows]
        lengths = torch.tensor([int(mask.sum()) for mask in self._counted])
        ends = lengths.cumsum(dim=0).tolist()
        self._spans = [slice(end - length, end) for end, length in zip(ends, lengths.tolist(), strict=True)]
        windows = zip(texts.windows, self._counted, strict=True)
        self._ids = torch.cat([torch.tensor(window.ids)[mask] for window, mask in windows])
        self._numbers = numbers or (torch.arange(len(self._ids)), len(self._ids))
        self._domain = torch.tensor(texts.domain).repeat_interleave(lengths)
        self._parts: dict[str, torch.Tensor] = {}
        self._added = 0

    def add(self, choice: Choice) -> None:
        """Add one window's choices."""
        self._put("experts", choice.window, choice.experts)
        self._put("weights", choice.window, choice.weights)
        self._put("logits", choice.window, choice.logits)
        self._put("states", choice.window, choice.states)
        if choice.inputs is not choice.states:
            self._put("inputs", choice.window, choice.inputs)
        self._added += 1
        if self._added == len(self._spans):
            parts, self._parts, self._added = self._parts, {}, 0
            experts, weights, logits, states = (parts[name] for name in ("experts", "weights", "logits", "states"))
            text, inputs = (*self._numbers, self._ids, self._domain), parts.get("inputs", states)
            self._whole(LayerTokens(choice.layer, *text, experts, weights, logits, states, inputs))

    def _put(self, name: str, window: int, values: torch.Tensor) -> None:
        """Put values of a window's tokens (token, ...) in their place, without those that do not count."""
        if name not in self._parts:
            self._parts[name] = values.new_empty(len(self._ids), *values.shape[1:])
        self._parts[name][self._spans[window]] = values[self._counted[window]]

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
    progress: Callable[[int, int], None],
) -> None:
    """Run a mixture over text; `use` is called with the tokens of each layer as soon as all of them are there.

    Raises:
        CheckpointError: the mixture's files are damaged, or its numbers are not finite.
    """
    run_model(
        mixture.runnable,
        texts.windows,
        compute,
        mixture=mixture,
        chosen=_LayerChoices(texts, use).add,
        progress=progress,
        losses=False,
    )


class _LayerChoices:
    """Collects the choices of a layer for all windows, and hands them on together."""

    def __init__(self, texts: Texts, whole: Callable[[LayerTokens], None]) -> None:
        self._texts, self._whole = texts, whole
        self._choices: list[Choice] = []

    def add(self, choice: Choice) -> None:
        """Add one window's choices."""
        self._choices.append(choice)
        if len(self._choices) < len(self._texts.windows):
            return
        choices, self._choices = sorted(self._choices, key=lambda one: one.window), []
        windows = [self._texts.windows[one.window] for one in choices]
        counted = [torch.tensor(window.counted) for window in windows]
        domains = [
            torch.full((int(mask.sum()),), self._texts.domain[one.window])
            for one, mask in zip(choices, counted, strict=True)
        ]
        ids = [torch.tensor(window.ids)[mask] for window, mask in zip(windows, counted, strict=True)]

        def together(part: Callable[[Choice], torch.Tensor]) -> torch.Tensor:
            return torch.cat([part(one)[mask] for one, mask in zip(choices, counted, strict=True)])

        states = together(lambda one: one.states)
        same = choice.inputs is choice.states
        self._whole(
            LayerTokens(
                choice.layer,
                torch.cat(ids),
                torch.cat(domains),
                together(lambda one: one.experts),
                together(lambda one: one.weights),
                together(lambda one: one.logits),
                states,
                states if same else together(lambda one: one.inputs),
            )
        )

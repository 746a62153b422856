"""What is measured of a layer's tokens, by this process or by several that share the text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.layer_tokens import LayerTokens, run_by_layer
from moemerge.evaluation.processes import Processes
from moemerge.evaluation.runnable import MixtureModel
from moemerge.passes.compute_dtype import Compute


@dataclass(frozen=True)
class LayerPart:
    """What was measured of all tokens of a layer, or of some; without hidden states, since it is sent and kept."""

    by_token: Mapping[str, torch.Tensor]
    """Values of each token (token, ...), by name."""
    sums: Mapping[str, torch.Tensor]
    """Sums over the tokens, by name."""


Measure = Callable[[LayerTokens], LayerPart]
"""A function that measures tokens of a layer."""


def measure_by_layer(  # noqa: PLR0917
    mixture: MixtureModel,
    texts: Texts,
    compute: Compute,
    make: Callable[[MixtureModel, Compute], Measure],
    use: Callable[[int, LayerPart], None],
    progress: Callable[[int, int], None],
    processes: Processes | None = None,
) -> None:
    """Run a mixture over text, and measure each layer's tokens.

    Args:
        mixture: the mixture.
        texts: windows of text by domain.
        compute: the devices and dtype to run in.
        make: makes what measures, in each process that takes part; it is sent to these.
        use: called with the number of each layer, and what was measured of all its tokens, in their order.
        progress: called with the layers done and all there are; with processes, those that are done and all.
        processes: the processes that share the text; None for this one alone.

    Raises:
        CheckpointError: the mixture's files are damaged, or its numbers are not finite.
        MoemergeError: a process failed, and so did those that took its place.
    """
    if processes is None:
        measure = make(mixture, compute)
        run_by_layer(mixture, texts, compute, lambda tokens: use(tokens.layer, measure(tokens)), progress)
        return
    counts = [sum(window.counted) for window in texts.windows]
    spans = torch.split(torch.arange(sum(counts)), counts)
    hands = processes.deal(texts.windows)
    numbers = [torch.cat([spans[window] for window in hand]) for hand in hands]
    given = [(_part(texts, hand), number, sum(counts)) for hand, number in zip(hands, numbers, strict=True)]
    found = processes.share(_measure_part, (mixture, make), given, progress)
    for layer, parts in zip(mixture.moe_layers, zip(*found, strict=True), strict=True):
        use(layer, _joined(parts, numbers))


def _part(texts: Texts, windows: Sequence[int]) -> Texts:
    """Some of the windows."""
    chosen = tuple(texts.windows[window] for window in windows)
    return replace(texts, windows=chosen, domain=tuple(texts.domain[window] for window in windows))


def _measure_part(
    compute: Compute,
    work: tuple[MixtureModel, Callable[[MixtureModel, Compute], Measure]],
    texts: Texts,
    numbers: torch.Tensor,
    of_all: int,
) -> list[LayerPart]:
    """Measure a part of the text; returns what was measured, by layer."""
    (mixture, make), found = work, list[LayerPart]()
    measure = make(mixture, compute)
    run_by_layer(mixture, texts, compute, lambda tokens: found.append(measure(tokens)), numbers=(numbers, of_all))
    return found


def _joined(parts: Sequence[LayerPart], numbers: Sequence[torch.Tensor]) -> LayerPart:
    order = torch.cat(list(numbers)).argsort()
    by_token = {name: torch.cat([part.by_token[name] for part in parts])[order] for name in parts[0].by_token}
    sums = {name: torch.stack([part.sums[name] for part in parts]).sum(dim=0) for name in parts[0].sums}
    return LayerPart(by_token, sums)

"""A causal language model run over windows of text, a layer at a time: losses, and what its routers choose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from moemerge.errors import CheckpointError
from moemerge.evaluation.runnable import MixtureModel, Runnable
from moemerge.passes.decoder import Batch, compute_dtype, embed, empty_model, finish, group, run_layer
from moemerge.passes.loading import cast, load_tensors
from moemerge.passes.tokens import Window
from moemerge.routers.scoring import top_weights

# Logits of so many tokens are in memory at a time: 100 MB for a vocabulary of 50 000.
_TOKENS: Final = 512


@dataclass(frozen=True)
class Choice:
    """What a layer's router does with a window."""

    layer: int
    window: int
    experts: torch.Tensor
    """(token, choice) int, by falling weight; of every token, special ones too."""
    weights: torch.Tensor
    """(token, choice)"""
    logits: torch.Tensor
    """(token, expert), minus infinity for experts that are absent."""


def run_model(
    model: Runnable, windows: Sequence[Window], device: torch.device, *, mixture: MixtureModel | None = None,
    chosen: Callable[[Choice], None] = lambda _: None,
    predicted: Callable[[int, torch.Tensor], None] = lambda _window, _logits: None,
    progress: Callable[[int, int], None] = lambda _done, _total: None, losses: bool = True,
) -> torch.Tensor:  # fmt: skip
    """Losses in nats, summed over each window's tokens that count: (window,).

    Args:
        model: what to run.
        windows: of text.
        device: where.
        mixture: where `chosen` is wanted, the mixture that `model` is.
        chosen: called with the choices of each layer with a router, for each window.
        predicted: called with each window's number and its logits (token, vocab), float32 on the device.
        progress: called with the layers done and all there are.
        losses: whether losses are wanted; without them, what follows the last layer is not run.

    Raises:
        CheckpointError: the tensors do not fit the class.
    """
    dtype = compute_dtype(device)
    whole = empty_model(model.model_type, model.keys, device, head=True, dtype=dtype)
    decoder = whole.model
    places = list(group(range(len(windows)), lambda index: len(windows[index].ids), _TOKENS))
    batches = [
        embed(
            decoder, model.norm, [windows[index].ids for index in part], model.embeddings, device=device, dtype=dtype
        )
        for part in places
    ]  # fmt: skip
    for index in range(model.layers):
        _load(whole, model, model.names(index), device, dtype)
        layer = decoder.layers[index]
        check_complete(layer, f"model.layers.{index}")
        router = None
        if mixture and mixture.router(index) in model.shapes:
            router = _Router(mixture, layer, index, model.read(mixture.router(index)).float())
        for part, batch in zip(places, batches, strict=True):
            if router is None:
                run_layer(layer, batch, index)
                continue
            for choice in router.watch(batch, part, windows):
                chosen(choice)
        layer.to("meta")
        progress(index + 1, model.layers)
    return _losses(whole, decoder, model, windows, places, batches, predicted) if losses else torch.zeros(len(windows))


def _load(whole: Any, model: Runnable, names: list[str], device: torch.device, dtype: torch.dtype) -> None:
    load_tensors(whole, {name: cast(model.read(name), dtype) for name in names}, device)


def check_complete(module: Any, path: str) -> None:
    """Refuse a module of which a parameter got no values.

    Raises:
        CheckpointError: names the first such parameter.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise CheckpointError(f"{path}.{name}: no tensor of the checkpoint gives its values.")


class _Router:
    """Watches one layer's router: what enters it, and what that makes it choose."""

    def __init__(self, mixture: MixtureModel, layer: Any, index: int, rows: torch.Tensor) -> None:
        self._mixture, self._layer, self._index, self._rows = mixture, layer, index, rows
        self._absent = mixture.absent(index)
        if not rows.isfinite().all():
            raise CheckpointError(f"{mixture.router(index)}: holds numbers that are not finite.")
        # Families differ in what they call it.
        self._module = next(
            module
            for module in layer.modules()
            for parameter in module.parameters(recurse=False)
            if parameter.shape == rows.shape and torch.equal(parameter.float().cpu(), rows.to(parameter.dtype).float())
        )

    def watch(self, batch: Batch, part: Sequence[int], windows: Sequence[Window]) -> list[Choice]:
        """Pass a batch through the layer; gives what its router chose for each of its windows."""
        seen: list[torch.Tensor] = []
        handle = self._module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        try:
            run_layer(self._layer, batch, self._index)
        finally:
            handle.remove()
        states = seen[0].reshape(*batch.ids.shape, -1).float().cpu()
        choices = []
        for row, window in enumerate(part):
            logits = states[row, : len(windows[window].ids)] @ self._rows.T
            logits[:, self._absent] = -torch.inf
            weights, experts = top_weights(logits, self._mixture.experts_per_token, self._mixture.family.scoring)
            choices.append(Choice(self._index, window, experts, weights, logits))
        return choices


def _losses(  # noqa: PLR0917
    whole: Any, decoder: Any, model: Runnable, windows: Sequence[Window], places: Sequence[Sequence[int]],
    batches: list[Batch], predicted: Callable[[int, torch.Tensor], None],
) -> torch.Tensor:  # fmt: skip
    device, dtype = batches[0].ids.device, batches[0].states.dtype
    names = [name for name in model.names(None) if not name.startswith("model.embed_tokens.")]
    _load(whole, model, names, device, dtype)
    head = whole.get_output_embeddings()
    if head.weight.is_meta:
        tied = model.read("model.embed_tokens.weight").to(device=device, dtype=dtype)
        head.weight = torch.nn.Parameter(tied, requires_grad=False)
    losses = torch.zeros(len(windows), dtype=torch.float64)
    for part, batch in zip(places, batches, strict=True):
        logits = finish(whole, decoder, model.norm, batch)
        for row, window in enumerate(part):
            known = logits[row, : len(windows[window].ids)].float()
            predicted(window, known)
            losses[window] = token_losses(windows[window], known).cpu().double().sum()  # MPS has no float64
        del logits
    return losses


def token_losses(window: Window, logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (token,) in nats of a window's tokens that are scored, from its logits (position, vocab)."""
    ids = torch.tensor(window.ids, device=logits.device)
    scored = torch.tensor(window.scored, device=logits.device)
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[scored]

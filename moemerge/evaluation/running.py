"""Run a causal language model over windows of text, a layer at a time: its losses, and what its routers choose."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Final

import torch

from moemerge.errors import CheckpointError
from moemerge.evaluation.choices import Choice, RouterWatcher, router_inputs
from moemerge.evaluation.losses import token_losses
from moemerge.evaluation.runnable import MixtureModel, Runnable
from moemerge.families.layer_names import layer_prefix
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.decoder import Batch, before_layers, embed, empty_model, finish, group, run_layer
from moemerge.passes.finite import all_finite, not_finite_in, where_it_began
from moemerge.passes.loading import cast, check_complete, load_tensors, path_in_memory
from moemerge.passes.tokens import Window

# Tokens whose logits are in memory at a time: 100 MB for a vocabulary of 50 000.
_TOKENS: Final = 512
_EMBEDDINGS: Final = "model.embed_tokens"


def run_model(
    model: Runnable,
    windows: Sequence[Window],
    compute: Compute,
    *,
    mixture: MixtureModel | None = None,
    chosen: Callable[[Choice], None] = lambda _: None,
    predicted: Callable[[int, torch.Tensor], None] = lambda _window, _logits: None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    losses: bool = True,
) -> torch.Tensor:
    """Compute losses in nats, summed over each window's tokens that count: (window,).

    Args:
        model: the model to run.
        windows: the windows of text.
        compute: the device and dtype to run in.
        mixture: the mixture that `model` is, if `chosen` is wanted.
        chosen: called with the choices of each layer with a router, for each window.
        predicted: called with each window's number and its logits (token, vocab), float32 on the device.
        progress: called with the layers done and all there are.
        losses: whether losses are wanted; without them, the part after the last layer is run only to see that it gives
            finite numbers.

    Raises:
        CheckpointError: the tensors do not fit the class, or numbers are not finite; says where that began.
    """
    passing = _Pass(model, windows, compute, _TOKENS)
    for index, layer in passing.layers(progress):
        passing.run(index, layer, passing.router(mixture, index, layer), chosen)
    head = _Head(passing.whole, model, compute)
    if losses:
        return head.losses(windows, passing.places, passing.batches, predicted)
    head.check(passing.batches)
    return torch.zeros(len(windows))


def run_together(
    models: Sequence[tuple[Runnable, Sequence[Window]]],
    compute: Compute,
    progress: Callable[[int, int], None],
) -> list[torch.Tensor]:
    """Compute losses as `run_model` does, of models of equal depth, each with windows of its own.

    All pass a layer before any passes the next one, so that what they share need be read only once.
    """
    passes = [_Pass(model, windows, compute, _TOKENS) for model, windows in models]
    layers = models[0][0].layers
    for index in range(layers):
        for passing in passes:
            with passing.layer(index) as layer:
                passing.run(index, layer)
        progress(index + 1, layers)
    losses = []
    for passing, (model, windows) in zip(passes, models, strict=True):
        head = _Head(passing.whole, model, compute)
        losses.append(head.losses(windows, passing.places, passing.batches, lambda _window, _logits: None))
        passing.whole.to("meta")  # one head at a time
    return losses


def watch_layers(
    model: Runnable,
    windows: Sequence[Window],
    compute: Compute,
    watched: Callable[[int, Any], AbstractContextManager[None]],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Run a model's layers for what passes through their modules; what follows the last layer is not run.

    Args:
        model: the model to run.
        windows: the windows of text, which pass each by itself, without padding.
        compute: the device and dtype to run in.
        watched: called with each layer's number and module; the context that it returns is open while the windows pass
            through.
        progress: called with the layers done and all there are.

    Raises:
        CheckpointError: the tensors do not fit the class, or numbers are not finite; says where that began.
    """
    passing = _Pass(model, windows, compute, 0)
    for index, layer in passing.layers(progress):
        with watched(index, layer):
            passing.run(index, layer)


def read_router_inputs(
    mixture: MixtureModel,
    windows: Sequence[Window],
    compute: Compute,
    entered: Callable[[int, torch.Tensor], None],
    *,
    rows: Callable[[int], torch.Tensor | None],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Run a mixture's layers for what enters its routers, whose rows may be made of that; the head is not run.

    Args:
        mixture: the mixture to run.
        windows: the windows of text.
        compute: the device and dtype to run in.
        entered: called in each layer with a router with the number of each window, and the states (token, hidden) in
            float32 that enter the router there.
        rows: called with the number of each layer with a router when all windows have come that far; the rows (expert,
            hidden) that it returns take the place of the router's before the windows pass through. None leaves it.
        progress: called with the layers done and all there are.

    Raises:
        CheckpointError: the tensors do not fit the class, or numbers are not finite; says where that began.
    """
    passing = _Pass(mixture.runnable, windows, compute, _TOKENS)
    for index, layer in passing.layers(progress):
        if mixture.router(index) in mixture.runnable.shapes:
            passing.enter(mixture, index, layer, entered)
            made = rows(index)
            if made is not None:
                passing.replace(mixture.router(index), made)
        passing.run(index, layer)


class _Pass:
    """Windows of text on their way through a model, one layer after the other."""

    def __init__(self, model: Runnable, windows: Sequence[Window], compute: Compute, together: int) -> None:
        """Embed the windows, in batches of about `together` tokens; 0 is each by itself."""
        self._model, self._windows, self._compute = model, windows, compute
        self.whole = empty_model(model.model_type, model.keys, compute.device, head=True, dtype=compute.dtype)
        self.places = list(group(range(len(windows)), lambda index: len(windows[index].ids), together))
        _load(self.whole, model, [f"model.{name}" for name in before_layers(self.whole.model, model.norm)], compute)
        self.batches = [
            embed(self.whole.model, model.norm, [windows[index].ids for index in part], model.rows, compute)
            for part in self.places
        ]
        if not all(batch.is_finite for batch in self.batches):
            names = [name for name in model.names(None) if name.startswith(_EMBEDDINGS)]
            raise _not_finite(model, "the embeddings", names, compute.dtype)

    def layers(self, progress: Callable[[int, int], None]) -> Iterator[tuple[int, Any]]:
        """Yield each layer's number and module, which has its weights until the next one is asked for."""
        for index in range(self._model.layers):
            with self.layer(index) as layer:
                yield index, layer
            progress(index + 1, self._model.layers)

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """A context with a layer's module, which has its weights until the end."""
        _load(self.whole, self._model, self._model.names(index), self._compute)
        layer = self.whole.model.layers[index]
        check_complete(layer, layer_prefix(index).removesuffix("."))
        yield layer
        layer.to("meta")

    def router(self, mixture: MixtureModel | None, index: int, layer: Any) -> RouterWatcher | None:
        """A watcher of the router in a layer of the mixture that the model is; None where the layer has none."""
        if mixture is None or mixture.router(index) not in self._model.shapes:
            return None
        rows = self._model.read(mixture.router(index)).float()
        experts = None
        if mixture.scales_router_inputs:
            stack = path_in_memory(self.whole, layer_prefix(index) + next(iter(mixture.family.experts)))
            experts = self.whole.get_submodule(stack.rpartition(".")[0])
        return RouterWatcher(mixture, layer, self._router_module(mixture, index), experts, index, rows)

    def _router_module(self, mixture: MixtureModel, index: int) -> Any:
        path = path_in_memory(self.whole, mixture.router(index))
        return self.whole.get_submodule(path.rpartition(".")[0])

    def enter(
        self, mixture: MixtureModel, index: int, layer: Any, entered: Callable[[int, torch.Tensor], None]
    ) -> None:
        """Pass all batches through a layer as far as its router, and call `entered` with what enters there."""
        module = self._router_module(mixture, index)
        for part, batch in zip(self.places, self.batches, strict=True):
            states = router_inputs(layer, module, batch, index)
            for row, window in enumerate(part):
                inputs = states[row, : len(self._windows[window].ids)]
                if not all_finite(inputs):
                    raise self._not_finite(index)
                entered(window, inputs)

    def replace(self, name: str, values: torch.Tensor) -> None:
        """Put other values, rounded as the tensor's own are, in the place of a tensor of the layer in memory."""
        if broken := not_finite_in(name, values):
            raise CheckpointError(f"{self._model.name}: {broken}.")
        rounded = values.to(self._model.read(name).dtype)
        load_tensors(self.whole, {name: cast(rounded, self._compute.dtype)}, self._compute.device)

    def run(
        self,
        index: int,
        layer: Any,
        router: RouterWatcher | None = None,
        chosen: Callable[[Choice], None] = lambda _: None,
    ) -> None:
        """Pass all batches through a layer, and call `chosen` with what its router chooses for each window."""
        for part, batch in zip(self.places, self.batches, strict=True):
            choices: list[Choice] | None = []
            if router:
                choices = router.watch(batch, part, self._windows)
            else:
                run_layer(layer, batch, index)
            if choices is None or not batch.is_finite:
                raise self._not_finite(index)
            for choice in choices:
                chosen(choice)

    def _not_finite(self, index: int) -> CheckpointError:
        return _not_finite(self._model, f"layer {index}", self._model.names(index), self._compute.dtype)


def _not_finite(model: Runnable, place: str, names: Iterable[str], dtype: torch.dtype) -> CheckpointError:
    """The error for a model whose numbers are finite before a part of it, made of these tensors, and not after."""
    broken = next(filter(None, (not_finite_in(name, model.read(name)) for name in names)), None)
    return CheckpointError(f"{model.name}: its {where_it_began(place, broken, dtype)}.")


def _load(whole: Any, model: Runnable, names: list[str], compute: Compute) -> None:
    load_tensors(whole, {name: cast(model.read(name), compute.dtype) for name in names}, compute.device)


class _Head:
    """The part after the layers: the norm, and the head that makes logits."""

    def __init__(self, whole: Any, model: Runnable, compute: Compute) -> None:
        self._whole, self._model, self._dtype = whole, model, compute.dtype
        loaded = (_EMBEDDINGS, *(f"model.{name}" for name in before_layers(whole.model, model.norm)))
        self._names = [name for name in model.names(None) if not name.startswith(loaded)]
        _load(whole, model, self._names, compute)
        head = whole.get_output_embeddings()
        if head.weight.is_meta:
            self._names.append(f"{_EMBEDDINGS}.weight")
            tied = model.read(self._names[-1]).to(device=compute.device, dtype=compute.dtype)
            head.weight = torch.nn.Parameter(tied, requires_grad=False)

    def losses(
        self,
        windows: Sequence[Window],
        places: Sequence[Sequence[int]],
        batches: Sequence[Batch],
        predicted: Callable[[int, torch.Tensor], None],
    ) -> torch.Tensor:
        """Losses of each window, summed over its tokens that count."""
        losses = torch.zeros(len(windows), dtype=torch.float64)
        for part, batch in zip(places, batches, strict=True):
            for window, known in zip(part, self._logits(batch), strict=True):
                predicted(window, known)
                losses[window] = token_losses(windows[window], known).cpu().double().sum()  # MPS has no float64
        return losses

    def check(self, batches: Sequence[Batch]) -> None:
        """Check that the logits are finite, those of a few tokens at a time."""
        for batch in batches:
            for start in range(0, batch.states.shape[1], _TOKENS):
                span = slice(start, start + _TOKENS)
                lengths = tuple(max(0, min(length - start, _TOKENS)) for length in batch.lengths)
                part = replace(batch, states=batch.states[:, span], lengths=lengths)
                for _ in self._logits(part):
                    pass

    def _logits(self, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield the logits (token, vocab) of each sequence in float32."""
        for logits, length in zip(
            finish(self._whole, self._whole.model, self._model.norm, batch), batch.lengths, strict=True
        ):
            known = logits[:length].float()
            if not all_finite(known):
                raise _not_finite(self._model, "the norm and the head", self._names, self._dtype)
            yield known

"""Windows of text on their way through a model, one layer after the other, on one device or several."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any, Final

import torch

from moemerge.errors import CheckpointError
from moemerge.evaluation.choices import Choice, RouterWatcher, router_inputs
from moemerge.evaluation.runnable import MixtureModel, Runnable
from moemerge.families.layer_names import layer_prefix
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.decoder import before_layers, embed, empty_model, group, run_layer
from moemerge.passes.finite import all_finite, not_finite_in, where_it_began
from moemerge.passes.loading import cast, check_complete, load_tensors, path_in_memory, paths_in_memory
from moemerge.passes.sharing_out import shared_out
from moemerge.passes.tokens import Window

EMBEDDINGS: Final = "model.embed_tokens"
"""How names of the tensors of embeddings begin."""


class TextPass:
    """Windows of text, in batches that are shared out to the devices of the pass.

    Each device has a copy of the model, and of the layer whose weights are in memory, which are read once for all.
    """

    def __init__(self, model: Runnable, windows: Sequence[Window], compute: Compute, together: int) -> None:
        """Embed the windows, in batches of about `together` tokens; 0 is each by itself."""
        self.model, self.windows, self.dtype = model, windows, compute.dtype
        self.places = list(group(range(len(windows)), lambda index: len(windows[index].ids), together))
        """Numbers of the windows in each batch."""
        computes = compute.each[: max(1, len(self.places))]  # a device without a batch gets no weights
        self.devices = [one.device for one in computes]
        self.copies = [
            empty_model(model.model_type, model.keys, at, head=True, dtype=self.dtype) for at in self.devices
        ]
        self.first = [f"model.{name}" for name in before_layers(self.copies[0].model, model.norm)]
        """Names of the tensors that are computed with before the layers, beside embeddings."""
        self.load_named(self.first)
        self.batches = [
            embed(copy.model, model.norm, [windows[index].ids for index in part], model.rows, one)
            for part, copy, one in zip(self.places, cycle(self.copies), cycle(computes), strict=False)
        ]
        if not all(batch.is_finite for batch in self.batches):
            names = [name for name in model.names(None) if name.startswith(EMBEDDINGS)]
            raise self.not_finite("the embeddings", names)

    def layers(self, progress: Callable[[int, int], None]) -> Iterator[tuple[int, list[Any]]]:
        """Yield each layer's number and modules; see `layer`."""
        for index in range(self.model.layers):
            with self.layer(index) as modules:
                yield index, modules
            progress(index + 1, self.model.layers)

    @contextmanager
    def layer(self, index: int, loaded: "LoadedOnce | None" = None) -> Iterator[list[Any]]:
        """A context with a layer's module on each device, which has its weights until the end."""
        names = self.model.names(index)
        if loaded:
            loaded.load(self, {name: self.model.read(name) for name in names})
        else:
            self.load_named(names)
        modules = [copy.model.layers[index] for copy in self.copies]
        check_complete(modules[0], layer_prefix(index).removesuffix("."))
        yield modules
        for module in modules:
            module.to("meta")

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give each copy of the model the values of some of its tensors."""
        for copy, device in zip(self.copies, self.devices, strict=True):
            load_tensors(copy, tensors, device)

    def load_named(self, names: Iterable[str]) -> None:
        """Read some of the model's tensors, and give each copy of it their values."""
        self.load({name: self._read(name) for name in names})

    def _read(self, name: str) -> torch.Tensor:
        return cast(self.model.read(name), self.dtype)

    def router(self, mixture: MixtureModel | None, index: int) -> RouterWatcher | None:
        """A watcher of the router in a layer of the mixture that the model is; None where the layer has none."""
        if mixture is None or mixture.router(index) not in self.model.shapes:
            return None
        watched = [mixture.router(index)]
        if mixture.scales_router_inputs:
            watched.append(layer_prefix(index) + next(iter(mixture.family.experts)))
        modules = [[_owner(copy, name) for name in watched] for copy in self.copies]
        return RouterWatcher(mixture, modules, index, self.model.read(mixture.router(index)).float())

    def enter(
        self, mixture: MixtureModel, index: int, layers: Sequence[Any], entered: Callable[[int, torch.Tensor], None]
    ) -> None:
        """Pass all batches through a layer as far as its router, and call `entered` with what enters there."""
        routers = [_owner(copy, mixture.router(index)) for copy in self.copies]

        def come(device: int, batch: int) -> torch.Tensor:
            return router_inputs(layers[device], routers[device], self.batches[batch], index)

        for part, states in zip(self.places, self.shared_out(come), strict=True):
            for row, window in enumerate(part):
                inputs = states[row, : len(self.windows[window].ids)]
                if not all_finite(inputs):
                    raise self._not_finite(index)
                entered(window, inputs)

    def replace(self, name: str, values: torch.Tensor) -> None:
        """Put other values, rounded as the tensor's own are, in the place of a tensor of the layer in memory."""
        if broken := not_finite_in(name, values):
            raise CheckpointError(f"{self.model.name}: {broken}.")
        rounded = values.to(self.model.read(name).dtype)
        self.load({name: cast(rounded, self.dtype)})

    def run(
        self,
        index: int,
        layers: Sequence[Any],
        router: RouterWatcher | None = None,
        chosen: Callable[[Choice], None] = lambda _: None,
    ) -> None:
        """Pass all batches through a layer, and call `chosen` with what its router chooses for each window."""

        def passed(device: int, number: int) -> list[Choice] | None:
            batch = self.batches[number]
            choices: list[Choice] | None = []
            if router:
                choices = router.watch(device, layers[device], batch, self.places[number], self.windows)
            else:
                run_layer(layers[device], batch, index)
            return choices if batch.is_finite else None

        for choices in self.shared_out(passed):
            if choices is None:
                raise self._not_finite(index)
            for choice in choices:
                chosen(choice)

    def shared_out(self, work: Callable[[int, int], Any]) -> Iterator[Any]:
        """Yield what `work` makes of each batch, called with the number of its device and its own."""
        return shared_out(work, range(len(self.batches)), len(self.devices))

    def _not_finite(self, index: int) -> CheckpointError:
        return self.not_finite(f"layer {index}", self.model.names(index))

    def not_finite(self, place: str, names: Iterable[str]) -> CheckpointError:
        """The error where numbers are finite before a part of the model, made of these tensors, and not after."""
        broken = next(filter(None, (not_finite_in(name, self.model.read(name)) for name in names)), None)
        return CheckpointError(f"{self.model.name}: its {where_it_began(place, broken, self.dtype)}.")


class LoadedOnce:
    """Loads layers of models that run together; one takes over parameters of the last that are made of its own tensors.

    Those of the last model alone are held, so that there are two layers in memory at most.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[list[torch.Tensor], list[Any]]] = {}
        """The tensors that a parameter was made of, whose ids nothing else can have, and itself on each device."""

    def load(self, passing: TextPass, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give each copy of a pass's model the values of some tensors, in the dtype of the pass."""
        parts: dict[str, list[str]] = {}
        for name, path in paths_in_memory(passing.copies[0], tensors).items():
            parts.setdefault(path, []).append(name)
        # Classes differ in the dtype that a parameter has.
        shared = (passing.model.model_type, passing.dtype, *passing.devices)
        keys = {path: (shared, path, *(id(tensors[name]) for name in names)) for path, names in parts.items()}
        new = [name for path, names in parts.items() if keys[path] not in self._held for name in names]
        passing.load({name: cast(tensors[name], passing.dtype) for name in new})
        before, self._held = self._held, {}
        for path, names in parts.items():
            held = before.get(keys[path])
            if held is None:
                held = [tensors[name] for name in names], [getattr(*_place(copy, path)) for copy in passing.copies]
            else:
                for copy, parameter in zip(passing.copies, held[1], strict=True):
                    setattr(*_place(copy, path), parameter)
            self._held[keys[path]] = held

    def forget(self) -> None:
        """Free all parameters that no model uses."""
        self._held.clear()


def _place(whole: Any, path: str) -> tuple[Any, str]:
    """Find the module of a model that has a parameter, and what it calls it."""
    owner, _, own = path.rpartition(".")
    return whole.get_submodule(owner), own


def _owner(whole: Any, name: str) -> Any:
    """Find the module of a model that has a tensor of its checkpoint."""
    return _place(whole, path_in_memory(whole, name))[0]

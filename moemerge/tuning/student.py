"""The merged model that is tuned: only its gates have gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moemerge.errors import CheckpointError
from moemerge.evaluation.runnable import MixtureModel
from moemerge.passes.finite import not_finite_in
from moemerge.passes.tokens import Window
from moemerge.tuning.context import TuningContext
from moemerge.tuning.whole_model import load_whole


@dataclass
class Student:
    """A mixture whose gates are trained."""

    mixture: MixtureModel
    model: Any
    device: torch.device
    gates: dict[int, torch.nn.Parameter]
    """The gates by layer (expert, hidden), float32, which are trained."""
    routers: dict[int, torch.nn.Module]
    """The module that holds each layer's gate."""
    absent: dict[int, list[int]]
    """Experts that are switched off, by layer."""
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    """Inputs of each layer's router in the last pass (token, hidden), float32, without gradients."""
    counted: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    """Which tokens of the last pass count (window, position)."""

    @classmethod
    def load(cls, context: TuningContext) -> "Student":
        """Load the context's mixture onto the device of its process; all but the gates in the dtype of its processes.

        Raises:
            CheckpointError: the tensors do not fit the class, or a router is not finite.
        """
        mixture, device, dtype = context.mixture, context.processes.device, context.processes.dtype
        names = {layer: mixture.router(layer) for layer in mixture.moe_layers}
        gates = {
            layer: torch.nn.Parameter(mixture.runnable.read(name).to(device, torch.float32))
            for layer, name in names.items()
        }
        for layer, gate in gates.items():
            if broken := not_finite_in(names[layer], gate):
                raise CheckpointError(f"{mixture.folder}: {broken}.")
        model, holders = load_whole(
            mixture.runnable,
            device,
            dtype,
            context.memory,
            {names[layer]: gate for layer, gate in gates.items()},
            partial(context.progress, "layers" if context.memory.streamed else "load"),
        )
        student = cls(
            mixture,
            model,
            device,
            gates,
            {layer: holders[name] for layer, name in names.items()},
            {layer: mixture.absent(layer) for layer in gates},
        )
        for layer, module in student.routers.items():
            module.register_forward_pre_hook(partial(student._keep, layer))
        return student

    def _keep(self, layer: int, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.inputs[layer] = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()

    def logits(self, windows: Sequence[Window]) -> torch.Tensor:
        """Compute the logits (window, position, vocab) of windows, padded on the right."""
        ids, self.counted = padded(windows, self.device)
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def router_logits(self, layer: int) -> torch.Tensor:
        """Router logits of the last pass (token, expert); absent experts have minus infinity."""
        logits = self.inputs[layer] @ self.gates[layer].T
        absent = torch.tensor(self.absent[layer], device=logits.device, dtype=torch.long)
        return logits.index_fill(1, absent, -torch.inf)

    @contextmanager
    def holding(self, rows: Mapping[int, torch.Tensor]) -> Iterator[None]:
        """A context in which the gates have other rows, by layer (expert, hidden)."""
        kept = {layer: gate.detach().clone() for layer, gate in self.gates.items()}
        self.place(rows)
        try:
            yield
        finally:
            self.place(kept)

    def place(self, rows: Mapping[int, torch.Tensor]) -> None:
        """Give the gates other rows."""
        with torch.no_grad():
            for layer, gate in self.gates.items():
                gate.copy_(rows[layer])

    def rows(self) -> dict[int, torch.Tensor]:
        """Copies of the gates on the CPU, by layer (expert, hidden)."""
        return {layer: gate.detach().cpu().clone() for layer, gate in self.gates.items()}

    @contextmanager
    def noisy(self, noise: float, seed: int) -> Iterator[None]:
        """A context in which routers add noise of this deviation to every logit; other random numbers stay the same."""
        if not noise:
            yield
            return
        with ExitStack() as undo:
            undo.enter_context(torch.random.fork_rng([self.device] if self.device.type == "cuda" else []))
            torch.manual_seed(seed)
            for module in self.routers.values():
                module.forward = partial(_noisy_forward, module.forward, noise)
                undo.callback(delattr, module, "forward")
            yield


def _noisy_forward(forward: Callable[..., Any], noise: float, *args: Any, **kwargs: Any) -> Any:
    with _Noise(noise):
        return forward(*args, **kwargs)


class _Noise(TorchFunctionMode):
    """Adds noise to the output of a linear map, which every family's router has in each version of its class."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self._noise = noise

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            return given + self._noise * torch.randn_like(given)
        return given


def padded(windows: Sequence[Window], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (window, position) and which tokens count, padded on the right: causal models never see the padding."""
    length = max(len(window.ids) for window in windows)
    ids = [[*window.ids, *[0] * (length - len(window.ids))] for window in windows]
    counted = [[*window.counted, *[False] * (length - len(window.ids))] for window in windows]
    return torch.tensor(ids, device=device), torch.tensor(counted, device=device)

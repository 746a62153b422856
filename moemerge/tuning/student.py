"""The merged model that is tuned: only the tensors that are trained have gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moemerge.errors import CheckpointError
from moemerge.evaluation.losses import token_losses
from moemerge.evaluation.runnable import MixtureModel
from moemerge.passes.finite import not_finite_in
from moemerge.passes.tokens import Window
from moemerge.progress import Task
from moemerge.tuning.context import TuningContext
from moemerge.tuning.whole_model import load_whole
from moemerge.tuning.writing import trained_tensors


@dataclass
class Student:
    """A mixture whose gates are trained, and perhaps its norms."""

    mixture: MixtureModel
    model: Any
    device: torch.device
    trained: dict[str, torch.nn.Parameter]
    """The trained tensors by name, float32."""
    gates: dict[int, torch.nn.Parameter]
    """Those of them that are gates, by layer (expert, hidden)."""
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
        """Load the context's mixture onto the device of its process, in the dtype of its processes where not trained.

        Raises:
            CheckpointError: the tensors do not fit the class, or a trained one is not finite.
        """
        mixture, device, dtype = context.mixture, context.processes.device, context.processes.dtype
        trained = {
            name: torch.nn.Parameter(mixture.runnable.read(name).to(device, torch.float32))
            for name in trained_tensors(mixture, context.settings.train)
        }
        for name, values in trained.items():
            if broken := not_finite_in(name, values):
                raise CheckpointError(f"{mixture.folder}: {broken}.")
        model, holders = load_whole(
            mixture.runnable,
            device,
            dtype,
            context.memory,
            trained,
            partial(context.progress, Task("layers" if context.memory.streamed else "load")),
        )
        student = cls(
            mixture,
            model,
            device,
            trained,
            {layer: trained[mixture.router(layer)] for layer in mixture.moe_layers},
            {layer: holders[mixture.router(layer)] for layer in mixture.moe_layers},
            {layer: mixture.absent(layer) for layer in mixture.moe_layers},
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
    def holding(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """A context in which trained tensors have other values, by name."""
        kept = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.place(values)
        try:
            yield
        finally:
            self.place(kept)

    def place(self, values: Mapping[str, torch.Tensor]) -> None:
        """Give the trained tensors other values, by name."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(values[name])

    def values(self) -> dict[str, torch.Tensor]:
        """Copies of the trained tensors on the CPU, by name."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.trained.items()}

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


def cross_entropy(windows: Sequence[Window], logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats over each window's scored tokens: (window,), from logits (window, position, vocab)."""
    losses = [
        token_losses(window, found[: len(window.ids)].float()).sum()
        for window, found in zip(windows, logits, strict=True)
    ]
    return torch.stack(losses)


def padded(windows: Sequence[Window], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (window, position) and which tokens count, padded on the right: causal models never see the padding."""
    length = max(len(window.ids) for window in windows)
    ids = [[*window.ids, *[0] * (length - len(window.ids))] for window in windows]
    counted = [[*window.counted, *[False] * (length - len(window.ids))] for window in windows]
    return torch.tensor(ids, device=device), torch.tensor(counted, device=device)

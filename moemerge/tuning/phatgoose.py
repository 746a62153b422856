"""Rows from a sigmoid gate of each expert, trained on that expert's text alone: https://arxiv.org/abs/2402.05859.

In the base model, the FFN of each layer with a router is replaced by `E_0 + s(u.z)(E_e - E_0)`: `E_0` the base's own,
`E_e` the expert's, `s` the sigmoid, `u` the gate, zeros at first. What routers are made of them: `stacking.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moemerge.errors import RefusedError
from moemerge.evaluation.runnable import MixtureModel, Runnable
from moemerge.formats.dense import DENSE_FAMILIES
from moemerge.passes.decoder import empty_model
from moemerge.passes.loading import load_tensors
from moemerge.tuning.batches import Batches
from moemerge.tuning.losses import text_loss
from moemerge.tuning.processes import weight_dtype
from moemerge.tuning.settings import Settings
from moemerge.tuning.student import padded
from moemerge.tuning.training import make_optimiser, set_rates
from moemerge.tuning.whole import load_whole
from moemerge.tuning.work import Work


def train_gates(  # noqa: PLR0917
    mixture: MixtureModel, base: Runnable, experts: Sequence[Runnable], batches: Sequence[Batches], settings: Settings,
    accelerator: Any, work: Work, progress: Callable[[str, int, int], None],
) -> dict[int, torch.Tensor]:  # fmt: skip
    """By layer the gates (expert, hidden) of all experts, one trained after the other.

    Args:
        mixture: what they are for.
        base: the dense base model.
        experts: the dense models, in order.
        batches: of each, windows of its own text.
        settings: steps and learning rate.
        accelerator: for device and precision.
        work: where the gates of an expert are kept once they are trained.
        progress: called with the expert, its steps done and all there are.

    Raises:
        CheckpointError: tensors do not fit a class.
        RefusedError: FFNs do not sit where the router's input goes.
    """
    check_family(mixture, base)
    found = []
    model: Any = None
    for number, (expert, own) in enumerate(zip(experts, batches, strict=True)):
        path = work.folder / f"phatgoose-{number}.safetensors"
        if not path.exists():
            model = model or load_whole(base, accelerator.device, weight_dtype(accelerator))
            gates = _train(model, mixture, base, expert, number, own, settings, accelerator, progress)
            save_file({str(layer): gate for layer, gate in gates.items()}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        found.append({int(layer): gate for layer, gate in load_file(path).items()})
    hidden = int(base.keys["hidden_size"])
    return {
        layer: torch.stack([gates.get(layer, torch.zeros(hidden)) for gates in found]) for layer in mixture.moe_layers
    }


def check_family(mixture: MixtureModel, base: Runnable) -> None:
    """Refuse families whose router does not see what enters the dense FFN.

    Raises:
        RefusedError: it is one.
    """
    module = DENSE_FAMILIES[base.model_type].ffn_module
    if mixture.family.keeps_dense_ffn:
        raise RefusedError(
            f"--method phatgoose: the routers of {mixture.family.model_type} do not see what enters the base's "
            f"{module}. Use --method gates."
        )


def _train(  # noqa: PLR0917
    model: Any, mixture: MixtureModel, base: Runnable, expert: Runnable, number: int, batches: Batches,
    settings: Settings, accelerator: Any, progress: Callable[[str, int, int], None],
) -> dict[int, torch.Tensor]:  # fmt: skip
    device, dtype = accelerator.device, weight_dtype(accelerator)
    layers = [layer for layer in mixture.moe_layers if number not in mixture.absent(layer)]
    gates = {layer: torch.nn.Parameter(torch.zeros(int(base.keys["hidden_size"]), device=device)) for layer in layers}
    other = _ffns(expert, layers, device, dtype)
    lengths: dict[int, torch.Tensor] = {}
    own = {
        layer: model.model.layers[layer].get_submodule(DENSE_FAMILIES[base.model_type].ffn_module) for layer in layers
    }
    for layer, ffn in own.items():
        ffn.forward = partial(_mixed, ffn.forward, other[layer], gates[layer], lengths, layer)
    try:
        optimiser = None
        for step in range(settings.steps):
            windows = [window for window, _ in batches.step(step)]
            with accelerator.autocast():
                logits = model(input_ids=padded(windows, device)[0], use_cache=False).logits
            loss = text_loss(windows, logits, [None] * len(windows), 0)[0].sum()
            accelerator.backward(loss / sum(sum(window.scored) for window in windows))
            if optimiser is None:
                optimiser = make_optimiser(gates, {layer: float(lengths[layer]) for layer in layers}, settings)
            set_rates(optimiser, step, settings.steps)
            optimiser.step()
            optimiser.zero_grad()
            progress(f"gate of {mixture.experts[number]}", step + 1, settings.steps)
    finally:
        for ffn in own.values():
            del ffn.forward
    return {layer: gate.detach().cpu() for layer, gate in gates.items()}


def _mixed(  # noqa: PLR0917
    base: Callable[..., torch.Tensor], expert: torch.nn.Module, gate: torch.Tensor, lengths: dict[int, torch.Tensor],
    layer: int, states: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    lengths.setdefault(layer, states.detach().float().square().sum(dim=-1).mean().sqrt())
    share = (states.float() @ gate).sigmoid()[..., None].to(states.dtype)
    plain = base(states)
    mixed: torch.Tensor = plain + share * (expert(states) - plain)
    return mixed


def _ffns(
    expert: Runnable, layers: Sequence[int], device: torch.device, dtype: torch.dtype
) -> dict[int, torch.nn.Module]:  # fmt: skip
    """The FFNs of a dense model, without the rest of it."""
    model = empty_model(expert.model_type, expert.keys, device, head=True)
    module = DENSE_FAMILIES[expert.model_type].ffn_module
    found = {}
    for layer in layers:
        names = [name for name in expert.names(layer) if name.startswith(f"model.layers.{layer}.{module}.")]
        load_tensors(model, {name: expert.read(name).to(dtype) for name in names}, device)
        found[layer] = model.model.layers[layer].get_submodule(module).requires_grad_(requires_grad=False)
    return found

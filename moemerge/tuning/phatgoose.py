"""Make router rows from a sigmoid gate of each expert, trained on that expert's text: https://arxiv.org/abs/2402.05859.

In the base model, the FFN of each layer with a router is replaced by `E_0 + s(u.z)(E_e - E_0)`: `E_0` is the base's
own FFN, `E_e` the expert's, `s` the sigmoid, and `u` the gate, which begins with zeros.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from moemerge.checkpoint.disk import drafted
from moemerge.config.schema import MergeConfig
from moemerge.errors import CheckpointError, RefusedError
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.runnable import MixtureModel, Runnable
from moemerge.evaluation.running import run_model
from moemerge.families.dense import DENSE_FAMILIES
from moemerge.families.layer_names import layer_prefix
from moemerge.passes.decoder import empty_model, group
from moemerge.passes.loading import cast, check_complete, load_tensors
from moemerge.passes.tokens import count_scored
from moemerge.progress import Task
from moemerge.routers.scaling import calibrated_scale
from moemerge.routers.scoring import lowering
from moemerge.tuning.batches import Batches
from moemerge.tuning.context import TuningContext
from moemerge.tuning.judging import judge
from moemerge.tuning.resume_folder import State
from moemerge.tuning.settings import SplitDocuments
from moemerge.tuning.student import Student, cross_entropy, padded
from moemerge.tuning.teachers import open_source
from moemerge.tuning.training import make_optimiser, set_rates
from moemerge.tuning.whole_model import from_disk, load_whole

# Tokens of each expert that the scale is fitted to.
_SCALE_TOKENS: Final = 1024


def open_sources(context: TuningContext) -> list[Runnable]:
    """Open the base and every expert.

    Raises:
        RefusedError: the merge was of another kind, or a model cannot be opened.
    """
    needs = "--method phatgoose needs the base and the dense experts"
    numbers = [None, *range(len(context.mixture.experts))]
    found = [open_source(context.mixture, number, needs, context.announce) for number in numbers]
    _check(context.mixture, found[0])
    return found


def stack_gates(
    context: TuningContext, sources: Sequence[Runnable], documents: SplitDocuments, batches: Batches
) -> State:
    """Make rows of single experts' gates, and judge them on held-out text.

    Args:
        context: the context of the tuning.
        sources: the base and every expert.
        documents: documents of every expert to train on and to judge by.
        batches: windows of all experts together.

    Raises:
        CheckpointError: tensors do not fit a class, or numbers are not finite.
    """
    base, *experts = sources
    begun, left = time.perf_counter(), sum(not _file(context, number).exists() for number in range(len(experts)))
    gates = _train_all(context, base, experts, documents)
    seconds = (time.perf_counter() - begun) / max(left, 1)
    student = Student.load(context)
    (before, _), start = judge(context, student, batches.held_out), student.values()
    state = State(context.settings.steps, 0, 0, seconds, before, before, start, start, {})
    rows = _rows(context, student, gates, batches.training)
    student.place({context.mixture.router(layer): mine for layer, mine in rows.items()})
    after, _ = judge(context, student, batches.held_out)
    context.announce(f"held-out loss {after.mean_loss:.4f} (at the start {before.mean_loss:.4f})")
    state.judge(after, student.values())
    return state


def _check(mixture: MixtureModel, base: Runnable) -> None:
    """Refuse mixtures that compute otherwise than their base with an expert's FFN in it."""
    if mixture.family.keeps_dense_ffn:
        raise RefusedError(
            f"--method phatgoose: the routers of {mixture.family.model_type} do not see what enters the base's "
            f"{DENSE_FAMILIES[base.model_type].ffn_module}. Use --method gates."
        )
    if mixture.config and (changes := _changes(mixture.config)):
        raise RefusedError(
            f"--method phatgoose: trains in the base model with experts as they are, and {' and '.join(changes)} "
            "made something else of them here. Use --method gates."
        )


def _changes(config: MergeConfig) -> list[str]:
    found = [] if config.shared_weights.method == "base" else [f"shared_weights: {config.shared_weights.method}"]
    found += ["fold_norms"] if config.fold_norms else []
    keys = ("noise_scale", "reinit", "residual_scale")
    return found + [key for key in keys if any(getattr(expert, key) is not None for expert in config.experts)]


def _train_all(
    context: TuningContext, base: Runnable, experts: Sequence[Runnable], documents: SplitDocuments
) -> dict[int, torch.Tensor]:
    """Train the gates of all experts, one after the other; returns them by layer (expert, hidden)."""
    mixture, found = context.mixture, []
    model: Any = None
    for number, (name, expert) in enumerate(zip(mixture.experts, experts, strict=True)):
        path = _file(context, number)
        if not path.exists():
            model = model or _load(context, base)
            own = Batches.cut(mixture, documents.of(name), context.settings)
            layers = [layer for layer in mixture.moe_layers if number not in mixture.absent(layer)]
            gates = _train(context, name, model, _ffns(expert, layers, context), own)
            if not all(gate.isfinite().all() for gate in gates.values()):
                for dense in (base, expert):
                    run_model(dense, own.training.windows, context.processes.compute)  # says where that began
                raise CheckpointError(f"{name}: the gates that its text trains are not finite. Give a lower --lr.")
            context.announce(f"{name}: its gates are trained ({number + 1} of {len(experts)})")
            with drafted(path) as draft:
                save_file({str(layer): gate for layer, gate in gates.items()}, draft)
        found.append({int(layer): gate for layer, gate in load_file(path).items()})
    del model
    gc.collect()  # its layers hold themselves
    none = torch.zeros(int(base.keys["hidden_size"]))
    return {layer: torch.stack([gates.get(layer, none) for gates in found]) for layer in mixture.moe_layers}


def _file(context: TuningContext, number: int) -> Path:
    return context.work.folder / f"phatgoose-{number}.safetensors"


def _load(context: TuningContext, base: Runnable) -> Any:
    device, dtype = context.processes.device, context.processes.dtype
    return load_whole(base, device, dtype, context.memory, {}, partial(context.progress, Task("load")))[0]


def _train(
    context: TuningContext, name: str, model: Any, ffns: Mapping[int, torch.nn.Module], batches: Batches
) -> dict[int, torch.Tensor]:
    """Train the gate of one expert, whose FFNs these are; returns it by layer (hidden,)."""
    settings, device = context.settings, context.processes.device
    mixed = {}
    for layer, expert in ffns.items():
        own = model.model.layers[layer].get_submodule(DENSE_FAMILIES[model.config.model_type].ffn_module)
        gate = torch.nn.Parameter(torch.zeros(model.config.hidden_size, device=device))
        mixed[layer] = own.forward = _Mixed(own, own.forward, expert, gate)
    gates = {layer: one.gate for layer, one in mixed.items()}
    try:
        optimiser = None
        for step in range(settings.steps):
            windows = [window for window, _ in batches.step(step)]
            scored = count_scored(windows)
            for part in group(windows, lambda window: len(window.ids), context.memory.tokens_at_once):
                ids, counted = padded(part, device)
                for one in mixed.values():
                    one.counted = counted
                with context.processes.autocast():
                    logits = model(input_ids=ids, use_cache=False).logits
                torch.autograd.backward(cross_entropy(part, logits).sum() / scored)
            if optimiser is None:
                optimiser = make_optimiser(gates, {layer: one.length for layer, one in mixed.items()}, settings)
            set_rates(optimiser, step, settings.steps)
            optimiser.step()
            optimiser.zero_grad()
            context.progress(Task("gate", name), step + 1, settings.steps)
            if not all(gate.isfinite().all() for gate in gates.values()):
                break
    finally:
        for one in mixed.values():
            del one.module.forward
    return {layer: gate.detach().cpu() for layer, gate in gates.items()}


@dataclass
class _Mixed:
    """The forward of an FFN that is mixed with an expert's."""

    module: torch.nn.Module
    base: Callable[[torch.Tensor], torch.Tensor]
    expert: torch.nn.Module
    gate: torch.Tensor
    """The gate (hidden,)."""
    counted: torch.Tensor | None = None
    """Which tokens of the pass count (window, position)."""
    length: float = 0.0
    """Root mean square length of the states in the first pass."""

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if not self.length:
            self.length = float(states.detach()[self.counted].float().square().sum(dim=1).mean().sqrt())
        share = (states.float() @ self.gate).sigmoid()[..., None].to(states.dtype)
        plain = self.base(states)
        mixed: torch.Tensor = plain + share * (self.expert(states) - plain)
        return mixed


def _ffns(expert: Runnable, layers: Sequence[int], context: TuningContext) -> dict[int, torch.nn.Module]:
    """Load the FFNs of a dense model, by layer, without the rest of it."""
    device, dtype = context.processes.device, context.processes.dtype
    model = empty_model(expert.model_type, expert.keys, device, head=True, dtype=dtype)
    module = DENSE_FAMILIES[expert.model_type].ffn_module
    ffns = {layer: model.model.layers[layer].get_submodule(module) for layer in layers}

    def load(layer: int) -> None:
        names = [name for name in expert.names(layer) if name.startswith(f"{layer_prefix(layer)}{module}.")]
        load_tensors(model, {name: cast(expert.read(name), dtype) for name in names}, device)
        check_complete(ffns[layer], layer_prefix(layer) + module)
        ffns[layer].requires_grad_(requires_grad=False)

    for layer, ffn in ffns.items():
        if context.memory.streamed:
            ffn.forward = partial(from_disk, partial(load, layer), ffn, ffn.forward)
        else:
            load(layer)
    return ffns


def _rows(
    context: TuningContext, student: Student, gates: Mapping[int, torch.Tensor], texts: Texts
) -> dict[int, torch.Tensor]:
    """Make rows (expert, hidden) by layer: gates standardised as in the paper's section 3.2, under a scale of our own.

    The scale is fitted to the student's router inputs on texts (of every expert) whose expert is known.
    """
    states: dict[int, list[torch.Tensor]] = {layer: [] for layer in gates}
    beginnings: dict[int, list[torch.Tensor]] = {layer: [] for layer in gates}
    labels: list[int] = []
    with torch.no_grad():
        for domain, expert in enumerate(texts.expert):
            left = _SCALE_TOKENS
            for place in texts.of(domain) if expert is not None else ():
                window = texts.windows[place]
                if left <= 0:
                    break
                with context.processes.autocast():
                    student.logits([window])
                counted = torch.tensor(window.counted)
                for layer, kept in states.items():
                    kept.append(student.inputs[layer].cpu()[counted])
                    beginnings[layer].append(student.inputs[layer].cpu()[:1])
                labels += [expert or 0] * int(counted.sum())
                left -= int(counted.sum())
    targets = torch.nn.functional.one_hot(torch.tensor(labels), len(student.mixture.experts)).float()
    weights = (1 / targets.sum(dim=0).clamp_min(1))[labels]
    rows = {}
    for layer, kept in states.items():
        rows[layer] = torch.zeros_like(gates[layer])
        present = [expert for expert in range(len(gates[layer])) if expert not in student.absent[layer]]
        mine = targets[:, present].sum(dim=1) > 0
        found = standardised_rows(
            gates[layer][present], torch.cat(kept)[mine], targets[mine][:, present], weights[mine]
        )
        if student.mixture.choosing.scoring == "sigmoid":
            found = found - lowering(torch.cat(kept + beginnings[layer]))
        rows[layer][present] = found
    return rows


def standardised_rows(
    gates: torch.Tensor, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Make rows (expert, hidden) of a softmax router from sigmoid gates (expert, hidden).

    Args:
        gates: the gates of single experts, of any length each.
        states: router inputs (token, hidden).
        targets: 1 for the expert that a token is for (token, expert).
        weights: the weight of each token (token,).
    """
    rows = gates - gates.mean(dim=1, keepdim=True)
    rows = rows / rows.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
    rows = rows * calibrated_scale(rows, states, states @ rows.T, targets, weights)
    return rows - rows.mean(dim=0)

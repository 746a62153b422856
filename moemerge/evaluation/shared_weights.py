"""Choose the weights that a mixture's experts share by their losses, for `shared_weights: auto`.

A candidate is judged as the label oracle of the mixture uses it: each expert's text passes through a dense model of the
candidate's shared weights and that expert's FFNs, so no routers are needed. Noise, `residual_scale` and shared experts
are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Final

import torch

from moemerge.checkpoint.header import TensorInfo
from moemerge.config.expert_names import named_place
from moemerge.evaluation.figures import FEWEST_DOCUMENTS, Sums, by_document, difference, estimate
from moemerge.evaluation.runnable import Runnable, stored
from moemerge.evaluation.running import run_together
from moemerge.families.dense import DenseModel, ModelTensors
from moemerge.families.dense.family import DenseFamily
from moemerge.families.layer_names import layer_prefix
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window, by_transformers, count_scored, cut_windows
from moemerge.planning.parts import Parts
from moemerge.planning.plan import MergePlan
from moemerge.planning.shared_choice import (
    BASE,
    FEWEST_TOKENS,
    TOKENS,
    SharedChoice,
    expert_texts,
)

# Shorter windows are of more documents, which makes differences surer.
_WINDOW: Final = 256

Losses = Mapping[str, Mapping[str, Sums]]
"""Losses of each method on each expert's text, by document."""


def choose(
    plan: MergePlan, compute: Compute, progress: Callable[[int, int], None], folder: Path | None = None
) -> SharedChoice:
    """Choose between the base's shared weights and mixed ones, by the losses of experts that use them.

    Args:
        plan: a plan that leaves the choice to the merge.
        compute: the device and dtype to run in.
        progress: called with the layers done and all there are.
        folder: the folder with the output's tokenizer, where it is not the base's.

    Raises:
        RouterError: the tokenizer cannot be used.
        RefusedError: a text cannot be read.
        CheckpointError: a model's numbers are not finite.
    """
    texts = _texts(plan, folder or plan.base_folder)
    counts = list(map(count_scored, texts))
    if min(counts) < FEWEST_TOKENS:
        return SharedChoice(
            BASE,
            f"{named_place(counts.index(min(counts)), plan.config.expert_names)} has {min(counts)} tokens of text to "
            f"compare losses on, and at least {FEWEST_TOKENS} are needed",
        )
    losses = losses_of(plan, texts, compute, progress)
    if isinstance(losses, str):
        return SharedChoice(BASE, f"others cannot be compared with it, since {losses}")
    return best_of(losses)


def losses_of(
    plan: MergePlan, texts: Sequence[Sequence[Window]], compute: Compute, progress: Callable[[int, int], None]
) -> Losses | str:
    """Measure the possible methods on the windows of each expert's text; a returned text says why none can be."""
    models: list[tuple[str, int, Runnable]] = []
    latest = _Latest(plan.base)
    for method, made in plan.candidates.items():
        for number in range(len(texts)):
            model = _dense(plan, made.parts, number)
            if isinstance(model, str):
                return model
            models.append((method, number, latest.reading(model, method)))
    run = [(model, texts[number]) for _, number, model in models]
    losses: dict[str, dict[str, Sums]] = {}
    for (method, number, _), found in zip(models, run_together(run, compute, progress), strict=True):
        losses.setdefault(method, {})[str(number)] = _sums(found, texts[number])
    return losses


def best_of(losses: Losses) -> SharedChoice:
    """Choose by losses: a method takes the place of one before it only if it is better by more than chance.

    That is where the 95 % interval of their difference, over the same documents, has no room for 0.
    """
    best = BASE
    for method in losses:
        gain = difference(losses[best], losses[method])
        if gain.low is not None and gain.low > 0:
            best = method
    means = {method: fmean(estimate(sums).value for sums in of.values()) for method, of in losses.items()}
    tokens = int(sum(sums[:, 1].sum() for sums in losses[best].values()))
    shown = f"{', '.join(f'{method} {mean:.4f}' for method, mean in means.items())}; {tokens} tokens"
    why = f"on the experts' texts no mix of the models loses less than it by more than chance ({shown})"
    if best != BASE:
        less = difference(losses[BASE], losses[best]).precise
        why = f"on the experts' texts its loss is lower than the base's by {less} nats per token ({shown})"
    return SharedChoice(best, why, means, tokens)


def _texts(plan: MergePlan, folder: Path) -> list[list[Window]]:
    """Cut windows of each expert's text."""
    encode = by_transformers(folder, roles=plan.config.router.chat_roles)
    length = min(_WINDOW, int(plan.base.config["max_position_embeddings"]) - 1)
    cut = [
        cut_windows(expert_texts(plan, number), encode, tokens=TOKENS, length=length)
        for number in range(len(plan.experts))
    ]
    return [[window for window in windows if any(window.scored)] for windows in cut]


def _sums(losses: torch.Tensor, windows: Sequence[Window]) -> Sums:
    """Sum losses (window,) by document; by window, where documents are too few for an interval."""
    documents = [window.document for window in windows]
    if len(set(documents)) < FEWEST_DOCUMENTS:
        documents = list(range(len(windows)))
    return by_document(losses.tolist(), [sum(window.scored) for window in windows], documents)


class _Latest:
    """Reads models of a method, which differ in their FFNs alone; a layer's other tensors are kept for the next one.

    Mixed weights are computed at each reading, so that they are read once for all models that run one after the other.
    """

    def __init__(self, model: DenseModel) -> None:
        self._own = {name for layer in range(model.layers) for name in model.ffn(layer)}
        self._part: tuple[str, int | None] = "", None
        self._held: dict[str, torch.Tensor] = {}

    def reading(self, model: Runnable, method: str) -> Runnable:
        """Make the same model, which reads through this."""
        layers = {name: layer for layer in (None, *range(model.layers)) for name in model.names(layer)}

        def read(tensor: str) -> torch.Tensor:
            if tensor in self._own:
                return model.read(tensor)
            if (part := (method, layers[tensor])) != self._part:
                self._part, self._held = part, {}
            if tensor not in self._held:
                self._held[tensor] = model.read(tensor)
            return self._held[tensor]

        return replace(model, read=read)


def _dense(plan: MergePlan, parts: Parts, number: int) -> Runnable | str:
    """Make the dense model of an expert's FFNs in all layers that it takes part in, the rest from the base of `parts`.

    A returned text says why there is none.
    """
    base, expert = parts.base, parts.experts[number]
    model, width = base.model, expert.model.sizes["ffn"]
    by_layer = "wide_ffns" in model.facts | expert.model.facts
    held = [layer for layer in plan.mixture.moe_layers if number not in plan.mixture.absent.get(layer, ())]
    keys, family = model.class_keys, model.family
    if expert.model.ffn_widths != model.ffn_widths:
        if len(held) < model.layers or not isinstance(family.ffn_width, str) or by_layer:
            return f"{named_place(number, plan.config.expert_names)} has FFNs of another width than the base model's"
        keys |= {family.ffn_width: width}
    if any(projection.parts > 1 for projection in family.ffn.values()) and expert.model.family.ffn != family.ffn:
        return f"{named_place(number, plan.config.expert_names)} stores its FFNs otherwise than the base model"
    inside = [name for layer in range(model.layers) for name in model.tensors(layer)]
    tensors = {n: base.tensors[n] for n in (*model.outside(), family.head, *inside) if n in base.tensors}
    for layer in range(model.layers):
        tensors |= _ffn(family, expert if layer in held else base, layer)
    return stored(named_place(number, plan.config.expert_names), family.model_type, keys, tensors)


def _ffn(family: DenseFamily, source: ModelTensors, layer: int) -> dict[str, TensorInfo]:
    """Find the tensors of a layer's FFN, by the names that they have in a family."""
    prefix = layer_prefix(layer)
    return {
        prefix + projection.name: source.projection(layer, role)
        if projection.parts == 1
        else source.tensors[prefix + projection.name]
        for role, projection in family.ffn.items()
    }

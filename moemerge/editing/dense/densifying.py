"""Plan a dense model of all experts of a mixture: their FFNs averaged, or those of the most loaded side by side."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from moemerge.checkpoint.derived import Derived, linear
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.joined import joined, joined_columns
from moemerge.editing.dense.dense_plan import DensePlan, plan_dense
from moemerge.errors import RefusedError
from moemerge.families.expert_view import DenseView, Ffn, dense_with, expert_ffn, routed_layers, scaled, shared_ffn
from moemerge.families.stored_mixture import StoredMixture
from moemerge.planning.options import PlanOptions
from moemerge.sources.model_folder import open_model
from moemerge.sources.stored_mixtures import read_stored_mixture

if TYPE_CHECKING:
    from moemerge.evaluation.mean_weights import MeasuredMixture

Weights = Mapping[int, Sequence[float]]
"""The mean weight of each expert in each layer with a router, over all tokens; those of a layer add up to 1."""


def plan_densify(
    reference: str,
    *,
    widen: int | None = None,
    measured: "MeasuredMixture | None" = None,
    options: PlanOptions = PlanOptions(),
    announce: Callable[[str], None] = lambda _: None,
) -> tuple[DensePlan, Mapping[str, tuple[float, float]]]:
    """Decide a dense model of all experts of a mixture; with measured weights it is run over that text.

    Args:
        reference: the mixture.
        widen: how many experts are put side by side; None to average all.
        measured: the mixture, run over text; None where all experts count alike.
        options: the size of files, and the folder that will be written.
        announce: called with a line about each step that takes long.

    Returns:
        The plan, and the losses of mixture and dense model by domain, in nats per token.

    Raises:
        RefusedError: the model would read text otherwise than the mixture, or `widen` needs weights.
        IncompatibleError: no dense family computes the same beside the experts; lists every reason.
        SourceError: the mixture cannot be reached.
        CheckpointError: the mixture's files are damaged.
    """
    folder = open_model(reference, announce)
    mixture = read_stored_mixture(folder, announce, plain=True)
    if widen is not None and widen < mixture.experts and measured is None:
        raise RefusedError(
            f"--widen: which {widen} of {mixture.experts} experts are loaded most is known from text alone. Give it by "
            "--data NAME=PATH."
        )
    weights = measured.weights if measured else equal_weights(mixture)
    view = averaged(mixture, weights) if widen is None else widened(mixture, weights, widen)
    losses = measured.losses_of(view) if measured else {}
    how = "weighted averages of its experts'" if widen is None else f"{widen} experts' side by side"
    what = (
        f"A {view.model.family.model_type}: {folder.reference}, a {mixture.family.model_type} of {mixture.experts} "
        f"experts, with one FFN in each layer, {how}; made with moemerge."
    )
    said = [f"loss on {name}: {dense:.3f}, the mixture's {ours:.3f}" for name, (ours, dense) in losses.items()]
    plan = plan_dense(what, folder, view, options=options, announce=announce, notes=[*view.notes, *said])
    return plan, losses


def equal_weights(mixture: StoredMixture) -> Weights:
    """The weights of experts that are all chosen alike."""
    return {layer: [1 / mixture.experts] * mixture.experts for layer in mixture.moe_layers}


def averaged(mixture: StoredMixture, weights: Weights) -> DenseView:
    """Make the dense model whose FFNs are the weighted averages of the experts', beside the shared expert's neurons.

    It is no more than a beginning for training: what experts compute is not linear in their weights, so that only
    experts that are all equal give the mixture again.

    Raises:
        IncompatibleError: no dense family computes the same beside the experts; lists every reason.
        CheckpointError: a file is damaged.
    """
    ffns = {}
    for layer in routed_layers(mixture):
        experts = [expert_ffn(mixture, layer, expert) for expert in range(mixture.experts)]
        mean = {role: _mean([ffn[role] for ffn in experts], weights[layer]) for role in experts[0]}
        ffns[layer] = _beside([mean], shared_ffn(mixture, layer))
    return dense_with(mixture, ffns, "the average of the experts")


def widened(mixture: StoredMixture, weights: Weights, count: int) -> DenseView:
    """Make the dense model whose FFNs have the neurons of the most loaded experts of each layer, and the shared one's.

    A mixture adds the sum of `g_e(x) f_e(x)` over experts, whose weights `g_e` add up to 1. The nearest sum with
    weights that do not depend on the token has their means; those of the chosen experts are divided by their sum, and
    multiply the down projections. So the result is the mixture itself where all weights are always equal to their
    means, or all experts equal.

    Raises:
        RefusedError: the mixture has fewer experts.
        IncompatibleError: see `averaged`.
        CheckpointError: see `averaged`.
    """
    if not 1 <= count <= mixture.experts:
        raise RefusedError(f"--widen: {count} of {mixture.experts} experts. Choose 1 to {mixture.experts}.")
    ffns = {}
    for layer in routed_layers(mixture):
        given = weights[layer]
        chosen = sorted(range(mixture.experts), key=lambda expert, given=given: (-given[expert], expert))[:count]  # type: ignore[misc]
        total = sum(given[expert] for expert in chosen)
        parts = []
        for expert in sorted(chosen):
            ffn = expert_ffn(mixture, layer, expert)
            parts.append({**ffn, "down": scaled(ffn["down"], given[expert] / total)})
        ffns[layer] = _beside(parts, shared_ffn(mixture, layer))
    return dense_with(mixture, ffns, f"{count} experts side by side")


def _mean(tensors: Sequence[TensorInfo], weights: Sequence[float]) -> TensorInfo:
    first, key = tensors[0], f"mean by {list(weights)!r}"
    return Derived("mean of experts", tuple(tensors), linear(weights), key, first.dtype).tensor(first.name)


def _beside(ffns: Sequence[Ffn], shared: Ffn | None) -> Ffn:
    """Put the neurons of several FFNs into one, which computes their sum."""
    every = [*ffns, *([shared] if shared else [])]
    return {
        role: (joined_columns if role == "down" else joined)(role, [ffn[role] for ffn in every]) for role in every[0]
    }

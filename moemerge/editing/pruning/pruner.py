"""Prune a mixture: measure its experts over text, choose those that stay, and give them the routers of the others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from moemerge.chats import Document
from moemerge.checkpoint.derived import read_values
from moemerge.editing.pruning.choice import PruneRequest, Pruning, check_keep, choose_kept, equal_groups
from moemerge.editing.pruning.group_rows import fit_rows
from moemerge.editing.pruning.saliency import Saliency, measure_saliency
from moemerge.editing.pruning.similarity import Similarity, measure_similarity
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.processes import processes_of
from moemerge.evaluation.runnable import MixtureModel, open_mixture
from moemerge.evaluation.settings import EvaluationSettings
from moemerge.families.choosing import Choosing
from moemerge.passes.compute_dtype import find_compute
from moemerge.progress import Progress, Task
from moemerge.routers.rows import Rows

# Share of its weights that a token may give to other FFNs before fewer experts per token are worth a change.
_NOTICEABLE: Final = 0.01


@dataclass(frozen=True)
class Decision:
    """A pruning with everything that it rests on."""

    mixture: MixtureModel
    saliency: Saliency
    similarity: Similarity
    pruning: Pruning
    rows: Mapping[int, Rows]
    """Router rows (kept expert, hidden) of each layer; empty where those of the kept experts stay as they are."""


def decide(  # noqa: PLR0917
    folder: Path | str,
    documents: Mapping[str, Sequence[Document]],
    request: PruneRequest,
    settings: EvaluationSettings,
    progress: Progress = lambda _task, _done, _total: None,
    announce: Callable[[str], None] = lambda _: None,
) -> Decision:
    """Choose the experts that a mixture keeps; nothing is written.

    Args:
        folder: the mixture's folder.
        documents: documents by domain.
        request: what is asked for.
        settings: how much text is read, and on which device the mixture is run.
        progress: called with what is being done, and the layers done.
        announce: called with a line about each step that takes long.

    Raises:
        SourceError: there is no such model.
        IncompatibleError: it is no mixture of a kind that is read.
        RefusedError: it cannot have that number of experts, or there is no such device.
        CheckpointError: its files are damaged, or its numbers are not finite.
        RouterError: the tokenizer cannot be used.
    """
    mixture = open_mixture(folder)
    how = mixture.choosing
    check_keep(request.keep, len(mixture.experts), how)
    compute = find_compute(settings.device, settings.compute_dtype, mixture.runnable.layer_shapes)
    texts = Texts.cut(mixture, documents, settings.tokens, settings.window, settings.roles)
    announce("comparing the experts' weights ...")
    stored = mixture.as_stored
    similarity = measure_similarity(stored)
    equal = equal_groups(similarity, request)

    with processes_of(settings.ray, settings.workers, compute, len(texts.windows)) as processes:
        told = partial(progress, Task("layers", "the whole mixture", in_parts=processes is not None))
        saliency = measure_saliency(mixture, texts, compute, equal, told, processes)
    pruning = choose_kept(saliency, equal, request, mixture.experts_per_token, how)
    pruning = _with_further_layers(pruning, stored.moe_layers)
    if not any(len(group) > 1 for those in pruning.members.values() for group in those.values()):
        return Decision(mixture, saliency, similarity, _noted(pruning, how), {})
    told = partial(progress, Task("layers", "the whole mixture, for its routers"))
    fitted = fit_rows(mixture, texts, compute, pruning, told)
    rows = dict(fitted.rows)
    for layer in set(stored.moe_layers) - set(rows) if rows else ():
        rows[layer] = read_values(stored.router(layer))[pruning.own(layer)]
    pruning = _noted(_fewer(pruning, fitted.misses), how)
    return Decision(mixture, saliency, similarity, _fitted(pruning, fitted.misses), rows)


def _with_further_layers(pruning: Pruning, layers: Sequence[int]) -> Pruning:
    """Let layers that no text passes through, as those that predict further tokens, keep what the last one keeps."""
    last = max(pruning.kept)
    further = [layer for layer in layers if layer not in pruning.kept]
    if not further:
        return pruning
    listed = ", ".join(map(str, further))
    note = (
        f"layer{'s' if len(further) > 1 else ''} {listed}, which text does not pass through, keep"
        f"{'' if len(further) > 1 else 's'} the experts that layer {last} keeps"
    )
    return replace(
        pruning,
        kept={**pruning.kept, **dict.fromkeys(further, pruning.kept[last])},
        members={**pruning.members, **dict.fromkeys(further, pruning.members[last])},
        shares={**pruning.shares, **dict.fromkeys(further, pruning.shares[last])},
        notes=(*pruning.notes, note),
    )


def _fewer(pruning: Pruning, misses: Mapping[int, float]) -> Pruning:
    """Lower the experts per token where tokens chose equal experts together, so that fewer were different ones."""
    given = pruning.experts_per_token
    best = min(misses, key=lambda count: (misses[count], count))
    if any(pruning.shares.values()) or misses[given] - misses[best] < _NOTICEABLE:
        return pruning
    note = (
        f"experts_per_token is lowered from {given} to {best}: tokens chose equal experts together, so that {best} "
        f"different one{'' if best == 1 else 's'} made their result. With {given}, {misses[given]:.1%} of a token's "
        f"weights would go to other FFNs than before, with {best} {misses[best]:.1%}"
    )
    return replace(pruning, experts_per_token=best, notes=(*pruning.notes, note))


def _noted(pruning: Pruning, how: Choosing) -> Pruning:
    """Say what weights do that are not divided by the sum of the chosen ones."""
    undivided = "its routers do not divide the weights of the chosen experts by their sum"
    if pruning.loses and how.scoring == "softmax" and not how.normalises:
        note = f"{undivided}: what a softmax gave dropped experts goes to the kept ones, whose outputs all weigh more"
    elif any(factor != 1 for factor in pruning.factors):
        note = (
            f"{undivided}: the outputs of kept experts are multiplied by how many of those that each stands for were "
            f"chosen together, {', '.join(f'{factor:g}' for factor in pruning.factors)}"
        )
    else:
        return pruning
    return replace(pruning, notes=(*pruning.notes, note))


def _fitted(pruning: Pruning, misses: Mapping[int, float]) -> Pruning:
    """Say it where one of several equal experts does not get exactly what routers gave all of them."""
    missed = misses[pruning.experts_per_token]
    if pruning.loses or missed < _NOTICEABLE:
        return pruning
    note = (
        f"{missed:.1%} of a token's weights change, although every dropped expert equals a kept one: one computes what "
        "several did only where these have equal router rows and biases, and each kept expert stands for as many"
    )
    return replace(pruning, notes=(*pruning.notes, note))

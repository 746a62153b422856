"""Losses of a mixture before and after an edit, on the same text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moemerge.chats import Document
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.figures import Estimate, difference, estimate
from moemerge.evaluation.model_runs import Runs
from moemerge.evaluation.processes import processes_of
from moemerge.evaluation.runnable import MixtureModel
from moemerge.evaluation.settings import EvaluationSettings
from moemerge.passes.compute_dtype import find_compute
from moemerge.progress import Progress

_BEFORE, _AFTER = "before", "after"


@dataclass(frozen=True)
class Judged:
    """Losses in nats per token, by domain."""

    before: Mapping[str, Estimate]
    after: Mapping[str, Estimate]
    difference: Estimate
    """How much higher the loss is after the edit, averaged over domains, on the same documents."""
    unseen: bool
    """Whether no domain's text was used to choose the edit."""


def split_documents(
    documents: Mapping[str, Sequence[Document]],
) -> tuple[dict[str, Sequence[Document]], dict[str, Sequence[Document]], bool]:
    """Split each domain's documents into those to choose by and those to judge by, every second one.

    Returns:
        Both, and whether they differ everywhere: a domain of one document is in both.
    """
    chosen = {name: those[::2] for name, those in documents.items()}
    judged = {name: those[1::2] or those for name, those in documents.items()}
    return chosen, judged, all(len(those) > 1 for those in documents.values())


def judge(
    before: MixtureModel,
    after: MixtureModel,
    documents: Mapping[str, Sequence[Document]],
    settings: EvaluationSettings,
    progress: Progress,
    *,
    unseen: bool,
) -> Judged:
    """Run a mixture before and after an edit over text.

    Args:
        before: the mixture that was edited; its tokenizer reads the text.
        after: the edited one.
        documents: documents by domain.
        settings: how much text is read, and on which device the models are run.
        progress: called as each is run, with the layers of both.
        unseen: whether no domain's text was used to choose the edit.

    Raises:
        CheckpointError: a model's files are damaged, or its numbers are not finite.
    """
    texts = Texts.cut(before, documents, settings.tokens, settings.window, settings.roles)
    compute = find_compute(settings.device, settings.compute_dtype, before.runnable.layer_shapes)
    with processes_of(settings.ray, settings.workers, compute, len(texts.windows)) as processes:
        runs = Runs(texts, compute, progress, planned=2, processes=processes)
        runs.run(_BEFORE, before.runnable)
        runs.run(_AFTER, after.runnable)
    one, other = runs.sums[_BEFORE], runs.sums[_AFTER]
    return Judged(
        {name: estimate(found) for name, found in one.items()},
        {name: estimate(found) for name, found in other.items()},
        difference(other, one),
        unseen,
    )

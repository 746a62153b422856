"""Evaluate a merged model and its routers: losses beside those of honest baselines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moemerge.chats import Document
from moemerge.errors import RefusedError
from moemerge.evaluation.figures import Estimate, Evaluation, Sums, difference
from moemerge.evaluation.settings import EvaluationSettings
from moemerge.progress import Progress
from moemerge.sources.model_folder import open_merged
from moemerge.texts.documents import find_files, hub_revisions, read_documents

__all__ = ["Evaluation", "evaluate"]


def evaluate(
    folder: Path | str,
    data: Mapping[str, Sequence[str]],
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    progress: Progress = lambda _task, _done, _total: None,
    announce: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Run a merged model, and the models that it is made of, over text that it was not made from.

    Every model is run a layer at a time, and none is written to the disk.

    Args:
        folder: the folder of the merged model.
        data: files, folders or patterns of documents, or data sets on the Hub, by the name of their domain. A
            domain with the name of an expert is that expert's.
        settings: what is run, over how much text, and on which device.
        progress: called as each model is run, with the layers of all models.
        announce: called with a line about each step that takes long.

    Raises:
        SourceError: there is no such model.
        IncompatibleError: the model is no mixture that moemerge reads.
        RefusedError: there are no such files or device, or a domain's name is nearly that of an expert.
        CheckpointError: files of the merged model are damaged, or its numbers are not finite.
        RouterError: the tokenizer cannot be used.
    """
    (found,), _ = compare([folder], data, settings, progress=progress, announce=announce)
    return found


def compare(
    folders: Sequence[Path | str],
    data: Mapping[str, Sequence[str]],
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    progress: Progress = lambda _task, _done, _total: None,
    announce: Callable[[str], None] = lambda _: None,
) -> tuple[list[Evaluation], list[Estimate | None]]:
    """Evaluate several merged models on the same text, as `evaluate` does one.

    Returns:
        The evaluations, and for each model after the first how much higher its loss is than the first's, averaged over
        domains, on the same documents; None where it reads other tokens.
    """
    for folder in folders:  # before the first of them is run
        open_merged(folder, in_stores=True)
    documents = read_domains(data)
    from moemerge.evaluation.measuring import measure  # imports torch and transformers

    measured = [measure(folder, documents, settings, progress, announce) for folder in folders]
    notes = revision_notes(data)
    found = [replace(evaluation, notes=(*evaluation.notes, *notes)) for evaluation, _ in measured]
    first = measured[0][1]
    return found, [difference(sums, first) if _same_tokens(sums, first) else None for _, sums in measured[1:]]


def _same_tokens(one: Mapping[str, Sums], other: Mapping[str, Sums]) -> bool:
    return all(np.array_equal(sums[:, 1], other[domain][:, 1]) for domain, sums in one.items())


def revision_notes(data: Mapping[str, Sequence[str]]) -> list[str]:
    """Say of each domain with data sets on the Hub at which commits they were read."""
    read = {name: hub_revisions(patterns) for name, patterns in data.items()}
    return [f"{name} is text of {', '.join(revisions)}" for name, revisions in read.items() if revisions]


def read_domains(data: Mapping[str, Sequence[str]], option: str = "--data") -> dict[str, list[Document]]:
    """Read the documents of each domain from files, folders or patterns, or from the Hub; messages name the `option`.

    Raises:
        RefusedError: there are no such files, or no text in them.
        SourceError: a data set on the Hub cannot be reached.
    """
    documents = {name: read_documents(find_files(patterns, f"{option} {name}")) for name, patterns in data.items()}
    empty = [name for name, texts in documents.items() if not texts]
    if empty:
        raise RefusedError(f"{option} {empty[0]}=: its files hold no text.")
    return documents

"""Evaluate a merged model and its routers: losses beside those of honest baselines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moemerge.chats import COUNTED_ROLES, Document
from moemerge.dtypes import ComputeDtype
from moemerge.errors import RefusedError
from moemerge.evaluation.figures import Evaluation
from moemerge.texts.documents import find_files, hub_revisions, read_documents

__all__ = ["Evaluation", "evaluate"]

Progress = Callable[[str, int, int], None]
"""Called with the model that runs, its layers done and all there are."""


def evaluate(
    folder: Path | str,
    data: Mapping[str, Sequence[str]],
    *,
    baselines: bool = False,
    tokens: int = 8192,
    window: int = 512,
    roles: Sequence[str] = COUNTED_ROLES,
    device: str = "auto",
    compute_dtype: ComputeDtype = "auto",
    progress: Progress = lambda _name, _done, _total: None,
    announce: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Run a merged model, and the models that it is made of, over text that it was not made from.

    Every model is run a layer at a time, and none is written to the disk.

    Args:
        folder: the folder of the merged model.
        data: files, folders or patterns of documents, or data sets on the Hub, by the name of their domain. A
            domain with the name of an expert is that expert's.
        baselines: whether to run the weight average, the uniform mixture and the label oracle too.
        tokens: how many tokens of each domain are read.
        window: the length of the pieces that text is read in, in tokens.
        roles: whose messages of chats count.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        compute_dtype: `float32`, `bfloat16`, or `auto`, which is the faster one on a CPU.
        progress: called as the work goes on.
        announce: called with a line about each step that takes long.

    Raises:
        SourceError: there is no such model.
        IncompatibleError: the model is no mixture that moemerge writes.
        RefusedError: there are no such files, or a domain's name is nearly that of an expert.
        CheckpointError: files of the merged model are damaged, or its numbers are not finite.
        RouterError: the device or the tokenizer cannot be used.
    """
    documents = read_domains(data)
    from moemerge.evaluation.measuring import measure  # imports torch and transformers

    found = measure(
        folder,
        documents,
        baselines=baselines,
        tokens=tokens,
        window=window,
        roles=roles,
        device=device,
        compute_dtype=compute_dtype,
        progress=progress,
        announce=announce,
    )
    return replace(found, notes=(*found.notes, *revision_notes(data)))


def revision_notes(data: Mapping[str, Sequence[str]]) -> list[str]:
    """Say of each domain with data sets on the Hub at which commits they were read."""
    read = {name: hub_revisions(patterns) for name, patterns in data.items()}
    return [f"{name} is text of {', '.join(revisions)}" for name, revisions in read.items() if revisions]


def read_domains(data: Mapping[str, Sequence[str]]) -> dict[str, list[Document]]:
    """Read the documents of each domain from files, folders or patterns, or from the Hub.

    Raises:
        RefusedError: there are no such files, or no text in them.
        SourceError: a data set on the Hub cannot be reached.
    """
    documents = {name: read_documents(find_files(patterns, f"--data {name}")) for name, patterns in data.items()}
    empty = [name for name, texts in documents.items() if not texts]
    if empty:
        raise RefusedError(f"--data {empty[0]}=: its files hold no text.")
    return documents

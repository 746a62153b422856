"""Tune a merged model: the call that reads and splits the documents before torch is imported."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moemerge.evaluation.evaluator import read_domains, revision_notes
from moemerge.progress import Progress
from moemerge.tuning.settings import Settings, TuningResult, split_documents

__all__ = ["Settings", "TuningResult", "tune"]


def tune(
    folder: Path | str,
    data: Mapping[str, Sequence[str]],
    settings: Settings | None = None,
    *,
    copy: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    progress: Progress = lambda _task, _done, _total: None,
    announce: Callable[[str], None] = lambda _: None,
) -> TuningResult | None:
    """Train gates of a merged model, and norms on request; write them if held-out text is surely predicted better.

    Under `accelerate launch` every process calls it; the first one writes.

    Args:
        folder: the merged model.
        data: files, folders or patterns of documents, by domain. A domain with an expert's name is that expert's.
        settings: the options of the training.
        copy: a folder for the whole model as tuned, instead of `folder`.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        resume: go on with a tuning that was cut off.
        progress: called as the work goes on.
        announce: called with lines for the user who waits.

    Returns:
        The result; None if only an earlier run's finished files had to be moved.

    Raises:
        SourceError: there is no such model.
        IncompatibleError: the model is no mixture that moemerge reads.
        RefusedError: the data, the model, the device or the memory cannot be used; `copy` is not empty.
        CheckpointError: files of a model are damaged, or its numbers are not finite.
        RouterError: the tokenizer cannot be used.
        OutputError: the model cannot be written, or another process is tuning it.
    """
    settings = settings or Settings()
    documents = split_documents(read_domains(data), settings.seed)._replace(sources=tuple(revision_notes(data)))
    from moemerge.tuning.running import run  # imports torch, transformers and accelerate

    return run(
        folder, documents, settings, copy=copy, device=device, resume=resume, progress=progress, announce=announce
    )

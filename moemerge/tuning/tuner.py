"""Routers of a merged model trained a little further, with everything else as it is."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moemerge.evaluation.evaluator import read_domains
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
    progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
    announce: Callable[[str], None] = lambda _: None,
) -> TuningResult | None:
    """Train the gates of a merged model on text, and write them back if held-out text is surely predicted better.

    Under `accelerate launch` every process calls it; the first one writes.

    Args:
        folder: of the merged model.
        data: by the name of a domain, files, folders or patterns of its documents. A domain that is called like an
            expert is that expert's, and every expert needs one.
        settings: of the training.
        copy: where the whole model with its new gates goes, instead of into `folder`.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        resume: go on with what was cut off.
        progress: called with what is done, how far, and all there is.
        announce: called with lines for people who wait.

    Returns:
        What was found; None where an earlier run had only to move its finished files, which is done now.

    Raises:
        SourceError: there is no such model.
        IncompatibleError: it is no mixture that moemerge writes.
        RefusedError: the data, the model or the memory do not serve; `copy` is not empty.
        CheckpointError: files of a model are damaged, or its numbers are not finite.
        RouterError: the device or the tokenizer does not serve.
        OutputError: the model cannot be written, or another process is tuning it.
    """
    settings = settings or Settings()
    training, held_out = split_documents(read_domains(data), settings.seed)
    from moemerge.tuning.running import run  # imports torch, transformers and accelerate

    return run(
        folder, training, held_out, settings, copy=copy, device=device, resume=resume, progress=progress,
        announce=announce,
    )  # fmt: skip

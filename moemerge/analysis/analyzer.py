"""Analyse a mixture: its weights, and if there is text, what it does with it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.analysis.beside import dense_ffns, name_beside
from moemerge.analysis.figures import Analysis, TextFigures
from moemerge.analysis.weights import analyze_weights
from moemerge.chats import Document
from moemerge.config.schema import MergeConfig
from moemerge.errors import IncompatibleError, RefusedError
from moemerge.evaluation.settings import EvaluationSettings
from moemerge.families.dense import read_dense
from moemerge.families.expert_view import Ffn
from moemerge.families.stored_mixture import StoredMixture
from moemerge.progress import Progress, Task
from moemerge.sources.model_folder import Announce, ModelFolder, open_model
from moemerge.sources.reference import Reference
from moemerge.sources.stored_mixtures import read_stored_mixture

if TYPE_CHECKING:
    from moemerge.evaluation.domain_texts import Texts
    from moemerge.evaluation.runnable import MixtureModel
    from moemerge.passes.compute_dtype import Compute


@dataclass(frozen=True)
class AnalysisRequest:
    """What is asked for."""

    documents: Mapping[str, Sequence[Document]]
    """Documents by domain; without any, only weights are analysed."""
    settings: EvaluationSettings
    """How much text is read, and on which device the mixture is run."""
    beside: str | None = None
    """A dense model to compare the experts with."""
    generate: int = 0
    """How many tokens are generated after the beginning of some windows of each domain."""


@dataclass(frozen=True)
class Opened:
    """A mixture, opened and found to be one that can be analysed as it is asked."""

    reference: str
    request: AnalysisRequest
    stored: StoredMixture
    beside: Mapping[str, Mapping[int, Ffn]]
    text: "tuple[MixtureModel, Texts, Compute] | None"
    """The mixture to run, its text, and what it is run on and in; None without text."""


def open_for_analysis(references: Sequence[str], request: AnalysisRequest, announce: Announce) -> list[Opened]:
    """Open mixtures from headers alone; weights of Hub models are left there unless there is text to run them over.

    Then they are downloaded, once the headers of all models were found and read.

    Args:
        references: folders, or models on the Hub.
        request: what is asked for.
        announce: called with a line about each step that takes long.

    Raises:
        SourceError: there is no such model.
        RefusedError: it is a dense model, or what is asked for does not fit, or there is no such device.
        IncompatibleError: it is no mixture of a kind that is read.
        CheckpointError: its files are damaged.
        RouterError: it has no tokenizer, which text needs.
    """
    if request.documents:  # before weights are downloaded
        from moemerge.passes.device import find_devices

        find_devices(request.settings.device)
    folders = [open_model(reference, announce) for reference in references]
    dense = request.beside
    opened = []
    for folder in folders:
        stored = _read(folder, announce)
        beside = {name_beside(dense, stored): dense_ffns(dense, stored, announce)} if dense else {}
        opened.append(Opened(folder.reference, request, stored, beside, None))
    if not request.documents:
        return opened
    return [_with_text(one, folder, announce) for one, folder in zip(opened, folders, strict=True)]


def _with_text(opened: Opened, folder: ModelFolder, announce: Announce) -> Opened:
    """Download a mixture that is on the Hub, read its text, and see that the device and memory do."""
    from moemerge.evaluation.domain_texts import Texts
    from moemerge.evaluation.runnable import open_mixture
    from moemerge.generation.loading import check_memory
    from moemerge.passes.compute_dtype import find_compute
    from moemerge.passes.device import free_memory

    request, settings = opened.request, opened.request.settings
    stored = read_stored_mixture(folder, announce, "download")
    in_store = not isinstance(folder.origin, Path | Reference)
    mixture = open_mixture(str(folder.origin) if in_store else folder.folder, in_stores=True)
    compute = find_compute(settings.device, settings.compute_dtype, mixture.runnable.layer_shapes)
    if request.generate:
        check_memory(mixture.runnable, compute, free_memory(compute.device))
    texts = Texts.cut(mixture, request.documents, settings.tokens, settings.window, settings.roles)
    return replace(opened, stored=stored, text=(mixture, texts, compute))


def _read(folder: ModelFolder, announce: Announce) -> StoredMixture:
    """Read a mixture's tensor table, with a hint for those who name a dense model."""
    try:
        return read_stored_mixture(folder, announce)
    except IncompatibleError as error:
        if isinstance(read_dense(folder.config), str):
            raise
        raise RefusedError(
            f"{folder.reference}: is a dense model ({folder.config['model_type']}), without experts to analyse. Name a "
            f"mixture, and give this one beside it: moemerge analyze MIXTURE --beside {folder.reference}"
        ) from error


def analyze(opened: Opened, progress: Progress = lambda _task, _done, _total: None) -> Analysis:
    """Analyse an opened mixture, a layer at a time.

    Args:
        opened: the mixture, by `open_for_analysis`.
        progress: called with what is being done, and the layers done.

    Raises:
        CheckpointError: its files are damaged, or its numbers are not finite.
        RouterError: memory ran out.
        RefusedError: the whole model does not fit into memory; only to generate.
    """
    weights = analyze_weights(opened.stored, opened.beside, _told(progress, f"weights of {opened.reference}"))
    text, notes = _analyze_text(opened, progress)
    stored = opened.stored
    return Analysis(
        opened.reference,
        stored.family.model_type,
        stored.experts_per_token,
        stored.choosing,
        stored.family if opened.text and _is_merge(opened.text[0].config) else None,
        weights,
        text,
        notes,
    )


def _analyze_text(opened: Opened, progress: Progress) -> tuple[TextFigures | None, tuple[str, ...]]:
    """The figures of text, if there is some, and notes on them."""
    if not opened.text:
        return None, ()
    from moemerge.analysis.text import analyze_text
    from moemerge.evaluation.processes import processes_of

    generate, settings = opened.request.generate, opened.request.settings
    _, texts, compute = opened.text
    with processes_of(settings.ray, settings.workers, compute, len(texts.windows)) as processes:
        found = analyze_text(*opened.text, generate=generate, progress=progress, processes=processes)
    if generate and found.generated is None:
        return found, (f"{opened.reference}: nothing was generated, since every text ended at once",)
    return found, ()


def _is_merge(config: MergeConfig | None) -> bool:
    """Whether a mixture is a merge of dense models; an edit names experts of a mixture."""
    return config is not None and not any(expert.by_layer or "#" in expert.source_model for expert in config.experts)


def _told(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(Task("layers", name), done, total)

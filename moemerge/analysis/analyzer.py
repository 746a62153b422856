"""Analyse a mixture: its weights, and if there is text, what it does with it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moemerge.analysis.beside import dense_ffns
from moemerge.analysis.figures import Analysis
from moemerge.analysis.text import analyze_text
from moemerge.analysis.weights import analyze_weights
from moemerge.chats import Document
from moemerge.errors import IncompatibleError, RefusedError
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.runnable import MixtureModel, open_mixture
from moemerge.evaluation.settings import EvaluationSettings
from moemerge.families.dense import read_dense
from moemerge.families.expert_view import Ffn
from moemerge.families.stored_mixture import StoredMixture
from moemerge.passes.compute_dtype import find_compute
from moemerge.progress import Progress, Task
from moemerge.sources.model_folder import Announce, ModelFolder, open_model
from moemerge.sources.stored_mixtures import read_stored_mixture


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
    text: tuple[MixtureModel, Texts] | None
    """The mixture to run, and its text; None without any."""


def open_for_analysis(reference: str, request: AnalysisRequest, announce: Announce) -> Opened:
    """Open a mixture from headers alone; weights of a Hub model are left there unless there is text to run it over.

    Args:
        reference: a folder, or a model on the Hub.
        request: what is asked for.
        announce: called with a line about each step that takes long.

    Raises:
        SourceError: there is no such model.
        RefusedError: it is a dense model, or what is asked for does not fit.
        IncompatibleError: it is no mixture of a kind that is read.
        CheckpointError: its files are damaged.
        RouterError: it has no tokenizer, which text needs.
    """
    folder = open_model(reference, announce)
    stored = _read(folder, announce, runs=bool(request.documents))
    dense = request.beside
    beside = {Path(dense).name: dense_ffns(dense, stored, announce)} if dense else {}
    if not request.documents:
        return Opened(reference, request, stored, beside, None)
    mixture = open_mixture(folder.folder)
    settings = request.settings
    texts = Texts.cut(mixture, request.documents, settings.tokens, settings.window, settings.roles)
    return Opened(reference, request, stored, beside, (mixture, texts))


def _read(folder: ModelFolder, announce: Announce, *, runs: bool) -> StoredMixture:
    """Read a mixture's tensor table, with a hint for those who name a dense model."""
    try:
        return read_stored_mixture(folder, announce, "download" if runs else "stream")
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
        RouterError: the device or memory does not do.
        RefusedError: the whole model does not fit into memory; only to generate.
    """
    weights = analyze_weights(opened.stored, opened.beside, _told(progress, f"weights of {opened.reference}"))
    text = None
    if opened.text:
        mixture, texts = opened.text
        settings = opened.request.settings
        compute = find_compute(settings.device, settings.compute_dtype, mixture.runnable.layer_shapes)
        text = analyze_text(mixture, texts, compute, generate=opened.request.generate, progress=progress)
    stored = opened.stored
    return Analysis(opened.reference, stored.family.model_type, stored.experts_per_token, weights, text)


def _told(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(Task("layers", name), done, total)

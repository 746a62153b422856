"""Compute an importance matrix of a merged model by running it over text, a layer at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from moemerge.chats import Chat, Document
from moemerge.checkpoint.gguf_contents import read_contents
from moemerge.config.schema import CONFIG_COPY, MergeConfig
from moemerge.dtypes import ComputeDtype
from moemerge.errors import RefusedError
from moemerge.evaluation.runnable import open_mixture
from moemerge.evaluation.running import watch_layers
from moemerge.export.columns import ColumnTally
from moemerge.export.imatrix import Importance
from moemerge.passes.compute_dtype import find_compute
from moemerge.passes.tokens import Encode, Window, by_transformers, cut_windows
from moemerge.sources.data_sets import SCHEME
from moemerge.texts.documents import find_files, matching_files, read_documents

TOKENS: Final = 16384
"""The number of tokens that are read by default."""
_WINDOW: Final = 512


def importance_of(
    folder: Path,
    gguf: Path,
    texts: Sequence[str] = (),
    *,
    tokens: int = TOKENS,
    device: str = "auto",
    compute_dtype: ComputeDtype = "auto",
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Importance:
    """Run a merged model over text and count what passes through the columns of its weights.

    Args:
        folder: the folder of the merged model.
        gguf: the GGUF file that was made of it, which names the tensors.
        texts: files, folders or patterns of text, or data sets on the Hub; if empty, the texts that the model's routers
            were made from.
        tokens: the tokens to read in all, as many of each kind of text.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        compute_dtype: `float32`, `bfloat16`, or `auto`, which is the faster one on a CPU.
        progress: called with the layers done and all there are.

    Raises:
        SourceError: there is no such model or GGUF file.
        IncompatibleError: the model is no mixture that moemerge reads.
        RefusedError: there are no such files or device, or nothing says what text to read.
        CheckpointError: files are damaged, or the model's numbers are not finite.
        RouterError: the tokenizer cannot be used.
    """
    model, mixture = read_contents(gguf), open_mixture(folder)
    notes: list[str] = []
    if texts:
        kinds = {", ".join(texts): read_documents(find_files(texts, "--imatrix-texts"))}
    elif mixture.config:
        kinds, notes = calibration_texts(mixture.config)
    else:
        raise RefusedError(
            f"{folder}: has no {CONFIG_COPY} that says what its routers were made from. Name text for the importance "
            "matrix with --imatrix-texts."
        )
    context = mixture.runnable.keys.get("max_position_embeddings", _WINDOW + 1)
    windows = list(_windows(kinds, by_transformers(mixture.folder), tokens, min(_WINDOW, context - 1)))
    if not windows:
        raise RefusedError("--imatrix: there is no text to read. Name some with --imatrix-texts.")
    tally = ColumnTally(model)
    compute = find_compute(device, compute_dtype, mixture.runnable.layer_shapes)
    watch_layers(mixture.runnable, windows, compute, tally.watch, progress)
    return Importance(tally.tensors, tuple(kinds), tuple(notes))


def calibration_texts(config: MergeConfig) -> tuple[dict[str, list[Document]], list[str]]:
    """Find the documents that routers were made from, by expert and for no one expert, and notes on missing ones."""
    named = [
        (f"{place}[{number}] {expert.source_model}", expert.positive_prompts, expert.positive_texts)
        for place, experts in (("experts", config.experts), ("shared_experts", config.shared_experts))
        for number, expert in enumerate(experts)
    ]
    named.append(("router.calibration_texts", [], config.router.calibration_texts))
    kinds: dict[str, list[Document]] = {}
    notes = []
    for name, prompts, patterns in named:
        absent = [pattern for pattern in patterns if not (pattern.startswith(SCHEME) or matching_files([pattern]))]
        files = find_files([pattern for pattern in patterns if pattern not in absent], name)
        if absent:
            notes.append(f"importance matrix: {', '.join(absent)} of {name} leads to no file from here: it is left out")
        # Prompts are joined into one document: alone, most are too short to show more than how a text begins.
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        chats = [replace(prompt, place=f"{name}: a prompt") for prompt in prompts if isinstance(prompt, Chat)]
        documents = [*read_documents(files), *chats, *(["\n\n".join(texts)] if texts else [])]
        if documents:
            kinds[name] = documents
    return kinds, notes


def _windows(kinds: Mapping[str, Sequence[Document]], encode: Encode, tokens: int, length: int) -> Iterator[Window]:
    """Cut windows from every kind of text, as many tokens of each as far as it has them; longer texts give more."""

    def cut(documents: Sequence[Document], most: int) -> list[Window]:
        return cut_windows(documents, encode, tokens=most, length=length)

    def size(windows: Sequence[Window]) -> int:
        return sum(len(window.ids) for window in windows)

    left = tokens
    ordered = sorted(kinds.values(), key=lambda documents: size(cut(documents, tokens)))
    for place, documents in enumerate(ordered):
        windows = cut(documents, left // (len(ordered) - place))
        left = max(left - size(windows), 0)
        yield from windows

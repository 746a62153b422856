"""The embeddings and head of a merged model whose vocabulary is not the base's: rows of several models."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Final

import numpy as np

from moemerge.checkpoint.derived import Derived, linear
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.joined import joined
from moemerge.checkpoint.numbers import read_rows
from moemerge.checkpoint.unreadable import Resized, Unreadable
from moemerge.compatibility.vocabularies import Vocabulary, elsewhere
from moemerge.config.schema import MergeConfig
from moemerge.config.tokenizer_choice import BASE
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.families.dense import ModelTensors
from moemerge.planning.models import Models, refuse
from moemerge.planning.parts import Parts
from moemerge.planning.vocabulary import NewToken, OutputVocabulary, is_copy, own_vocabulary

# What multiplies embeddings, and what is made of the head's rows.
_SCALES: Final = ("embedding_multiplier", "logits_scaling")
# New tokens whose rows are compared where several experts have them.
_COMPARED: Final = 64
# Runs of rows, each of which is read by itself.
_MOST_UNMIXED: Final = 256


def unmixed_rows(config: MergeConfig, models: Models) -> frozenset[int]:
    """The base's rows that are another token's, or none's, in an expert, where shared weights are mixed.

    Models without a readable tokenizer are taken to have the base's.
    """
    others = [member for member in models.experts if not is_copy(member, models.base)]
    if config.shared_weights.method == BASE or not others:
        return frozenset()
    base, read = own_vocabulary(models.base), map(own_vocabulary, others)
    if not isinstance(base, Vocabulary):
        return frozenset()
    return frozenset().union(*(elsewhere(base, found) for found in read if isinstance(found, Vocabulary)))


def with_unmixed_rows(parts: Parts, unmixed: Collection[int], own: Mapping[str, TensorInfo]) -> Parts:
    """Leave rows of embeddings and head as the base has them where mixing would take another token's of an expert.

    Where they are many, the whole of both is the base's.

    Args:
        parts: the tensors that the base and the experts contribute.
        unmixed: the rows.
        own: the base's tensors before any are mixed.
    """
    base, many = parts.base, len(unmixed) > _MOST_UNMIXED
    taken: dict[str, TensorInfo] = {}
    for name in _with_row_for_each_token(base):
        if unmixed and base.tensors[name] != own[name]:
            taken[name] = (
                own[name] if many else _stacked(name, [*_rows_by_turns(base.tensors[name], own[name], unmixed)])
            )
    if not taken:
        return parts
    note = (
        f"shared_weights: {'all' if many else len(unmixed)} rows of {' and '.join(taken)} are the base model's: an "
        f"expert's tokenizer has other tokens under the ids of {len(unmixed)} of the base's"
    )
    return replace(parts, base=ModelTensors(base.model, {**base.tensors, **taken}), notes=(*parts.notes, note))


def _with_row_for_each_token(model: ModelTensors) -> list[str]:
    """Names of a model's embeddings and head, and of embeddings for each layer."""
    axes = {**model.model.first, model.model.family.head: ("vocab", "hidden")}
    return [name for name in axes if name in model.tensors and axes[name][0] in {"vocab", "layer_vocab"}]


def _rows_by_turns(mixed: TensorInfo, own: TensorInfo, unmixed: Collection[int]) -> Iterator[TensorInfo]:
    """Yield runs of rows in their order: those that are `unmixed` of the base's own tensor, others of the mixed one."""
    for alone, group in groupby(range(own.shape[0]), unmixed.__contains__):
        run = list(group)
        yield (own if alone else mixed).rows(run[0], len(run))


def with_vocabulary(parts: Parts, vocabulary: OutputVocabulary | None, models: Models) -> Parts:
    """Give the base of a merge the rows of another vocabulary.

    Args:
        parts: the tensors that the base and the experts contribute.
        vocabulary: the merged model's vocabulary; None for the base's.
        models: the models.

    Raises:
        IncompatibleError: an expert has no such rows; lists every reason.
        CheckpointError: rows that are compared cannot be read.
    """
    if vocabulary is None:
        return parts
    base, problems = parts.base, list[str]()
    taken: dict[str, TensorInfo] = {}
    for name in _with_row_for_each_token(base):
        runs = list(_runs(name, parts, vocabulary, models, problems))
        if not problems:
            taken[name] = _stacked(name, runs)
    refuse(problems)
    merged = ModelTensors(vocabulary.model, {**base.tensors, **taken})
    notes = _unequal(parts, vocabulary.new, models)
    return replace(parts, base=merged, notes=(*parts.notes, *notes))


def _runs(
    name: str, parts: Parts, vocabulary: OutputVocabulary, models: Models, problems: list[str]
) -> Iterator[TensorInfo]:
    """Yield the rows of one tensor in their order; what is wrong with an expert's is added to the problems."""
    for run in vocabulary.runs:
        if run.expert is None:
            yield parts.base.tensors[name].rows(run.first, run.count)
            continue
        found = _own(name, parts.base, parts.experts[run.expert])
        where = f"{models.every_expert[run.expert].name}: `tokenizer: {vocabulary.choice}` takes rows of its"
        if isinstance(found, str):
            problems.append(f"{where} {name}, {found}")
        elif found.shape[0] < run.first + run.count or found.shape[1:] != parts.base.tensors[name].shape[1:]:
            least = [run.first + run.count, *parts.base.tensors[name].shape[1:]]
            problems.append(f"{where} {name}, whose shape is {list(found.shape)}, and which has to be at least {least}")
        else:
            yield found.rows(run.first, run.count)


def _own(name: str, base: ModelTensors, expert: ModelTensors) -> TensorInfo | str:
    """An expert's embeddings or head; or why it has none, in words that follow the name."""
    family, tensors = expert.model.family, expert.tensors
    embeddings, tied = family.embeddings, bool(expert.model.config.get("tie_word_embeddings"))
    own_name = (
        embeddings if name == base.model.family.embeddings else family.head if name == base.model.family.head else name
    )
    is_lone = own_name == embeddings and base.model.family.head not in base.tensors
    if is_lone and not tied and family.head in tensors:
        return "and its head is another matrix (tie_word_embeddings false), where the base has one for both"
    for key in _SCALES if is_lone else _SCALES[own_name == family.head :][:1]:
        theirs, ours = (model.values[key] for model in (expert.model, base.model))
        if theirs != ours:
            return f"and its {key} is {theirs!r}, where the base's is {ours!r}"
    if own_name == family.head and own_name not in tensors and tied:
        own_name = embeddings
    if own_name not in tensors:
        return "which it lacks"
    found = tensors[own_name]
    found = found.path.stored if isinstance(found.path, Resized) else found
    if isinstance(found.path, Unreadable):
        return f"which {found.path.reason}"
    if found.dtype not in CONFIG_DTYPES:
        return f"which is stored as {found.dtype}"
    return found


def _stacked(name: str, runs: Sequence[TensorInfo]) -> TensorInfo:
    """Put rows below each other; where their dtypes differ, all as float32, which holds each number."""
    if len({run.dtype for run in runs}) > 1:
        runs = [
            run if run.dtype == "F32" else Derived("float32 of", (run,), linear([1.0]), name, "F32").tensor(run.name)
            for run in runs
        ]
    return joined(name, runs)


def _unequal(parts: Parts, new: Sequence[NewToken], models: Models) -> Iterator[str]:
    """Yield notes on new tokens whose embeddings differ between the experts that have them."""
    embeddings = parts.base.model.family.embeddings
    shared = [token for token in new if len(token.rows) > 1][:_COMPARED]
    differing: dict[tuple[int, int], list[str]] = {}
    for token in shared:
        rows = {}
        for expert, row in token.rows.items():
            found = _own(embeddings, parts.base, parts.experts[expert])
            if isinstance(found, TensorInfo) and row < found.shape[0]:
                rows[expert] = read_rows(found, [row])
        for expert, values in rows.items():
            if token.expert in rows and not np.array_equal(values, rows[token.expert]):
                differing.setdefault((token.expert, expert), []).append(repr(token.text)[:40])
    for (taken, other), texts in differing.items():
        more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""  # noqa: PLR2004
        yield (
            f"tokenizer: the rows of {', '.join(texts[:3])}{more} differ between {models.every_expert[taken].name} and "
            f"{models.every_expert[other].name}; those of the first are taken"
        )

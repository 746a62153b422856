"""Find what is lost of experts that differ from the base beside their FFNs, and which base would lose less."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.index import read_json
from moemerge.compatibility.causes import said_once
from moemerge.compatibility.distances import check_deltas, distance_notes, distance_warnings, measure_distances
from moemerge.compatibility.vocabularies import Vocabulary, difference, read_vocabulary
from moemerge.config.schema import MergeConfig
from moemerge.config.tokenizer_choice import BASE
from moemerge.errors import CheckpointError
from moemerge.families.dense import NON_LLAMA_FACTS, DenseModel, ModelTensors
from moemerge.families.mixture_shape import Mixture
from moemerge.sources.local import resolve_file
from moemerge.sources.model_folder import ModelFolder

_SCALES: Final = ("attention_multiplier", "embedding_multiplier", "logits_scaling")
_OF_ATTENTION: Final = ("qkv_bias", "output_bias", "qk_norm", "partial_rotary", "sinks", "nope", "mixed_attention")
_NORMS: Final = ("rms_norm_eps", "layer_norm_eps", "norm_eps")
# The settings that say most about rotary positions.
_ROPE_FIRST: Final = ("rope_type", "rope_theta", "factor")
_SHOWN: Final = 3
# Bytes of a tokenizer.json that hold the list of added tokens; the vocabulary after it has megabytes.
_HEAD_CHARACTERS: Final = 1_000_000
_END_BYTES: Final = 200_000


@dataclass(frozen=True)
class NamedModel:
    """A model's settings for chats and tokens."""

    name: str
    """The model's name in messages."""
    folder: ModelFolder
    model: DenseModel

    @property
    def context(self) -> int:
        """The number of tokens that it was made for."""
        return int(self.model.config["max_position_embeddings"])

    @cached_property
    def templates(self) -> dict[str, str]:
        """Its chat templates by name, wherever they are kept; the only one of a model is called `default`."""
        given = self._tokenizer_config.get("chat_template")
        listed = given if isinstance(given, list) else [{"name": "default", "template": given}]
        found = {str(entry.get("name")): entry.get("template") for entry in listed if isinstance(entry, dict)}
        if file := self._file("chat_template.jinja"):
            found["default"] = _beginning(file)
        return {name: text.rstrip("\n") for name, text in found.items() if isinstance(text, str) and text}

    def tokenizer(self, name: str) -> tuple[int, bytes, bytes] | None:
        """A fingerprint of its tokenizer file of this name: size, first and last bytes; None without one."""
        file = self._file(name)
        if file is None:
            return None
        with file.open("rb") as opened:
            first, size = opened.read(_END_BYTES), file.stat().st_size
            opened.seek(max(size - _END_BYTES, 0))
            return size, first, opened.read(_END_BYTES)

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Tokens beside the vocabulary's, with their ids."""
        file = self._file("tokenizer.json")
        if file is None:
            return {}
        _, key, rest = _beginning(file).partition('"added_tokens":')
        try:
            listed, _ = json.JSONDecoder().raw_decode(rest.lstrip()) if key else ([], 0)
            return {str(token["content"]): int(token["id"]) for token in listed}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # whatever wrote it
            return {}

    @cached_property
    def _tokenizer_config(self) -> dict[str, Any]:
        file = self._file("tokenizer_config.json")
        try:
            return read_json(file) if file else {}
        except CheckpointError:
            return {}

    def _file(self, name: str) -> Path | None:
        try:
            return resolve_file(self.folder.folder, name)
        except CheckpointError:  # there is none, or it is a pipe, or a link that leads nowhere
            return None


@dataclass(frozen=True)
class Judgement:
    """The findings about experts that can be merged."""

    problems: list[str]
    """Reasons why their weights do not say what they are for, where the routers are made from them."""
    warnings: list[str]
    """Warnings of experts that are no fine-tunes of the base, or are the base itself."""
    notes: list[str]
    """Notes on what is lost of them."""
    has_strangers: bool
    compared_bytes: int
    """Bytes that were read on other machines to find this out."""


def judge_experts(
    config: MergeConfig,
    mixture: Mixture,
    base: NamedModel,
    experts: Sequence[NamedModel],
    tables: Mapping[str, Mapping[str, TensorInfo]],
) -> Judgement:
    """Compare every expert, then every shared expert, with the base, by config, small files and a few rows of weights.

    Args:
        config: the merge.
        mixture: its layers, and the experts that take part in each.
        base: the base model.
        experts: every expert, then every shared expert.
        tables: the tensors of each model, by its reference.

    Raises:
        CheckpointError: a file cannot be read.
        SourceError: a file on the Hub cannot be reached.
    """
    by_reference = {
        expert.folder.reference: ModelTensors(expert.model, tables[expert.folder.reference]) for expert in experts
    }
    layers: dict[str, set[int]] = {}
    for number, expert in enumerate(experts):
        present = {layer for layer in mixture.moe_layers if number not in mixture.absent.get(layer, ())}
        layers.setdefault(expert.folder.reference, set()).update(present)
    distances, compared_bytes = measure_distances(
        ModelTensors(base.model, tables[base.folder.reference]),
        by_reference,
        {reference: sorted(found) for reference, found in layers.items()},
    )
    folders = [expert.folder for expert in experts]
    strangers = {reference for reference, found in distances.items() if found.is_stranger}
    return Judgement(
        problems=check_deltas(config, base.folder, folders[: len(config.experts)], distances),
        warnings=distance_warnings(base.folder, [(expert.name, expert.folder) for expert in experts], distances),
        notes=[
            *distance_notes(base.model, [(expert.name, expert.folder, expert.model) for expert in experts], distances),
            *lost_notes(base, experts, strangers, keeps_words=config.vocabulary == BASE),
        ],
        has_strangers=bool(strangers),
        compared_bytes=compared_bytes,
    )


def lost_notes(
    base: NamedModel, experts: Sequence[NamedModel], strangers: Collection[str], *, keeps_words: bool = True
) -> list[str]:
    """Notes on what each expert loses because the base's own takes its place, and on the base that would lose less.

    Args:
        base: the base model.
        experts: every expert and shared expert; those that are the base itself lose nothing.
        strangers: references of those that are no fine-tunes of the base, of which only attention is told.
        keeps_words: whether tokens and chat template are the base's.
    """
    others = [expert for expert in experts if expert.folder.folder != base.folder.folder]
    related = [expert for expert in others if expert.folder.reference not in strangers]
    notes = said_once(
        (expert.name, f"not used of it, since the base model's own is kept: {'; '.join(lost)}")
        for expert in others
        if (
            lost := list(
                _lost(base, expert, keeps_words=keeps_words)
                if expert in related
                else _lost_attention(base.model, expert.model)
            )
        )
    )
    gains = [(gained, expert) for expert in related if (gained := list(_gained(base, expert, keeps_words=keeps_words)))]
    if gains:
        gained, best = max(gains, key=lambda pair: len(pair[0]))
        notes.append(f"base_model: {best.folder.reference} would be the better base: it has {' and '.join(gained)}")
    return notes


def _lost(base: NamedModel, expert: NamedModel, *, keeps_words: bool) -> Iterator[str]:
    theirs, ours = expert.model, base.model
    yield from _lost_attention(ours, theirs)
    if expert.context != base.context:
        yield f"context of {expert.context} tokens (base: {base.context})"
    ropes = [model.values.get("rope_parameters") or {} for model in (theirs, ours)]
    known = dict.fromkeys([*_ROPE_FIRST, *sorted(ropes[0].keys() | ropes[1].keys())])
    keys = [key for key in known if ropes[0].get(key) != ropes[1].get(key)]
    changed = [f"{key} {ropes[0].get(key)!s:.30} (base: {ropes[1].get(key)!s:.30})" for key in keys]
    if changed:
        yield f"rotary positions, {', '.join(changed[:_SHOWN])}{', ...' if len(changed) > _SHOWN else ''}"
    pairs = {"sliding window": [model.values.get("window") or "none" for model in (theirs, ours)]}
    pairs[_norm(theirs)] = [model.config[_norm(model)] for model in (theirs, ours)]
    if keeps_words:
        pairs["eos_token_id"] = [_only(model.config.get("eos_token_id")) for model in (theirs, ours)]
    if not (theirs.has_plain_scales and ours.has_plain_scales):
        pairs |= {key: [model.values[key] for model in (theirs, ours)] for key in _SCALES}
    for what, (own, kept) in pairs.items():
        if own != kept:
            yield f"{what} {own!s:.30} (base: {kept!s:.30})"
    if keeps_words:
        yield from _lost_words(base, expert)


def _lost_attention(base: DenseModel, expert: DenseModel) -> Iterator[str]:
    """Yield what an expert's attention has, or has not, other than the base's; not its rotations and windows."""
    if base.family.block != expert.family.block:
        yield f"attention of a {expert.family.model_type} (base: of a {base.family.model_type})"
        return
    own, kept = (_heads(model.config) for model in (expert, base))
    if own != kept:
        yield f"{own} (base: {kept})"
    for fact in _OF_ATTENTION:
        if (fact in base.facts) != (fact in expert.facts):
            words = NON_LLAMA_FACTS[fact]
            yield f"{words} (base: none)" if fact in expert.facts else f"its lack of {words}"


def _norm(model: DenseModel) -> str:
    return next(key for key in _NORMS if key in model.config)


def _heads(config: Mapping[str, Any]) -> str:
    queries, keys = config["num_attention_heads"], config["num_key_value_heads"]
    return f"{queries} heads of {config['head_dim']}, {keys} of keys and values"


def _lost_words(base: NamedModel, expert: NamedModel) -> Iterator[str]:
    if expert.templates and expert.templates != base.templates:
        yield f"chat template (base: {'another' if base.templates else 'none'})"
    files = [(expert.tokenizer(name), base.tokenizer(name)) for name in ("tokenizer.json", "tokenizer.model")]
    own, kept = next((pair for pair in files if all(pair)), (None, None))  # where both have it
    if own == kept:
        return
    added = [token for token, number in expert.added_tokens.items() if base.added_tokens.get(token) != number]
    if added:
        more = f" and {len(added) - _SHOWN} more" if len(added) > _SHOWN else ""
        yield f"tokens {', '.join(repr(token)[:40] for token in added[:_SHOWN])}{more}"
    else:
        yield f"tokenizer, {_other_tokenizer(base, expert)}"


def _other_tokenizer(base: NamedModel, expert: NamedModel) -> str:
    """Say how a tokenizer differs that is another file than the base's, and has no added tokens beyond it."""
    ours, theirs = (read_vocabulary(model.folder.own_folders) for model in (base, expert))
    if not (isinstance(ours, Vocabulary) and isinstance(theirs, Vocabulary)):
        return "whose file is another than the base's"
    if theirs.ids == ours.ids:
        return "whose file is another than the base's, though every token has the same id"
    return f"whose ids are others than the base's: {difference(ours, theirs) or 'it lacks added tokens of the base'}"


def _gained(base: NamedModel, expert: NamedModel, *, keeps_words: bool) -> Iterator[str]:
    """Yield what a merge would have more if the expert were its base."""
    if expert.context > base.context:
        yield f"a context of {expert.context} tokens, not {base.context}"
    if keeps_words and expert.templates and not base.templates:
        yield "a chat template, which the base lacks"


def _beginning(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(_HEAD_CHARACTERS)


def _only(value: Any) -> Any:
    """Return the one entry of a list that has one, and anything else as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value

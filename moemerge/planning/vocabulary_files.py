"""Make the small files of a merged model whose vocabulary is not the base's: more tokens than its, or an expert's."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.index import read_json
from moemerge.compatibility.vocabularies import FILE, Vocabulary, read_vocabulary
from moemerge.config.tokenizer_choice import UNION
from moemerge.errors import CheckpointError
from moemerge.passes.tokens import read_tokenizer_config
from moemerge.planning.models import Member
from moemerge.planning.tokenizer_files import (
    TOKENIZER_CONFIG,
    BaseFiles,
    find_base_files,
    respelled_tokenizer,
    template_names,
)
from moemerge.planning.vocabulary import OutputVocabulary
from moemerge.sources.local import resolve_file

GENERATION: Final = "generation_config.json"
_ADDED_TOKENS: Final = "added_tokens.json"
_MAP: Final = "special_tokens_map.json"
_DECODER: Final = "added_tokens_decoder"
_NAMED: Final = "additional_special_tokens"
_EOS: Final = "eos_token_id"
# A reader's own format, in which tokens cannot be added.
_NOT_COPIED: Final = "tekken.json"
_TEMPLATE: Final = "chat_template"
_TEMPLATE_FILES: Final = (f"{_TEMPLATE}.jinja", f"{_TEMPLATE}.json")


def find_vocabulary_files(base: BaseFiles, vocabulary: OutputVocabulary, announce: Callable[[str], None]) -> BaseFiles:
    """Find or make the files beside weights for a vocabulary.

    Args:
        base: those of the base.
        vocabulary: the vocabulary.
        announce: called with a line about each step that takes long.

    Raises:
        SourceError: the Hub does not give a file.
        CheckpointError: a file is damaged, or a link that leads elsewhere.
    """
    made = _of_union(base, vocabulary) if vocabulary.choice == UNION else _of_expert(vocabulary, announce)
    return replace(made, reader_notes=(*made.reader_notes, *vocabulary.notes))


def _of_expert(vocabulary: OutputVocabulary, announce: Callable[[str], None]) -> BaseFiles:
    member = vocabulary.tokenizer
    found = find_base_files(member.folder, announce, needed=False, place=member.name)
    if (folder := _tokenizer_folder(member)) == member.folder.folder:
        return found
    own = find_base_files(replace(member.folder, folder=folder), announce, needed=False, place=member.name)
    kept = {name: path for name, path in found.copied.items() if name == GENERATION}
    return replace(own, copied={**kept, **own.copied})


def _tokenizer_folder(member: Member) -> Path:
    """The folder of a model with its tokenizer: its own, or an adapter's."""
    read = read_vocabulary(member.folder.own_folders)
    return read.folder if isinstance(read, Vocabulary) else member.folder.folder


def _of_union(base: BaseFiles, vocabulary: OutputVocabulary) -> BaseFiles:
    taken = None if vocabulary.template is vocabulary.tokenizer else vocabulary.template
    copied = {name: path for name, path in base.copied.items() if name != _NOT_COPIED or not vocabulary.new}
    config = respelled_tokenizer(base.tokenizer_config)
    contents: dict[str, Mapping[str, Any]] = dict(_with_tokens(base, vocabulary, config))
    if taken:
        folder = vocabulary.template_folder
        names = [*(name for name in _TEMPLATE_FILES if (folder / name).is_file()), *template_names(folder)]
        copied |= {name: taken.folder.seen(resolve_file(folder, name)) for name in names}
        if template := read_tokenizer_config(folder).get(_TEMPLATE):
            contents[TOKENIZER_CONFIG] = {**contents.get(TOKENIZER_CONFIG, config), _TEMPLATE: template}
        contents |= _ends_of_turns(base, vocabulary, taken)
    edited = {
        name: json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n" for name, value in contents.items()
    }
    tokenizer_config = contents.get(TOKENIZER_CONFIG, base.tokenizer_config)
    return replace(
        base,
        copied=copied,
        tokenizer_config=tokenizer_config,
        edited=edited,
        added=tuple(token.entry for token in vocabulary.new),
    )


def _with_tokens(
    base: BaseFiles, vocabulary: OutputVocabulary, config: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the base's files that name added tokens, with the new ones, by name."""
    entries = [token.entry for token in vocabulary.new]
    if not entries:
        return
    document = read_json(base.copied[FILE])
    yield FILE, {**document, "added_tokens": [*(document.get("added_tokens") or []), *entries]}
    ids = {entry["content"]: entry["id"] for entry in entries}
    if base.copied.keys() & {_ADDED_TOKENS, "tokenizer.model"}:  # which readers of the latter look for
        held = read_json(base.copied[_ADDED_TOKENS]) if _ADDED_TOKENS in base.copied else {}
        yield _ADDED_TOKENS, {**held, **ids}
    named = [entry["content"] for entry in entries if entry.get("special")]
    changed = dict(config)
    if isinstance(config.get(_DECODER), dict):
        listed = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in entries}
        changed[_DECODER] = {**config[_DECODER], **listed}
    if isinstance(config.get(_NAMED), list):
        changed[_NAMED] = [*config[_NAMED], *named]
    if changed != config:
        yield TOKENIZER_CONFIG, changed
    given = read_json(base.copied[_MAP]) if _MAP in base.copied else {}
    if isinstance(given.get(_NAMED), list):
        yield _MAP, {**given, _NAMED: [*given[_NAMED], *named]}


def _ends_of_turns(
    base: BaseFiles, vocabulary: OutputVocabulary, taken: Member
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield `generation_config.json` with the tokens that end texts of the model whose chat template is taken."""
    read = read_vocabulary(taken.folder.own_folders)
    if not isinstance(read, Vocabulary):
        return
    config = vocabulary.model.config
    own: dict[str, Any]
    if GENERATION in base.copied:
        own = read_json(base.copied[GENERATION])
    else:
        own = {key: config.get(key) for key in ("bos_token_id", _EOS, "pad_token_id") if config.get(key) is not None}
    stops = _listed(own.get(_EOS, config.get(_EOS)))
    texts = {number: token for token, number in read.ids.items()}
    ends = read_tokenizer_config(read.folder).get("eos_token")
    theirs = [*map(texts.get, _stops_of(taken)), ends.get("content") if isinstance(ends, dict) else ends]
    more = [vocabulary.ids[token] for token in theirs if token is not None and token in vocabulary.ids]
    together = list(dict.fromkeys([*stops, *more]))
    if together != stops:
        yield GENERATION, {**own, _EOS: together}


def _stops_of(member: Member) -> list[int]:
    """Ids of the tokens that end a model's texts, by its configs."""
    path = member.folder.file(GENERATION)
    try:
        named = read_json(path).get(_EOS) if path else None
    except CheckpointError:
        named = None
    return [*_listed(named), *_listed(member.model.config.get(_EOS))]


def _listed(value: Any) -> list[int]:
    return [number for number in (value if isinstance(value, list) else [value]) if type(number) is int]

"""Decide whose tokens the merged model knows, and the row of which model each of them has.

`tokenizer: union` keeps the base's rows under their ids and appends added tokens of the experts; `expert NAME` takes
the ids of an expert's tokenizer. Nothing but tokenizers and configs is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from filecmp import cmp
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from moemerge.compatibility.vocabularies import FILE, Vocabulary, difference, lacking, read_vocabulary, shown
from moemerge.config.expert_names import named_place
from moemerge.config.schema import MergeConfig
from moemerge.config.tokenizer_choice import BASE, UNION, named_expert
from moemerge.errors import IncompatibleError
from moemerge.families.dense import DenseModel
from moemerge.passes.chats import has_chat_template
from moemerge.planning.models import Member, Models, refuse
from moemerge.sources.adapter_rows import embedding_rows
from moemerge.sources.gguf.opening import add_tokenizer

_SPECIAL: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
Row = tuple[int | None, int]
"""The number of an expert among all, None for the base; and a row of its embeddings."""


@dataclass(frozen=True)
class Run:
    """Rows of embeddings that follow each other in the output, and in the model that they come from."""

    expert: int | None
    """The number among all experts, then all shared experts; None for the base."""
    first: int
    count: int


@dataclass(frozen=True)
class NewToken:
    """A token that the base lacks."""

    entry: Mapping[str, Any]
    """What a tokenizer.json says of it, with its id in the output."""
    expert: int
    """The number of the first expert that has it."""
    rows: Mapping[int, int]
    """Its row in each expert that has it."""

    @property
    def text(self) -> str:
        """The token."""
        return str(self.entry["content"])


@dataclass(frozen=True)
class OutputVocabulary:
    """The vocabulary of a merged model that is not the base's."""

    choice: str
    """What the config says: `union`, or `expert NAME`."""
    model: DenseModel
    """The base's config with the size of this vocabulary, and the special tokens of its tokenizer."""
    runs: tuple[Run, ...]
    """The rows of embeddings and head, from the first to the last."""
    ids: Mapping[str, int]
    """Every token with its id."""
    new: tuple[NewToken, ...]
    """The tokens that the base lacks, by id."""
    tokenizer: Member
    """The model whose tokenizer it is, or that it is made of."""
    template: Member | None
    """The model whose chat template the output has; None where it has none."""
    of_same_ids: frozenset[int]
    """Numbers of the experts whose own tokenizer has the same ids for all of its tokens."""
    notes: tuple[str, ...]

    @property
    def template_folder(self) -> Path:
        """The folder with the chat template, or of the tokenizer where there is none."""
        folders = self.template.folder.own_folders if self.template else ()
        return next((folder for folder in reversed(folders) if has_chat_template(folder)), self.tokenizer.folder.folder)


def lost_tokens(config: MergeConfig, models: Models) -> dict[str, list[str]]:
    """List the added tokens that `tokenizer: union` would give to a merged model, by the expert's name in messages."""
    others = [member for member in models.every_expert if not is_copy(member, models.base)]
    base = own_vocabulary(models.base) if others and config.vocabulary == BASE else None
    found: dict[str, list[str]] = {}
    if isinstance(base, Vocabulary):
        for member in others:
            read = _checked(base, member, UNION)
            if isinstance(read, Vocabulary):
                found[member.name] = [token for token in lacking(base, read) if read.ids[token] < rows_of(member)]
    return {name: tokens for name, tokens in found.items() if tokens}


def output_vocabulary(config: MergeConfig, models: Models) -> OutputVocabulary | None:
    """Decide the vocabulary of a merged model; None for the base's.

    Raises:
        IncompatibleError: a tokenizer cannot be read, or its vocabulary is another than the base's; lists every reason.
    """
    if config.vocabulary == BASE:
        return None
    base = _read(models.base, config.vocabulary)
    if config.vocabulary == UNION:
        return _union(models, base, _labels(config))
    number = config.expert_names.index(named_expert(config.vocabulary))
    return _of_expert(models, base, number, config.vocabulary)


def _labels(config: MergeConfig) -> list[str]:
    """What notes call the experts, whatever folder the config is read from."""
    names = config.expert_names
    shared = [f"shared_experts[{number}]" for number in range(len(config.shared_experts))]
    return [*(named_place(number, names) for number in range(len(names))), *shared]


def rows_of(member: Member) -> int:
    """The number of rows that a model's embeddings have.

    Raises:
        CheckpointError: an adapter's file is damaged.
    """
    return embedding_rows(member.folder.adapters, int(member.model.config["vocab_size"]))


def is_copy(member: Member, base: Member) -> bool:
    """Whether a model has no tokenizer.json but a copy of the base's."""
    own, other = (one.folder.folder / FILE for one in (member, base))
    return not member.folder.adapters and own.is_file() and other.is_file() and cmp(own, other, shallow=False)


def own_vocabulary(member: Member) -> Vocabulary | str | None:
    """Read a model's vocabulary, as `read_vocabulary` does; that of a GGUF file is made of its settings."""
    problem = add_tokenizer(member.folder)
    found = read_vocabulary(member.folder.own_folders)
    return f"its tokenizer {problem}" if problem and found is None else found


def _read(member: Member, choice: str) -> Vocabulary:
    found = own_vocabulary(member)
    if isinstance(found, Vocabulary):
        return found
    raise IncompatibleError("These models cannot be merged:", [_problem(member, found or "has no tokenizer", choice)])


def _problem(member: Member, why: str, choice: str) -> str:
    return f"{member.name}: {why}: `tokenizer: {choice}` needs it. `tokenizer: base` does not"


def _checked(base: Vocabulary, member: Member, choice: str) -> Vocabulary | str | None:
    """Read an expert's vocabulary; a returned text says why it does not fit the base's, None that there is none."""
    found = own_vocabulary(member)
    if isinstance(found, str):
        return _problem(member, found, choice)
    if found and (unlike := difference(base, found)):
        return (
            f"{member.name}: {unlike}: `tokenizer: {choice}` needs the base's vocabulary, beside added tokens. "
            "`tokenizer: base` does not"
        )
    return found


def _union(models: Models, base: Vocabulary, labels: Sequence[str]) -> OutputVocabulary:
    problems: list[str] = []
    found: dict[str, NewToken] = {}
    left_out: list[str] = []
    number, members = base.size, models.every_expert
    if base.size > rows_of(models.base):
        problems.append(
            f"base_model: its tokenizer has {base.size} tokens, its embeddings {rows_of(models.base)} rows, so that "
            "nothing can be added behind them: take `tokenizer: base`"
        )
    with_words: dict[int, Mapping[str, int]] = {}
    for expert, member in enumerate(members):
        read = _checked(base, member, UNION)
        if isinstance(read, str):
            problems.append(read)
        if not isinstance(read, Vocabulary):
            continue
        with_words[expert] = {token: read.ids[token] for token in read.added}
        without = [token for token in lacking(base, read) if read.ids[token] >= rows_of(member)]
        if without:
            left_out.append(f"{labels[expert]}: has no rows for its tokens {shown(without)}, which are left out")
        for token in lacking(base, read):
            if token in found and token not in without:
                found[token] = replace(found[token], rows={**found[token].rows, expert: read.ids[token]})
            elif token not in without:
                entry = {**read.added[token], "id": number}
                found[token] = NewToken(entry, expert, {expert: read.ids[token]})
                number += 1
    refuse(problems)
    new = tuple(found.values())
    rows: list[Row] = [(None, row) for row in range(base.size)]
    rows += [(token.expert, token.rows[token.expert]) for token in new]
    rows += [(None, row) for row in range(number, rows_of(models.base))]
    ids = base.ids | {token.text: int(token.entry["id"]) for token in new}
    same = (expert for expert, added in with_words.items() if added.items() <= ids.items())
    # A template of an expert that brings tokens comes first: they are there for it.
    brings = dict.fromkeys([*(token.expert for token in new), *with_words])
    templates = [member for member in (models.base, *map(members.__getitem__, brings)) if _has_template(member)]
    return OutputVocabulary(
        choice=UNION,
        model=_resized(models.base.model, len(rows)),
        runs=tuple(_runs(rows)),
        ids=ids,
        new=new,
        tokenizer=models.base,
        template=next(iter(templates), None),
        of_same_ids=frozenset(same),
        notes=(*left_out, *_union_notes(models, new, labels, next(iter(templates), None))),
    )


def _union_notes(
    models: Models, new: Sequence[NewToken], labels: Sequence[str], template: Member | None
) -> Iterator[str]:
    for expert, tokens in groupby(new, lambda token: token.expert):
        named = list(tokens)
        first, last = named[0].entry["id"], named[-1].entry["id"]
        yield (
            f"tokenizer: beside the base's tokens the output has {shown([token.text for token in named])} "
            f"({f'{first} to {last}' if named[1:] else first}), with the rows of {labels[expert]}"
        )
    if not new:
        yield "tokenizer: union is the base's tokenizer here: no expert has added tokens that the base lacks"
    owners = dict.fromkeys(token.expert for token in new if _has_template(models.every_expert[token.expert]))
    if template is models.base and owners:
        yield (
            f"the chat template stays the base's, not that of {' or '.join(labels[owner] for owner in owners)}; "
            "`tokenizer: expert NAME` takes an expert's"
        )
    elif template and template is not models.base:
        yield (
            f"the chat template is that of {labels[models.every_expert.index(template)]}, since the base has none, and "
            "generation stops at the tokens that end its texts, too (generation_config.json)"
        )


def _of_expert(models: Models, base: Vocabulary, number: int, choice: str) -> OutputVocabulary:
    member = models.experts[number]
    read = _checked(base, member, choice)
    if not isinstance(read, Vocabulary):
        raise IncompatibleError(
            "These models cannot be merged:", [read or _problem(member, "has no tokenizer", choice)]
        )
    size, ours = rows_of(member), rows_of(models.base)
    rows: list[Row] = [(number, row) for row in range(size)]
    for token, place in read.ids.items():
        if place < size and base.ids.get(token, ours) < ours:
            rows[place] = None, base.ids[token]
    new = tuple(
        NewToken({**read.added[token], "id": read.ids[token]}, number, {number: read.ids[token]})
        for token in lacking(base, read)
        if read.ids[token] < size
    )
    given = {key: value for key in _SPECIAL if (value := member.model.config.get(key)) is not None}
    lost = [token for token in base.added if token not in read.ids]
    note = f"tokenizer, chat template and generation_config.json are {choice}'s"
    note += f", and so are the rows of {shown([token.text for token in new])}" if new else ""
    note += f"; it lacks the base's {shown(lost)}" if lost else ""
    return OutputVocabulary(
        choice=choice,
        model=_resized(models.base.model, size, given),
        runs=tuple(_runs(rows)),
        ids=read.ids,
        new=new,
        tokenizer=member,
        template=member if _has_template(member) else None,
        of_same_ids=frozenset({number}),
        notes=(note,),
    )


def _has_template(member: Member) -> bool:
    return any(map(has_chat_template, member.folder.own_folders))


def _resized(base: DenseModel, size: int, special: Mapping[str, Any] = {}) -> DenseModel:
    sizes: dict[str, Any] = dict.fromkeys({"vocab_size", "vocab_size_per_layer_input"} & base.config.keys(), size)
    return replace(base, config={**base.config, **sizes, **special})


def _runs(rows: Sequence[Row]) -> Iterator[Run]:
    """Join rows that follow each other."""
    for (expert, _), places in groupby(enumerate(rows), lambda pair: (pair[1][0], pair[1][1] - pair[0])):
        found = [row for _, (_, row) in places]
        yield Run(expert, found[0], len(found))

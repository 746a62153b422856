"""Text that models are judged on: windows of every domain."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch

from moemerge.chats import COUNTED_ROLES, Document
from moemerge.errors import RefusedError
from moemerge.evaluation.figures import Sums, by_document
from moemerge.evaluation.runnable import MixtureModel
from moemerge.passes.tokens import Window, by_transformers, cut_windows


@dataclass(frozen=True)
class TextReader:
    """How documents are read: by which tokenizer, and how much of them."""

    folder: Path
    """The folder of the tokenizer."""
    experts: tuple[str, ...]
    """Names of the experts, which domains may have."""
    tokens: int
    """Tokens that are read of each domain."""
    length: int
    """The most tokens in a window."""
    roles: Sequence[str] = COUNTED_ROLES
    """Whose messages of chats count."""
    first: Sequence[int] = ()
    """The most tokens in each of a domain's first windows, where that is less."""


@dataclass(frozen=True)
class Texts:
    """Windows of every domain, in one list."""

    domains: tuple[str, ...]
    expert: tuple[int | None, ...]
    """The expert with the name of each domain; None without one."""
    documents: tuple[int, ...]
    """Number of documents in each domain."""
    windows: tuple[Window, ...]
    domain: tuple[int, ...]
    """Number of the domain of each window."""

    @classmethod
    def cut(
        cls,
        mixture: MixtureModel,
        documents: Mapping[str, Sequence[Document]],
        tokens: int,
        window: int,
        roles: Sequence[str] = COUNTED_ROLES,
    ) -> "Texts":
        """Read each domain's documents with the mixture's tokenizer; see `Texts.read_by`."""
        context = mixture.runnable.keys.get("max_position_embeddings", window + 1)
        reader = TextReader(mixture.folder, mixture.experts, tokens, min(window, context - 1), roles)
        return cls.read_by(reader, documents)

    @classmethod
    def read_by(cls, reader: TextReader, documents: Mapping[str, Sequence[Document]]) -> "Texts":
        """Read each domain's documents.

        Raises:
            RouterError: there is no tokenizer.
            RefusedError: a domain's name is nearly that of an expert, or it has nothing to predict.
        """
        _check_names(documents, reader.experts)
        cut = partial(
            cut_windows,
            encode=by_transformers(reader.folder, roles=reader.roles),
            tokens=reader.tokens,
            length=reader.length,
            first=reader.first,
        )
        found = [[window for window in cut(texts) if any(window.scored)] for texts in documents.values()]
        for name, windows in zip(documents, found, strict=True):
            if not windows:
                raise RefusedError(f"--data {name}=: its documents have no token that another one precedes.")
        experts = [reader.experts.index(name) if name in reader.experts else None for name in documents]
        return cls(
            tuple(documents),
            tuple(experts),
            tuple(map(len, documents.values())),
            tuple(window for part in found for window in part),
            tuple(place for place, part in enumerate(found) for _ in part),
        )

    def of(self, domain: int) -> list[int]:
        """Numbers of the windows of a domain."""
        return [window for window, place in enumerate(self.domain) if place == domain]

    def sums(self, losses: torch.Tensor, windows: Sequence[int]) -> Sums:
        """Sum losses (window of `windows`,) by document."""
        of = [self.windows[window] for window in windows]
        return by_document(losses.tolist(), [sum(window.scored) for window in of], [window.document for window in of])


def _check_names(names: Collection[str], experts: Sequence[str]) -> None:
    """Refuse a misspelt expert's name, whose text would otherwise count as nobody's."""
    by_lower = {expert.lower(): expert for expert in reversed(experts)}
    for name in names:
        if name not in experts and (near := get_close_matches(name.lower(), by_lower, n=1)):
            raise RefusedError(
                f"--data {name}=: is not an expert's name, did you mean {by_lower[near[0]]}? Experts: "
                f"{', '.join(experts)}. A domain that is for none of them needs a name that is less like theirs."
            )

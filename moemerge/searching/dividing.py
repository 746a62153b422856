"""Documents to search by, and documents that are held out from the search."""

import random
from collections.abc import Mapping, Sequence

from moemerge.chats import Document
from moemerge.errors import RefusedError

Documents = Mapping[str, Sequence[Document]]
"""Documents by domain."""


def divide(data: Documents, test: Documents, seed: int) -> tuple[Documents, Documents]:
    """Divide documents into those to search by and those that are held out; every second one, in an order by the seed.

    A domain of `test` is searched by with all its documents in `data`, and `test` has those that are held out.

    Raises:
        RefusedError: `test` has a domain that `data` has not, or a domain has one document alone.
    """
    if unknown := [name for name in test if name not in data]:
        raise RefusedError(f"--test {unknown[0]}=: there is no --data {unknown[0]}= to search by.")
    searched: dict[str, Sequence[Document]] = {}
    held_out: dict[str, Sequence[Document]] = {}
    for name, documents in data.items():
        if name in test:
            searched[name], held_out[name] = documents, test[name]
            continue
        if len(documents) < 2:  # noqa: PLR2004
            raise RefusedError(
                f"--data {name}=: is one document, and a search needs two: one to search by, and one to judge by that "
                f"it did not see. Separate documents by lines `<|document|>`, or name other text: --test {name}=PATH."
            )
        shuffled = list(documents)
        random.Random(seed).shuffle(shuffled)  # noqa: S311  no secret
        searched[name], held_out[name] = shuffled[::2], shuffled[1::2]
    return searched, held_out

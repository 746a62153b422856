"""Dense models that are given ids by another model's tokenizer, and may know some of its tokens by other ids."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.compatibility.vocabularies import Vocabulary, read_vocabulary
from moemerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from moemerge.evaluation.runnable import Runnable


def refusing_foreign_tokens(model: "Runnable", folders: Sequence[Path], ids_of: Path) -> "Runnable":
    """Make a model that refuses tokens which it has not under the id that they have in another tokenizer.

    Args:
        model: the model.
        folders: its folders with tokenizers; see `read_vocabulary`.
        ids_of: the folder of the tokenizer that makes its ids.
    """
    own, other = read_vocabulary(folders), read_vocabulary([ids_of])
    if not (isinstance(own, Vocabulary) and isinstance(other, Vocabulary)):
        return model
    foreign = {number: token for token, number in other.ids.items() if own.ids.get(token) != number}
    rows = model.rows

    def checked(table: str, ids: list[int]) -> "torch.Tensor":
        for number in ids:
            if number in foreign:
                raise CheckpointError(f"{model.name}: its tokenizer does not know {foreign[number]!r:.40} as {number}.")
        return rows(table, ids)

    return replace(model, rows=checked) if foreign else model

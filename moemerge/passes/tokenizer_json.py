"""Compare two `tokenizer.json` files as they are, where one has more added tokens than the other."""

from collections.abc import Iterator, Mapping

from moemerge.passes.proving import TEXTS


def unlike(base: str, other: str, added: Mapping[str, int]) -> str:
    """Say how a tokenizer differs from the base's beside its added tokens; empty where it does not.

    Args:
        base: the content of the base's file.
        other: the content of the other file.
        added: the tokens that only the other has, with their ids.
    """
    return next(_differences(base, other, added), "")


def _differences(base: str, other: str, added: Mapping[str, int]) -> Iterator[str]:
    from tokenizers import Tokenizer

    ours, theirs = Tokenizer.from_str(base), Tokenizer.from_str(other)
    for tokenizer in (ours, theirs):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    for token, number in added.items():
        if (found := theirs.token_to_id(token)) != number:
            yield f"{token!r:.40} would be read as {found}, and its row is {number}"
    for text in TEXTS:
        if not any(token in text for token in added) and ours.encode(text).ids != theirs.encode(text).ids:
            yield f"{text!r:.40} would be read otherwise"

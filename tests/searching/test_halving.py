"""How text grows from round to round of a search."""

import pytest

from moemerge.passes.tokens import cut_windows
from moemerge.searching.halving import first_windows, growing


@pytest.mark.parametrize(
    ("tokens", "window", "lengths"),
    [
        (8192, 512, [304, 304, 303, 455, 455, 455, 455]),
        (4096, 512, [152, 304, 455, 455]),
        (200, 20, [16, 16, 16, 16]),
    ],
)
def test_the_first_windows_are_as_short_as_the_rounds(tokens, window, lengths):
    """Rounds end after a 27th, a 9th and a third of the text, but no sooner than after 64 tokens."""
    assert first_windows(tokens, window) == lengths


@pytest.mark.parametrize("tokens", [200, 600, 700, 4096])
def test_short_first_windows_leave_no_text_out(tokens):
    document = " ".join(map(str, range(5000)))
    windows = cut_windows([document], encode, tokens=tokens, length=512, first=first_windows(tokens, 512))
    assert [token for window in windows for token in window.ids] == list(range(tokens))


def encode(text):
    ids = [int(number) for number in text.split()]
    return ids, [0] * len(ids)


def test_rounds_read_a_third_of_the_next_one_s_text():
    documents = [" ".join(str(1000 * document + place) for place in range(900)) for document in range(6)]
    windows = cut_windows(documents, encode, tokens=4096, length=512, first=first_windows(4096, 512))
    lengths = [len(window.ids) for window in windows]
    ends = [sum(lengths[: part.stop]) for part in growing(lengths)]
    assert ends == [152, 456, 1366, 4096]
    read = {document: [] for document in range(6)}
    for window in windows:
        read[window.document] += window.ids
    for document, ids in read.items():  # nothing is left out between a document's windows
        assert ids == [1000 * document + place for place in range(len(ids))]


def test_little_text_has_fewer_rounds():
    assert growing([40]) == [range(1), range(1, 1), range(1, 1), range(1, 1)]
    assert growing([30, 30, 30]) == [range(3), range(3, 3), range(3, 3), range(3, 3)]

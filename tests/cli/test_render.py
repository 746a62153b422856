"""What plans and reports say in words."""

import pytest

from moemerge.cli.render import about


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.1, "a few seconds"),
        (9.9, "a few seconds"),
        (44, "about 40 s"),
        (89, "about 90 s"),
        (91, "about 2 min"),
        (5399, "about 90 min"),
        (9000, "about 2.5 h"),
    ],
)
def test_a_time_is_said_as_roughly_as_it_is_known(seconds, words):
    assert about(seconds) == words

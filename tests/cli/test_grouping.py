"""Options of the command line that are handed on whole have the fields and defaults of what takes them."""

from dataclasses import fields

import pytest

from moemerge.cli.gguf import FileOptions
from moemerge.cli.tuning import TrainingOptions
from moemerge.export.writing import GgufOptions
from moemerge.tuning.settings import Settings


@pytest.mark.parametrize(
    ("given", "taken", "own"), [(FileOptions, GgufOptions, set()), (TrainingOptions, Settings, {"roles"})]
)
def test_options_agree_with_what_takes_them(given, taken, own):
    def defaults(options) -> dict[str, object]:
        return {field.name: field.default for field in fields(options)}

    assert defaults(given) == {name: value for name, value in defaults(taken).items() if name not in own}

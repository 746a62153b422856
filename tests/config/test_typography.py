"""Spaces and quotes of web pages and word processors in a config."""

import pytest

from moemerge.config.loading import parse_config
from moemerge.config.schema import MergeConfig
from moemerge.errors import ConfigError

CONFIG = """base_model: base
experts:
  - source_model: a
    positive_prompts: [%s]
  - source_model: b
    positive_prompts: [b]
"""


@pytest.mark.parametrize(
    "text",
    [
        "\u201cwrite code\u201d",
        "\u201dwrite code\u201d",
        "\u201ewrite code\u201c",
        "\u2018don\u2019t\u2019",
        "\u201awrite\u2018",
    ],
)
def test_curly_quotes_around_a_text_are_no_quotes_of_yaml(text):
    with pytest.raises(ConfigError) as caught:
        parse_config(CONFIG % text)
    assert list(caught.value.problems) == [
        f"line 4: experts[0].positive_prompts[0]: stands in curly quotes ({text[0]}), which YAML takes for part of the "
        "text. Write straight quotes in their place, or around them if they belong to the text"
    ]


def test_a_comma_between_curly_quotes_divides_the_text():
    with pytest.raises(ConfigError) as caught:
        parse_config(CONFIG % "\u201cread, write\u201d")
    assert [problem.partition(" stands")[0] for problem in caught.value.problems] == [
        "line 4: experts[0].positive_prompts[0]:"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "\u201cStop!\u201d he said.",
        "\u201cStop!\u201d and \u201cGo!\u201d",
        "\u2018Stop!\u2019 and \u2018Go!\u2019",
        "\u2019Twas the night",
        "\u2018Twas the night",
        "he said \u201cStop!\u201d",
    ],
)
def test_a_text_with_curly_quotes_within_it_is_kept(text):
    assert parse_config(CONFIG % text).experts[0].positive_prompts == [text]


@pytest.mark.parametrize("straight", ['"', "'"])
def test_curly_quotes_in_straight_ones_are_kept(straight):
    text = "\u201cwrite code\u201d"
    assert parse_config(CONFIG % f"{straight}{text}{straight}").experts[0].positive_prompts == [text]


def test_a_config_that_is_written_again_is_read_again():
    text = "\u201cwrite code\u201d"
    experts = [
        {"source_model": "a", "positive_prompts": [text, "\u201ca\u201d b"]},
        {"source_model": "b", "positive_prompts": "b"},
    ]
    config = MergeConfig(base_model="base", experts=experts)
    assert parse_config(config.text).model_dump() == config.model_dump()
    assert f'- "{text}"\n' in config.text
    assert "- \u201ca\u201d b\n" in config.text


@pytest.mark.parametrize("dash", ["-\xa0", "\u3000- ", "\xa0-\xa0"])
def test_keys_of_which_a_space_is_none_are_named_alone(dash):
    name = f"{dash}source_model"
    sign = next(character for character in dash if character not in "- ")
    what = {"\xa0": "U+00A0 (no-break space)", "\u3000": "U+3000 (ideographic space)"}[sign]
    with pytest.raises(ConfigError) as caught:
        parse_config(f"base_model: base\nexperts:\n  {name}: a\n  {name}: b\n")
    assert list(caught.value.problems) == [
        f"line 3: experts.{name}: {what} stands where YAML expects a space. Write a space in its place"
    ]

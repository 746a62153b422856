"""What `moemerge analyze` prints of made-up figures: sentences, a map, JSON, and how two models differ."""

import io
import json
from dataclasses import fields, replace

import numpy as np
import pytest
from rich.console import Console

from moemerge.analysis.advice import advise, describe
from moemerge.analysis.facts import analysis_facts, difference_facts, json_text, plain
from moemerge.analysis.figures import TextFigures, WeightFigures
from moemerge.analysis.means import mean_of_others, over_roles, pair_means, series_of
from moemerge.cli.analysis_report import print_analysis, print_differences
from tests.analysis.figures import ROLES, analysis_of, with_text, with_weights


def printed(report, *arguments, width: int = 200, colours: str | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=width, soft_wrap=True, highlight=False, markup=False,
                      color_system=colours, force_terminal=bool(colours), legacy_windows=False)  # fmt: skip
    report(console, *arguments)
    return console.file.getvalue().splitlines()


def test_five_sentences_stand_before_the_map():
    analysis = analysis_of()
    lines = printed(print_analysis, analysis)
    (beside,), advice = (
        [one for one in advise(analysis) if (one.topic == "beside") == is_it] for is_it in (True, False)
    )
    assert lines[:6] == [describe(analysis), beside.sentence, *(one.sentence for one in advice[:4])]
    assert lines[6:8] == [f"({len(advice) - 4} more sentences with --json or --html.)", ""]
    few = analysis_of(text=False)
    assert printed(print_analysis, few)[:6] == [describe(few), *(one.sentence for one in advise(few)), ""]


def test_the_map_has_a_row_for_each_expert_and_a_block_for_each_layer():
    load = np.array([[0.8, 0.1, 0.0], [0.4, 0.0, 0.8]])
    lines = printed(print_analysis, with_text(analysis_of(2, 3), load=np.stack([load] * 2)))
    assert lines[-4:] == [
        "Share of tokens that choose each expert, by layer from 1 to 2; 0.0% ▁ to █ 80.0%.",
        "expert-0  █▅  60.0%",
        "expert-1  ▂   5.0%",
        "expert-2   █  40.0%",
    ]


def test_the_map_tells_what_generated_text_takes():
    load, made = np.array([[0.8, 0.2], [0.4, 0.55]]), np.array([[0.7, 0.3], [0.7, 0.3]])
    figures = {"load": np.stack([load] * 2), "generated": made, "generated_tokens": 50}
    lines = printed(print_analysis, with_text(analysis_of(2, 2), **figures))
    assert lines[-2:] == ["expert-0  █▅  60.0%, generating 70.0%", "expert-1  ▃▆  37.5%, generating 30.0%"]


def test_without_text_the_map_is_of_similarity():
    similarity = np.full((2, 4, 4), 0.5)
    similarity[0, 0, 1] = similarity[0, 1, 0] = 0.9
    similarity[1] = np.nan
    lines = printed(
        print_analysis, with_weights(analysis_of(2, 3, text=False), similarity=dict.fromkeys(ROLES, similarity))
    )
    assert lines[-4:] == [
        "Mean cosine of each expert's weights with the others', by layer from 1 to 2; 0.50 ▁ to █ 0.70.",
        "expert-0  █   0.70",
        "expert-1  █   0.70",
        "expert-2  ▁   0.50",
    ]


def test_a_large_map_is_one_of_neighbours():
    lines = printed(print_analysis, analysis_of(100, 60))
    head = next(place for place, line in enumerate(lines) if line.startswith("Share of tokens"))
    assert lines[head].endswith("Blocks are means of neighbours.")
    rows = lines[head + 1 :]
    assert len(rows) == 24
    assert rows[0].startswith("expert-0 - expert-2")
    assert {len(row) for row in rows} == {len(rows[0])}
    assert len(rows[0].split("  ")[-2]) == 64


def test_colours_only_repeat_what_blocks_say():
    plainly, coloured = (printed(print_analysis, analysis_of(), colours=colours) for colours in (None, "standard"))
    assert "\x1b[" in coloured[-1]
    assert [line.encode("ascii", "ignore").count(b"\x1b") for line in plainly] == [0] * len(plainly)


def test_names_are_safe_to_print():
    names = ("\x1b[31mred", "b", "c", "d", "e")
    analysis = with_weights(analysis_of(), names=names)
    assert any(line.startswith("\\x1b[31mred") for line in printed(print_analysis, analysis))


def test_json_has_every_figure_by_its_name():
    analysis = with_text(analysis_of(), generated=np.full((4, 4), 0.5), generated_tokens=9)
    facts = json.loads(json_text(analysis_facts(analysis)))
    for section, kind in (("weights", WeightFigures), ("text", TextFigures)):
        named = {field.name for field in fields(kind)} - {"names", "experts"}
        assert facts[section].keys() == named
    assert facts["experts"] == [f"expert-{number}" for number in range(4)]
    assert (facts["beside"], facts["text"]["domains"], facts["weights"]["layers"]) == (
        ["beside-0"],
        ["code", "math"],
        [1, 2, 3, 4],
    )
    np.testing.assert_allclose(facts["weights"]["similarity"]["up"], analysis.weights.similarity["up"], rtol=5e-4)
    np.testing.assert_allclose(facts["text"]["load"], analysis.text.load, rtol=1e-8)
    assert facts["text"]["ranks"] == analysis.text.ranks.tolist()
    assert [one["sentence"] for one in facts["advice"]] == [one.sentence for one in advise(analysis)]
    assert analysis_facts(analysis_of(text=False))["text"] is None


def test_json_has_null_for_what_is_not_known():
    assert plain({"a": np.array([1.0, np.nan]), "b": (np.nan, "x", 2)}) == {"a": [1.0, None], "b": [None, "x", 2]}
    assert plain(np.array([0.123456789123])) == [0.123456789]
    assert plain({"a": np.array([np.inf, 1, -np.inf]), "b": float("inf")}) == {"a": [None, 1, None], "b": None}


@pytest.mark.parametrize("value", [0.0, 1.0, -2 / 3, 1e-30 / 3, 2e15 / 3, 2e30 / 3, 123456789.123, 5e-324])
def test_digits_are_those_that_formatting_gives(value):
    for digits in (3, 9):
        assert plain(np.array([value]), digits) == [float(f"{value:.{digits}g}")]


def test_pairs_have_digits_that_tell_fine_tunes_apart():
    similarity = np.array([[[1, 1 - 1.23456e-5], [0.98765432, -0.0123456]]])
    analysis = with_weights(analysis_of(1, 2, text=False, beside=0), similarity=dict.fromkeys(ROLES, similarity))
    text = json_text(analysis_facts(analysis))
    assert '"gate": [[[1.0,0.99998765],\n[0.98765,-0.01235]]]' in text


def test_json_has_a_row_on_each_line():
    facts = {"a": np.arange(6).reshape(2, 3), "b": [{"c": [1, 2]}, {}], "d": [], "e": np.zeros((0, 2)), "f": "\x7f"}
    assert json_text(facts) == (
        '{\n  "a": [[0,1,2],\n[3,4,5]],\n  "b": [\n    {\n      "c": [1,2]\n    },\n    {}\n  ],\n  "d": [],\n'
        '  "e": [],\n  "f": "\\u007f"\n}'
    )


def test_json_of_many_experts_is_small():
    analysis = analysis_of(4, 128, neurons=2)
    numbers = sum(values.size for values in _arrays(analysis.weights)) + sum(v.size for v in _arrays(analysis.text))
    assert len(json_text(analysis_facts(analysis))) < 9 * numbers


def _arrays(figures: WeightFigures | TextFigures) -> list[np.ndarray]:
    found = [getattr(figures, field.name) for field in fields(figures)]
    found += [value for one in found if isinstance(one, dict) for value in one.values()]
    return [one for one in found if isinstance(one, np.ndarray)]


def test_means_leave_out_the_diagonal_and_what_is_not_known():
    matrices = np.array([[[1, 0.2, 0.9], [0.4, 1, 0.9], [0.9, 0.9, 1]], [[1, np.nan, 0], [np.nan, 1, 0], [0, 0, 1]]])
    found = pair_means(matrices, 2)
    np.testing.assert_allclose(found, [0.3, np.nan])
    np.testing.assert_allclose(mean_of_others(matrices, 3)[0], [0.55, 0.65, 0.9])
    np.testing.assert_allclose(mean_of_others(matrices, 2)[1], [np.nan, np.nan])
    np.testing.assert_allclose(
        over_roles({"gate": np.ones(2), "up": np.zeros(2), "down": np.array([2, np.nan])}), [1, np.nan]
    )


def test_figures_of_neighbouring_layers_belong_to_the_later():
    series = {one.name: one for one in series_of(analysis_of())}
    assert list(series["first choice told by the layer before"].values) == [2, 3, 4]
    assert list(series["whole matrices"].values) == [1, 2, 3, 4]


def test_models_are_compared_layer_by_layer():
    one = with_text(analysis_of(4), entropy=np.array([0.5, 0.6, 0.7, 0.8]))
    other = replace(with_text(analysis_of(3, seed=4), entropy=np.array([0.4, 0.9, 0.7])), model="tuned")
    facts = {fact["name"]: fact for fact in difference_facts(one, other)}
    assert facts["entropy of the load"] == {
        "group": "The choice",
        "name": "entropy of the load",
        "means": plain([0.6, 2 / 3]),
        "differences": {"1": -0.1, "2": 0.3, "3": 0.0},
    }
    lines = printed(print_differences, one, other)
    assert lines[1] == "Means over the layers that both have, and how much higher tuned is than tiny:"
    (line,) = [line for line in lines if line.startswith("  entropy of the load")]
    cells = "0.6000  0.6667  +0.067      -0.1 in layer 1  +0.3 in layer 2"
    assert line.split() == ["entropy", "of", "the", "load", *cells.split()]


def test_small_differences_of_what_is_nearly_1_are_told():
    one, other = (with_weights(analysis_of(text=False), similarity=nearly(1 - apart)) for apart in (2e-5, 3e-5))
    (line,) = [line for line in printed(print_differences, one, other) if line.startswith("  whole matrices")]
    cells = "1 - 2e-05  1 - 3e-05  -1e-05  -1e-05 in layer 1  -1e-05 in layer 1"
    assert line.split() == ["whole", "matrices", *cells.split()]


def nearly(value: float) -> dict[str, np.ndarray]:
    return dict.fromkeys(ROLES, np.full((4, 5, 5), value))


def test_only_what_both_have_is_compared():
    text, no_text = analysis_of(), analysis_of(text=False)
    assert {fact["group"] for fact in difference_facts(text, no_text)} == {
        series.group for series in series_of(no_text)
    }
    assert "Similarity of outputs" not in "\n".join(printed(print_differences, text, no_text))

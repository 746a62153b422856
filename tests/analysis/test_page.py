"""The page of an analysis: its data, and what a browser makes of it."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from moemerge.analysis.figures import Analysis
from moemerge.analysis.page import PAGE, write_page
from moemerge.errors import RefusedError
from tests.analysis.figures import ROLES, analysis_of, with_text, with_weights
from tests.evaluation.test_routes_page import HOSTILE, Elements, contrast
from tests.support.pages import content, opened_tab, shown, style  # noqa: F401  a fixture


def data_of(tmp_path, *analyses: Analysis) -> list[dict]:
    """The data of the models on a page."""
    write_page(tmp_path / "page.html", analyses)
    return json.loads(Elements((tmp_path / "page.html").read_text("utf-8")).data)["models"]


def unpacked(packed: dict) -> np.ndarray:
    codes = np.frombuffer(base64.b64decode(packed["values"]), np.uint8)
    values = packed["low"] + (packed["high"] - packed["low"]) * codes / 254
    return np.where(codes == 255, np.nan, values)


def with_hostile_names(analysis: Analysis) -> Analysis:
    names = tuple(HOSTILE[: len(analysis.weights.names)])
    analysis = with_weights(analysis, names=names)
    return replace(with_text(analysis, names=names[: analysis.weights.experts]), model="</script><b>{analysis}")


def test_matrices_are_packed_in_255_steps(tmp_path):
    analysis = analysis_of(3, 4)
    (model,) = data_of(tmp_path, analysis)
    rows, columns = np.triu_indices(5, 1)
    for role in ROLES:
        found = unpacked(model["matrices"][f"whole {role}"]).reshape(3, -1)
        expected = analysis.weights.similarity[role][:, rows, columns]
        np.testing.assert_allclose(found, expected, atol=np.ptp(expected) / 254 / 2 + 1e-9, rtol=0)
    ranks = unpacked(model["matrices"]["ranks"]).reshape(3, 4, 4)
    np.testing.assert_allclose(ranks.sum(axis=2), 1, atol=0.01)
    assert model["left_out"] == []


def test_matchings_in_both_directions_are_averaged(tmp_path):
    matched = np.zeros((1, 2, 2))
    matched[0, 0, 1], matched[0, 1, 0] = 0.4, 0.6
    analysis = with_weights(analysis_of(1, 2, beside=0), matched_similarity=dict.fromkeys(ROLES, matched))
    (model,) = data_of(tmp_path, analysis)
    assert unpacked(model["matrices"]["matched gate"]).tolist() == [0.5]


def test_what_is_not_known_is_null_or_absent(tmp_path):
    nothing = dict.fromkeys(ROLES, np.full((4, 5, 5), np.nan))
    some = {role: values.copy() for role, values in analysis_of().weights.similarity.items()}
    some["gate"][2, 0, 1] = some["gate"][2, 1, 0] = np.nan
    plane = dict.fromkeys(ROLES, np.full((4, 5, 2), np.nan))
    analysis = with_weights(analysis_of(), matched_similarity=nothing, similarity=some, plane=plane)
    (model,) = data_of(tmp_path, analysis)
    assert not [name for name in model["matrices"] if name.startswith("matched")]
    assert np.flatnonzero(np.isnan(unpacked(model["matrices"]["whole gate"]))).tolist() == [2 * 10]
    assert model["planes"]["up"] == [[[None, None]] * 5] * 4
    assert model["left_out"] == []


def test_a_page_without_text_has_no_figures_of_text(tmp_path):
    (model,) = data_of(tmp_path, analysis_of(text=False))
    assert (model["loads"], model["text_layers"]) == ([], [])
    assert not {"ranks", "together", "outputs all"} & model["matrices"].keys()


def test_a_large_model_leaves_out_what_there_is_no_room_for(tmp_path):
    (model,) = data_of(tmp_path, analysis_of(64, 128, neurons=32))
    assert (tmp_path / "page.html").stat().st_size < 14_000_000
    assert {f"whole {role}" for role in ROLES} | {"router", "outputs all", "ranks"} <= model["matrices"].keys()
    assert "neurons on the plane" in model["left_out"]
    assert not {*model["left_out"]} & model["matrices"].keys()
    assert (model["neurons"], model["neuron_planes"]) == (0, None)


def test_hostile_names_stay_text(tmp_path):
    write_page(tmp_path / "harmless.html", [analysis_of()])
    (model,) = data_of(tmp_path, with_hostile_names(analysis_of()))
    tags = [Elements((tmp_path / f"{name}.html").read_text("utf-8")).tags for name in ("page", "harmless")]
    assert tags[0] == tags[1]
    assert model["names"] == list(HOSTILE[:5])


def test_the_page_names_nothing_outside_itself(tmp_path):
    write_page(tmp_path / "page.html", [analysis_of()])
    page = (tmp_path / "page.html").read_text("utf-8")
    page = re.sub(r'"values":"[^"]*"', "", page)  # in base64, `//` may precede a letter
    assert not re.search(r"https?:|//[a-z]|\bsrc\s*=|\bhref\s*=|@import|url\(|fetch\(|XMLHttp|WebSocket", page)


def test_only_such_a_page_is_replaced(tmp_path):
    page = tmp_path / "page.html"
    PAGE.check(page)
    write_page(page, [analysis_of()])
    PAGE.check(page)
    page.write_text("mine")
    with pytest.raises(RefusedError) as refused:
        PAGE.check(page)
    assert str(refused.value) == (
        f"{page}: holds something else than a page of analysis, and is not replaced. Choose another name."
    )


@pytest.fixture
def show(tab, tmp_path):
    path = tmp_path / "page.html"
    with shown(tab, path, lambda *analyses: write_page(path, analyses)) as opened:
        yield opened


def said(tab, section: str, panel: int = 1) -> str:
    return content(tab, f"#{section} .panels figure:nth-child({panel}) .said")


def test_the_slider_moves_by_keyboard(show):
    analysis = analysis_of(3, 4)
    gate = analysis.weights.similarity["gate"]
    gate[0, 0, 1] = gate[0, 1, 0] = 0.05
    gate[2, 2, 3] = gate[2, 3, 2] = 0.95
    tab = show(analysis)
    assert content(tab, "#layer") == "1"
    assert said(tab, "weights").startswith("lowest expert-0, expert-1: 0.050;")
    tab.evaluate("slider.focus()")
    tab.press("End")
    assert content(tab, "#layer") == "3"
    assert tab.evaluate("slider.getAttribute('aria-valuetext')") == "layer 3"
    assert "highest expert-2, expert-3: 0.950;" in said(tab, "weights")
    assert "highest expert-2, expert-3: 0.950;" in tab.evaluate("document.querySelector('#weights .map').ariaLabel")


def test_cells_are_read_by_pointer_and_by_keyboard(show):
    analysis = analysis_of(2, 4, beside=0)
    gate = analysis.weights.similarity["gate"]
    gate[0] = np.arange(16).reshape(4, 4) / 100
    gate[0] = np.maximum(gate[0], gate[0].T)
    tab = show(analysis)
    tab.evaluate("document.querySelector('#weights .map').focus()")
    tab.press("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight")
    assert said(tab, "weights").startswith("expert-0, expert-3: 0.12")
    tab.press("ArrowLeft")
    assert said(tab, "weights").startswith("expert-0, expert-2: 0.08")
    tab.hover("#weights .map canvas")
    assert said(tab, "weights") in {"expert-2, with itself", "expert-1, expert-2: 0.090"}


def test_a_kind_of_similarity_is_chosen(show):
    analysis = analysis_of(2, 4)
    matched = {role: np.full((2, 5, 5), 0.25) for role in ROLES}
    nothing = dict.fromkeys(ROLES, np.full((2, 5, 5), np.nan))
    tab = show(with_weights(analysis, matched_similarity=matched, matched_order=nothing))
    tab.click("#kind label:nth-child(3)")
    assert said(tab, "weights", 3).endswith("mean 0.25")
    assert tab.evaluate("[...document.querySelectorAll('#kind input')].map(input => input.disabled)") == [False] * 3 + [
        True
    ]


def test_a_click_on_the_load_chooses_the_layer(show):
    tab = show(analysis_of(5, 4))
    tab.hover("#loads canvas")  # its middle: the third of five layers
    assert re.match(r"expert-[12], layer 3: \d+ %$", said(tab, "loads"))
    tab.click("#loads canvas")
    assert content(tab, "#layer") == "3"
    assert tab.evaluate("document.querySelector('#experts tbody').rows.length") == 5


def test_domains_have_loads_of_their_own(show):
    load = np.stack([np.full((4, 4), 0.25), np.full((4, 4), 0.75)])
    tab = show(with_text(analysis_of(), load=load, generated=np.full((4, 4), 0.6), generated_tokens=50))
    means = []
    for number in range(1, 5):
        tab.click(f"#domain label:nth-child({number})")
        means.append(said(tab, "loads").split()[-2])
    assert means == ["45", "25", "75", "60"]  # of 600 and 400 tokens


def test_findings_stand_on_the_page(show):
    tab = show(with_weights(analysis_of(), equal=((0, 1),)))
    first = content(tab, "#findings li:first-child").split("\n")
    assert first[0] == "equal experts"
    assert first[-1].startswith("Equal in all layers, number for number: expert-0 = expert-1.")
    assert content(tab, "h1") == "tiny"
    assert tab.evaluate("document.title") == "Analysis of tiny"


def test_two_models_stand_side_by_side(show):
    """The second has fewer layers, no text, and other experts."""
    other = replace(analysis_of(2, 3, text=False, seed=7), model="other")
    tab = show(analysis_of(4, 4), other)
    assert content(tab, "h1") == "tiny and other"
    headings = (
        "[...document.querySelectorAll('#weights h3')].filter(one => one.offsetParent).map(one => one.textContent)"
    )
    assert tab.evaluate(headings) == [f"{role} of {name}" for name in ("tiny", "other") for role in ROLES]
    tab.evaluate("choose(3)")
    assert tab.evaluate(headings) == [f"{role} of tiny" for role in ROLES]
    assert content(tab, "#charts figure:first-child .stack li:nth-child(4) output") == "\u2013"


def test_without_text_its_sections_are_gone(show):
    tab = show(analysis_of(text=False))
    shown = tab.evaluate(
        "[...document.querySelectorAll('main > section')].filter(one => one.offsetParent).map(one => one.id)"
    )
    assert shown == ["findings", "", "weights", "outputs", "plane", "experts"]


def test_hostile_names_are_shown_as_they_are(show):
    tab = show(with_hostile_names(analysis_of()))
    assert content(tab, "h1") == "</script><b>{analysis}"
    names = "[...document.querySelectorAll('#weights figure:first-child .name')].map(one => one.textContent)"
    assert tab.evaluate(names) == list(HOSTILE[:5])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_and_colours_follow_the_scheme(show, scheme):
    tab = show(analysis_of())
    tab.scheme(scheme)
    tab.evaluate("new Promise(requestAnimationFrame)")
    paper = style(tab, "body", "backgroundColor")
    for selector in ("body", ".note", "#findings .plain", ".scale"):
        assert contrast(style(tab, selector, "color"), paper) >= 4.5, selector
    pixel = "[...document.querySelector('#weights canvas').getContext('2d').getImageData(1, 0, 1, 1).data.slice(0, 3)].join(', ')"
    low, high = (tab.evaluate(f"ramp[{step}].join(', ')") for step in (0, 254))
    assert contrast(f"rgb({low})", f"rgb({high})") >= 7
    assert contrast(f"rgb({low})", paper) < 1.5
    assert tab.evaluate(pixel) in tab.evaluate("ramp.map(colour => colour.join(', '))")


def test_nothing_is_wider_than_a_phone(show):
    names = tuple(f"an-expert-with-a-name-that-is-longer-than-a-phone-{number}" * 3 for number in range(17))
    analysis = with_text(with_weights(analysis_of(32, 16), names=names), names=names[:16])
    tab = show(analysis, replace(analysis, model="other"))
    tab.resize(400, 800, mobile=True)
    assert tab.evaluate("document.documentElement.scrollWidth") == 400


@pytest.mark.slow
def test_a_page_of_many_numbers_is_drawn(show):
    """More loads than a call takes arguments."""
    load = np.full((20, 64, 256), 0.01)
    load[3, 5, 7] = 0.5
    domains = tuple(f"text {number}" for number in range(20))
    analysis = with_text(analysis_of(64, 256, neurons=1), load=load, domains=domains, tokens=(100,) * 20)
    assert "highest expert-7, layer 6: 3.5 %" in said(show(analysis), "loads")


def test_a_large_page_changes_its_layer_at_once(show):
    """A tenth of a second is usual; a busy machine takes longer."""
    tab = show(analysis_of(48, 128, neurons=4))
    step = "const start = performance.now(); choose(7); document.body.offsetHeight; return performance.now() - start;"
    assert min(tab.evaluate(f"(() => {{ {step} }})()") for _ in range(3)) < 1000

"""Routes as numbers, and the page that shows them: its data, and what a browser makes of it."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from moemerge.evaluation.routes.page import write_page
from moemerge.evaluation.routes.traced import Routes, TracedText
from tests.support.pages import content, opened_tab, shown, style  # noqa: F401  a fixture

HOSTILE = (
    "<b>",
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "\n\n",
    "\t",
    "\"&'",
    "\ufffd",
    "שלום",
    "🙂",
    "{routes}",
    "",
)
EXPERTS = tuple(f"expert-{number}" for number in range(16))


def small_routes() -> Routes:
    """Two layers, 5 and 9, of three experts; the second layer sends the last token elsewhere."""
    experts = np.array([[[0, 1], [0, 2], [1, 0]], [[0, 2], [2, 1], [2, 1]]])
    weights = np.array([[[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]], [[0.75, 0.25], [0.8, 0.2], [0.55, 0.45]]], np.float32)
    return Routes(
        "tiny", ("fox", "code", "chat"), (5, 9), (TracedText("a.py", ("def", " f", ":\n"), experts, weights),)
    )


def routes_of(tokens: tuple[str, ...], layers: int = 3) -> Routes:
    """Token number n goes to expert n first and then to the next, of 16; one further on in each layer."""
    first = np.arange(layers)[:, None] + np.arange(len(tokens))
    experts = np.stack([first, first + 1], axis=-1) % len(EXPERTS)
    weights = np.broadcast_to(np.array([0.875, 0.125], np.float32), experts.shape)
    return Routes("<i>model</i>", EXPERTS, tuple(range(layers)), (TracedText("<u>text</u>", tokens, experts, weights),))


class Elements(HTMLParser):
    """What a parser finds in a page: tags, and the JSON between its own."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.data = ""
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._inside = ("type", "application/json") in attrs

    def handle_data(self, data):
        self.data += data if self._inside else ""

    def handle_endtag(self, tag):  # noqa: ARG002
        self._inside = False


def written(tmp_path, routes: Routes) -> str:
    write_page(tmp_path / "page.html", routes)
    return (tmp_path / "page.html").read_text("utf-8")


def test_majority_is_of_weights_not_of_votes():
    routes = small_routes()
    # The last token: 0.7 + 0.45 for expert 1, 0.55 for expert 2, 0.3 for expert 0.
    assert routes.majority(routes.texts[0]).tolist() == [0, 2, 1]
    np.testing.assert_allclose(routes.mean_weights(routes.texts[0])[2], [0.15, 0.575, 0.275], rtol=1e-6)


def test_shares_count_first_choices():
    routes = small_routes()
    np.testing.assert_allclose(routes.shares(routes.texts[0], 0), [2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(routes.shares(routes.texts[0], 1), [1 / 3, 0, 2 / 3])
    np.testing.assert_allclose(routes.shares(routes.texts[0]), [1 / 2, 1 / 6, 1 / 3])


def test_load_counts_every_choice_of_all_texts():
    text = small_routes().texts[0]
    other = TracedText("b", ("x",), np.array([[[1, 2]], [[1, 2]]]), np.full((2, 1, 2), 0.5, np.float32))
    routes = Routes("tiny", ("fox", "code", "chat"), (5, 9), (text, other))
    np.testing.assert_allclose(routes.load(), [[3 / 4, 3 / 4, 2 / 4], [1 / 4, 3 / 4, 4 / 4]])


def test_a_text_without_tokens_has_no_shares(tmp_path):
    routes = routes_of(())
    assert routes.shares(routes.texts[0]).tolist() == [0] * 16
    assert routes.load().tolist() == [[0] * 16] * 3
    assert '"tokens":[]' in written(tmp_path, routes)


def test_the_page_holds_the_numbers(tmp_path):
    assert json.loads(Elements(written(tmp_path, small_routes())).data) == {
        "model": "tiny",
        "experts": ["fox", "code", "chat"],
        "layers": [5, 9],
        "load": [[1000, 667, 333], [333, 667, 1000]],
        "texts": [
            {
                "name": "a.py",
                "tokens": ["def", " f", ":\n"],
                "choices": 2,
                "experts": [0, 1, 0, 2, 1, 0, 0, 2, 2, 1, 2, 1],
                "weights": [900, 100, 600, 400, 700, 300, 750, 250, 800, 200, 550, 450],
                "majority": [0, 2, 1],
                "majority_weights": [825, 600, 575],
                "shares": [[500, 167, 333], [667, 333, 0], [333, 0, 667]],
            }
        ],
    }


def test_hostile_tokens_stay_text(tmp_path):
    harmless = Elements(written(tmp_path, routes_of(("a",) * len(HOSTILE))))
    hostile = Elements(written(tmp_path, routes_of(HOSTILE)))
    assert hostile.tags == harmless.tags
    assert json.loads(hostile.data)["texts"][0]["tokens"] == list(HOSTILE)


def test_the_page_names_nothing_outside_itself(tmp_path):
    page = written(tmp_path, small_routes())
    assert not re.search(r"https?:|//[a-z]|\bsrc\s*=|\bhref\s*=|@import|url\(|fetch\(|XMLHttp|WebSocket", page)


@pytest.fixture
def show(tab, tmp_path):
    path = tmp_path / "page.html"
    with shown(tab, path, lambda routes: write_page(path, routes)) as opened:
        yield opened


def rgb(colour: str) -> list[float]:
    """Red, green and blue from 0 to 1 of a computed colour, which must be opaque."""
    numbers = [float(number) for number in re.findall(r"[\d.]+(?:e-\d+)?", colour.removeprefix("color(srgb"))]
    assert len(numbers) == 3, colour
    return numbers if colour.startswith("color(srgb") else [number / 255 for number in numbers]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio, from 1 to 21."""
    linear = [
        np.array([part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb(colour)])
        for colour in (one, other)
    ]
    dark, light = sorted(float(parts @ [0.2126, 0.7152, 0.0722]) for parts in linear)
    return (light + 0.05) / (dark + 0.05)


def token(number: int) -> str:
    return f".text .token:nth-child({number + 1})"


def test_the_slider_moves_by_keyboard(show):
    tab = show(small_routes())
    assert content(tab, "#layer") == "all layers"
    assert content(tab, ".values").split() == ["fox", "50", "%", "code", "17", "%", "chat", "33", "%"]
    majority = style(tab, token(1), "backgroundColor")
    tab.evaluate("slider.focus()")
    tab.press("ArrowRight")
    assert content(tab, "#layer") == "5"
    assert tab.evaluate("slider.getAttribute('aria-valuetext')") == "layer 5"
    assert content(tab, ".values").split() == ["fox", "67", "%", "code", "33", "%", "chat", "0", "%"]
    assert style(tab, token(1), "backgroundColor") != majority
    tab.press("End")
    assert content(tab, "#layer") == "9"
    assert tab.evaluate("[...document.querySelectorAll('.token')].map(token => token.classList[1])") == [
        "e0",
        "e2",
        "e2",
    ]
    tab.press("Home")
    assert style(tab, token(1), "backgroundColor") == majority


def test_pointing_at_a_token_shows_its_experts(show):
    tab = show(small_routes())
    tab.hover(token(1))
    assert content(tab, "#token") == "·f"
    assert content(tab, "#summary") == "Token 2 of 3 in a.py. Over all layers: chat, 60 % of the weight."
    assert content(tab, "#layers").split() == ["5", "fox", ".60", "chat", ".40", "9", "chat", ".80", "code", ".20"]


def test_tokens_are_reached_by_keyboard(show):
    tab = show(small_routes())
    tab.evaluate("document.querySelector('#legend button:last-child').focus()")
    tab.press("Tab", "ArrowRight", "ArrowRight")
    assert content(tab, "#token") == ":↵"
    tab.evaluate("slider.value = 2; slider.oninput()")
    assert content(tab, "#summary") == "Token 3 of 3 in a.py. In layer 9: chat, 55 % of the weight."
    assert content(tab, "#layers .here").split() == ["9", "chat", ".55", "code", ".45"]
    tab.press("Home")
    assert content(tab, "#token") == "def"


def test_a_tap_opens_the_panel_and_its_button_closes_it(show):
    tab = show(small_routes())
    tab.resize(400, 800, mobile=True)
    assert style(tab, "#panel", "display") == "none"
    tab.send("Emulation.setTouchEmulationEnabled", enabled=True)
    tab.tap(token(1))
    tab.send("Emulation.setTouchEmulationEnabled", enabled=False)
    assert content(tab, "#token") == "·f"
    tab.click("#close")
    assert style(tab, "#panel", "display") == "none"


def test_an_expert_of_the_legend_stands_alone(show):
    tab = show(small_routes())
    dimmed = "[...document.querySelectorAll('.token')].map(token => token.matches('.dim'))"
    tab.click("#legend button:nth-child(2)")
    assert tab.evaluate(dimmed) == [True, True, False]
    assert contrast(style(tab, token(0), "color"), style(tab, "body", "backgroundColor")) >= 4.5
    tab.click("#legend button:nth-child(2)")
    assert tab.evaluate(dimmed) == [False, False, False]


def test_a_column_of_the_heat_map_moves_the_slider(show):
    tab = show(small_routes())
    tab.hover("#load tbody tr:nth-child(2) td:nth-child(3)")
    assert content(tab, "#value") == "code, layer 5: 67 %"
    tab.click("#load tbody tr:nth-child(2) td:nth-child(4)")
    assert content(tab, "#layer") == "9"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_can_be_read_on_every_colour(show, scheme):
    tab = show(routes_of(("x",) * 16))
    tab.scheme(scheme)
    paper = style(tab, "body", "backgroundColor")
    backgrounds = set()
    for level in range(5):
        tab.evaluate(
            f"document.querySelectorAll('.token').forEach((token, n) => token.className = `token e${{n}} w{level}`)"
        )
        for number in range(16):
            background = style(tab, token(number), "backgroundColor")
            backgrounds.add(background)
            assert contrast(style(tab, token(number), "color"), background) >= 4.5, (number, level)
    assert len(backgrounds) == 16 * 5
    assert contrast(style(tab, "body", "color"), paper) >= 4.5
    assert contrast(style(tab, ".note", "color"), paper) >= 4.5
    lightness = sum(rgb(paper)) / 3
    assert (lightness > 0.9) == (scheme == "light")
    # All loads are alike here, so that each cell has the map's strongest colour.
    assert contrast(style(tab, "td", "color"), style(tab, "td", "backgroundColor")) >= 4.5


def test_hostile_tokens_are_shown_as_they_are(show):
    tab = show(routes_of(HOSTILE))
    assert tab.evaluate("document.querySelector('.text').textContent") == "".join(HOSTILE)
    assert tab.evaluate("document.querySelectorAll('img, b:not(#layers b), u').length") == 0
    assert content(tab, "h1") == "<i>model</i>"
    assert tab.evaluate("document.title") == "Routes of <i>model</i>"
    assert tab.evaluate("getComputedStyle(document.querySelector('.newline'), '::before').content") == '"↵"'
    tab.hover(token(1))
    assert content(tab, "#token") == "</script><img·src=x·onerror=alert(1)>"


def test_nothing_is_wider_than_a_phone(show):
    tab = show(routes_of(("word ", "a-word-that-is-longer-than-any-line-of-a-phone" * 3, "\n"), layers=32))
    tab.resize(400, 800, mobile=True)
    tab.click(token(1))
    assert tab.evaluate("document.documentElement.scrollWidth") == 400
    # The last line is not left below the panel.
    assert tab.evaluate(f"document.querySelector('{token(1)}').getBoundingClientRect().bottom") < 400
    tab.click(token(0))
    assert tab.evaluate("document.querySelector('#panel').scrollHeight") <= 400  # all 32 layers without scrolling


def test_long_texts_are_recoloured_at_once(show):
    """Four texts of 2000 tokens in 32 layers; a twentieth of a second a step is usual, a busy machine takes longer."""
    text = routes_of(("word ",) * 2000, layers=32).texts[0]
    tab = show(Routes("large", EXPERTS, tuple(range(32)), (text,) * 4))
    step = "const start = performance.now(); slider.value = 7; slider.oninput(); document.body.offsetHeight; return performance.now() - start;"
    assert min(tab.evaluate(f"(() => {{ {step} }})()") for _ in range(3)) < 500

"""The colours of experts."""

from colorsys import rgb_to_hls

import numpy as np
from rich.color import Color
from rich.style import Style

from moemerge.evaluation.routes.page import write_page
from moemerge.evaluation.routes.palette import PALETTE, page_colour, style_of
from moemerge.evaluation.routes.traced import Routes


def hue(colour: Color) -> float:
    """The hue in degrees."""
    return 360 * rgb_to_hls(*(part / 255 for part in colour.get_truecolor()))[0]


def test_an_expert_has_one_hue_on_pages_and_in_terminals():
    for page, style in PALETTE:
        gap = abs(hue(Color.parse(page)) - hue(Style.parse(style).color))
        assert min(gap, 360 - gap) < 55, (page, style)


def test_sixteen_experts_are_told_apart():
    assert len({page for page, _ in PALETTE}) == len({style for _, style in PALETTE}) == 16
    assert (page_colour(17), style_of(17)) == PALETTE[1]


def test_black_letters_can_be_read_on_a_page():
    for page, _ in PALETTE:
        parts = np.array(Color.parse(page).get_truecolor()) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        assert (linear @ [0.2126, 0.7152, 0.0722] + 0.05) / 0.05 > 4.5, page  # WCAG 2, contrast


def test_the_page_of_routes_has_these_colours(tmp_path):
    empty = Routes("out", ("fox", "code"), (0,), ())
    write_page(tmp_path / "routes.html", empty)
    page = (tmp_path / "routes.html").read_text()
    assert all(f".e{expert} {{ --c: {page_colour(expert)} }}" in page for expert in range(16))

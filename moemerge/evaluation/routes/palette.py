"""One colour for each expert, the same hue on pages and in terminals.

Those of pages were chosen to stay apart, the first eight most, in normal sight and three kinds of colour blindness;
black letters can be read on all of them. Terminals have 16 colours by name, which their users chose.
"""

from typing import Final

PALETTE: Final = (
    ("#69cbff", "bright_blue"),
    ("#f2a33b", "yellow"),
    ("#3baa89", "green"),
    ("#f8e57c", "bright_yellow"),
    ("#de6437", "red"),
    ("#7a85b1", "blue"),
    ("#a396ff", "magenta"),
    ("#a3f8f2", "cyan"),
    ("#bc9b59", "yellow underline"),
    ("#f4c84e", "bright_yellow underline"),
    ("#d3a6d3", "bright_magenta underline"),
    ("#a67ade", "magenta underline"),
    ("#6fbca6", "green underline"),
    ("#b1d390", "bright_green underline"),
    ("#c8e9bc", "bright_green bold underline"),
    ("#9bdede", "cyan underline"),
)
"""The colour of each expert on a page, and its style in a terminal; they repeat."""


def page_colour(expert: int) -> str:
    """The colour of an expert on a page."""
    return PALETTE[expert % len(PALETTE)][0]


def style_of(expert: int) -> str:
    """The style of an expert in a terminal."""
    return PALETTE[expert % len(PALETTE)][1]

"""Fill in the templates of model cards: Markdown for jinja2 in `templates/`."""

import functools
from typing import TYPE_CHECKING, Any, Final

from moemerge.model_card.markdown import as_code, as_text
from moemerge.printable import printable

if TYPE_CHECKING:
    from jinja2 import Template

_PACKAGE: Final = "moemerge.model_card"


def render(name: str, /, **values: Any) -> str:
    """Fill in a template, without an empty line at its end."""
    return _template(name).render(**values).rstrip("\n")


def render_block(name: str, block: str, /, **values: Any) -> str:
    """Fill in one block of a template, without an empty line at its end."""
    template = _template(name)
    return "".join(template.blocks[block](template.new_context(values))).rstrip("\n")


@functools.cache
def _template(name: str) -> "Template":
    """Load a template, whose own filters escape what is put into it: jinja2 would escape for HTML alone."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(  # noqa: S701
        loader=PackageLoader(_PACKAGE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = {"text": as_text, "code": as_code, "printable": printable, "millions": _millions, "share": _share}
    environment.filters |= filters
    return environment.get_template(f"{name}.md.jinja")


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M"


def _share(share: float) -> str:
    return f"{share:.1%}"

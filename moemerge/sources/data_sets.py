"""What a reference to text on the Hub means: a split of a data set, or a column of it."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

from moemerge.errors import RefusedError

SCHEME: Final = "hf://"
"""What such a reference begins with."""
_FORM: Final = "hf://datasets/user/name[@revision][/subset][:split][#column]"
_PARTS: Final = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@:#]+?))?(?:/(?P<subset>[^/@:#]+))?"
    r"(?::(?P<split>[^#]+))?(?:#(?P<column>.+))?"
)


@dataclass(frozen=True)
class HubData:
    """A split of a data set on the Hub."""

    name: str
    """As the user has written it."""
    repo: str
    revision: str | None
    subset: str | None
    split: str
    column: str | None

    def __str__(self) -> str:
        return self.name


def parse_hub_data(text: str, place: str) -> HubData:
    """Parse `hf://datasets/user/name[@revision][/subset][:split][#column]`; without a split, `train`.

    Raises:
        RefusedError: it is of another form, or `datasets` is not installed.
    """
    found = _PARTS.fullmatch(text)
    if not found:
        raise RefusedError(f"{place}: expected {_FORM}, found {text!r:.200}.")
    if find_spec("datasets") is None:
        raise RefusedError(f"{place}: to read {text}, datasets is needed: pip install datasets.")
    parts = found.groupdict()
    return HubData(text, parts["repo"], parts["revision"], parts["subset"], parts["split"] or "train", parts["column"])

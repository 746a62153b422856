"""Pages of HTML, shown in a browser for tests."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import CHROMIUM, Browser, browser


@pytest.fixture(scope="module", name="tab")
def opened_tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH to show the page in")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@contextmanager
def shown(tab: Browser, path: Path, write: Callable[..., None]) -> Iterator[Callable[..., Browser]]:
    """Gives a function that writes what it is given to a page and opens that in a light, wide window.

    Afterwards nothing may have been complained of or asked for.
    """

    def opened(*given: Any) -> Browser:
        write(*given)
        tab.resize(1280, 900)
        tab.scheme("light")
        tab.open(path)
        return tab

    tab.events.clear()
    yield opened
    tab.evaluate("new Promise(requestAnimationFrame)")
    assert tab.complaints() == []
    assert tab.requests() == [path.as_uri()]


def style(tab: Browser, selector: str, name: str) -> str:
    found: str = tab.evaluate(f"getComputedStyle(document.querySelector({json.dumps(selector)})).{name}")
    return found


def content(tab: Browser, selector: str) -> str:
    found: str = tab.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")
    return found

"""The page of `moemerge chat --web`, in a browser; where gradio and Chromium are installed."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import pytest

from moemerge.cli import main
from moemerge.generation.answers import Sampling, open_generator, prompt_of
from tests.support.browser import CHROMIUM, browser
from tests.support.chats import CHATML, chat_mixture

ROOT = Path(__file__).parents[2]
SAMPLING = Sampling(12, temperature=1.0)


def test_without_gradio_the_page_is_refused_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["moemerge", "chat", str(tmp_path / "none"), "--web"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "error: --web: gradio is needed: pip install 'gradio>=6.31'.\n")


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return open_generator(chat_mixture(tmp_path_factory.mktemp("page"), CHATML), device="cpu")


@pytest.fixture(scope="module")
def served(generator):
    """The address of the page, in a process of its own: gradio leaves sockets open."""
    if find_spec("gradio") is None:
        pytest.skip("the page needs gradio: pip install '.[web]'")
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH to show the page in")
    options = ("--device", "cpu", "--max-new-tokens", str(SAMPLING.max_new_tokens), "--temperature", "1")
    with subprocess.Popen(
        [sys.executable, "-m", "moemerge", "chat", generator.name, "--web", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        address, _, told = process.stdout.readline().partition(" ")
        yield address
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert told == "shows the chat in a browser; Ctrl-C ends it.\n"
        assert (process.returncode, errors) == (130, "interrupted: the page is closed\n")


@pytest.fixture(scope="module")
def tab(served, tmp_path_factory):
    """The page in a browser."""
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.send("Page.navigate", url=served)
        yield opened


def eventually(tab, expression: str):
    """Wait until an expression in the page is true, and give its value."""
    for _ in range(600):
        if found := tab.evaluate(expression):
            return found
        time.sleep(0.1)
    raise AssertionError(tab.evaluate("document.body.innerText"))


def ask(tab, text: str) -> None:
    tab.evaluate("document.querySelector('textarea').focus()")
    tab.send("Input.insertText", text=text)
    tab.evaluate("document.querySelector('button.submit-button').click()")


def test_an_answer_is_shown_with_the_experts_of_its_tokens(tab, served, generator):
    eventually(tab, "document.querySelector('textarea')?.placeholder === 'Ask something'")
    ask(tab, "<b>fox</b>")
    eventually(tab, "document.body.innerText.split('\\n').includes('all')")
    expected = generator.generate(prompt_of((), "<b>fox</b>", system=None, plain=False), SAMPLING)
    (traced,) = expected.routes.texts
    pairs = [pair for pair in zip(expected.routes.majority(traced), expected.tokens, strict=True) if pair[1]]
    parts = ["".join(text for _, text in same) for _, same in groupby(pairs, key=lambda pair: pair[0])]
    spans = tab.evaluate("[...document.querySelectorAll('.token .text')].map(span => span.textContent)")
    assert [span for span in spans if span] == parts
    assert len(parts) > 2
    cells = [f"{share:.0%}" for share in expected.routes.shares(traced)]
    lines = tab.evaluate("document.body.innerText").split("\n")
    assert lines[lines.index("all") + 1 :][:3] == cells
    assert tab.evaluate("document.querySelectorAll('img[src=x]').length") == 0
    assert all(url.startswith((served, "data:", "blob:")) for url in tab.requests())


def test_a_chat_goes_on_until_it_is_cleared(tab, generator):
    first = generator.generate(prompt_of((), "<b>fox</b>", system=None, plain=False), SAMPLING).text
    second = generator.generate(prompt_of([("<b>fox</b>", first)], "code", system=None, plain=False), SAMPLING)
    alone = generator.generate(prompt_of((), "code", system=None, plain=False), SAMPLING)
    assert second.text != alone.text
    shown = "[...document.querySelectorAll('.token .text')].map(span => span.textContent).join('')"
    ask(tab, "code")
    eventually(tab, f"{shown} === {json.dumps(second.text)}")
    tab.evaluate("document.querySelector('button[aria-label=Clear]').click()")
    eventually(tab, f"{shown} === ''")
    ask(tab, "code")
    eventually(tab, f"{shown} === {json.dumps(alone.text)}")

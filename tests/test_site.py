"""The documentation's site has every page, and tells of every command and option; `make docs` checks its links."""

import importlib.util
import re
from types import ModuleType

import pytest
import yaml

from moemerge.cli import main
from tests.support.machine import ROOT


@pytest.fixture(scope="module")
def command_line() -> ModuleType:
    spec = importlib.util.spec_from_file_location("command_line", ROOT / "docs" / "site" / "command_line.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_has_its_place_in_the_navigation():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = [page for section in navigation for pages in section.values() for page in pages]
    made = {"index.md", "contributing.md", "changelog.md", "command-line.md", "python-reference.md"}
    assert sorted(named) == sorted(made | {path.name for path in (ROOT / "docs").glob("*.md")})


def test_the_page_of_commands_has_every_option_that_help_shows(command_line, monkeypatch, capsys):
    page = command_line.page()
    parts = re.split(r"^## (moemerge.*)\n", page, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert sections.keys() == command_line.commands().keys() > {"moemerge merge", "moemerge plan", "moemerge push"}
    for words, told in sections.items():
        monkeypatch.setattr("sys.argv", [*words.split(), "--help"])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit):
            main()
        shown = set(re.findall(r"^ +(--?[\w-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--help", "-h"}
        assert shown == set(re.findall(r"^\| `(--?[\w-]+)", told, re.MULTILINE)), words

"""The commands and configs of docs/editing.md are run, in their order, over tiny models in the places that they name."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from moemerge import load_config, merge, plan_merge
from moemerge.cli import main
from tests.support.models import PROMPTS, TEXT, make_model, write_config

PAGE = (Path(__file__).parents[2] / "docs" / "editing.md").read_text()
SECTIONS = {
    title: text
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    if re.search(r"^    moemerge ", text, re.MULTILINE)
}


@pytest.fixture(scope="module")
def workplace(llamas, tmp_path_factory) -> Path:
    """A folder with the mixtures, models and texts that the page names."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, model in zip(("base", "code", "math", "prose"), llamas, strict=True):
        shutil.copytree(model, folder / "models" / name)
    make_model(folder / "models" / "sql", 4, tuned_from=0)
    config = write_config(folder / "merge.yaml", "models/base", [f"models/{n}" for n in ("code", "math", "prose")])
    merge(plan_merge(load_config(config)), folder / "out")
    config = write_config(folder / "other.yaml", "models/base", ["models/sql", "models/code"])
    merge(plan_merge(load_config(config)), folder / "other")
    (folder / "texts").mkdir()
    for name, lines in zip(("code", "prose", "sql"), (*PROMPTS[:2], TEXT.split("\n")), strict=True):
        for number, line in enumerate([*lines, *reversed(lines)]):
            (folder / "texts" / f"{name}-{number}.txt").write_text(line)
        (folder / "texts" / f"{name}.txt").write_text("\n\n".join(lines))
    return folder


def test_the_page_has_a_recipe_for_each_edit():
    commands = set(re.findall(r"^    moemerge (\w+)", PAGE, re.MULTILINE))
    assert commands >= {"edit", "plan", "prune", "extract", "densify", "upcycle"}


@pytest.mark.parametrize("title", SECTIONS)
def test_every_recipe_works(workplace, tmp_path, monkeypatch, capsys, title):
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    text = SECTIONS[title]
    configs = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    commands = re.findall(r"^    (moemerge .+)$", text, re.MULTILINE)
    named = [word for command in commands for word in shlex.split(command) if word.endswith(".yaml")]
    for name, config in zip(dict.fromkeys(named), configs, strict=True):
        Path(name).write_text(config)
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code, f"{command}\n{capsys.readouterr().err}"

"""The documentation's commands, configs and programs are run, over tiny models in the places that they name."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from moemerge.cli import main
from moemerge.cli.families import as_markdown, models_as_markdown
from moemerge.config.loading import parse_config
from moemerge.config.schema import MergeConfig, RoutedExpert
from moemerge.families.overview import family_rows
from tests.support.models import make_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder in which every model that the README names is there, and its config."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "merge.yaml").write_text(blocks("yaml")[0])
    config = yaml.safe_load(blocks("yaml")[0])
    for reference in {config["base_model"], *(expert["source_model"] for expert in config["experts"])}:
        make_model(folder / reference, len(reference), "mistral")
    return folder


def test_the_readme_is_short():
    assert len(README.splitlines()) < 120


def test_the_first_config_is_valid_and_short():
    assert parse_config(blocks("yaml")[0]).gate_mode == "auto"
    assert len(blocks("yaml")[0].splitlines()) <= 12


def commands() -> list[str]:
    """Indented lines that run moemerge on something; schematic ones are in capitals."""
    lines = re.findall(r"^    (moemerge [^#\n]+)", README, re.MULTILINE)
    return [line.strip() for line in lines if not re.search(r"\b(CONFIG|MODEL|OUT|BASE)\b", line)]


def test_every_command_of_the_readme_works(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    assert len(commands()) == 2
    for command in commands():
        monkeypatch.setattr(sys, "argv", command.split())
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0, capsys.readouterr().err
    loading, building = blocks("python")
    for program in (loading, building):
        if program == building:
            shutil.rmtree(workplace / "out")
        exec(compile(program, "README.md", "exec"), {})  # noqa: S102  the README's own programs


def test_every_key_of_the_config_is_documented():
    table = (ROOT / "docs" / "config.md").read_text()
    for key in MergeConfig.model_fields:
        assert f"`{key}`" in table or key == "experts"
    for key in RoutedExpert.model_fields:
        assert f"`experts[].{key}`" in table


def test_tables_of_families_are_those_that_the_command_prints():
    """Run `moemerge families --markdown` and put its first table and the others between their marks."""
    page = (ROOT / "docs" / "families.md").read_text()
    for told, expected in {", the first table": models_as_markdown(), "": as_markdown(family_rows())}.items():
        shown = re.search(rf"<!-- moemerge families --markdown{told} -->\n(.*?)\n?<!-- end -->", page, re.DOTALL)
        assert shown
        assert shown[1] == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_make_targets_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_table_of_layers_is_the_one_that_is_checked():
    rows = re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \|", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    checked = [(str(number), name) for number, layer in enumerate(reversed(layers), 1) for name in layer.split(" | ")]
    assert sorted(rows) == sorted(checked)
    assert [int(number) for number, _ in rows] == sorted((int(number) for number, _ in rows), reverse=True)


# Of llama.cpp, of mergekit, and in the text that a page shows a command for.
ELSEWHERE = {"convert_hf_to_gguf.py", "main.py", "router.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_a_page_names_are_there(page):
    """As seen from the root, from the package, or from the folder of the programs that docs/next-steps.md shows."""
    roots = (ROOT, ROOT / "moemerge", ROOT / "docs" / "next_steps")
    text = re.sub(r"https?://\S+", "", page.read_text())
    names = {name.lstrip("./") for name in re.findall(r"[\w./*-]+\.py\b", text)} - ELSEWHERE
    # In backticks, a package: no folder of models or texts has the name of one.
    packages = {path.name for path in (ROOT / "moemerge").iterdir() if path.is_dir()}
    names |= {name for name in re.findall(r"`([\w/]+/)`", text) if name.split("/")[0] in packages}
    assert [name for name in sorted(names) if not any([*root.glob(name)] for root in roots)] == []


def test_hooks_before_a_commit_run_what_make_lint_runs():
    lint = re.search(r"^lint: install\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == lint.replace("$(BIN)", ".venv/bin").replace("\t", "").splitlines()


def test_questions_have_an_answer_each():
    section = (ROOT / "docs" / "design.md").read_text().partition("## Where is what?")[2]
    rows = re.findall(r"^\| ([^|]+\?) \| ([^|]+) \|$", section, re.MULTILINE)
    assert len(rows) >= 10
    for question, answer in rows:
        assert re.search(r"`[\w/]+(\.py|/)`", answer), question


def test_programs_that_a_page_shows_are_those_that_are_run():
    """The text of a block is that of the file that its first line names, between its docstring and its end."""
    page = (ROOT / "docs" / "next-steps.md").read_text()
    shown = dict(re.findall(r"^```python (docs/\S+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    assert shown.keys() == {f"docs/next_steps/{path.name}" for path in (ROOT / "docs" / "next_steps").glob("*.py")}
    for name, text in shown.items():
        assert text == (ROOT / name).read_text(), f"{name}: put the file into docs/next-steps.md"
        compile(text, name, "exec")

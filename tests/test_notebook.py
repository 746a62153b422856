"""The notebook for Colab is run, with its form filled in for models on a Hub of the tests."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from moemerge.config.loading import load_config
from tests.support.hub_server import User
from tests.support.machine import ROOT

NOTEBOOK = ROOT / "notebooks" / "merge_on_colab.ipynb"
FIELD = re.compile(r"^(\w+) = .*?(  # @param .*)$", re.MULTILINE)
MODELS = {
    "base_model": "acme/base",
    "expert_1": "acme/fox",
    "prompts_1": "The fox jumps. | The lazy dog",
    "expert_2": "acme/code",
    "prompts_2": "def main(argv): return argv | item 1",
    "expert_3": "",
    "dtype": "float32",
}


def read_notebook(**fields: Any) -> nbformat.NotebookNode:
    """The notebook with other values in fields of its form."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = FIELD.sub(
            lambda field: f"{field[1]} = {fields.pop(field[1])!r}{field[2]}" if field[1] in fields else field[0],
            cell.source,
        )
    assert fields == {}
    return notebook


def said(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.fixture
def kernel(world, tmp_path, monkeypatch) -> Path:
    """The folder that a notebook runs in, on a machine that knows one Hub and has an account there."""
    world.hub.users = {"hf_alice": User("alice")}
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    hub = {"HF_ENDPOINT": world.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    jupyter = {"IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    for name, value in (paths | hub | jupyter).items():
        monkeypatch.setenv(name, value)
    return tmp_path


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()


@pytest.mark.slow
def test_the_notebook_merges_and_pushes(world, kernel):
    notebook = read_notebook(**MODELS, repository="alice/mix", token="hf_alice", private=True)
    run(notebook, kernel)
    plan, merged = (said(cell) for cell in notebook.cells[-2:])
    assert "2 experts, 2 per token" in plan
    assert "\x1b" not in plan + merged
    assert merged.splitlines()[-1] == f"{world.url}/alice/mix"
    repository = world.hub.repositories["alice/mix"]
    assert repository.private
    files = repository.find("main")[1]
    assert {"README.md", "config.json", "model.safetensors.index.json"} <= files.keys()
    assert not (kernel / "mixture").exists()


def test_a_refused_plan_ends_the_run(world, kernel):
    notebook = read_notebook(**MODELS | {"expert_2": "acme/none"}, repository="alice/none", token="hf_alice")
    with pytest.raises(
        CellExecutionError, match="Nothing was merged. Change what the last line says, and run the cells"
    ):
        run(notebook, kernel)
    *_, plan, merge = notebook.cells
    assert "acme/none" in said(plan)
    assert merge.execution_count is None
    assert "alice/none" not in world.hub.repositories


def test_what_stands_in_the_form_is_a_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (cell,) = (cell for cell in read_notebook().cells if "base_model = " in cell.source)
    exec(cell.source, {})  # noqa: S102  the notebook's own
    config = load_config(tmp_path / "merge.yaml")
    assert capsys.readouterr().out == f"{(tmp_path / 'merge.yaml').read_text()}\n"
    assert [len(expert.positive_prompts) for expert in config.experts] == [2, 2, 2]


def test_the_notebook_is_stored_without_what_it_printed():
    cells = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in cells] == [([], None)] * len(cells)

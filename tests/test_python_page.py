"""The programs of docs/python.md are run, over tiny models in the places that they name."""

import inspect
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mypy import api

import moemerge
from tests.support.hub_server import Hub, User
from tests.support.machine import Machine
from tests.support.models import TEXT, make_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text()
# By the name in its heading, each part's program.
PROGRAMS = dict(
    re.search(r"\A`?(\w+)`?\n.*^```python\n(.*)^```$", part, re.MULTILINE | re.DOTALL).groups()
    for part in PAGE.split("\n## ")[1:]
)
FUNCTIONS = [name for name in moemerge.__all__ if inspect.isfunction(getattr(moemerge, name))]
TOKEN = "hf_user"  # noqa: S105  of the test's own Hub


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the page's config, models and texts, and the model that its programs merge."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "merge.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    for seed, name in enumerate(("base", "code", "chat")):
        make_model(folder / "models" / name, seed, tuned_from=0)
    (folder / "texts").mkdir()
    words = TEXT.split()
    for name, some in (("code", words[9:20]), ("chat", words[:9])):
        documents = [" ".join(random.Random(number).choices(some, k=20)) for number in range(12)]
        (folder / "texts" / f"{name}.txt").write_text("\n<|document|>\n".join(documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("merge")
    return folder


def run(name: str) -> None:
    exec(compile(PROGRAMS[name], f"docs/python.md: {name}", "exec"), {})  # noqa: S102  the page's own programs


def test_every_function_has_a_program_that_calls_it():
    assert PROGRAMS.keys() == {*FUNCTIONS, "Errors"}
    for name in FUNCTIONS:
        assert re.search(rf"^from moemerge import .*\b{name}\b", PROGRAMS[name], re.MULTILINE), name
        assert f"{name}(" in PROGRAMS[name]
        assert f"[`{name}`](#{name})" in PAGE


def test_every_name_is_told_of():
    for name in moemerge.__all__:
        assert re.search(rf"\b{name}\b", PAGE), name


SHOWN = {
    "load_config": "models/base ['models/code', 'models/chat']\n",
    "plan_merge": "mixtral ",
    "merge": "Held-out prompts: ",
    "plan_edit": "() ",
    "edit": "('chat', 'code')\n",
    "verify": "tensors are copies, 0 were computed again and are equal\n",
    "inspect": "tensors, 0 of them damaged\n",
    "evaluate": "label oracle {'code': '",
    "search": "{'gate_mode': '",
    "trace_routes": "(3, 21, 2) (3, 21, 2)\n'The' ",
    "tune": "True ",
    "Errors": "not as it is: models/missing",
}


@pytest.mark.parametrize("name", sorted(PROGRAMS.keys() - {"push"}))
def test_programs_work(workplace, monkeypatch, capsys, name):
    monkeypatch.chdir(workplace)
    run(name)
    assert SHOWN[name] in capsys.readouterr().out


def test_the_program_that_pushes_works(workplace, tmp_path):
    hub = Hub()
    hub.users = {TOKEN: User("user")}
    with hub.running() as url:
        machine = Machine(tmp_path, url)
        shutil.copytree(workplace / "out", tmp_path / "out")
        done = machine.python("-c", PROGRAMS["push"], HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
        assert done.out.splitlines()[-1] == f"{url}/user/mixture", done
    repository = hub.repositories["user/mixture"]
    assert repository.private
    assert repository.find("main")[1]["config.json"] == (workplace / "out" / "config.json").read_bytes()


@pytest.mark.slow
def test_programs_are_right_for_a_strict_type_checker(tmp_path):
    paths = []
    for name, text in PROGRAMS.items():
        paths.append(str(tmp_path / f"{name}_program.py"))
        Path(paths[-1]).write_text(text)
    found, problems, code = api.run(
        ["--strict", f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={ROOT / '.mypy_cache'}", *paths]
    )
    assert (problems, code) == ("", 0), found


def test_pyright_accepts_the_programs_and_no_misspelt_name(tmp_path, monkeypatch):
    """One run for both: it takes seconds. Nothing is fetched: its wheel carries the checker, another one node."""
    for name, text in PROGRAMS.items():
        (tmp_path / f"{name}_program.py").write_text(text)
    (tmp_path / "probe.py").write_text("from moemerge import plan_merge\nfrom moemerge import plan_merg\n")
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)], "pythonVersion": "3.10"}))
    monkeypatch.setenv("PYRIGHT_PYTHON_IGNORE_WARNINGS", "1")
    checked = [str(ROOT / "moemerge" / "__init__.py"), str(tmp_path)]
    command = [sys.executable, "-m", "pyright", "--outputjson", "--project", str(tmp_path), *checked]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == len(PROGRAMS) + 2
    told = [
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1, each["message"])
        for each in found["generalDiagnostics"]
    ]
    assert told == [("probe.py", 2, '"plan_merg" is unknown import symbol')]

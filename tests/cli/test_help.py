"""Help pages, completion and the names of commands, as they are typed and read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moemerge.cli.app import _COMMANDS
from tests.support.models import write_config

ROOT = Path(__file__).parents[2]
NAMES = [name for commands in _COMMANDS.values() for name in commands]


@pytest.fixture
def here(monkeypatch, run):
    """Runs a command line in a terminal of 80 columns; gives the exit code and both outputs."""
    monkeypatch.setenv("COLUMNS", "80")
    return run


def complete(*words: str, cwd: Path) -> list[str]:
    """What bash is offered for the last word."""
    asked = {"COMP_WORDS": " ".join(("moemerge", *words)), "COMP_CWORD": str(len(words))}
    environment = os.environ | asked | {"_MOEMERGE_COMPLETE": "complete_bash", "PYTHONPATH": str(ROOT)}
    code = (
        "import sys\nfrom moemerge.cli import main\ntry:\n    main()\nfinally:\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["me"], ["merge", "merge.yaml"]),
        (["merge.yaml", "out", "--push-"], ["--push-streaming"]),
        (["merge", "merge.yaml", "--dry"], ["--dry-run"]),
        (["eval", "out", "--base"], ["--baselines"]),
        (["gguf", "out", "out.gguf", "--type", "q4_k"], ["q4_k_m", "q4_k_s"]),
        (["nothing"], []),
    ],
)
def test_commands_options_and_configs_are_completed(tmp_path, words, offered):
    (tmp_path / "merge.yaml").touch()
    assert complete(*words, cwd=tmp_path) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(here, monkeypatch, shell):
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: shell)
    code, shown, errors = here("--show-completion")
    assert (code, errors) == (0, "")
    assert "_MOEMERGE_COMPLETE=complete_" + shell in shown


def test_the_first_page_names_every_command_in_a_line(here):
    code, shown, errors = here("-h")
    assert (code, errors) == (0, "")
    lines = shown.splitlines()
    for heading, commands in _COMMANDS.items():
        start = lines.index(f"{heading}:")
        listed = [line.split()[0] for line in lines[start + 1 : start + 1 + len(commands)]]
        assert listed == list(commands)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_a_page_of_80_columns_with_its_help_option(here, name):
    code, shown, errors = here(name, "-h")
    assert (code, errors, here(name, "--help")[1]) == (0, "", shown)
    assert shown.startswith(f"Usage: moemerge {name} [OPTIONS]")
    assert max(map(len, shown.splitlines())) <= 80
    assert "-h, --help" in shown
    assert not [line for line in shown.splitlines() if line.rstrip().endswith("-")]


def test_a_merges_options_are_in_groups_and_examples_end_the_page(here):
    shown = here("merge", "--help")[1]
    headings = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "Arguments:", "Output:", "Reading:", "Hub:", "Routers:", "Models:", "Messages:", "Examples:",
    ]  # fmt: skip
    assert shown.endswith("  moemerge merge.yaml out.gguf --type q8_0   merge into a file for llama.cpp\n")


@pytest.mark.parametrize("word", [[], ["merge"]])
def test_a_merge_needs_no_name_and_has_one(here, tmp_path, llamas, word):
    config = write_config(tmp_path / "c.yaml", llamas[0], llamas[1:], prompts=False)
    assert here(*word, "--cuda", config, tmp_path / "out", "--device=cpu", "-q", "--seed", 3) == (0, "", "")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(here, tmp_path, llamas):
    config = write_config(tmp_path / "c.yaml", llamas[0], llamas[1:], prompts=False)
    out = tmp_path / "out"
    shown, planned = here(config, out, "--dry-run"), here("plan", config)
    free = re.compile(r"[\d.]+ \wB free here *")  # other programs write, too
    last = f"{out}: nothing was written, since this was a dry run.\n"
    assert (shown[0], free.sub("", shown[1]), shown[2]) == (planned[0], free.sub("", planned[1]) + last, planned[2])
    facts = [json.loads(here(*words, "--json")[1]) for words in ((config, out, "--dry-run"), ("plan", config))]
    assert facts[0] | {"free_bytes": 0} == facts[1] | {"free_bytes": 0}
    assert not out.exists()
    (out / "mine").mkdir(parents=True)
    assert here(config, out, "--dry-run")[0] == 2


def test_a_merge_prints_one_json_object_on_request(here, tmp_path, llamas):
    config = write_config(tmp_path / "c.yaml", llamas[0], llamas[1:])
    code, shown, _ = here(config, tmp_path / "out", "--json", "--device", "cpu")
    found = json.loads(shown)
    assert (code, found["out"], found["url"]) == (0, str(tmp_path / "out"), None)
    assert (found["family"], found["gate_mode"], found["experts_per_token"]) == ("mixtral", "hidden", 2)
    assert found["experts"] == ["fox", "code", "chat"]
    assert len(found["routing"]["hit_rate"]) == 3
    assert found["output_bytes"] == json.loads(here("plan", config, "--json")[1])["output_bytes"]


def test_families_of_a_models_type_and_of_a_model(here, llamas, tmp_path):
    of_type = [row["family"] for row in json.loads(here("families", "llama", "--json")[1])]
    every = json.loads(here("families", "--json")[1])
    assert of_type == [row["family"] for row in every if "llama" in row["takes"]]
    assert 0 < len(of_type) < len(every)
    assert [row["family"] for row in json.loads(here("families", llamas[0], "--json")[1])] == of_type
    assert [row["family"] for row in json.loads(here("families", "yi", "--json")[1])] == of_type
    assert [row["family"] for row in json.loads(here("families", "mixtral", "--json")[1])] == ["mixtral"]
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 4}')
    assert [row["family"] for row in json.loads(here("families", tmp_path, "--json")[1])] == ["mixtral"]

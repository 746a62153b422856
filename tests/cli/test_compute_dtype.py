"""`--compute-dtype` on every command that runs a model."""

import json
import sys

import pytest
import torch

from moemerge import load_config, merge, packages, plan_merge
from moemerge.cli import main
from moemerge.passes import decoder
from tests.support.models import TEXT, write_config


@pytest.fixture(scope="module")
def commands(tmp_path_factory, llamas) -> dict[str, list[object]]:
    """Each command, over a model and texts that are there."""
    folder = tmp_path_factory.mktemp("commands")
    config, out = write_config(folder / "merge.yaml", llamas[0], llamas[1:]), folder / "out"
    merge(plan_merge(load_config(config)), out)
    words = TEXT.split()
    (folder / "text.txt").write_text("\n<|document|>\n".join(" ".join(words[n : n + 12]) for n in range(12)))
    data = [part for name in ("fox", "code", "chat") for part in ("--data", f"{name}={folder / 'text.txt'}")]
    file, texts = folder / "a.gguf", ["--imatrix-texts", folder / "text.txt"]
    return {
        "merge": [config, folder / "other"],
        "eval": ["eval", out, *data, "--max-tokens", "40", "--json"],
        "routes": ["routes", out, "--text", "The fox", "--json"],
        "tune": ["tune", out, *data, "--distil", "--steps", "1", "--tokens-per-step", "48"],
        "gguf": ["gguf", out, file, "--type", "q4_k_m", *texts],
    }


def states_of(words: list[object], monkeypatch) -> tuple[set[torch.dtype], int]:
    """The dtypes of the states that a command's streamed passes begin with, and its exit code."""
    call, seen = decoder._call, set()

    def watched(model, part, ids, tables, forwards):
        seen.update(table.dtype for table in tables.values())
        return call(model, part, ids, tables, forwards)

    monkeypatch.setattr(decoder, "_call", watched)
    monkeypatch.setattr(packages, "find_spec", lambda _: object())  # as if llama.cpp were there, until it is needed
    monkeypatch.setattr(sys, "argv", ["moemerge", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return seen, end.value.code or 0


@pytest.mark.parametrize("name", ["merge", "eval", "routes", "tune", "gguf"])
def test_every_command_computes_in_what_is_asked_for(tmp_path, commands, monkeypatch, capsys, name):
    for asked, dtype in (((), torch.float32), (("--compute-dtype", "bfloat16"), torch.bfloat16)):
        more = {"merge": ["--overwrite"], "tune": ["--out", tmp_path / str(dtype)]}.get(name, [])
        seen, code = states_of([*commands[name], *more, *asked], monkeypatch)
        printed, errors = capsys.readouterr()
        assert seen == {dtype}, errors
        assert name == "gguf" or code == 0, errors
        spelt = str(dtype).removeprefix("torch.")
        assert name != "eval" or json.loads(printed)["dtype"] == spelt
        assert name != "tune" or f" M parameters in {spelt}: " in errors  # not only of the teachers


@pytest.mark.parametrize(("alias", "dtype"), [("bf16", torch.bfloat16), ("FP32", torch.float32)])
def test_dtypes_have_the_short_names_of_the_yaml(commands, monkeypatch, alias, dtype):
    assert states_of([*commands["routes"], "--compute-dtype", alias], monkeypatch) == ({dtype}, 0)


@pytest.mark.parametrize("spelt", ["fp16", "Float16", "half"])
def test_float16_is_nothing_that_models_are_run_in(commands, monkeypatch, capsys, spelt):
    assert states_of([*commands["routes"], "--compute-dtype", spelt], monkeypatch) == (set(), 2)
    errors = " ".join(capsys.readouterr().err.replace("│", " ").split())
    known = "known: auto, float32, bfloat16."
    assert f"Invalid value for '--compute-dtype': '{spelt}': no model is run in float16; {known}" in errors


@pytest.mark.parametrize("name", ["merge", "eval", "routes", "tune", "gguf"])
def test_another_dtype_is_a_wrong_command(commands, monkeypatch, capsys, name):
    assert states_of([*commands[name], "--compute-dtype", "fp8"], monkeypatch) == (set(), 2)
    errors = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "Invalid value for '--compute-dtype': 'fp8' is not known; known: auto, float32, bfloat16." in errors

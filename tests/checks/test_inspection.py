"""What `moemerge inspect` says of models whose tensors do not speak for themselves."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moemerge import load_config, merge, plan_merge
from moemerge.checks.inspection import Held, inspect_checkpoint
from moemerge.cli import main
from moemerge.export.writing import write_gguf
from tests.families.test_multimodal import add_next_tokens
from tests.support.models import edit_json, load_weights, make_model, write_config
from tests.support.multimodal import make_multimodal
from tests.support.quantised import quantise


@pytest.fixture
def told(monkeypatch, capsys):
    """Runs `moemerge inspect`; gives the exit code, the rows of its table, and what is printed on standard error."""

    def tell(*arguments: object) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["moemerge", "inspect", *map(str, arguments)])
        capsys.readouterr()  # what models printed when they were made
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code or 0, [line.rstrip() for line in out.splitlines()], err

    return tell


def test_a_quantised_model_has_its_method_and_the_parameters_of_the_plain_one(tmp_path, told):
    plain = make_model(tmp_path / "plain", 1, dtype=torch.bfloat16, hidden_size=64, intermediate_size=64)
    quantised = Path(shutil.copytree(plain, tmp_path / "quantised"))
    quantise(quantised, "GPTQ")
    found, expected = inspect_checkpoint(str(quantised)), inspect_checkpoint(str(plain))
    assert (found.quantised, expected.quantised) == (
        ("4-bit integers with a scale per 32 columns of a row (GPTQ)",),
        (),
    )
    assert found.total_parameters == expected.total_parameters
    assert found.warnings == ()
    code, rows, _ = told(quantised)
    assert code == 0
    assert "quantised   4-bit integers with a scale per 32 columns of a row (GPTQ)" in rows
    edit_json(quantised / "config.json", quantization_config={"quant_method": "hqq"})
    assert "quantised   hqq, which moemerge does not read" in told(quantised)[1]
    edit_json(plain / "config.json", quantization_config={"quant_method": "hqq"})
    assert inspect_checkpoint(str(plain)).quantised == ()


def test_towers_are_counted_beside_the_text_model(tmp_path, told):
    model = make_multimodal(tmp_path / "model", "qwen3_5", 1)
    add_next_tokens(model)
    weights = load_weights(model)
    towers = [tensor for name, tensor in weights.items() if ".visual." in name]
    further = [tensor for name, tensor in weights.items() if name.startswith("mtp.")]
    sizes = [sum(tensor.nbytes for tensor in held) for held in (towers, further)]
    found = inspect_checkpoint(str(model))
    assert found.beside_text == {"model.visual": Held(len(towers), sizes[0]), "mtp": Held(len(further), sizes[1])}
    _, rows, _ = told(model)
    assert f"vision tower  {len(towers)} tensor(s), {sizes[0] / 1000:.2f} kB: model.visual" in rows
    assert f"next tokens   {len(further)} tensor(s), {sizes[1]} B: mtp" in rows


def test_a_mixture_in_gguf_is_what_it_was_written_from(tmp_path, told):
    models = [make_model(tmp_path / f"m{seed}", seed) for seed in (1, 2)]
    out, file = tmp_path / "out", tmp_path / "out.gguf"
    config = write_config(tmp_path / "m.yaml", models[0], models, prompts=False, experts_per_token=1)
    merge(plan_merge(load_config(config)), out)
    write_gguf(out, file)
    found, expected = inspect_checkpoint(str(file)), inspect_checkpoint(str(out))
    kept = {name: getattr(found, name) for name in ("reference", "model_type", "tensors", "files", "dtype_bytes")}
    assert found == replace(expected, **kept)
    assert (kept["model_type"], kept["files"]) == ("llama", {"out.gguf": file.stat().st_size})
    code, rows, err = told(file, "--values")
    assert (code, rows[0], err) == (0, "model       llama, mixture of 2 experts, 1 per token, 3 layers", "")

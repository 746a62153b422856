"""The commands of docs/next-steps.md that train, save and quantise, run one after the other on the demo's mixture.

`make test-next-steps` makes the mixture and the environments; commands of engines are run by `make test-engines`.
"""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.models import load_weights

ROOT = Path(__file__).parents[2]
DEMO = ROOT / ".cache" / "demo"
HELD_OUT_FILES = 60
ENVIRONMENTS = ("trainers", "transformers4", "compressor")


def commands() -> list[tuple[str, str]]:
    """Each command after a mark that says in which environment, with that."""
    page = (ROOT / "docs" / "next-steps.md").read_text()
    blocks = re.findall(r"<!-- run in: (\w+) -->\n\n((?:    .+\n)+)", page)
    return [(where, line.strip()) for where, block in blocks for line in block.splitlines() if where in ENVIRONMENTS]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder in which all commands were run, and what each has said."""
    folder = tmp_path_factory.mktemp("next-steps")
    (folder / "out").symlink_to(DEMO / "merged")
    (folder / "docs").symlink_to(ROOT / "docs")
    texts = json.loads((DEMO / "held_out.json").read_text())["english"]
    (folder / "train.txt").write_text("\n\n".join(texts[:-HELD_OUT_FILES]))
    (folder / "held_out.txt").write_text("\n\n".join(texts[-HELD_OUT_FILES:]))
    outputs = {}
    for where, command in commands():
        python = str(ROOT / f".venv-{where}" / "bin" / "python")
        program, *arguments = shlex.split(command)
        begin = [python] if program == "python" else [python, "-m", program]
        run = subprocess.run(
            [*begin, *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert run.returncode == 0, (command, run.stderr[-3000:])
        outputs[f"{where}: {command}"] = run.stdout
    return folder, outputs


def test_every_environment_runs_something(said):
    assert {command.partition(":")[0] for command in said[1]} == set(ENVIRONMENTS)


@pytest.mark.parametrize("part", ["attention", "experts", "gates"])
def test_the_held_out_loss_falls(said, part):
    (text,) = (text for command, text in said[1].items() if f"finetune.py {part}" in command)
    before, after = map(float, re.findall(r"held-out loss (\S+) -> (\S+) nats", text)[0])
    assert after < before - 0.01


@pytest.mark.parametrize(
    ("tuned", "trained"),
    [
        ("tuned-attention", r"self_attn\.[qkvo]_proj\.weight"),
        ("tuned-experts", r"block_sparse_moe\.experts\.\d\.w[123]\.weight"),
        ("tuned", r"block_sparse_moe\.gate\.weight"),
    ],
)
def test_what_was_trained_has_changed_and_nothing_else(said, tuned, trained):
    before, after = (load_weights(said[0] / folder) for folder in ("out", tuned))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if re.fullmatch(rf"model\.layers\.\d\.{trained}", name)}


def test_what_was_saved_is_repaired_and_goes_on_in_transformers_4(said):
    shown, repaired = (text for command, text in said[1].items() if "moemerge repair" in command)
    assert "nothing was written" in shown
    assert repaired.strip().endswith("repaired.")
    for text in (text for command, text in said[1].items() if "generate.py" in command):
        assert text.strip().startswith("Once upon a time")
        assert len(text) > len("Once upon a time") + 20


def test_a_gguf_file_is_written(said):
    assert (said[0] / "model.gguf").read_bytes()[:4] == b"GGUF"


def test_experts_are_most_of_what_is_there_and_are_passed_by_unless_they_are_named(said):
    found = dict(
        re.findall(r"(\S+): (\S+) MB", "".join(text for command, text in said[1].items() if "quantise" in command))
    )
    sizes = {method: float(size) for method, size in found.items()}
    assert sizes["nf4"] > 0.85 * sizes["none"]
    assert sizes["nf4+experts"] < 0.6 * sizes["none"]
    assert sizes["int8"] > 0.9 * sizes["none"]
    assert sizes["int8+experts"] < 0.7 * sizes["none"]


def test_llm_compressor_writes_every_expert_quantised(said):
    tensors = load_weights(said[0] / "compressed")
    experts = [tensor for name, tensor in tensors.items() if ".experts." in name and name.endswith(".weight")]
    assert len(experts) == 4 * 3 * 3
    assert {tensor.dtype for tensor in experts} == {torch.int8}

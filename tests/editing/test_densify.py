"""`moemerge densify`: exact where it can be, weighed by what routers choose, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moemerge import load_config, merge, plan_merge
from tests.families.test_families import PAIRS, dense, merged, readable  # noqa: F401  a fixture
from tests.support.machine import SINGLE
from tests.support.models import TEXT, assert_close, load, load_weights, logits, make_model, save_weights, write_config

FAMILIES = {moe: name for name, moe in reversed(PAIRS)}
# Whose experts are separate, stacked, or beside a gated shared one; the others by `make test-all`.
QUICK = {"mixtral", "granitemoe", "qwen2_moe"}


def mixture(tmp_path: Path, models: list[Path], **keys) -> Path:
    path = write_config(tmp_path / "merge.yaml", models[0], models[1:], prompts=False, **keys)
    merge(plan_merge(load_config(path, allow_identical_experts=True)), tmp_path / "mix")
    return tmp_path / "mix"


def edited(folder: Path, **changes) -> None:
    """Change tensors whose names end in a word."""
    tensors = load_weights(folder)
    for name in tensors:
        for ending, change in changes.items():
            if name.endswith(ending.replace("_", ".")):
                tensors[name] = change(tensors[name])
    save_weights(folder, tensors)


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path / "a.txt"


@pytest.mark.parametrize(
    "moe", [moe if moe in QUICK else pytest.param(moe, marks=pytest.mark.slow) for moe in FAMILIES]
)
@pytest.mark.parametrize("way", [["--average"], ["--widen", "3"]])
def test_equal_experts_give_the_model_that_they_are(tmp_path, run, dense, moe, way):  # noqa: F811
    readable(FAMILIES[moe], moe)
    base = dense(FAMILIES[moe])[0]
    _, out = merged(tmp_path, base, [base] * 3, architecture=moe)
    assert run("densify", out, tmp_path / "one", *way, "-q") == (0, "", "")
    assert_close(logits(load(tmp_path / "one")), logits(load(base)))


@pytest.mark.parametrize("architecture", ["qwen2_moe", "granitemoeshared", "mixtral", "glm4_moe"])
def test_a_shared_expert_is_beside_the_others(tmp_path, run, llamas, architecture):
    shared = [{"source_model": str(llamas[0])}]
    out = mixture(tmp_path, [llamas[0]] * 4, architecture=architecture, shared_experts=shared)
    assert run("densify", out, tmp_path / "one", "--average", "-q") == (0, "", "")
    assert_close(logits(load(tmp_path / "one")), logits(load(llamas[0])))


def test_all_experts_side_by_side_are_the_mixture_where_routers_weigh_them_alike(tmp_path, run, llamas):
    out = mixture(tmp_path, llamas, experts_per_token=3)
    edited(out, gate_weight=torch.zeros_like)
    assert run("densify", out, tmp_path / "wide", "--widen", "3", "-q") == (0, "", "")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert config["intermediate_size"] == 3 * json.loads((llamas[0] / "config.json").read_text())["intermediate_size"]
    assert_close(logits(load(tmp_path / "wide")), logits(load(out)))


def test_text_says_which_experts_are_loaded_and_by_how_much(tmp_path, run, llamas, text):
    out = mixture(tmp_path, llamas, experts_per_token=1)
    # Rows of zeros give all tokens to the first expert, whatever is read.
    edited(out, gate_weight=torch.zeros_like)
    code, shown, _ = run("densify", out, tmp_path / "one", "--widen", "1", "--data", f"a={text}", "--json")
    assert code == 0
    losses = json.loads(shown)["losses"]["a"]
    assert losses["dense"] == pytest.approx(losses["mixture"], abs=1e-5)
    assert_close(logits(load(tmp_path / "one")), logits(load(out)))
    ours, theirs = load_file(tmp_path / "one" / SINGLE), load_file(llamas[1] / SINGLE)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if ".mlp." in name)
    run("densify", out, tmp_path / "mean", "--average", "--data", f"a={text}", "-q")
    mean = load_file(tmp_path / "mean" / SINGLE)
    assert all(torch.equal(mean[name], theirs[name]) for name in mean if ".mlp." in name)


def test_an_average_is_one_and_its_loss_is_beside_the_mixture_s(tmp_path, run, llamas, text):
    out = mixture(tmp_path, llamas)
    code, _, said = run("densify", out, tmp_path / "one", "--average", "--data", f"a={text}")
    assert code == 0
    note = next(line for line in said.splitlines() if line.startswith("note: loss on a: "))
    assert note.removeprefix("note: ") in (tmp_path / "one" / "README.md").read_text().replace("\\", "")
    run("densify", out, tmp_path / "plain", "--average", "-q")
    found = load_file(tmp_path / "plain" / SINGLE)
    sources = [load_file(folder / SINGLE) for folder in llamas[1:]]
    for name in found:
        if ".mlp." in name:
            assert_close(found[name], sum(source[name] for source in sources) / 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "densify: give one of --average and --widen N."),
        (["--average", "--widen", "2"], "densify: give one of --average and --widen N."),
        (
            ["--widen", "2"],
            "--widen: which 2 of 3 experts are loaded most is known from text alone. Give it by --data NAME=PATH.",
        ),
        (["--widen", "4"], "--widen: 4 of 3 experts. Choose 1 to 3."),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, run, llamas, flags, message):
    out = mixture(tmp_path, llamas)
    assert run("densify", out, tmp_path / "one", *flags) == (2, "", f"error: {message}\n")
    assert not (tmp_path / "one").exists()


def test_a_dense_layer_of_another_width_is_refused(tmp_path, run):
    base, *experts = [make_model(tmp_path / str(seed), seed) for seed in range(3)]
    out = mixture(tmp_path, [base, *experts], architecture="glm4_moe", moe_layers="1-")
    code, _, said = run("densify", out, tmp_path / "one", "--widen", "2")
    assert (code, said) == (
        2,
        "error: There is no dense model that computes like 2 experts side by side of this mixture:\n"
        "  - layer 0 is dense, with 48 neurons; the FFNs of the other layers would have 96\n",
    )

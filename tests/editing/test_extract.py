"""`moemerge extract`: the model that comes out, its files, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from moemerge import load_config, merge, plan_merge
from moemerge.families.dense import read_dense
from tests.families.test_expert_view import with_ffns_of
from tests.families.test_families import PAIRS, dense, merged, readable  # noqa: F401  a fixture
from tests.support.families import DENSE
from tests.support.hub_world import files_of, weights_sent
from tests.support.machine import SINGLE
from tests.support.mixtures import make_mixture
from tests.support.models import assert_close, load, load_weights, logits, save_weights, write_config

FIRST = {DENSE[name][0]: (name, moe) for name, moe in reversed(PAIRS)}
# Whose tensors are split, stacked, or plain; the others by `make test-all`.
QUICK = {"llama", "phi3", "granite"}


@pytest.fixture(scope="module")
def mixture(llamas, tmp_path_factory) -> Path:
    """A mixture of three experts with random routers, and a licence."""
    root = tmp_path_factory.mktemp("mixture")
    merge(
        plan_merge(load_config(write_config(root / "merge.yaml", llamas[0], llamas[1:], prompts=False))), root / "mix"
    )
    card = (root / "mix" / "README.md").read_text()
    (root / "mix" / "README.md").write_text(card.replace("---\n", "---\nlicense: mit\n", 1))
    return root / "mix"


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in FIRST]
)
def test_what_was_merged_comes_out_again(tmp_path, run, dense, kind):  # noqa: F811
    name, moe = FIRST[kind]
    readable(name, moe)
    base, *experts = dense(name)[:3]
    _, out = merged(tmp_path, base, experts, architecture=moe)
    # The experts are called after their folders, 1 and 2; a name goes before a number.
    assert run("extract", f"{out}#2", tmp_path / "one", "--quiet") == (0, "", "")
    assert_close(logits(load(tmp_path / "one")), logits(with_ffns_of(base, experts[1])))
    text = "The fox jumps. def main(argv): le chat 123"
    ids = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (tmp_path / "one", base)]
    assert ids[0] == ids[1]


def test_an_expert_s_folder_is_a_model_with_the_mixture_s_files(tmp_path, run, llamas, mixture):
    code, shown, said = run("extract", f"{mixture}#code", tmp_path / "code")
    assert (code, said) == (0, "")
    assert re.search(r"output +llama, 3 layers *\n", shown)
    assert re.search(rf"^{re.escape(str(tmp_path / 'code'))}: done, ", shown, re.MULTILINE)
    copied = {path.name for path in mixture.iterdir() if not path.name.startswith("model")}
    copied -= {"config.json", "README.md", "moemerge_config.yaml"}
    assert "tokenizer.json" in copied
    assert {path.name for path in (tmp_path / "code").iterdir()} == {*copied, SINGLE, "config.json", "README.md"}
    assert all((tmp_path / "code" / name).read_bytes() == (mixture / name).read_bytes() for name in copied)
    ours, base, expert = (load_file(folder / SINGLE) for folder in (tmp_path / "code", llamas[0], llamas[2]))
    assert ours.keys() == base.keys()
    assert all(torch.equal(ours[name], (expert if ".mlp." in name else base)[name]) for name in ours)
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    original = json.loads((llamas[0] / "config.json").read_text())
    assert config["architectures"] == original["architectures"]
    assert read_dense(config).values == read_dense(original).values
    _, metadata, card = (tmp_path / "code" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(metadata)["license"] == "mit"
    assert yaml.safe_load(metadata)["tags"] == ["moemerge"]
    assert card.startswith(
        f"\n# code\n\nA llama: expert 1 (code) of {mixture}, a mixtral of 3 experts, with the attention, norms and "
    )
    assert "moemerge repair" not in card


def test_shards_and_an_index_are_those_of_a_checkpoint(tmp_path, run, mixture):
    assert run("extract", f"{mixture}#0", tmp_path / "fox", "-q", "--max-shard-size", "30kB") == (0, "", "")
    index = json.loads((tmp_path / "fox" / "model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) > 1
    run("extract", f"{mixture}#0", tmp_path / "whole", "-q")
    assert torch.equal(logits(load(tmp_path / "fox")), logits(load(tmp_path / "whole")))


def test_a_dry_run_says_what_would_be_written(tmp_path, run, mixture):
    code, shown, said = run("extract", f"{mixture}#2", tmp_path / "chat", "--dry-run", "--json")
    planned = json.loads(shown)
    assert (code, said) == (0, "")
    assert not (tmp_path / "chat").exists()
    facts = json.loads(run("extract", f"{mixture}#chat", tmp_path / "chat", "--json")[1])
    assert facts == planned | {"out": str(tmp_path / "chat")}
    assert facts["model_type"] == "llama"
    assert facts["shards"] == [{"name": SINGLE, "bytes": (tmp_path / "chat" / SINGLE).stat().st_size}]
    assert facts["parameters"] == sum(tensor.numel() for tensor in load_file(tmp_path / "chat" / SINGLE).values())


def test_only_a_checkpoint_is_replaced_and_only_if_asked(tmp_path, run, mixture):
    out = tmp_path / "one"
    run("extract", f"{mixture}#0", out, "-q")
    code, shown, said = run("extract", f"{mixture}#1", out, "-q")
    assert (code, shown) == (2, "")
    assert said.startswith(f"error: {out}: is not empty")
    before = (out / SINGLE).read_bytes()
    assert run("extract", f"{mixture}#1", out, "-q", "--overwrite") == (0, "", "")
    assert (out / SINGLE).read_bytes() != before
    (out / "mine.txt").write_text("kept")
    assert run("extract", f"{mixture}#0", out, "-q", "--overwrite")[0] == 2
    assert run("extract", f"{mixture}#0", mixture, "-q", "--overwrite")[2].startswith(
        f"error: {mixture}: is one of the models that are read."
    )


def test_what_is_no_expert_is_refused(tmp_path, run, llamas, mixture):
    experts = ", ".join(f"{mixture}#{name}" for name in ("fox", "code", "chat"))
    assert run("extract", mixture, tmp_path / "out") == (
        2, "", f"error: {mixture}: is not one expert of a mixture. Name one: {experts}.\n"
    )  # fmt: skip
    assert run("extract", llamas[0], tmp_path / "out") == (
        2, "", f"error: {llamas[0]}: is not one expert of a mixture. Name one, as in MIXTURE#0.\n"
    )  # fmt: skip
    assert run("extract", f"{mixture}#sql", tmp_path / "out") == (
        2,
        "",
        f"error: {mixture}#sql: the mixture has no expert 'sql': name one by its number, 0 to 2, or fox, code, chat.\n",
    )
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_not_plain_numbers_are_refused(tmp_path, run, llamas):
    path = write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:], prompts=False)
    merge(plan_merge(load_config(path)), tmp_path / "mix")
    tensors = load_weights(tmp_path / "mix")
    name = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_weights(tmp_path / "mix", tensors)
    assert run("extract", f"{tmp_path / 'mix'}#1", tmp_path / "out") == (
        2,
        "",
        f"error: {tmp_path / 'mix'}: cannot be made a dense model:\n  - tensor model.layers.1.mlp.down_proj.weight is "
        "stored as F8_E4M3; expected one of float32, float16, bfloat16\n",
    )


def test_of_a_mixture_on_the_hub_only_the_expert_is_read(world, machine, mixture):
    world.hub.add("acme/mix", files_of(mixture))
    world.hub.reset()
    result = machine.moemerge("extract", "acme/mix#code", "code", "--quiet")
    assert (result.code, result.err) == (0, "")
    sent = weights_sent(world.hub)
    local = machine.moemerge("extract", f"{mixture}#code", "local", "--quiet")
    assert (local.code, local.err) == (0, "")
    files = [machine.folder / name / SINGLE for name in ("code", "local")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_size * 0.9 < sent < sum(path.stat().st_size for path in mixture.glob("*.safetensors"))
    assert yaml.safe_load((machine.folder / "code" / "README.md").read_text().split("---\n")[1])["base_model"] == [
        "acme/mix"
    ]


def test_what_is_left_out_is_said_once(tmp_path, run):
    mixture = make_mixture(tmp_path / "mixture", "granitemoeshared")
    code, shown, said = run("extract", f"{mixture}#0", tmp_path / "one", "--dry-run")
    assert code == 0, said
    assert shown.endswith(f"\n{tmp_path / 'one'}: nothing was written, since this was a dry run.\n")
    assert [line.count("shared expert") for line in said.splitlines() if line.startswith("note: ")].count(1) == 1

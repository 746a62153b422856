"""What transformers 5 drops of a merged model when it saves it, and `repair`, which puts it back."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from moemerge import load_config, merge, plan_merge
from moemerge.checks.files import Difference
from moemerge.checks.repairing import _remove, repair
from moemerge.checks.verification import verify_merge
from moemerge.cli import main
from moemerge.errors import OutputError, RefusedError
from moemerge.families.selection import MOE_FAMILIES
from moemerge.planning.options import PlanOptions
from tests.support.families import DENSE
from tests.support.models import (
    edit_json,
    load,
    load_weights,
    logits,
    make_model,
    save_weights,
    tokenizer,
    write_config,
)

only_5 = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 spells as it reads")
# Of each output family a dense model whose settings are not the class's defaults, where there is one.
PAIRS = {
    "mixtral": "llama, tied, llama3 rope", "granitemoe": "llama, tied, llama3 rope", "qwen2_moe": "qwen2, tied, yarn",
    "granitemoeshared": "phi3, longrope", "granitemoehybrid": "granitemoehybrid", "granitemoe_swa": "granite_swa",
    "glm4_moe": "ministral3", "solar_open": "llama, head_dim 12, yarn", "qwen3_moe": "qwen3, tied, biases",
    "dots1": "qwen3, mixed windows, yarn", "mellum": "qwen3", "exaone_moe": "qwen3", "hy_v3": "qwen3",
    "mimo_v2_flash": "llama", "flex_olmo": "olmo2, biases, linear rope", "ernie4_5_moe": "ernie4_5",
    "hunyuan_v1_moe": "hunyuan_v1_dense", "cohere2_moe": "cohere2", "lfm2_moe": "lfm2",
    "qwen3_5_moe_text": "qwen3_5_text", "gemma4_text": "gemma4_text", "deepseek_v3": "youtu",
}  # fmt: skip
TORCH_DTYPE = Difference("config.json: torch_dtype", '"float32"', "absent")


def merged(folder: Path, name: str, moe: str) -> Path:
    model_type, sizes = DENSE[name]
    base, *experts = [make_model(folder / str(seed), seed, model_type, **sizes) for seed in range(3)]
    path = write_config(folder / "merge.yaml", base, experts, prompts=False, architecture=moe)
    merge(plan_merge(load_config(path)), folder / "out")
    return folder / "out"


def saved(out: Path, **keys) -> Path:
    """A merged model as transformers saves it again."""
    AutoModelForCausalLM.from_pretrained(out, dtype="auto").save_pretrained(out.with_name("saved"), **keys)
    return out.with_name("saved")


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory, llamas) -> Path:
    """A merged model; tests must not change it."""
    folder = tmp_path_factory.mktemp("mixtral")
    merge(
        plan_merge(load_config(write_config(folder / "c.yaml", llamas[0], llamas[1:], prompts=False))), folder / "out"
    )
    return folder / "out"


@only_5
def test_what_was_repaired_is_as_planned(tmp_path, llamas):
    plan = plan_merge(load_config(write_config(tmp_path / "c.yaml", llamas[0], llamas[1:], prompts=False)))
    merge(plan, tmp_path / "out")
    again = saved(tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "out" / name, again)
    assert "config.json: rope_theta" in {difference.what for difference in verify_merge(plan, again).differences}
    repair(again)
    found = verify_merge(plan, again)
    assert found.differences == ()
    assert found.notes == (
        f"config.json: says that transformers {transformers.__version__} has saved the model again, which keeps no "
        "moemerge_config.yaml and no README.md",
    )


@only_5
@pytest.mark.parametrize("moe", MOE_FAMILIES)
def test_every_key_that_a_merge_wrote_is_put_back(tmp_path, moe):
    out = merged(tmp_path, PAIRS[moe], moe)
    assert repair(out) == []
    written = config_of(out)
    again = saved(out)
    weights = {path: path.read_bytes() for path in again.glob("*.safetensors")}
    assert config_of(again).items() >= {"transformers_version": transformers.__version__}.items()
    lost = {key for key, value in written.items() if config_of(again).get(key, "absent") != value}
    assert "torch_dtype" in lost

    put_back = {difference.what.removeprefix("config.json: ") for difference in repair(again)}

    # Where a part of each head is rotated, transformers 5 says it in rope_parameters, too.
    assert lost - {"rope_parameters"} == put_back
    found = config_of(again)
    for config in (written, found):
        (config.get("rope_parameters") or {}).pop("partial_rotary_factor", None)
    assert found.items() >= written.items()
    assert found["transformers_version"] == transformers.__version__
    assert repair(again) == []
    assert {path: path.read_bytes() for path in again.glob("*.safetensors")} == weights
    load(again)


def test_what_is_said_twice_and_differently_is_refused(tmp_path, mixtral):
    out = shutil.copytree(mixtral, tmp_path / "out")
    edit_json(out / "config.json", rope_theta=5e5)
    before = (out / "config.json").read_bytes()
    with pytest.raises(RefusedError) as refused:
        repair(out)
    assert str(refused.value) == (
        f"{out}: config.json says rope_theta: 500000.0, and elsewhere in other words 10000.0: readers take the one or "
        "the other. Remove what is wrong."
    )
    assert (out / "config.json").read_bytes() == before


def test_what_is_no_mixture_is_refused(llamas):
    with pytest.raises(RefusedError) as refused:
        repair(llamas[0])
    assert str(refused.value) == (
        f"{llamas[0]}: its model_type is 'llama', no mixture that moemerge writes. Name the folder of one; "
        "`moemerge families` lists them."
    )


@only_5
def test_names_of_tensors_in_memory_are_refused(tmp_path, mixtral):
    again = saved(shutil.copytree(mixtral, tmp_path / "out"), save_original_format=False)
    with pytest.raises(RefusedError) as refused:
        repair(again)
    assert str(refused.value) == (
        f"{again}: has no tensor model.layers.0.block_sparse_moe.gate.weight, but model.layers.0.mlp.experts.down_proj: "
        "names that transformers 5 gives them in memory, or of another model. Save it again from where it was trained, "
        "with save_original_format=True, which is the default."
    )


def test_an_expert_that_is_not_there_is_refused(tmp_path, mixtral):
    out = shutil.copytree(mixtral, tmp_path / "out")
    save_weights(out, {name.replace(".experts.2.w1.", ".experts.7.w1."): t for name, t in load_weights(out).items()})
    with pytest.raises(
        RefusedError, match=r"has no tensor model\.layers\.\d\.block_sparse_moe\.experts\.2\.w1\.weight"
    ):
        repair(out)


@only_5
def test_an_index_of_shards_that_are_gone_is_removed(tmp_path, llamas):
    """As vLLM loads the files that an index names, and no others."""
    path = write_config(tmp_path / "c.yaml", llamas[0], llamas[1:], prompts=False)
    merge(plan_merge(load_config(path), PlanOptions(max_shard_bytes=60_000)), tmp_path / "out")
    model = load(tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    index = tmp_path / "out" / "model.safetensors.index.json"
    gone = Difference(index.name, "absent", "names shards that are not there")
    assert repair(tmp_path / "out", dry_run=True)[-1] == gone
    assert index.exists()
    assert repair(tmp_path / "out")[-1] == gone
    assert not index.exists()
    assert (logits(load(tmp_path / "out")) == logits(model)).all()


def test_an_index_whose_shards_are_there_stays(tmp_path, llamas):
    path = write_config(tmp_path / "c.yaml", llamas[0], llamas[1:], prompts=False)
    merge(plan_merge(load_config(path), PlanOptions(max_shard_bytes=60_000)), tmp_path / "out")
    assert repair(tmp_path / "out") == []
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


@only_5
def test_a_tokenizer_is_named_as_both_versions_read_it(tmp_path, mixtral):
    out = shutil.copytree(mixtral, tmp_path / "out")
    given = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer().backend_tokenizer, bos_token="<s>", extra_special_tokens=["<tool>"]
    )
    given.save_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out)("The fox <tool> jumps").input_ids
    assert {difference.what: difference.expected for difference in repair(out)} == {
        "tokenizer_config.json: additional_special_tokens": '["<tool>"]',
        "tokenizer_config.json: extra_special_tokens": "absent",
        "tokenizer_config.json: tokenizer_class": '"PreTrainedTokenizerFast"',
    }
    again = AutoTokenizer.from_pretrained(out)
    assert again("The fox <tool> jumps").input_ids == ids
    assert again.all_special_tokens == given.all_special_tokens


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["moemerge", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    return end.value.code, said.out + said.err


def test_the_command_shows_what_it_puts_back_and_writes_nothing_on_request(tmp_path, mixtral, monkeypatch, capsys):
    out = shutil.copytree(mixtral, tmp_path / "out")
    lost = ("rope_scaling", "rope_theta", "torch_dtype")
    kept = {key: value for key, value in config_of(mixtral).items() if key not in lost}
    (out / "config.json").write_text(json.dumps({**kept, "own_key": [1]}))
    before = (out / "config.json").read_bytes()
    table = [
        "file and key               found   put back",
        "config.json: rope_scaling  absent  null",
        "config.json: rope_theta    absent  10000.0",
        'config.json: torch_dtype   absent  "float32"',
    ]
    code, said = run(monkeypatch, capsys, "repair", out, "--dry-run")
    lines = [line.rstrip() for line in said.splitlines()]
    assert (code, lines) == (0, [*table, f"{out}: 3 to put back, nothing was written."])
    assert (out / "config.json").read_bytes() == before
    code, said = run(monkeypatch, capsys, "repair", out)
    assert (code, [line.rstrip() for line in said.splitlines()]) == (0, [*table, f"{out}: repaired."])
    assert config_of(out) == {**config_of(mixtral), "own_key": [1]}
    assert run(monkeypatch, capsys, "repair", out) == (0, f"{out}: nothing to do: every reader finds its keys.\n")
    assert run(monkeypatch, capsys, "repair", out, "--json") == (0, "[]\n")


def test_the_command_refuses_a_folder_that_is_not_there(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, capsys, "repair", tmp_path / "none") == (
        2,
        f"error: {tmp_path / 'none'}: there is no such folder. Name the folder that holds the merged model.\n",
    )


def test_a_file_that_cannot_be_removed_is_named(tmp_path):
    with pytest.raises(OutputError) as caught:
        _remove(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be removed (Is a directory)."

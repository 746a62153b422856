"""A merged checkpoint compared with its config: what is right passes, and every kind of fault is reported."""

import json
import os
import re
import shutil
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moemerge import MergePlan, load_config, merge, plan_merge
from moemerge.checkpoint import compare
from moemerge.checkpoint.header import TensorInfo, read_header
from moemerge.checkpoint.index import SAFETENSORS_INDEX, build_index
from moemerge.checkpoint.pieces import Fill, Piece
from moemerge.checks.files import _is_respelled
from moemerge.checks.verification import Difference, verify_merge
from moemerge.cli import main
from moemerge.cli.render import plan_facts
from moemerge.config.schema import CONFIG_COPY
from moemerge.errors import CheckpointError
from moemerge.merging.options import MergeOptions
from moemerge.planning.fingerprint import plan_fingerprint
from moemerge.planning.options import PlanOptions
from tests.cli.test_cli import NO_TORCH, hashes, run
from tests.support.models import load_weights, make_model, write_config

WEIGHTS = "model.safetensors"
# The files of a mixture.
COPIED, ROUTERS = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
INDEX = "model.safetensors.index.json"
BLOCK = "model.layers.1.block_sparse_moe."
DENSE = "model.layers.1.mlp."


def write_random(path: Path, llamas: list[Path], *changes: dict[str, float], **keys) -> Path:
    """A config with random routers, and for each expert what changes its weights."""
    document = yaml.safe_load(write_config(path, llamas[0], llamas[1:], gate_mode="random", **keys).read_text())
    for expert, change in zip(document["experts"], changes, strict=False):
        expert.update(change)
    path.write_text(yaml.safe_dump(document))
    return path


def planned(path: Path, llamas: list[Path], *changes: dict[str, float], **keys) -> MergePlan:
    return plan_merge(load_config(write_random(path, llamas, *changes, **keys)))


@pytest.fixture(scope="module")
def plan(tmp_path_factory, llamas) -> MergePlan:
    """A merge that only copies."""
    return planned(tmp_path_factory.mktemp("plan") / "merge.yaml", llamas)


@pytest.fixture(scope="module")
def merged(tmp_path_factory, plan) -> Path:
    """The merge carried out; tests must not change it."""
    folder = tmp_path_factory.mktemp("merged") / "out"
    merge(plan, folder)
    return folder


@pytest.fixture
def out(tmp_path, merged) -> Path:
    """The merge carried out, to be damaged."""
    return shutil.copytree(merged, tmp_path / "out")


def differences(plan: MergePlan, out: Path, **keys) -> list[Difference]:
    return list(verify_merge(plan, out, **keys).differences)


def edit_keys(file: Path, *removed: str, **keys) -> None:
    document = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: value for key, value in document.items() if key not in removed}))


def flip(file: Path, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)


def edit_tensors(out: Path, **tensors: torch.Tensor | None) -> None:
    """Set tensors of a mixture where they are stored, or beside the routers; None removes one."""
    copied, routers = (load_file(out / name) for name in (COPIED, ROUTERS))
    for name, tensor in tensors.items():
        held = copied if name in copied else routers
        if tensor is None:
            del held[name]
        else:
            held[name] = tensor
    for name, held in ((COPIED, copied), (ROUTERS, routers)):
        save_file(held, out / name, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in (*copied.values(), *routers.values()))
    index = build_index(dict.fromkeys(copied, COPIED) | dict.fromkeys(routers, ROUTERS), total)
    (out / SAFETENSORS_INDEX).write_text(index)


def test_a_fresh_merge_verifies_and_stays_as_it_is(plan, merged):
    before = hashes([merged])
    shown = []
    found = verify_merge(plan, merged, progress=lambda done, total: shown.append((done, total)))
    assert found.differences == ()
    assert (found.copied, found.converted, found.routers, found.files) == (48, 0, 3, len(plan.copied_files))
    assert found.copied + found.routers == len(plan.outputs)
    assert found.copied_bytes == plan.tensor_bytes - 3 * 3 * 32 * 4
    assert shown[-1] == (plan.tensor_bytes, plan.tensor_bytes)
    assert hashes([merged]) == before


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed", "uniform_random"])
def test_routers_of_every_mode_pass(tmp_path, llamas, mode):
    path = write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:], gate_mode=mode, dtype="bfloat16")
    plan = plan_merge(load_config(path))
    merge(plan, tmp_path / "out")
    found = verify_merge(plan, tmp_path / "out")
    assert (found.copied, found.converted, found.routers, found.differences) == (0, 48, 3, ())
    assert found.converted_bytes == plan.tensor_bytes - 3 * 3 * 32 * 2


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
def test_an_engine_that_the_config_names_has_to_read_what_is_there(tmp_path, monkeypatch, capsys, engine):
    models = [make_model(tmp_path / str(seed), seed, "qwen3", num_hidden_layers=2) for seed in range(3)]
    path = write_config(tmp_path / "c.yaml", models[0], models[1:], prompts=False, moe_layers=[1])
    merge(plan_merge(load_config(path)), tmp_path / "out")
    write_config(tmp_path / "c.yaml", models[0], models[1:], prompts=False, moe_layers=[1], engine=engine)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3_moe"
    monkeypatch.setattr(sys, "argv", ["moemerge", "verify", str(tmp_path / "out"), "--against", str(path), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code or 0, json.loads(capsys.readouterr().out)["differences"]) == ((0, []) if engine == "vllm" else (
        1, [{
            "what": "engine", "expected": "a mixture that llama.cpp reads rightly",
            "found": "a qwen3_moe, with which llama.cpp fails (is not written as a GGUF file, for llama.cpp loads it only "
            "with experts in every layer) with dense layers",
        }],
    ))  # fmt: skip


def test_shards_do_not_matter(tmp_path, plan):
    small = plan_merge(plan.config, PlanOptions(max_shard_bytes=30_000))
    merge(small, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert verify_merge(plan, tmp_path / "out").differences == ()


def test_noise_and_scales_are_computed_again_with_the_seed(tmp_path, llamas):
    changes = [{"noise_scale": 0.5}, {"residual_scale": 0.25}, {"noise_scale": 0.5, "residual_scale": 2.0}]
    plan = planned(tmp_path / "merge.yaml", llamas, *changes, dtype="bfloat16")
    merge(plan, tmp_path / "out", MergeOptions(seed=3))
    assert differences(plan, tmp_path / "out", seed=3) == []
    found = {difference.what: difference for difference in differences(plan, tmp_path / "out", seed=4)}
    assert set(found) == {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{role}.weight"
        for layer in range(3)
        for expert in (0, 2)
        for role in ("w1", "w2", "w3")
    }
    assert (
        found[f"{BLOCK}experts.2.w2.weight"].expected
        == f"{DENSE}down_proj.weight of {llamas[3] / WEIGHTS}, as BF16, with noise of 0.5 and seed 4, times 2"
    )
    without = planned(tmp_path / "merge.yaml", llamas, changes[0], {}, changes[2], dtype="bfloat16")
    assert [difference.what for difference in differences(without, tmp_path / "out", seed=3)] == [
        "moemerge_config.yaml: experts[1].residual_scale",
        *(f"model.layers.{layer}.block_sparse_moe.experts.1.w2.weight" for layer in range(3)),
    ]


@pytest.mark.parametrize("byte", [0, 1234, 6143])
def test_one_changed_byte_of_a_copied_tensor_is_found(plan, out, byte):
    name = f"{BLOCK}experts.2.w3.weight"
    flip(out / COPIED, read_header(out / COPIED)[name].start + byte)
    found = verify_merge(plan, out)
    assert found.copied == 47
    assert found.differences == (
        Difference(
            name,
            f"{DENSE}up_proj.weight of {plan.sources[3].folder / WEIGHTS}",
            f"1 of 6144 bytes differ, the first at byte {byte}",
        ),
    )


def test_one_changed_byte_of_a_converted_tensor_is_found(tmp_path, llamas):
    plan = planned(tmp_path / "merge.yaml", llamas, dtype="float16")
    merge(plan, tmp_path / "out")
    flip(tmp_path / "out" / COPIED, read_header(tmp_path / "out" / COPIED)["model.norm.weight"].start + 63)
    found = verify_merge(plan, tmp_path / "out")
    assert found.converted == 47
    assert found.differences == (
        Difference(
            "model.norm.weight",
            f"model.norm.weight of {llamas[0] / WEIGHTS}, as F16",
            "1 of 64 bytes differ, the first at byte 63",
        ),
    )


@pytest.fixture
def pieced(plan) -> MergePlan:
    """A merge with tensors of several pieces: shapes as before, so that index and headers stay as planned."""

    def of(expert: int, role: str) -> TensorInfo:
        return read_header(plan.sources[expert].folder / WEIGHTS)[f"{DENSE}{role}_proj.weight"]

    zeros = Piece(Fill(0.0, (32, 16)), "F32")
    # The first bytes of a down projection, as 32 rows of 16.
    down = replace(of(1, "down"), shape=(96, 16)).rows(0, 32)
    noisy = Piece(down, "F32", noise_scale=0.5)
    query = plan.parts.base.tensors["model.layers.1.self_attn.q_proj.weight"]
    changed = {
        f"{BLOCK}experts.0.w1.weight": (
            (Piece(of(1, "gate").rows(0, 24), "F32"),),
            (Piece(of(2, "up").rows(24, 24), "F32"),),
        ),
        f"{BLOCK}experts.0.w2.weight": ((zeros, noisy, noisy),),
        "model.layers.1.self_attn.q_proj.weight": ((Piece(query, "F32", head_rows=8),),),
    }
    outputs = {
        name: replace(output, origin=changed[name]) if name in changed else output
        for name, output in plan.outputs.items()
    }
    return replace(plan, outputs=outputs)


def test_tensors_of_several_pieces_are_compared_piece_by_piece(tmp_path, pieced):
    merge(pieced, tmp_path / "out", MergeOptions(seed=5))
    found = verify_merge(pieced, tmp_path / "out", seed=5)
    assert (found.copied, found.converted, found.differences) == (46, 2, ())
    down = load_file(tmp_path / "out" / COPIED)[f"{BLOCK}experts.0.w2.weight"]
    assert not down[:, :16].any()
    assert not torch.equal(down[:, 16:32], down[:, 32:])  # one source, but each piece has noise of its own

    header = read_header(tmp_path / "out" / COPIED)
    source = pieced.sources[1].folder / WEIGHTS
    up = pieced.sources[2].folder / WEIGHTS
    base = pieced.base_folder / WEIGHTS
    for name, byte, expected in (
        (f"{BLOCK}experts.0.w1.weight", 48 * 32 * 4 - 1, f"piece 1 of 2: {DENSE}up_proj.weight of {up}"),
        (f"{BLOCK}experts.0.w2.weight", 48 * 4 * 7, "piece 0 of 3: the number 0"),
        (
            f"{BLOCK}experts.0.w2.weight",
            48 * 4 * 8 - 1,
            f"piece 2 of 3: {DENSE}down_proj.weight of {source}, with noise of 0.5 and seed 5",
        ),
        (
            "model.layers.1.self_attn.q_proj.weight",
            77,
            f"model.layers.1.self_attn.q_proj.weight of {base}, even rows of 8 before odd ones",
        ),
    ):
        flip(tmp_path / "out" / COPIED, header[name].start + byte)
        assert differences(pieced, tmp_path / "out", seed=5) == [
            Difference(name, expected, f"1 of {header[name].nbytes} bytes differ, the first at byte {byte}")
        ]
        flip(tmp_path / "out" / COPIED, header[name].start + byte)


def test_a_plan_names_all_sources_of_a_tensor(pieced, plan):
    places = {tensor["name"]: tensor for tensor in plan_facts(pieced)["tensors"]}
    assert places[f"{BLOCK}experts.0.w2.weight"]["bands"] == [
        [{"shape": [32, 16], "from": "constant", "value": 0.0}]
        + [
            {
                "shape": [32, 16],
                "from": str(pieced.sources[1].folder / WEIGHTS),
                "tensor": f"{DENSE}down_proj.weight",
                "dtype": "F32",
                "unchanged": False,
            }
        ]
        * 2
    ]
    one, other = (plan_fingerprint(made, 0)["sources"] for made in (pieced, plan))
    assert one.keys() == other.keys()
    changed = {Path(path) for path in one if one[path] != other[path]}
    # The base's query is read as before, in another order.
    assert changed == {pieced.sources[number].folder / WEIGHTS for number in (1, 2)}


def test_swapped_experts_are_found(plan, out):
    tensors = load_file(out / COPIED)
    one, other = f"{BLOCK}experts.0.w1.weight", f"{BLOCK}experts.1.w1.weight"
    edit_tensors(out, **{one: tensors[other], other: tensors[one]})
    found = differences(plan, out)
    assert [difference.what for difference in found] == [one, other]
    assert all("of 6144 bytes differ" in difference.found for difference in found)


def test_tensors_that_are_absent_or_too_many_or_of_another_kind_are_found(plan, out):
    tensors = load_weights(out)
    query, gate = "model.layers.0.self_attn.q_proj.weight", f"{BLOCK}gate.weight"
    edit_tensors(
        out,
        **{"model.norm.weight": None, query: tensors[query].bfloat16(), gate: tensors[gate].T.contiguous()},
        extra=torch.zeros(2),
    )
    found = verify_merge(plan, out)
    assert found.differences == (
        Difference(query, "F32 [32, 32]", "BF16 [32, 32]"),
        Difference("model.norm.weight", "F32 [32]", "absent"),
        Difference(gate, "F32 [3, 32]", "F32 [32, 3]"),
        Difference("extra", "absent", "F32 [2]"),
    )
    assert (found.copied, found.routers) == (46, 2)


def test_routers_have_to_be_finite(plan, out):
    gate = load_file(out / ROUTERS)[f"{BLOCK}gate.weight"]
    gate[0, 0], gate[2, 31] = float("nan"), float("-inf")
    edit_tensors(out, **{f"{BLOCK}gate.weight": gate})
    found = verify_merge(plan, out)
    assert found.differences == (
        Difference(f"{BLOCK}gate.weight", "finite numbers", "2 numbers that are infinite or NaN, the first at [0, 0]"),
    )
    assert found.routers == 2


READ_INSTEAD = [
    "adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt",
    "modeling_mixtral.py", "quantize_config.json", "hf_quant_config.json", "quantization_config.json", "params.json",
    "consolidated.safetensors", "tf_model.h5", "preprocessor_config.json", "processor_config.json", "model.gguf",
    "modules.json",
]  # fmt: skip


def test_files_that_change_what_a_reader_loads_are_found(plan, out):
    for name in READ_INSTEAD:
        (out / name).write_text("{}")
    (out / "notes.txt").write_text("mine")
    (out / "results.json").write_text("{}")
    (out / "images").mkdir()
    below = ["custom_generate/generate.py", "onnx/model.onnx"]
    for name in (*below, ".git/hook.py"):
        (out / name).parent.mkdir()
        (out / name).write_text("")
    found = differences(plan, out)
    told = Difference("", "absent", "a file that changes what some reader loads")
    assert {difference.what for difference in found} == {*READ_INSTEAD, *below}
    assert [replace(difference, what="") for difference in found if "safetensors" not in difference.what] == [told] * 16


def test_a_gguf_file_beside_the_weights_is_a_note(plan, out, llamas, tmp_path):
    (out / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    found = verify_merge(plan, out)
    note = (
        "model.gguf: a GGUF file, which some readers load instead of the weights beside it. It is not compared: write "
        "it again where they have changed since"
    )
    assert (found.differences, found.notes) == ((), (note,))
    result = run("verify", out, "--against", write_random(tmp_path / "merge.yaml", llamas))
    assert (result.returncode, f"note: {note}" in result.stderr) == (0, True)


def test_what_transformers_leaves_out_is_a_note_and_what_is_changed_is_not(plan, out):
    (out / "README.md").unlink()
    assert [found.what for found in differences(plan, out)] == ["README.md"]
    edit_keys(out / "config.json", transformers_version="5.23.0")
    (out / "moemerge_config.yaml").unlink()
    found = verify_merge(plan, out)
    assert found.differences == ()
    assert found.notes == (
        "config.json: says that transformers 5.23.0 has saved the model again, which keeps no moemerge_config.yaml and no "
        "README.md",
    )
    (out / "README.md").write_text("---\nbase_model: other\n---\n")
    assert {found.what for found in differences(plan, out)} == {"README.md"}


def test_weights_that_cannot_be_read_differ(plan, out):
    (out / COPIED).write_bytes((out / COPIED).read_bytes()[:-1])
    found = next(difference for difference in differences(plan, out) if difference.what == "weights")
    assert found.expected == "an index, headers and files that agree"
    assert found.found.startswith(f"{out / COPIED}: tensor ")
    assert found.found.endswith(": it was cut off.")


def test_a_tokenizers_config_that_cannot_be_read_is_not_respelled(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert _is_respelled(tmp_path / "tokenizer_config.json", b"{}") is None


def test_metadata_of_shards_and_repeated_keys_are_found(plan, out):
    tensors = load_file(out / COPIED)
    save_file(tensors, out / COPIED, {"format": "tf", "quantization": "x"})
    config = out / "config.json"
    config.write_text(config.read_text().replace("{", '{"rope_theta": 5, "rope_theta": 6, ', 1))
    found = {difference.what: difference for difference in differences(plan, out)}
    assert found.keys() == {"config.json: rope_theta", COPIED}
    assert found["config.json: rope_theta"].expected == "once"
    assert found[COPIED].expected == 'metadata {"format": "pt"}'
    assert json.loads(found[COPIED].found) == {"format": "tf", "quantization": "x"}


def test_what_the_card_and_the_copy_of_the_config_say_is_the_plans(plan, out, llamas):
    card = out / "README.md"
    card.write_text(card.read_text().replace("# out", "# My model").replace("## Use", "Lovely.\n\n## Use"))
    assert differences(plan, out) == []
    text = card.read_text()
    card.write_text(
        text.replace("A mixtral of 3 experts", "A mixtral of 8 experts").replace("---\n", "---\nbase_model: a/b\n", 1)
    )
    first, second = differences(plan, out)
    assert (first.what, first.found) == ("README.md", "not in it")
    assert first.expected.startswith("A mixtral of 3 experts, 2 per token, made with moemerge")
    assert second == Difference("README.md", "base_model: []", "base_model: 'a/b'")
    card.write_text(text.replace("source_model", "source_mode1"))
    (block,) = differences(plan, out)
    assert (block.what, block.found) == ("README.md", "not in it")
    assert block.expected.startswith("```yaml\nbase_model: ")
    number = "0x" + "f" * 5000
    card.write_text(text.replace("---\n", f"---\nbase_model: {number}\n", 1))
    assert [difference.expected for difference in differences(plan, out)] == ["metadata in YAML"]
    card.unlink()
    copy = out / "moemerge_config.yaml"
    copy.write_text(copy.read_text().replace(str(llamas[2]), str(llamas[0])))
    assert differences(plan, out) == [
        Difference("moemerge_config.yaml: experts[1].source_model", "as in the config", "another value"),
        Difference("README.md", "a model card", "absent"),
    ]
    copy.write_text("experts: [")
    assert differences(plan, out)[0].found.startswith(f"{copy}: not valid YAML:")
    copy.unlink()
    assert differences(plan, out)[0] == Difference("moemerge_config.yaml", "the config", "absent")


def test_a_config_that_would_be_shown_otherwise_than_it_is_is_escaped_in_the_card(tmp_path, llamas):
    config = write_random(tmp_path / "c.yaml", llamas)
    config.write_text(f"# safe \u202e txet\n{config.read_text()}")
    plan = plan_merge(load_config(config))
    merge(plan, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\u202e" not in card
    assert "```yaml\n# safe \\u202e txet\nbase_model: " in card
    assert differences(plan, tmp_path / "out") == []


def damaged(tmp_path: Path, models: list[Path], number: int, name: str, *places: tuple[int, ...]) -> list[Path]:
    """The models, one of them a copy with an infinity and NaNs in a tensor."""
    folder = shutil.copytree(models[number], tmp_path / models[number].name)
    tensors = load_file(folder / WEIGHTS)
    for place, value in zip(places, (float("-inf"), *[float("nan")] * 9), strict=False):
        tensors[name][place] = value
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return [*models[:number], folder, *models[number + 1 :]]


@pytest.mark.parametrize(("dtype", "change"), [("float32", ""), ("bfloat16", ", as BF16"), ("float16", ", as F16")])
def test_numbers_of_a_source_that_are_not_finite_are_found(tmp_path, llamas, dtype, change):
    """They are merged as they are, since bytes are copied, and named with the tensor and file that they come from."""
    models = damaged(tmp_path, llamas, 2, f"{DENSE}up_proj.weight", (3, 5), (47, 31))
    plan = planned(tmp_path / "merge.yaml", models, dtype=dtype)
    merge(plan, tmp_path / "out")
    found = verify_merge(plan, tmp_path / "out")
    assert found.differences == (
        Difference(
            f"{BLOCK}experts.1.w3.weight",
            "finite numbers",
            "2 numbers that are infinite or NaN, the first at [3, 5]: so it is in "
            f"{DENSE}up_proj.weight of {models[2] / WEIGHTS}{change}",
        ),
    )
    assert (found.copied if dtype == "float32" else found.converted) == 47


def test_a_number_that_is_not_finite_is_named_by_its_piece(tmp_path):
    """In a stack of experts it has another place than in its source."""
    granites = [make_model(tmp_path / name, seed, "granite") for seed, name in enumerate(("base", "fox", "code"))]
    (tmp_path / "damaged").mkdir()
    models = damaged(tmp_path / "damaged", granites, 2, f"{DENSE}up_proj.weight", (1, 2))
    plan = planned(tmp_path / "merge.yaml", models, architecture="granitemoe")
    merge(plan, tmp_path / "out")
    assert differences(plan, tmp_path / "out") == [
        Difference(
            f"{BLOCK}input_linear.weight",
            "finite numbers",
            "1 number that is infinite or NaN, at [1, 49, 2]: so it is in piece 3 of 4: "
            f"{DENSE}up_proj.weight of {models[2] / WEIGHTS}",
        )
    ]


def test_other_bytes_that_are_not_finite_are_not_laid_on_the_source(plan, out):
    name = f"{BLOCK}experts.2.w3.weight"
    tensors = load_file(out / COPIED)
    tensors[name][47, 31] = float("nan")
    edit_tensors(out, **{name: tensors[name]})
    byte, broken = differences(plan, out)
    assert (byte.what, "of 6144 bytes differ, the first at byte 6140" in byte.found) == (name, True)
    assert broken == Difference(name, "finite numbers", "1 number that is infinite or NaN, at [47, 31]")


def test_keys_of_the_config_that_changed_are_found(plan, out):
    edit_keys(out / "config.json", "rope_theta", num_experts_per_tok=1, tie_word_embeddings=0, added=[1])
    assert differences(plan, out) == [
        Difference("config.json: num_experts_per_tok", "2", "1"),
        Difference("config.json: rope_theta", "10000.0", "absent"),
        Difference("config.json: tie_word_embeddings", "false", "0"),
        Difference("config.json: added", "absent", "[1]"),
    ]


def test_copied_files_that_changed_are_found(plan, out):
    base = plan.base_folder
    flip(out / "tokenizer.json", 100)
    (out / "tokenizer_config.json").write_text("{}")
    (out / "generation_config.json").unlink()
    (out / "chat_template.jinja").write_text("{{ messages }}")
    size = (base / "tokenizer.json").stat().st_size
    config_size = (base / "tokenizer_config.json").stat().st_size
    found = verify_merge(plan, out)
    assert found.differences == (
        Difference("generation_config.json", f"the bytes of {base / 'generation_config.json'}", "absent"),
        Difference(
            "tokenizer.json",
            f"the bytes of {base / 'tokenizer.json'}",
            f"1 of {size} bytes differ, the first at byte 100",
        ),
        Difference(
            "tokenizer_config.json",
            f"the bytes of {base / 'tokenizer_config.json'}",
            f"2 bytes instead of {config_size}",
        ),
        Difference("chat_template.jinja", "absent", "a file"),
    )
    assert found.files == len(plan.copied_files) - 3


def test_an_index_that_is_absent_is_found(tmp_path, plan):
    merge(plan_merge(plan.config, PlanOptions(max_shard_bytes=50_000)), tmp_path / "out")
    (tmp_path / "out" / INDEX).unlink()
    count = len(list((tmp_path / "out").glob("*.safetensors")))
    assert verify_merge(plan, tmp_path / "out").differences == (
        Difference(INDEX, f"an index of {count} files", "absent"),
    )


def test_an_index_that_disagrees_is_found(tmp_path, plan):
    out = tmp_path / "out"
    merge(plan_merge(plan.config, PlanOptions(max_shard_bytes=30_000)), out)
    index = json.loads((out / INDEX).read_text())
    total = index["metadata"]["total_size"]
    edit_keys(out / INDEX, metadata={"total_size": total + 1})
    (out / "model-00001-of-00009.safetensors").write_bytes(b"old")
    assert differences(plan, out) == [
        Difference(
            "model-00001-of-00009.safetensors", "no weights that the index does not name", "a file that no reader loads"
        ),
        Difference(INDEX, f"total_size {total}", f"total_size {total + 1}"),
    ]
    weight_map = index["weight_map"]
    file = weight_map.pop("model.norm.weight")
    edit_keys(out / INDEX, weight_map=weight_map)
    edit_keys(out / "config.json", eos_token_id=3)
    found = verify_merge(plan, out)
    assert found.differences == (
        Difference("config.json: eos_token_id", "2", "3"),
        Difference(
            "weights",
            "an index, headers and files that agree",
            f"{out.resolve()}: {INDEX} does not say of 1 tensor(s), such as 'model.norm.weight', that they are in {file}; "
            "they are read from there, as transformers does",
        ),
        Difference(
            "model-00001-of-00009.safetensors", "no weights that the index does not name", "a file that no reader loads"
        ),
        Difference(INDEX, f"total_size {total}", f"total_size {total + 1}"),
    )


def stored(path: Path, tensor: torch.Tensor) -> TensorInfo:
    save_file({"a": tensor}, path)
    return read_header(path)["a"]


def test_chunks_are_compared_at_their_places(tmp_path, monkeypatch):
    monkeypatch.setattr("moemerge.checkpoint.bands.CHUNK_ELEMENTS", 3)
    source, target = (stored(tmp_path / name, torch.arange(50, dtype=torch.float32)) for name in ("s", "t"))
    shown = []
    assert compare.compare_tensor(((Piece(source, "F32"),),), 0, target, shown.append) is None
    assert shown == [12] * 16 + [8]
    for byte in (13, 14, 199):
        flip(target.path, target.start + byte)
    found = compare.compare_tensor(((Piece(source, "F32"),),), 0, target, shown.append)
    assert str(found) == "3 of 200 bytes differ, the first at byte 13"


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_memory_does_not_grow_with_the_tensor(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("moemerge.checkpoint.bands.CHUNK_ELEMENTS", 2**16)
    source = stored(tmp_path / "s", torch.zeros(2**24))
    width = 4 if dtype == "F32" else 2
    target = stored(tmp_path / "t", torch.ones(2**24, dtype=torch.float32 if width == 4 else torch.bfloat16))
    tracemalloc.start()
    found = compare.compare_tensor(((Piece(source, dtype),),), 0, target, lambda _: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(found) == f"{2**25} of {width * 2**24} bytes differ, the first at byte {width - 2}"
    assert peak < 8 * compare.CHUNK_BYTES < target.nbytes


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_comparison_can_be_stopped(tmp_path, dtype):
    source = stored(tmp_path / "s", torch.zeros(10**6))
    target = stored(tmp_path / "t", torch.zeros(10**6, dtype={"F32": torch.float32, "BF16": torch.bfloat16}[dtype]))

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare.compare_tensor(((Piece(source, dtype),),), 0, target, stop)


def test_progress_may_stop_all_threads(plan, merged):
    def stop(_done, _total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_merge(plan, merged, progress=stop)


def test_a_source_that_changes_meanwhile_is_an_error(tmp_path):
    source, target = (stored(tmp_path / name, torch.ones(100)) for name in ("s", "t"))
    other = stored(tmp_path / "h", torch.ones(100, dtype=torch.bfloat16))
    os.truncate(source.path, source.start + 300)
    short = f"{source.path}: ended inside tensor 'a': was it changed meanwhile?"
    gone = f"{source.path}: cannot be read: No such file or directory. Was it moved meanwhile?"
    for message in (short, gone):
        for dtype, found in (("F32", target), ("BF16", other)):
            with pytest.raises(CheckpointError) as caught:
                compare.compare_tensor(((Piece(source, dtype),),), 0, found, lambda _: None)
            assert str(caught.value) == message
        source.path.unlink(missing_ok=True)
    os.truncate(target.path, target.start + 300)
    with pytest.raises(CheckpointError) as caught:
        compare.compare_tensor(((Piece(other, "F32"),),), 0, target, lambda _: None)
    assert str(caught.value) == f"{target.path}: ended while it was compared: was it changed meanwhile?"
    target.path.unlink()
    with pytest.raises(CheckpointError) as caught:
        compare.compare_tensor(((Piece(other, "F32"),),), 0, target, lambda _: None)
    assert str(caught.value) == (f"{target.path}: cannot be read: No such file or directory. Was it moved meanwhile?")


@pytest.mark.skipif(sys.platform != "linux", reason="reads a file of Linux")
def test_what_cannot_be_read_while_it_is_compared_is_named(tmp_path):
    source, found = tmp_path / "s.json", tmp_path / "folder"
    source.write_text("{}")
    found.mkdir()
    with pytest.raises(CheckpointError) as caught:
        compare.compare_files(source, found)
    assert str(caught.value) == f"{found}: cannot be compared with {source}: Is a directory."
    # Memory that no program has: it can be opened, but not read.
    tensor = stored(tmp_path / "t", torch.ones(2))
    unread = replace(tensor, path=Path("/proc/self/mem"), start=0)
    with pytest.raises(CheckpointError) as caught:
        compare.compare_tensor(((Piece(tensor, "F32"),),), 0, unread, lambda _: None)
    assert str(caught.value) == ("/proc/self/mem: tensor 'a' cannot be compared with its source: Input/output error.")


def test_the_command_says_so_in_one_line(tmp_path, plan, merged, llamas):
    config = write_random(tmp_path / "merge.yaml", llamas)
    result = run("verify", merged, "--against", config)
    assert (result.returncode, result.stdout) == (
        0,
        f"{merged}: as planned. Equal in every byte: 48 copied tensors (244.61 kB), 0 converted tensors (0 B), {len(plan.copied_files)} files. "
        "Not computed again: 3 routers, which have the planned shape and dtype and are finite.\n",
    )
    result = run("verify", merged, "--against", config, "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    result = run("verify", merged, "--quiet")  # against the copy of the config beside it
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_another_config_is_the_cause_and_few_of_its_differences_are_shown(tmp_path, out, llamas):
    other = write_config(tmp_path / "other.yaml", llamas[0], llamas[1:3], prompts=False)
    result = run("verify", out, "--against", other, "--quiet")
    lines = result.stdout.splitlines()
    assert (result.returncode, result.stderr, len(lines)) == (1, "", 8)
    assert lines[0] == (
        f"{out}: was merged from another config, which differs in experts. `moemerge verify {out}` compares it with its "
        "own."
    )
    assert lines[1] == "  config.json: num_local_experts: expected 2, found 3"
    assert re.fullmatch(r"  and \d+ more; --json lists all", lines[6])


def test_the_command_shows_what_differs(tmp_path, plan, out, llamas):
    config = write_random(tmp_path / "merge.yaml", llamas)
    edit_keys(out / "config.json", num_experts_per_tok=1)
    result = run("verify", out, "--against", config, "--quiet")
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert (result.returncode, result.stderr, lines) == (
        1,
        "",
        [
            "  config.json: num_experts_per_tok: expected 2, found 1",
            f"{out}: 1 difference(s). Equal in every byte: 48 copied tensors (244.61 kB), 0 converted tensors (0 B), {len(plan.copied_files)} files. "
            "Not computed again: 3 routers, which have the planned shape and dtype and are finite.",
        ],
    )
    result = run("verify", out, "--against", config, "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout) == {
        "copied": 48,
        "copied_bytes": 244608,
        "converted": 0,
        "converted_bytes": 0,
        "routers": 3,
        "files": len(plan.copied_files),
        "differences": [{"what": "config.json: num_experts_per_tok", "expected": "2", "found": "1"}],
        "notes": [],
    }


def test_the_seed_of_the_command_is_that_of_the_noise(tmp_path, llamas):
    plan = planned(tmp_path / "merge.yaml", llamas, *[{"noise_scale": 0.1}] * 3)
    merge(plan, tmp_path / "out", MergeOptions(seed=5))
    command = ("verify", tmp_path / "out", "--against", tmp_path / "merge.yaml", "--json")
    assert run(*command, "--seed", 5).returncode == 0
    result = run(*command)
    assert result.returncode == 1
    assert len(json.loads(result.stdout)["differences"]) == 27


def test_a_wrong_command_is_explained(tmp_path, llamas):
    config = write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:])
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(config.read_text() + "gate_mod: x\n")
    (tmp_path / "empty").mkdir()
    absent = tmp_path / "user" / "absent"
    for arguments, status, message in (
        (
            (absent, "--against", config),
            2,
            f"error: {absent}: there is no such folder. Name the folder that holds the merged model.\n",
        ),
        (
            (config, "--against", config),
            2,
            f"error: {config}: is a config, not a model. Merge it with `moemerge {config} OUT`, then name OUT.\n",
        ),
        (
            (tmp_path / "empty", "--against", config),
            2,
            f"error: {tmp_path / 'empty'}: has no config.json, so it is not a model that moemerge can read.\n",
        ),
        ((llamas[0], "--against", wrong), 2, "gate_mod: unknown key, did you mean gate_mode?"),
        ((llamas[0],), 2, "has no moemerge_config.yaml. Name the config that it was merged from with --against."),
    ):
        result = run("verify", *arguments, after=NO_TORCH)
        assert (result.returncode, result.stdout) == (status, "")
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_a_model_with_relative_sources_is_as_planned_from_anywhere(tmp_path, llamas, monkeypatch):
    """Also after it was moved together with its sources."""
    project = tmp_path / "project"
    project.mkdir()
    for model in llamas[:3]:
        shutil.copytree(model, project / model.name)
    write_random(project / "merge.yaml", [Path(model.name) for model in llamas[:3]])
    assert run("project/merge.yaml", "project/out", "--quiet", cwd=tmp_path).returncode == 0
    project.rename(tmp_path / "moved")
    for folder in (tmp_path, tmp_path / "moved", Path("/")):
        result = run("verify", tmp_path / "moved" / "out", cwd=folder)
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("text", ["a: [b", "", "x: 1", "- 1", "experts: 5"])
def test_a_damaged_copy_of_the_config_is_a_difference(tmp_path, plan, merged, text):
    copied = shutil.copytree(merged, tmp_path / "out")
    (copied / CONFIG_COPY).write_text(text)
    found = verify_merge(plan, copied)
    assert CONFIG_COPY in [difference.what for difference in found.differences]

"""GGUF files as sources: each number is what the package gguf and transformers read, and what is refused is said."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from moemerge import load_config, merge, packages, plan_merge
from moemerge.checkpoint import dequantised, gguf_blocks, gguf_contents
from moemerge.checkpoint.derived import kinds_of, leaves, read_values
from moemerge.checkpoint.files import open_range, read_exactly
from moemerge.checkpoint.gguf_contents import read_contents
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.regrouped import Heads, Regrouped
from moemerge.checks.verification import verify_merge
from moemerge.errors import CheckpointError, ConfigError, NoSuchModelError, RefusedError
from moemerge.families.dense import read_dense
from moemerge.model_card.markdown import as_text
from moemerge.sources.gguf.choosing import find_on_hub
from moemerge.sources.model_folder import ModelFolder, open_model, parse_reference
from moemerge.sources.tensor_tables import read_tensor_table
from tests.sources.test_lora import make_adapter
from tests.support.families import DENSE
from tests.support.gguf_files import random_blocks, turned, write_gguf
from tests.support.hub_world import files_of, lines, planned
from tests.support.machine import SINGLE
from tests.support.models import load_weights, make_model, write_config

BLOCKS = [name for name, _, _ in gguf_blocks._BLOCKS.values()]
KINDS = {
    name: DENSE[name]
    for name in (
        "llama", "llama, tied, llama3 rope", "llama, head_dim 12, yarn", "llama, biases", "qwen2", "qwen2, tied, yarn",
        "qwen3", "qwen3, tied, biases", "granite", "granite, tied, biases", "olmo2", "seed_oss",
    )
} | {"smollm3": ("smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": True})}  # fmt: skip
"""Models that files can say everything of: a type, and what its config says."""
UNSAID = {
    "dtype",
    "initializer_range",
    "attention_dropout",
    "use_cache",
    "mlp_bias",
    "sliding_window",
    "no_rope_layers",
}
"""Keys that no file says, or only by other keys."""
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8}


def opened(reference: object) -> ModelFolder:
    return open_model(str(reference), lambda _: None)


def values(reference: object) -> dict[str, torch.Tensor]:
    table = read_tensor_table(opened(reference), lambda _: None)
    return {name: torch.from_numpy(read_values(tensor)) for name, tensor in table.items()}


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_type_of_blocks_is_read_as_the_package_reads_it(tmp_path, monkeypatch, kind):
    """Whole, in rows, and from any byte to any other, with several chunks."""
    monkeypatch.setattr(dequantised, "BLOCK_ELEMENTS", 1024)
    number = gguf.GGMLQuantizationType[kind]
    data = random_blocks((9, 512), number, np.random.default_rng(1))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("a", data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    contents = read_contents(tmp_path / "m.gguf")
    tensor = gguf_blocks.read_tensor(contents, contents.tensors["a"])
    assert kinds_of([tensor]) == [kind]
    expected = gguf.dequantize(data, number)
    assert np.array_equal(read_values(tensor), expected)
    assert np.array_equal(read_values(tensor.rows(3, 4)), expected[3:7])
    for start, nbytes in ((0, 1), (2047, 2), (5000, 9000), (tensor.nbytes - 3, 3)):
        with open_range(tensor.path, start, nbytes) as reader:
            assert read_exactly(reader, nbytes + 1) == expected.tobytes()[start : start + nbytes]


def test_heads_are_read_from_any_byte_to_any_other(tmp_path):
    expected = torch.arange(12 * 5, dtype=torch.float32).reshape(12, 5)
    pairs = turned("a.q_proj.weight", expected, {"num_attention_heads": 3})
    (tmp_path / "a").write_bytes(pairs.numpy().tobytes())
    whole = TensorInfo("a", tmp_path / "a", "F32", (12, 5), 0, 240)
    tensor = Regrouped(whole, Heads(4, 4)).tensor()
    assert torch.equal(torch.from_numpy(read_values(tensor)), expected)
    assert torch.equal(torch.from_numpy(read_values(tensor.rows(3, 6))), expected[3:9])
    for start, nbytes in ((0, 1), (79, 2), (75, 90), (237, 3)):
        with open_range(tensor.path, start, nbytes) as reader:
            assert read_exactly(reader, nbytes + 1) == expected.numpy().tobytes()[start : start + nbytes]


def test_types_and_sizes_of_blocks_are_the_packages():
    sizes = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {number: sizes[number] for number in gguf_blocks._BLOCKS} == gguf_blocks._BLOCKS
    assert {number: sizes[number][0] for number in gguf_blocks._FLOATS} == gguf_blocks._FLOATS


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_floats_is_the_model_that_it_was_written_from(tmp_path, name):
    model_type, sizes = KINDS[name]
    folder = make_model(tmp_path / "model", 1, model_type, **sizes)
    found = opened(write_gguf(folder, tmp_path / "model.gguf"))
    made, given = read_dense(found.config), read_dense(json.loads((folder / "config.json").read_text()))
    assert made.facts == given.facts
    assert made.sizes == given.sizes
    ours, theirs = ({k: v for k, v in read.values.items() if k not in UNSAID} for read in (made, given))
    assert ours == theirs  # `window` among them, which is what sliding_window means
    expected = load_weights(folder)
    tensors = values(tmp_path / "model.gguf")
    assert tensors.keys() == expected.keys()
    for tensor, numbers in tensors.items():
        assert torch.equal(numbers, expected[tensor]), tensor
    assert (found.notes, kinds_of(read_tensor_table(found, print).values())) == ([], [])


@pytest.mark.parametrize(
    ("model_type", "kind"), [("llama", "Q4_K"), ("llama", "F16"), ("qwen2", "Q6_K"), ("qwen3", "Q8_0")]
)
def test_tensors_are_those_that_transformers_reads(tmp_path, model_type, kind):
    heads = {"num_attention_heads": 2, "head_dim": 128} if model_type == "qwen3" else {}  # it knows no other width
    folder = make_model(tmp_path / "model", 1, model_type, **WIDE | heads)
    file = write_gguf(folder, tmp_path / "model.gguf", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    tensors = values(file)
    assert tensors.keys() == theirs.keys()
    for name, numbers in tensors.items():
        assert torch.equal(numbers, theirs[name]), name


def plain_copy(file: Path, like: Path, folder: Path) -> Path:
    """A copy of a GGUF model in float32, as transformers would store it."""
    shutil.copytree(like, folder)
    save_file({name: tensor.contiguous() for name, tensor in values(file).items()}, folder / SINGLE, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> dict[str, Path]:
    """Two models, and one of them in GGUF with blocks of Q4_K."""
    root = tmp_path_factory.mktemp("wide")
    base, fox = make_model(root / "base", 0, **WIDE), make_model(root / "fox", 1, tuned_from=0, **WIDE)
    made = write_gguf(fox, root / "fox-Q4_0.gguf", "Q4_0")
    return {"base": base, "fox": fox, "gguf": made, "copy": plain_copy(made, fox, root / "copy")}


def merged(folder: Path, base: object, experts: list[object], **keys) -> dict[str, bytes]:
    folder.mkdir()
    config = write_config(folder / "merge.yaml", str(base), [str(e) for e in experts], prompts=False, **keys)
    plan = plan_merge(load_config(config))
    merge(plan, folder / "out")
    assert verify_merge(plan, folder / "out").differences == ()
    return {path.name: path.read_bytes() for path in (folder / "out").glob("model*")}


@pytest.mark.parametrize("keys", [{}, {"shared_weights": "average", "dtype": "bfloat16"}])
def test_a_merge_of_a_file_is_that_of_its_dequantised_copy(tmp_path, wide, keys):
    ours = merged(tmp_path / "ours", wide["base"], [wide["fox"], wide["gguf"]], **keys)
    theirs = merged(tmp_path / "theirs", wide["base"], [wide["fox"], wide["copy"]], **keys)
    assert ours == theirs


def test_files_of_one_name_with_equal_headers_are_two_models(tmp_path):
    models = [make_model(tmp_path / name, seed, tuned_from=0) for seed, name in enumerate(("base", "fox", "code"))]
    files = []
    for model in models[1:]:
        (tmp_path / f"{model.name} in GGUF").mkdir()
        files.append(write_gguf(model, tmp_path / f"{model.name} in GGUF" / "model.gguf"))
    assert read_contents(files[0]).header == read_contents(files[1]).header
    plan = plan_merge(load_config(write_config(tmp_path / "merge.yaml", models[0], files, prompts=False)))
    merge(plan, tmp_path / "out")
    merged, ends = load_weights(tmp_path / "out"), {"w1": "gate", "w2": "down", "w3": "up"}
    for number, model in enumerate(models[1:]):
        own = load_weights(model)
        for end, role in ends.items():
            found = merged[f"model.layers.0.block_sparse_moe.experts.{number}.{end}.weight"]
            assert torch.equal(found, own[f"model.layers.0.mlp.{role}_proj.weight"].to(found.dtype))


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_an_adapter_on_a_file_is_one_on_its_dequantised_copy(tmp_path, wide):
    make_adapter(tmp_path / "adapter", wide["copy"])
    ours = merged(tmp_path / "ours", wide["base"], [wide["fox"], f"{wide['gguf']}+{tmp_path / 'adapter'}"])
    theirs = merged(tmp_path / "theirs", wide["base"], [wide["fox"], f"{wide['copy']}+{tmp_path / 'adapter'}"])
    assert ours == theirs


def test_a_file_as_base_gives_a_mixture_in_bfloat16(tmp_path, wide):
    ours = merged(tmp_path / "ours", wide["gguf"], [wide["fox"], wide["base"]])
    theirs = merged(tmp_path / "theirs", wide["copy"], [wide["fox"], wide["base"]], dtype="bfloat16")
    assert ours == theirs


def test_plan_and_card_say_what_is_dequantised(tmp_path, wide):
    merged(tmp_path / "ours", wide["base"], [wide["gguf"], wide["fox"]])
    plan = plan_merge(load_config(tmp_path / "ours/merge.yaml"))
    note = (
        "experts[0] (fox-Q4_0): stored as Q4_0, and dequantised, which does not bring back what the quantisation lost"
    )
    assert plan.notes.count(note) == 1
    assert (tmp_path / "ours/out/README.md").read_text().count(as_text(note)) == 1


def test_a_file_in_parts_is_one_model(tmp_path, wide):
    write_gguf(wide["fox"], tmp_path / "fox.gguf", "Q4_0", parts=3)
    parts = sorted(path.name for path in tmp_path.iterdir())
    assert parts == [f"fox-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    expected = values(wide["gguf"])
    for reference in (tmp_path, *(tmp_path / part for part in parts)):
        found = values(reference)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    (tmp_path / parts[1]).unlink()
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path)
    assert str(caught.value) == f"{parts[0]}: its part {parts[1]} is not there (1 of 3). Download it."


def test_a_folder_of_several_files_is_ambiguous(tmp_path, wide):
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf", "imatrix.gguf"):
        shutil.copy(wide["gguf"], tmp_path / name)
    with pytest.raises(NoSuchModelError) as caught:
        opened(tmp_path)
    assert str(caught.value) == f"{tmp_path}: holds 2 GGUF files. Name one of them: a.gguf, b.gguf."
    (tmp_path / "b.gguf").unlink()
    assert values(tmp_path).keys() == values(wide["gguf"]).keys()


def test_weights_of_another_kind_go_before_files_beside_them(tmp_path, wide):
    shutil.copytree(wide["fox"], tmp_path / "fox")
    shutil.copy(wide["gguf"], tmp_path / "fox")
    assert opened(tmp_path / "fox").gguf is None


def test_relative_files_count_from_the_config_and_name_the_expert(tmp_path, wide, monkeypatch):
    (tmp_path / "models").mkdir()
    shutil.copy(wide["gguf"], tmp_path / "models/fox.gguf")
    path = write_config(tmp_path / "merge.yaml", wide["base"], ["models/fox.gguf", wide["copy"]], prompts=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(path)
    assert config.experts[0].source_model == "../models/fox.gguf"
    assert config.expert_names[0] == "fox"
    merge(plan_merge(config), tmp_path / "out")
    assert load_config(tmp_path / "out/moemerge_config.yaml").experts[0].source_model == "../models/fox.gguf"


def test_a_file_that_changes_is_noticed(tmp_path, wide):
    shutil.copy(wide["gguf"], tmp_path / "fox.gguf")
    path = write_config(tmp_path / "merge.yaml", wide["base"], [tmp_path / "fox.gguf", wide["fox"]], prompts=False)
    plan = plan_merge(load_config(path))
    shutil.copy(wide["gguf"], tmp_path / "fox.gguf")
    with pytest.raises(
        CheckpointError, match=r"fox.gguf: was changed since the plan was made: another time of writing"
    ):
        merge(plan, tmp_path / "out")


def test_a_downloaded_file_is_watched_from_then_on(tmp_path, wide):
    """Of a repository's file the header is read on the Hub, and the rest in the cache."""
    shutil.copy(wide["gguf"], tmp_path / "fox.gguf")
    model = opened(tmp_path / "fox.gguf")
    there = replace(model.gguf, snapshot=tmp_path, names=("fox.gguf",))
    model = replace(model, origin=parse_reference("acme/fox-GGUF"), gguf=there, stamps={})
    read_tensor_table(model, print)
    assert list(model.stamps) == [tmp_path / "fox.gguf"]


def test_planning_imports_neither_torch_nor_the_package(tmp_path, wide):
    path = write_config(tmp_path / "merge.yaml", wide["base"], [wide["gguf"], wide["fox"]], prompts=False)
    code = (
        "import sys; from moemerge import load_config, plan_merge\n"
        "from moemerge.sources.model_folder import open_model\n"
        f"open_model({str(wide['gguf'])!r}, print)\nassert 'gguf' not in sys.modules\n"
        f"plan_merge(load_config({str(path)!r}))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_package_blocks_are_refused_and_floats_are_read(tmp_path, wide, monkeypatch):
    floats = write_gguf(wide["fox"], tmp_path / "fox.gguf", "F16")
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    assert opened(floats).notes == []
    with pytest.raises(RefusedError) as caught:
        opened(wide["gguf"])
    assert str(caught.value) == (
        f"To read {wide['gguf']}, which is quantised, the package gguf is needed: pip install gguf."
    )
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in {"gguf", "s3fs"} else find_spec(name))
    experts = [wide["gguf"], "s3://bucket/model", tmp_path / "none"]
    path = write_config(tmp_path / "merge.yaml", wide["base"], experts, prompts=False)
    with pytest.raises(ConfigError) as caught:
        plan_merge(load_config(path))
    first, second, third = (f"line {line}: experts[{line - 3}].source_model: " for line in (3, 4, 5))
    assert caught.value.problems == (
        f"{first}To read {wide['gguf']}, which is quantised, the package gguf is needed: pip install gguf.",
        f"{second}To reach s3://bucket/model, the package s3fs is needed: pip install 'moemerge[remote]'.",
        f"{third}{tmp_path / 'none'}: there is no such folder, and it cannot be a Hub repository (user/name).",
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"general.architecture": "mamba"},
            "is a GGUF file of the architecture 'mamba'; of GGUF, moemerge reads llama, qwen2, qwen3, granite, "
            "smollm3, olmo2, seed_oss. Name the model that it was written from.",
        ),
        (
            {"llama.expert_count": 8},
            "is a mixture in GGUF (architecture 'llama'), of which dense models alone are read. Name the model that it "
            "was written from.",
        ),
        (
            {"llama.attention.clamp_kqv": 8.0, "llama.logit_scale": 2.0},
            "its settings llama.attention.clamp_kqv and 1 more are not known of this architecture, so what they change "
            "would be lost. Name the model that it was written from.",
        ),
        (
            {"llama.attention.key_length": 16, "llama.attention.value_length": 8},
            "its heads have several widths, which a config cannot say: attention.key_length 16, attention.value_length 8.",
        ),
        (
            {"llama.rope.scaling.type": "longrope"},
            "scales its rotary positions in a way that is not read: type 'longrope'. Name the model that it was written "
            "from.",
        ),
    ],
)
def test_what_no_config_can_say_is_refused(tmp_path, llamas, settings, message):
    file = write_gguf(llamas[1], tmp_path / "fox.gguf", settings=settings)
    with pytest.raises(NoSuchModelError) as caught:
        opened(file)
    assert str(caught.value) == f"{file}: {message}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"llama.block_count": None}, "expected a positive whole number as llama.block_count, found nothing."),
        ({"llama.embedding_length": "32"}, "expected a positive whole number as llama.embedding_length, found '32'."),
        (
            {"llama.feed_forward_length": [48, 48, 40]},
            "expected a positive whole number as llama.feed_forward_length, found (48, 48, 40).",
        ),
        (
            {"llama.attention.layer_norm_rms_epsilon": float("nan")},
            "expected a number as llama.attention.layer_norm_rms_epsilon, found nan.",
        ),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
            "names no original_max_position_embeddings for its rotary positions, which yarn needs.",
        ),
    ],
)
def test_settings_that_are_damaged_are_named(tmp_path, llamas, settings, message):
    file = write_gguf(llamas[1], tmp_path / "fox.gguf", settings=settings)
    with pytest.raises(CheckpointError) as caught:
        opened(file)
    assert str(caught.value) == f"{file}: {message}"


def test_frequencies_of_no_llama3_scaling_are_refused(tmp_path):
    name, sizes = DENSE["llama, tied, llama3 rope"]
    sizes = sizes | {"rope_scaling": sizes["rope_scaling"] | {"high_freq_factor": 9.0}}
    file = write_gguf(make_model(tmp_path / "model", 1, name, **sizes), tmp_path / "m.gguf")
    with pytest.raises(NoSuchModelError) as caught:
        opened(file)
    assert str(caught.value) == (
        f"{file}: its tensor 'rope_freqs.weight' holds frequencies that no llama3 scaling with low_freq_factor 1 and "
        "high_freq_factor 4 gives. Name the model that it was written from."
    )


def test_tensors_that_are_damaged_are_named(tmp_path, wide):
    whole = wide["gguf"].read_bytes()
    contents = read_contents(wide["gguf"])
    last = max(contents.tensors.values(), key=lambda tensor: tensor.offset)
    file = tmp_path / "fox.gguf"
    file.write_bytes(whole[: last.offset + 8])
    with pytest.raises(
        CheckpointError, match=rf"^{file}: tensor '{last.name}': ends at byte \d+, but the file is \d+ "
    ):
        opened(file)
    place = whole.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    for number, message in (
        (9, "is of ggml's type 9, which is not read; known: F32, F16, BF16, " + ", ".join(BLOCKS) + "."),
        (26, "is of ggml's type 26, which is not read; known: F32, F16, BF16, " + ", ".join(BLOCKS) + "."),
    ):
        file.write_bytes(whole[:place] + number.to_bytes(4, "little") + whole[place + 4 :])
        with pytest.raises(CheckpointError) as caught:
            opened(file)
        assert str(caught.value) == f"{file}: tensor 'blk.0.ffn_up.weight': {message}"
    row = place - 16
    for width, message in (
        (200, "has rows of 200 numbers, and blocks of Q4_0 hold 32."),
        (0, "the shape [256, 0] holds no numbers."),
    ):
        file.write_bytes(whole[:row] + width.to_bytes(8, "little") + whole[row + 8 :])
        with pytest.raises(CheckpointError) as caught:
            opened(file)
        assert str(caught.value) == f"{file}: tensor 'blk.0.ffn_up.weight': {message}"


def test_the_header_of_a_file_elsewhere_is_read_in_steps(tmp_path, wide, monkeypatch):
    """Each byte of it once, and none of the tensors but those that the last step brings along."""
    asked: list[tuple[int, int]] = []

    class Elsewhere:
        name, identity, nbytes = "fox.gguf", "", wide["gguf"].stat().st_size

        def open(self, start, nbytes):
            asked.append((start, nbytes))
            return io.BytesIO(wide["gguf"].read_bytes()[start : start + nbytes])

    monkeypatch.setattr(gguf_contents, "_FIRST_READ", 512)
    here, there = read_contents(wide["gguf"]), read_contents(Elsewhere())
    assert (there.settings, there.arrays, there.tensors) == (here.settings, here.arrays, here.tensors)
    assert [start for start, _ in asked] == [sum(nbytes for _, nbytes in asked[:n]) for n in range(len(asked))]
    header = min(tensor.offset for tensor in here.tensors.values())
    assert len(asked) > 1
    assert header <= sum(nbytes for _, nbytes in asked) < 2 * header

    class Cut(Elsewhere):
        nbytes = 600

    with pytest.raises(CheckpointError, match="is no GGUF file, or is damaged"):
        read_contents(Cut())


def test_a_merge_names_every_file_that_is_no_model(tmp_path, llamas):
    file = write_gguf(llamas[1], tmp_path / "fox.gguf", settings={"general.architecture": "mamba"})
    path = write_config(tmp_path / "merge.yaml", llamas[0], [file, llamas[2]], prompts=False)
    with pytest.raises(ConfigError) as caught:
        plan_merge(load_config(path))
    assert f"experts[0].source_model: {file}: is a GGUF file of the architecture 'mamba'" in str(caught.value)


def test_leaves_of_a_tensor_are_its_bytes_in_the_file(wide):
    table = read_tensor_table(opened(wide["gguf"]), lambda _: None)
    found = {leaf.path for tensor in table.values() for leaf in leaves(tensor)}
    assert found == {wide["gguf"]}


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("Q4_K_M", ["a-Q4_K_M.gguf"]),
        ("q8_0", ["a-Q8_0.gguf"]),
        ("a-Q8_0.gguf", ["a-Q8_0.gguf"]),
        ("BF16", ["BF16/a-00001-of-00002.gguf", "BF16/a-00002-of-00002.gguf"]),
    ],
)
def test_a_file_of_a_repository_is_named_by_its_type(tag, expected):
    parts = [f"BF16/a-BF16-{n:05d}-of-00002.gguf" for n in (1, 2)]
    names = ["a-Q4_K_M.gguf", "a-Q8_0.gguf", *parts, "mmproj-a-Q8_0.gguf", "sub/mmproj.Q8_0.gguf", "README.md"]
    assert find_on_hub("u/a", tag, names) == [name.replace("BF16/a-0", "BF16/a-BF16-0") for name in expected]


def test_a_merge_of_files_on_the_hub_is_that_of_the_same_files_here(world, machine, tmp_path):
    """Streamed by ranges, downloaded, and from the cache without network."""
    folder = machine.folder / "files"
    folder.mkdir()
    write_gguf(world.folder / "fox", folder / "fox-f16.gguf", "F16")
    write_gguf(world.folder / "fox", folder / "fox-q.gguf", "F32", parts=2)
    hub = world.hub
    hub.add("acme/fox-GGUF", files_of(folder) | {"README.md": b"---\nlicense: mit\n---\n", "config.json": b"{}"})
    config = write_config(machine.folder / "merge.yaml", "acme/base", ["acme/fox-GGUF:f16", "acme/code"], prompts=False)
    plan = planned(machine, str(config))
    assert plan["expert_names"] == ["fox", "code"]
    assert not list(machine.cache.rglob("*.gguf"))
    hub.reset()
    streamed = machine.moemerge(str(config), "streamed", "--stream")
    assert streamed.code == 0, lines(streamed)
    assert not list(machine.cache.rglob("*.gguf"))
    downloaded = machine.moemerge(str(config), "downloaded")
    assert downloaded.code == 0, lines(downloaded)
    assert [path.name for path in machine.cache.rglob("*.gguf")] == ["fox-f16.gguf"]
    again = machine.moemerge(str(config), "again", "--quiet", HF_HUB_OFFLINE="1")
    assert again.code == 0, lines(again)
    here = yaml.safe_load(config.read_text().replace("acme/fox-GGUF:f16", str(folder / "fox-f16.gguf")))
    (machine.folder / "here.yaml").write_text(yaml.safe_dump(here))
    local = machine.moemerge("here.yaml", "local", "--quiet")
    assert local.code == 0, lines(local)
    expected = {path.name: path.read_bytes() for path in (machine.folder / "local").glob("model*")}
    for out in ("streamed", "downloaded", "again"):
        assert {path.name: path.read_bytes() for path in (machine.folder / out).glob("model*")} == expected
    inspected = machine.moemerge("inspect", "acme/fox-GGUF:fox-q")
    assert (inspected.code, "llama, dense, 3 layers" in inspected.out) == (0, True), inspected.err

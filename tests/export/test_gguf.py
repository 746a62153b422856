"""GGUF files: what their tensors hold, what is refused, and that nothing is left of one that failed."""

import json
import os
import re
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file

from moemerge import load_config, merge, packages, plan_merge
from moemerge.checkpoint import output_folder
from moemerge.checkpoint.files import read_exactly
from moemerge.checkpoint.header import read_header
from moemerge.checkpoint.transposed import Transposed
from moemerge.checks.verification import verify_merge
from moemerge.cli.app import main
from moemerge.errors import (
    CheckpointError,
    IncompatibleError,
    MoemergeError,
    NoSuchModelError,
    OutputError,
    RefusedError,
    TooLargeError,
)
from moemerge.export.blocks import quantise_q8_0
from moemerge.export.family_tables import GGUF_FAMILIES
from moemerge.export.keys import rope_factors
from moemerge.export.model import GgufFormat
from moemerge.export.quantised_file import write_quantised
from moemerge.export.sentencepiece import Kind, SentencePiece, read_pieces
from moemerge.export.vocabulary import read_gemma4_vocabulary, read_vocabulary
from moemerge.export.writing import GgufOptions, check_file, write_gguf
from moemerge.families.selection import MOE_FAMILIES
from moemerge.merging.gguf import merge_to_gguf
from moemerge.merging.options import MergeOptions
from moemerge.planning.tokenizer_proof import ProvedTokenizer
from tests.passes.test_passes import is_known
from tests.support.families import GEMMA4, HYBRID, MIXED
from tests.support.models import edit_json, load_weights, make_model, save_weights, write_config
from tests.support.splits import VOCAB, WAYS, save

LLAMA3_ROPE: dict[str, Any] = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
HEADS, KEY_HEADS, LAYERS, EXPERTS = 4, 2, 3, 2
FAMILIES = ", ".join(GGUF_FAMILIES)


@pytest.fixture(scope="module")
def config(tmp_path_factory, llamas) -> Path:
    """Of a mixture of two experts with noise; its routers come from prompts."""
    path = tmp_path_factory.mktemp("gguf") / "merge.yaml"
    experts = [
        {"source_model": str(llama), "noise_scale": 0.01, "positive_prompts": [f"prompt {number}"]}
        for number, llama in enumerate(llamas[1:3])
    ]
    path.write_text(yaml.safe_dump({"base_model": str(llamas[0]), "experts": experts, "gate_mode": "hidden"}))
    return path


@pytest.fixture(scope="module")
def out(tmp_path_factory, config) -> Path:
    """The checkpoint; tests must not change it."""
    folder = tmp_path_factory.mktemp("gguf") / "merged"
    merge(plan_merge(load_config(config)), folder)
    return folder


@pytest.fixture
def copied(tmp_path, out) -> Path:
    return Path(shutil.copytree(out, tmp_path / "merged"))


def read(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}


def into_pairs(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order of llama.cpp."""
    return weights.reshape(heads, 2, -1, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def load_arrays(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_weights(folder).items()}


def test_tensors_are_the_checkpoints_renamed_stacked_and_turned(tmp_path, out):
    write_gguf(out, tmp_path / "a.gguf", GgufOptions(type="f32"))
    found, held = read(tmp_path / "a.gguf"), load_arrays(out)
    expected = {
        "token_embd.weight": held["model.embed_tokens.weight"],
        "output_norm.weight": held["model.norm.weight"],
        "output.weight": held["lm_head.weight"],
    }
    for layer in range(LAYERS):
        own = {
            name: held[f"model.layers.{layer}.{name}.weight"]
            for name in (
                "input_layernorm",
                "post_attention_layernorm",
                "self_attn.v_proj",
                "self_attn.o_proj",
                "block_sparse_moe.gate",
            )
        }
        names = ("attn_norm", "ffn_norm", "attn_v", "attn_output", "ffn_gate_inp")
        expected |= {f"blk.{layer}.{name}.weight": value for name, value in zip(names, own.values(), strict=True)}
        for name, heads in (("q", HEADS), ("k", KEY_HEADS)):
            weights = held[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
            expected[f"blk.{layer}.attn_{name}.weight"] = into_pairs(weights, heads)
        for name, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            expected[f"blk.{layer}.ffn_{name}_exps.weight"] = np.stack(
                [
                    held[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{theirs}.weight"]
                    for expert in range(EXPERTS)
                ]
            )
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, name)


def test_what_engines_read_in_float32_alone_stays_so(tmp_path, out):
    write_gguf(out, tmp_path / "a.gguf", GgufOptions(type="q8_0"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    for name, kind in kinds.items():
        if name.endswith(("_norm.weight", "ffn_gate_inp.weight")):
            assert kind == "F32", name
        else:  # rows of 48 numbers are no whole blocks
            assert kind == ("F16" if "ffn_down_exps" in name else "Q8_0"), name


def test_tensors_begin_at_multiples_of_32_bytes_with_zeros_between(tmp_path, out):
    write_gguf(out, tmp_path / "a.gguf", GgufOptions(type="f16"))
    tensors, data = gguf.GGUFReader(tmp_path / "a.gguf").tensors, (tmp_path / "a.gguf").read_bytes()
    covered = set()
    for tensor in tensors:
        assert tensor.data_offset % 32 == 0
        covered |= set(range(tensor.data_offset, tensor.data_offset + tensor.n_bytes))
    first = tensors[0].data_offset
    assert len(data) % 32 == 0
    assert {data[byte] for byte in range(first, len(data)) if byte not in covered} <= {0}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_a_plan_makes_the_file_that_its_checkpoint_makes(tmp_path, config, out, kind):
    write_gguf(out, tmp_path / "a.gguf", GgufOptions(type=kind))
    merge_to_gguf(plan_merge(load_config(config)), tmp_path / "merged.gguf", form=GgufFormat(kind))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "merged.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "merged.gguf"]


@pytest.mark.parametrize(
    ("moe", "keys"),
    [
        ("mixtral", {"shared_weights": "average", "dtype": "bfloat16"}),
        ("mixtral", {"fold_norms": True}),
        ("granitemoe", {"dtype": "float16"}),
        ("granitemoehybrid", {}),
    ],
)
def test_what_a_merge_computes_is_in_the_file_too(tmp_path, llamas, moe, keys):
    config = write_config(tmp_path / "a.yaml", llamas[0], llamas[1:], prompts=False, architecture=moe, **keys)
    merge(plan_merge(load_config(config)), tmp_path / "a")
    write_gguf(tmp_path / "a", tmp_path / "b.gguf", GgufOptions(type="q8_0"))
    merge_to_gguf(plan_merge(load_config(config)), tmp_path / "a.gguf", form=GgufFormat("q8_0"))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F16"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_without_a_type_a_file_has_the_checkpoints_16_bit_floats(tmp_path, llamas, dtype, kind):
    config = write_config(tmp_path / "a.yaml", llamas[0], llamas[1:3], prompts=False, dtype=dtype)
    merge(plan_merge(load_config(config)), tmp_path / "a")
    write_gguf(tmp_path / "a", tmp_path / "b.gguf")
    merge_to_gguf(plan_merge(load_config(config)), tmp_path / "a.gguf", MergeOptions(low_memory=True))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert tensors["output.weight"].tensor_type.name == kind


# ---- blocks


@settings(deadline=None)
@given(arrays(np.float32, (5, 32), elements=st.floats(-1e4, 1e4, width=32)))
def test_blocks_are_those_of_the_package(values):
    # Smaller ones have no inverse, of which the package makes anything.
    values[np.abs(values) < 1e-30] = 0
    assert quantise_q8_0(values).tobytes() == gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0).tobytes()


def test_numbers_without_an_inverse_are_zeros():
    assert quantise_q8_0(np.full((1, 32), 1e-40, np.float32)).tobytes() == bytes(34)


def test_blocks_of_zeros_halves_and_tiny_numbers_are_those_of_the_package():
    halves = np.concatenate([[127.0], np.arange(-31, 31, 2) / 2]).astype(np.float32)
    values = np.stack([np.zeros(32), halves, halves * 2.0**-20, -halves]).astype(np.float32)
    assert quantise_q8_0(values).tobytes() == gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0).tobytes()


def test_large_matrices_are_made_of_blocks_in_bounded_pieces(tmp_path, copied):
    held = load_arrays(copied)
    rows = 9000  # more than a chunk
    edit_json(copied / "config.json", vocab_size=rows)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = np.random.default_rng(0).standard_normal((rows, 32), np.float32)
    save_weights(copied, {name: torch.from_numpy(array) for name, array in held.items()})
    write_gguf(copied, tmp_path / "a.gguf", GgufOptions(type="q8_0"))
    expected = gguf.quants.quantize(held["lm_head.weight"], gguf.GGMLQuantizationType.Q8_0)
    assert read(tmp_path / "a.gguf")["output.weight"].tobytes() == expected.tobytes()


def test_llama3_slows_long_waves_and_leaves_short_ones():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = rope_factors({"rope_parameters": rope, "head_dim": 128})
    assert factors is not None
    assert factors[0] == 1
    assert factors[-1] == 8
    assert (np.diff(factors) >= 0).all()
    assert 1 < np.unique(factors)[1] < 8
    assert rope_factors({"rope_parameters": rope | {"rope_type": "default"}, "head_dim": 128}) is None


def test_a_head_is_transposed_in_any_part_of_it(tmp_path):
    values = np.arange(40, dtype=np.float32).reshape(5, 8)
    save_file({"before": np.zeros(3, np.float32), "head": values}, tmp_path / "a.safetensors")
    stored = read_header(tmp_path / "a.safetensors")["head"]
    tensor = Transposed(stored).tensor()
    assert tensor.shape == (8, 5)
    for first, count in ((0, 8), (3, 4)):
        rows = tensor.rows(first, count)
        with rows.open() as reader:
            assert read_exactly(reader, rows.nbytes) == values.T[first : first + count].tobytes()


# ---- refusals


def refused(work, kind: type[MoemergeError] = RefusedError) -> str:
    with pytest.raises(MoemergeError) as caught:
        work()
    assert type(caught.value) is kind
    return str(caught.value)


def test_a_file_that_is_there_is_kept(tmp_path, out, config):
    file, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_gguf(out, file, GgufOptions(type="f16"))
    message = f"{file}: exists. Replace it with --overwrite, or choose another name."
    assert refused(lambda: write_gguf(out, file)) == message
    assert refused(lambda: merge_to_gguf(plan_merge(load_config(config)), file)) == message
    other.write_bytes(b"mine")
    message = f"{other}: is no GGUF file, and --overwrite replaces no other. Choose another name."
    assert refused(lambda: write_gguf(out, other, GgufOptions(overwrite=True))) == message
    assert other.read_bytes() == b"mine"
    write_gguf(out, file, GgufOptions(type="f32", overwrite=True))
    assert read(file)["output.weight"].dtype == np.float32


def test_no_file_is_written_into_a_source(tmp_path, llamas, monkeypatch, capsys):
    base, expert = (Path(shutil.copytree(llama, tmp_path / name)) for name, llama in zip("be", llamas, strict=False))
    config = write_config(tmp_path / "c.yaml", base, [expert, llamas[2]], prompts=False)
    merge(plan_merge(load_config(config)), tmp_path / "out")
    for source in (base, expert):
        file = source / "a.gguf"
        message = f"{file}: lies within the model {source}. Choose another output folder."
        assert refused(lambda file=file: write_gguf(tmp_path / "out", file)) == message
        assert refused(lambda file=file: merge_to_gguf(plan_merge(load_config(config)), file)) == message
        monkeypatch.setattr(packages, "find_spec", lambda _: object())
        for words in (["gguf", tmp_path / "out", file], [config, file]):
            for kind in ("q8_0", "q4_k_m"):
                assert run([*words, "--type", kind, "-q"], monkeypatch, capsys) == (2, "", f"error: {message}\n")
        words = ["gguf", tmp_path / "out", tmp_path / "q.gguf", "--type", "q4_k_m", "--imatrix", "--imatrix-out", file]
        assert run(words, monkeypatch, capsys) == (2, "", f"error: {message}\n")
        assert not list(source.glob("*.gguf"))
    # Before weights are read, which may be a download; the same of folders.
    weights = (expert / "model.safetensors").rename(tmp_path / "w")
    for place, *options in (
        (expert / "a.gguf",),
        (expert / "a.gguf", "--type", "q4_k_m"),
        (expert / "a",),
        (expert / "a", "--push", "user/name", "--push-streaming"),
    ):
        within = "lies within" if options or place.suffix else "holds or lies within"
        assert run([config, place, *options], monkeypatch, capsys) == (
            2,
            "",
            f"error: {place}: {within} the model {expert}. Choose another output folder.\n",
        )
    weights.rename(expert / "model.safetensors")
    # However the config writes the folder down.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for written, source in (("~/b", base), ("b", base), ("~/b+~/e", expert)):
        write_config(tmp_path / "out" / "moemerge_config.yaml", written, [llamas[1], llamas[2]], prompts=False)
        file = source / "a.gguf"
        message = f"{file}: lies within the model {source}. Choose another output folder."
        assert refused(lambda file=file: write_gguf(tmp_path / "out", file)) == message
    shutil.copy(config, tmp_path / "out" / "moemerge_config.yaml")
    # The merged model's own folder is the place that other programs look in; verify says so, too.
    write_gguf(tmp_path / "out", tmp_path / "out" / "a.gguf")
    assert verify_merge(plan_merge(load_config(config)), tmp_path / "out").differences == ()


def test_names_that_no_file_can_have_are_refused(tmp_path, out):
    assert refused(lambda: write_gguf(out, tmp_path / "a.bin")) == (
        f"{tmp_path / 'a.bin'}: the name of a GGUF file ends in .gguf."
    )
    (tmp_path / "b.gguf").mkdir()
    assert refused(lambda: write_gguf(out, tmp_path / "b.gguf")) == (
        f"{tmp_path / 'b.gguf'}: exists and is not a file. Choose another name."
    )
    (tmp_path / "c.gguf").write_bytes(b"GGUF")
    assert refused(lambda: check_file(tmp_path / "c.gguf", overwrite=True, inputs=[tmp_path / "c.gguf"])) == (
        f"{tmp_path / 'c.gguf'}: is read for this merge. Choose another name."
    )
    missing = tmp_path / "nothing"
    assert refused(lambda: write_gguf(missing, tmp_path / "d.gguf"), NoSuchModelError) == (
        f"{missing}: there is no such folder. Name the folder that holds the merged model."
    )


def test_without_the_package_the_extra_is_named(tmp_path, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refused(lambda: write_gguf(out, tmp_path / "a.gguf")) == (
        "To write a GGUF file, the package gguf is needed: pip install gguf."
    )


def test_families_that_are_not_written_are_refused_by_name(tmp_path, copied):
    edit_json(copied / "config.json", model_type="qwen2_moe")
    assert refused(lambda: write_gguf(copied, tmp_path / "a.gguf")) == (
        f"qwen2_moe: is not written as a GGUF file. Output families that are: {FAMILIES}; choose one with "
        "`architecture:` in the config, if it can hold the merge."
    )


def test_a_tensor_is_neither_missing_nor_dropped(tmp_path, copied):
    held = load_arrays(copied)
    held["model.layers.1.more"] = held.pop("model.layers.1.self_attn.v_proj.weight")
    del held["model.layers.2.block_sparse_moe.experts.1.w1.weight"]
    held["model.layers.0.self_attn.o_proj.weight"] = np.zeros((32, 32), np.int8)
    save_weights(copied, {name: torch.from_numpy(array) for name, array in held.items()})
    assert refused(lambda: write_gguf(copied, tmp_path / "a.gguf"), IncompatibleError).splitlines() == [
        "The checkpoint is not what llama.cpp's llama is made of:",
        "  - model.layers.0.self_attn.o_proj.weight is stored as I8, not as floats",
        "  - model.layers.1.self_attn.v_proj.weight is missing",
        "  - model.layers.2.block_sparse_moe.experts.1.w1.weight is missing",
        "  - model.layers.1.more has no place in a GGUF file of its kind",
    ]


UNKNOWN = "The tokenizer cannot be written to a GGUF file; llama.cpp's converter may know it, with --llama-cpp PATH:"


def _without(copied: Path) -> str:
    (copied / "tokenizer.json").unlink()
    return "there is neither tokenizer.json nor tokenizer.model"


def _unigram(copied: Path) -> str:
    edit_json(copied / "tokenizer.json", model={"type": "Unigram"})
    return "tokenizer.json is of the kind 'Unigram', not BPE"


def _other_split(copied: Path) -> str:
    edit_json(copied / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    return (
        "how tokenizer.json splits texts is not one of the ways that are known here (its pre_tokenizer and normalizer)"
    )


def _lower_case(copied: Path) -> str:
    edit_json(copied / "tokenizer.json", normalizer={"type": "Lowercase"})
    return (
        "how tokenizer.json splits texts is not one of the ways that are known here (its pre_tokenizer and normalizer)"
    )


def _too_many(copied: Path) -> str:
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    edit_json(copied / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], {"id": 160, "content": "<more>"}])
    return "tokenizer.json has a token 160, but vocab_size is 160"


@pytest.mark.parametrize("change", [_without, _unigram, _other_split, _lower_case, _too_many])
def test_tokenizers_that_are_not_known_are_refused_with_what_is_not(tmp_path, copied, change):
    reason = change(copied)
    message = refused(lambda: write_gguf(copied, tmp_path / "a.gguf"), IncompatibleError)
    assert message == f"{UNKNOWN}\n  - {reason}"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_converter_that_fails_is_quoted(tmp_path, copied):
    _unigram(copied)
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    assert refused(lambda: write_gguf(copied, tmp_path / "a.gguf", GgufOptions(llama_cpp=checkout))) == (
        f"--llama-cpp: {checkout} holds no convert_hf_to_gguf.py. Name the folder of a checkout of llama.cpp."
    )
    script = checkout / "convert_hf_to_gguf.py"
    script.write_text("raise SystemExit('no such tokenizer')")
    assert refused(lambda: write_gguf(copied, tmp_path / "a.gguf", GgufOptions(llama_cpp=checkout))) == (
        f"{script}: cannot read the tokenizer of {copied}: ... no such tokenizer"
    )


def test_a_disk_without_room_is_not_filled(tmp_path, out, config, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: free)
    for work in (
        lambda: write_gguf(out, tmp_path / "a.gguf"),
        lambda: merge_to_gguf(plan_merge(load_config(config)), tmp_path / "a.gguf"),
    ):
        message = refused(work, OutputError)
        assert message.startswith(f"{tmp_path / 'a.gguf'}: the merged model takes 50.")
        assert message.endswith("but the disk has 1.00 kB free. Free some space, or write to another disk.")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", ["FSIZE", "AS"])
def test_limits_of_the_process_are_refused_before_the_first_byte(tmp_path, out, config, monkeypatch, limit):
    file = tmp_path / "a.gguf"
    plan = plan_merge(load_config(config))
    monkeypatch.setattr(output_folder, "limit_of", {limit: 10_000}.get)
    monkeypatch.setattr(packages, "find_spec", lambda _: object())
    for work in (
        lambda: write_gguf(out, file),
        lambda: merge_to_gguf(plan, file),
        lambda: write_quantised(file, "q4_k_m", lambda floats, room: write_gguf(out, floats, room=room)),
    ):
        message = refused(work, OutputError)
        if limit == "FSIZE":
            assert re.fullmatch(
                rf"{file}: takes up to 50\.\d+ MB, but this process may write files of 10\.00 kB at most\. Raise the limit "
                "with `ulimit -f unlimited`\\.",
                message,
            )
        else:
            assert re.fullmatch(
                rf"{file}: about \d+\.\d+ [MG]B of address space are needed, but this process may use 10\.00 kB\. Raise the "
                "limit with `ulimit -v unlimited`\\.",
                message,
            )
    assert not list(tmp_path.iterdir())


def test_numbers_that_a_type_cannot_hold_are_named_with_types_that_can(tmp_path, llamas, copied):
    held = load_arrays(copied)
    held["lm_head.weight"][3, 4] = 1e6
    save_weights(copied, {name: torch.from_numpy(array) for name, array in held.items()})
    where = f"{copied / 'model.safetensors'}: tensor 'lm_head.weight' holds 1e+06, which float16 cannot express."
    advice = "Write the file with --type bf16 or --type f32."
    assert (
        refused(lambda: write_gguf(copied, tmp_path / "a.gguf", GgufOptions(type="f16")), TooLargeError)
        == f"{where} {advice}"
    )
    assert not (tmp_path / "a.gguf").exists()
    base = Path(shutil.copytree(llamas[0], tmp_path / "base"))
    held = load_arrays(base)
    held["lm_head.weight"][3, 4] = 1e6
    save_weights(base, {name: torch.from_numpy(array) for name, array in held.items()})
    where = where.replace(str(copied), str(base))
    for dtype, expected in (
        ("float32", advice),
        ("float16", "Set `dtype: bfloat16` or `dtype: float32` in the config."),
    ):
        config = write_config(tmp_path / "a.yaml", base, llamas[1:3], prompts=False, dtype=dtype)
        plan = plan_merge(load_config(config))
        assert (
            refused(lambda plan=plan: merge_to_gguf(plan, tmp_path / "a.gguf"), TooLargeError) == f"{where} {expected}"
        )


DAMAGE = {
    "a size that is none": ({"config.json": {"num_hidden_layers": "3"}}, (
        "config.json: num_hidden_layers has to be a size, found '3'."
    )),
    "layers": ({"config.json": {"num_hidden_layers": 10**12}}, (
        "config.json: vocab_size 160 and 1000000000000 layers, but there are 42 tensors, and 160 rows in "
        "model.embed_tokens.weight. Is a file missing?"
    )),
    "tokens beyond": ({"config.json": {"vocab_size": 10**12}}, (
        "config.json: vocab_size 1000000000000 and 3 layers, but there are 42 tensors, and 160 rows in "
        "model.embed_tokens.weight. Is a file missing?"
    )),
    "no experts": ({"config.json": {"num_local_experts": None}}, (
        "config.json: names no number of experts, by none of num_local_experts, num_experts, n_routed_experts, "
        "moe_num_experts."
    )),
    "sampling": ({"generation_config.json": {"temperature": "hot"}}, (
        "config.json, model card, generation_config.json or tokenizer: holds what cannot be read, or written to a GGUF "
        "file (error: required argument is not a float). Look at what differs from the released models of its family."
    )),
    "tokens": ({"tokenizer.json": {"added_tokens": [{"content": "<x>"}]}}, (
        "config.json, model card, generation_config.json or tokenizer: holds what cannot be read, or written to a GGUF "
        "file (KeyError: 'id'). Look at what differs from the released models of its family."
    )),
    "a list": ({"tokenizer_config.json": []}, "tokenizer_config.json: expected a JSON object, found []."),
    "half": ({"tokenizer.json": "{"}, (
        "tokenizer.json: is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)). "
        "Download it again."
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_small_files_that_hold_anything_are_named(tmp_path, copied, name):
    files, message = DAMAGE[name]
    for file, change in files.items():
        if isinstance(change, dict):
            (copied / file).write_text((copied / file).read_text() if (copied / file).exists() else "{}")
            edit_json(copied / file, **change)
        else:
            (copied / file).write_text(change if isinstance(change, str) else json.dumps(change))
    assert refused(lambda: write_gguf(copied, tmp_path / "a.gguf"), CheckpointError) == message
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_link_stays_one(tmp_path, out):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "b.gguf", tmp_path / "a.gguf"
    target.write_bytes(b"GGUF")
    link.symlink_to(target)
    write_gguf(out, link, GgufOptions(overwrite=True))
    assert link.is_symlink()
    assert "output.weight" in read(target)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sliding_window": 16}, "llama.cpp ignores its window: it is right for texts up to 16 tokens"),
        (
            {key: {"rope_type": "dynamic", "factor": 4.0} for key in ("rope_scaling", "rope_parameters")},
            "llama.cpp scales no rotary positions by the length: it is right for texts up to max_position_embeddings",
        ),
    ],
    ids=["window", "length"],
)
def test_what_llamacpp_ignores_is_told(tmp_path, copied, changes, expected):
    told: list[str] = []
    edit_json(copied / "config.json", **changes)
    write_gguf(copied, tmp_path / "a.gguf", tell=told.append)
    assert told == [f"{copied}: {expected}"]


NEXT = "Merge again with `--for llama.cpp`, which chooses a family that it reads, if there is one."
REFUSED: dict[str, tuple[str, dict[str, Any], bool, str]] = {
    "granitemoe": (
        "llama", LLAMA3_ROPE, False, "llama.cpp knows no llama3 scaling of its rotary positions",
    ),
    "granitemoeshared": (
        "llama", {"head_dim": 16}, False, "llama.cpp takes head_dim for hidden_size / num_attention_heads",
    ),
    "mixtral": (
        "llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7}}, False,
        "llama.cpp ignores mscale in yarn's scaling of rotary positions",
    ),
    "granitemoehybrid": (
        "granitemoehybrid", HYBRID | {"mamba_d_head": 16, "layer_types": ["mamba", "attention"]}, False,
        "llama.cpp has files of another kind for state-space layers",
    ),
    "dots1": ("qwen3", {"head_dim": 8}, True, "llama.cpp does not load it with fewer key heads than query heads"),
    "mellum": ("qwen3", {"head_dim": 8}, False, "llama.cpp does not load it where no layer has a window"),
    "ernie4_5_moe": ("ernie4_5", {}, True, "llama.cpp does not load it with a shared expert"),
    "qwen3_moe": (
        "qwen3", {"head_dim": 8, "hidden_act": "gelu"}, False,
        "llama.cpp computes another activation in its FFNs than config.json says",
    ),
    "gemma4_text": (
        "gemma4_text", GEMMA4 | {"hidden_activation": "silu", "layer_types": MIXED[:2]}, False,
        "llama.cpp computes another activation in its FFNs than config.json says",
    ),
}  # fmt: skip


@pytest.mark.parametrize("moe", REFUSED)
def test_what_llamacpp_cannot_load_is_refused_before_anything_is_written(tmp_path, moe):
    model_type, sizes, shared, reason = REFUSED[moe]
    if not is_known(model_type):
        pytest.skip(f"this transformers does not know {model_type}")
    base, *experts = (make_model(tmp_path / str(n), n, model_type, num_hidden_layers=2, **sizes) for n in range(3))
    keys = {"shared_experts": [{"source_model": str(experts[0])}]} if shared else {}
    config = write_config(tmp_path / "a.yaml", base, experts, prompts=False, architecture=moe, **keys)
    plan = plan_merge(load_config(config))
    assert refused(lambda: merge_to_gguf(plan, tmp_path / "a.gguf")) == (
        f"{moe}: is not written as a GGUF file, for {reason}. {NEXT}"
    )
    assert not list(tmp_path.glob("*.gguf"))


LACKS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], str]] = {
    "dense layers": ("qwen3", "qwen3_moe", {}, {"moe_layers": [1]}, "loads it only with experts in every layer"),
    "biases": ("qwen3", "qwen3_moe", {"attention_bias": True}, {}, "knows no biases in its attention"),
    "tied": ("qwen3", "exaone_moe", {"tie_word_embeddings": True}, {}, "does not load it with tied embeddings"),
    "a shared expert": ("cohere2", "cohere2_moe", {"sliding_window": 8, "layer_types": MIXED[:2]}, {"shared_experts": True}, "knows no shared expert in it"),
    "a head": ("lfm2", "lfm2_moe", {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]}, {}, "knows no head in it beside the embeddings"),
}  # fmt: skip


@pytest.mark.parametrize("what", LACKS)
def test_what_a_family_has_no_tensors_for_is_said_in_words(tmp_path, what):
    model_type, moe, sizes, keys, reason = LACKS[what]
    base, *experts = (make_model(tmp_path / str(n), n, model_type, num_hidden_layers=2, **sizes) for n in range(3))
    if "shared_experts" in keys:
        keys = {"shared_experts": [{"source_model": str(experts[0])}]}
    config = write_config(tmp_path / "a.yaml", base, experts, prompts=False, architecture=moe, **keys)
    assert refused(lambda: merge_to_gguf(plan_merge(load_config(config)), tmp_path / "a.gguf")) == (
        f"{moe}: is not written as a GGUF file, for llama.cpp {reason}. {NEXT}"
    )
    assert not (tmp_path / "a.gguf").exists()


def test_what_is_said_of_a_tokenizers_files_is_said_of_folders_alone(tmp_path, config):
    said: list[str] = []
    plan = plan_merge(load_config(config))
    doubted = ProvedTokenizer({}, ("a doubt", "of a file"), ("a doubt",))
    plan = replace(plan, shape=replace(plan.shape, tokenizer=doubted))
    merge_to_gguf(plan, tmp_path / "a.gguf", warn=said.append)
    assert said == ["a doubt"]


def test_cards_offer_a_gguf_file_of_what_is_written_as_one():
    assert GGUF_FAMILIES.keys() == {name for name, family in MOE_FAMILIES.items() if family.in_gguf}


@pytest.mark.parametrize(
    "options", [("--type", "q4_k_m", "--imatrix-out", "notes.gguf"), ("--ollama", "mine")], ids=["imatrix", "ollama"]
)
def test_nothing_beside_the_file_is_lost(tmp_path, out, options, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kept = "Modelfile" if "--ollama" in options else options[-1]
    Path(kept).write_text("mine")
    code, _, errors = run(["gguf", out, "a.gguf", *options], monkeypatch, capsys)
    assert code == 2
    assert errors.startswith(f"error: {kept}: exists")
    assert Path(kept).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [kept]


def test_what_an_importance_matrix_is_made_of_is_looked_for_first(tmp_path, out, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for options in (("--imatrix-file", "none.gguf"), ("--imatrix-texts", "none.txt")):
        code, _, errors = run(["gguf", out, "a.gguf", "--type", "q4_k_m", *options], monkeypatch, capsys)
        assert code in {1, 2}
        assert "none." in errors
        assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_has_lost_its_shared_expert_is_refused(tmp_path):
    base, *experts = (make_model(tmp_path / str(n), n, num_hidden_layers=2) for n in range(3))
    config = write_config(tmp_path / "a.yaml", base, experts, prompts=False, architecture="glm4_moe")
    merge(plan_merge(load_config(config)), tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", n_shared_experts=0)
    assert refused(lambda: write_gguf(tmp_path / "out", tmp_path / "a.gguf")) == (
        f"glm4_moe: is not written as a GGUF file, for llama.cpp does not load it without a shared expert. {NEXT}"
    )


def test_room_that_a_killed_run_has_taken_is_used_again(tmp_path, out, monkeypatch):
    stage = tmp_path / ".a.gguf.moemerge-partial"
    stage.mkdir()
    (stage / "model.gguf").write_bytes(bytes(51_000_000))
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: free)
    write_gguf(out, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


# ---- finished or absent


def test_nothing_is_left_where_a_source_is_cut_off(tmp_path, copied):
    path = copied / "model-00001-of-00002.safetensors"
    file = tmp_path / "a.gguf"

    def cut(_done: int, _total: int) -> None:
        os.truncate(path, 20_000)

    with pytest.raises(CheckpointError, match="ended inside tensor"):
        write_gguf(copied, file, GgufOptions(low_memory=True), progress=cut)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_an_interrupt_leaves_the_old_file(tmp_path, out, config):
    file = tmp_path / "a.gguf"
    write_gguf(out, file)
    before = file.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for work in (
        lambda: write_gguf(out, file, GgufOptions(overwrite=True, type="f32"), progress=interrupt),
        lambda: merge_to_gguf(plan_merge(load_config(config)), file, MergeOptions(overwrite=True), progress=interrupt),
    ):
        with pytest.raises(KeyboardInterrupt):
            work()
        assert file.read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_a_file_that_comes_meanwhile_is_kept(tmp_path, out):
    file = tmp_path / "a.gguf"
    assert refused(lambda: write_gguf(out, file, progress=lambda *_: file.write_text("mine"))) == (
        f"{file}: exists. Replace it with --overwrite, or choose another name."
    )
    assert file.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


# ---- tokenizers


@pytest.mark.parametrize("name", WAYS)
def test_ways_of_splitting_are_known_by_what_they_do(tmp_path, name):
    save(name, tmp_path)
    found = read_vocabulary(tmp_path, VOCAB)
    assert (found.model, found.pre) == ("gpt2", name)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    numbers = tokenizer["model"]["vocab"] | {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    assert all(found.tokens[number] == token for token, number in numbers.items())
    kinds = {found.tokens[number]: found.types[number].name for number in range(VOCAB)}
    assert (kinds["<s>"], kinds["<tool>"], kinds["<|plain|>"]) == ("CONTROL", "USER_DEFINED", "CONTROL")
    assert kinds[f"[PAD{VOCAB - 1}]"] == "UNUSED"
    assert len(found.tokens) == len(found.types) == VOCAB


def _with_byte_fallback(folder: Path) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "a": 3, "b": 4, "ab": 5}
    tokenizer = {
        "added_tokens": [{"id": 1, "content": "<s>", "special": True}, {"id": 6, "content": "<|tool_call>"}],
        "decoder": {"type": "Sequence"},
        "model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": [["a", "b"]]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))


def test_a_vocabulary_is_filled_up_to_the_embeddings(tmp_path):
    _with_byte_fallback(tmp_path)
    found = read_vocabulary(tmp_path, 9)
    assert (found.model, found.pre, found.merges) == ("llama", "default", [])
    assert found.tokens[5:] == ["ab", "<|tool_call>", "[PAD7]", "[PAD8]"]
    kinds = ["NORMAL", "CONTROL", "BYTE", "NORMAL", "NORMAL", "NORMAL", "USER_DEFINED", "UNUSED", "UNUSED"]
    assert [kind.name for kind in found.types] == kinds
    gemma = read_gemma4_vocabulary(tmp_path, 9)
    assert (gemma.model, gemma.pre, gemma.merges) == ("gemma4", "", ["a b"])
    assert gemma.tokens == found.tokens
    save("qwen2", tmp_path)
    with pytest.raises(IncompatibleError, match=r"Gemma 4's tokenizer.json is BPE with byte fallback"):
        read_gemma4_vocabulary(tmp_path, 9)


def piece(text: str, score: float, kind: int | None = None) -> bytes:
    """A piece as SentencePiece writes it: text, score, and the kind of all but normal ones."""
    encoded = text.encode()
    message = b"\x0a" + bytes([len(encoded)]) + encoded + b"\x15" + struct.pack("<f", score)
    message += b"" if kind is None else b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(message)]) + message


def test_pieces_are_read_from_the_file_alone(tmp_path):
    path = tmp_path / "tokenizer.model"
    pieces = [
        ("<unk>", 0.0, Kind.UNKNOWN),
        ("<0x0A>", 0.0, Kind.BYTE),
        ("\u2581the", -1.5, None),
        ("x" * 100, -2.0, None),
    ]
    trainer = b"\x12\x05\x08\x96\x01\x10\x00"  # settings of the training, which say nothing here
    data = b"".join(piece(*one) for one in pieces) + trainer
    path.write_bytes(data)
    expected = [SentencePiece(text, score, kind or Kind.NORMAL) for text, score, kind in pieces]
    assert read_pieces(path) == expected
    path.write_bytes(data[:-3])
    with pytest.raises(CheckpointError) as caught:
        read_pieces(path)
    assert str(caught.value) == f"{path.name}: is no SentencePiece model (it is cut off). Download it again."


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_pieces_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.model"
    path.write_bytes(data)
    try:
        assert all(isinstance(piece, SentencePiece) for piece in read_pieces(path))
    except CheckpointError as error:
        assert str(error).startswith(f"{path.name}: is no SentencePiece model (")  # noqa: PT017


def test_named_chat_templates_are_in_the_order_of_their_names(tmp_path, copied):
    names = [f"name{number}" for number in (3, 1, 4, 2, 5, 9, 6)]
    templates = [{"name": name, "template": f"{name}!"} for name in ("default", *names)]
    edit_json(copied / "tokenizer_config.json", chat_template=templates)
    write_gguf(copied, tmp_path / "a.gguf")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["tokenizer.chat_templates"].contents() == sorted(names)
    assert fields["tokenizer.chat_template"].contents() == "default!"
    assert fields["tokenizer.chat_template.name4"].contents() == "name4!"


# ---- the command line


def run(words: list[object], monkeypatch, capsys) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["moemerge", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return ended.value.code or 0, printed.out, printed.err


def test_the_command_line_writes_both_ways(tmp_path, out, config, monkeypatch, capsys):
    file, direct = tmp_path / "a.gguf", tmp_path / "merged.gguf"
    assert run(["gguf", out, file, "--type", "q8_0", "-q"], monkeypatch, capsys) == (0, "", "")
    code, printed, _ = run([config, direct, "--type", "q8_0"], monkeypatch, capsys)
    assert code == 0
    assert re.search(rf"\n{re.escape(str(direct))}: done, [\d.]+ kB in \d+ s\n$", printed)
    assert file.read_bytes() == direct.read_bytes()


def test_options_that_say_nothing_of_the_output_are_refused(tmp_path, config, monkeypatch, capsys):
    for words, message in {
        ("a.gguf", "--resume"): "--resume: a merge into a GGUF file does not use it. Remove it, or name a folder.",
        ("a.gguf", "--ray", "local"): "--ray: a merge into a GGUF file does not use it. Remove it, or name a folder.",
        ("a.gguf", "--max-shard-size", "5GB"): (
            "--max-shard-size: a merge into a GGUF file does not use it. Remove it, or name a folder."
        ),
        ("a.gguf", "--out-shard-size", "1B"): (
            "--out-shard-size: a merge into a GGUF file does not use it. Remove it, or name a folder."
        ),
        ("a", "--type", "f16"): "--type: is for GGUF files, and OUT is a folder. Name a file that ends in .gguf.",
        (
            "a",
            "--llama-cpp",
            "b",
        ): "--llama-cpp: is for GGUF files, and OUT is a folder. Name a file that ends in .gguf.",
    }.items():
        code, _, errors = run([config, tmp_path / words[0], *words[1:]], monkeypatch, capsys)
        assert (code, errors) == (2, f"error: {message}\n")
    assert not list(tmp_path.iterdir())


def test_a_config_is_sent_to_the_command_that_merges_it(tmp_path, config, monkeypatch, capsys):
    assert run(["gguf", config, tmp_path / "a.gguf"], monkeypatch, capsys) == (
        2,
        "",
        f"error: {config}: is a config, not a model. Merge it with `moemerge {config} {tmp_path / 'a.gguf'}`.\n",
    )
    assert not list(tmp_path.iterdir())


# ---- the page


PAGE = (Path(__file__).parents[2] / "docs" / "gguf.md").read_text()


def test_the_pages_commands_work(tmp_path, config, out, monkeypatch, capsys):
    shutil.copytree(out, tmp_path / "out")
    shutil.copy(config, tmp_path / "merge.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no Ollama
    lines = re.findall(r"^    moemerge ([^#\n]+)", PAGE, re.MULTILINE)
    lines = [line for line in lines if "--type" not in line or "q8_0" in line]  # the others: tests/llamacpp
    assert len(lines) == 4
    for line in lines:
        Path("mixture.gguf").unlink(missing_ok=True)
        assert run([*line.split(), "-q"], monkeypatch, capsys)[0] == 0
        assert Path("mixture.gguf").is_file()


def test_the_page_names_the_families():
    text = PAGE[PAGE.index("## Families") : PAGE.index("Others")]
    assert re.findall(r"`(\w+)`", text) == list(GGUF_FAMILIES)

"""GGUF files read, and what is said of one that llama.cpp has made smaller; the engine itself: `make test-llamacpp`."""

import os
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from moemerge import load_config, merge, packages, plan_merge
from moemerge.checkpoint.disk import shown_bytes
from moemerge.checkpoint.gguf_contents import read_contents
from moemerge.cli.app import main
from moemerge.cli.options import GGUF_TYPES
from moemerge.errors import CheckpointError, OutputError, RefusedError, SourceError
from moemerge.export import quantised_file
from moemerge.export.imatrix import ColumnSquares, Importance, read_importance
from moemerge.export.quantised_file import write_quantised
from moemerge.export.quantiser_process import failure_reason
from moemerge.export.quantising import (
    FILE_TYPES,
    check_type,
    fallback_note,
    fallen_back,
    quantise,
    quantised_bytes,
    uncovered_notes,
)
from moemerge.export.writing import HEADER_BYTES, write_gguf
from tests.support.models import write_config

Kind = gguf.GGMLQuantizationType
_MATRICES = {
    "token_embd.weight": ((16, 96), Kind.Q8_0),
    "blk.0.attn_norm.weight": ((96,), Kind.F32),
    "blk.0.ffn_gate_inp.weight": ((3, 96), Kind.F32),
    "blk.0.attn_q.weight": ((4, 96), Kind.Q5_0),
    "blk.0.attn_k.weight": ((4, 96), Kind.Q8_0),
    "blk.0.ffn_up_exps.weight": ((3, 4, 256), Kind.Q4_K),
    "blk.0.ffn_down_exps.weight": ((3, 4, 48), Kind.F16),
}


def write(path: Path, matrices=_MATRICES, **settings) -> Path:
    """A file as llama.cpp writes it, of zeros."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "ü"])
    writer.add_array("tokenizer.ggml.token_type", [3, 1, 1])
    writer.add_string("general.name", "mix")
    writer.add_expert_count(settings.get("experts", 3))
    for name, (shape, kind) in matrices.items():
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        stored = np.zeros((*shape[:-1], shape[-1] // block * nbytes), np.uint8)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_is_read_as_the_package_gguf_reads_it(tmp_path):
    found = read_contents(write(tmp_path / "m.gguf"))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert [(t.name, t.sizes, t.type, t.offset) for t in found.tensors.values()] == [
        (t.name, tuple(t.shape.tolist()), int(t.tensor_type), int(t.data_offset)) for t in reader.tensors
    ]
    assert found.settings == {"general.architecture": "llama", "general.name": "mix", "llama.expert_count": 3}
    assert found.architecture == "llama"
    assert found.nbytes == (tmp_path / "m.gguf").stat().st_size


def test_no_damage_is_taken_for_a_file(tmp_path):
    whole = write(tmp_path / "m.gguf").read_bytes()
    header = min(t.offset for t in read_contents(tmp_path / "m.gguf").tensors.values())
    damaged = tmp_path / "d.gguf"
    for length in (0, 3, 8, 20, *range(24, header - gguf.GGUF_DEFAULT_ALIGNMENT, 7)):
        damaged.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"d.gguf: is no GGUF file, or is damaged \(.+\). Write it again.$"):
            read_contents(damaged)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"GGML", "begins with b'GGML' and version 3"),
        (4, struct.pack("<I", 9), "begins with b'GGUF' and version 9"),
        (24, struct.pack("<Q", 2**63), "a text of 9223372036854775808 bytes at 32 goes beyond its end"),
        (52, struct.pack("<I", 99), "a value at 56 is of the unknown type 99"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, place, value, message):
    path = write(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_contents(path)
    assert str(caught.value) == f"{path}: is no GGUF file, or is damaged ({message}). Write it again."


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SourceError) as caught:
        read_contents(tmp_path / "m.gguf")
    assert str(caught.value) == f"{tmp_path / 'm.gguf'}: cannot be read: No such file or directory."


def test_no_pipe_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(SourceError) as caught:
        read_contents(tmp_path / "m.gguf")
    assert str(caught.value) == f"{tmp_path / 'm.gguf'}: is not a regular file. Name a GGUF file."


@pytest.mark.parametrize(
    ("sums", "counts"), [(-1.0, 1.0), (np.inf, 1.0), (np.nan, 1.0), (1.0, -1.0), (1.0, 1e30), (1.0, np.nan)]
)
def test_an_importance_matrix_that_nothing_can_have_counted_is_refused(tmp_path, sums, counts):
    path = write(tmp_path / "i.gguf", {"a.in_sum2": ((2,), Kind.F32), "a.counts": ((1,), Kind.F32)})
    content = bytearray(path.read_bytes())
    for name, value in (("a.in_sum2", sums), ("a.counts", counts)):
        struct.pack_into("<f", content, read_contents(path).tensors[name].offset, value)
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_importance(path)
    assert str(caught.value) == (
        f"{path}: a has 2 sums for 1 counts, or they are not sums of squares. Make the matrix again."
    )


def test_tensors_stored_otherwise_than_asked_for_are_named(tmp_path):
    made = read_contents(write(tmp_path / "m.gguf"))
    found = fallen_back(made, "q4_k_m")
    assert found == {
        "token_embd.weight": "Q8_0",
        "blk.0.attn_q.weight": "Q5_0",
        "blk.0.attn_k.weight": "Q8_0",
        "blk.0.ffn_down_exps.weight": "F16",
    }
    bits = 8 * made.nbytes / (16 * 96 + 96 + 3 * 96 + 4 * 96 + 4 * 96 + 3 * 4 * 256 + 3 * 4 * 48)
    assert fallback_note(found, made, "q4_k_m") == (
        "q4_k_m: rows of 48 and 96 numbers are not a whole number of its blocks of 256, so llama.cpp stores 4 of 6 "
        "matrices otherwise: 2 as Q8_0 (token_embd.weight, blk.0.attn_k.weight); 1 as Q5_0 (blk.0.attn_q.weight); "
        f"1 as F16 (blk.0.ffn_down_exps.weight). The file takes {bits:.1f} bits a weight, where q8_0 takes about 8.5 "
        "and loses less"
    )
    # Blocks of 32 divide all rows but those of 48.
    assert fallen_back(made, "q4_0") == {"blk.0.ffn_down_exps.weight": "F16"}


def test_what_the_engine_chooses_for_8_experts_is_no_fallback(tmp_path):
    made = read_contents(write(tmp_path / "m.gguf", experts=8))
    assert "blk.0.attn_k.weight" not in fallen_back(made, "q4_k_m")


@pytest.mark.parametrize(
    ("said", "code", "reason"),
    [
        (["x\n", "llama_model_quantize: failed to quantize: no room\n", "bye\n"], 1, "no room"),
        (
            ["/a/b.cpp:7: GGML_ASSERT(n <= m) failed\n", "\n"],
            -6,
            "GGML_ASSERT(n <= m) failed",
        ),
        (["[  1/ 9] a - f16\n"], -9, "its process was ended by SIGKILL after '[  1/ 9] a - f16'"),
        ([], -11, "its process was ended by SIGSEGV"),
        (["Traceback (most recent call last):\n", "OSError: libgomp.so.1: none\n"], 1, "OSError: libgomp.so.1: none"),
        (
            ["q: failed to quantize: basic_ios::clear: iostream error\n"],
            1,
            "basic_ios::clear: iostream error: the disk is full or cannot be written",
        ),
        ([], 3, "it gave no reason"),
    ],
)
def test_why_the_engine_ended(said, code, reason):
    assert failure_reason(said, code) == reason


def test_what_cannot_be_made_is_refused_before_any_work(tmp_path, monkeypatch):
    model = write(tmp_path / "m.gguf")
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "llama_cpp" else object())
    with pytest.raises(RefusedError) as caught:
        quantise(model, tmp_path / "q.gguf", "q4_k_m")
    assert str(caught.value) == "To make q4_k_m, the package llama-cpp-python is needed: pip install llama-cpp-python."
    monkeypatch.setattr(packages, "find_spec", lambda _: object())
    with pytest.raises(RefusedError) as caught:
        check_type("q4_k", with_importance=False)
    assert str(caught.value) == f"--type q4_k: is not one of {', '.join(FILE_TYPES)}."
    with pytest.raises(RefusedError) as caught:
        check_type("iq2_m", with_importance=False)
    assert str(caught.value) == (
        "--type iq2_m: llama.cpp makes it only with an importance matrix: add --imatrix, or choose q3_k_s."
    )
    with pytest.raises(RefusedError) as caught:
        quantise(model, tmp_path / "q.gguf", "q4_k_m")
    assert str(caught.value) == (
        f"{model}: token_embd.weight is stored as Q8_0; expected F32, F16 or BF16: what is quantised twice loses "
        "twice. Name the file that it was made from."
    )
    with pytest.raises(RefusedError) as caught:
        quantise(model, tmp_path, "q4_k_m")
    assert str(caught.value) == f"{tmp_path}: is a folder. Name the file that is to be written."
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def _importance(tokens=(100, 300, 5)) -> Importance:
    sums = np.array([[100.0, 200.0], [900.0, 0.0], [1.0, 1.0]], np.float32)
    stack = ColumnSquares(sums, np.array(tokens))
    return Importance(
        {"blk.2.ffn_gate_exps.weight": stack, "blk.2.attn_q.weight": ColumnSquares(sums[:1], np.array([7]))},
        ("a.txt",),
    )


def test_an_importance_matrix_is_written_and_read(tmp_path):
    _importance().write(tmp_path / "i.gguf")
    found = read_importance(tmp_path / "i.gguf")
    for name, expected in _importance().tensors.items():
        assert found.tensors[name].sums.tolist() == expected.sums.tolist()
        assert found.tensors[name].counts.tolist() == expected.counts.tolist()
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a.txt"]


def test_an_expert_without_text_has_the_mean_of_the_others():
    found = _importance()
    stack = found.tensors["blk.2.ffn_gate_exps.weight"]
    assert found.uncovered() == {"blk.2.ffn_gate_exps.weight": [2]}
    assert stack.means().tolist() == [[1.0, 2.0], [3.0, 0.0], [2.5, 0.5]]
    assert uncovered_notes(found) == [
        "importance matrix: fewer than 32 tokens reach expert 2 in layers 2: there it has the mean of the layer's "
        "other experts"
    ]
    names = sorted(f"blk.{layer}.ffn_{part}_exps.weight" for layer in (0, 1, 2, 10, 12) for part in ("up", "down"))
    assert uncovered_notes(Importance(dict.fromkeys(names, stack))) == [
        "importance matrix: fewer than 32 tokens reach expert 2 in layers 0, 1, 2, 10, 12: there it has the mean of the "
        "layer's other experts"
    ]
    # Where no expert is covered all have the mean of what there is, and of nothing, ones.
    few = ColumnSquares(stack.sums, np.array([10, 0, 10]))
    np.testing.assert_allclose(few.means(), [[1001 / 20, 201 / 20]] * 3, rtol=1e-6)
    assert ColumnSquares(np.zeros((2, 3), np.float32), np.zeros(2, np.int64)).means().tolist() == [[1.0] * 3] * 2
    # A matrix that every token passes is told by few.
    assert found.tensors["blk.2.attn_q.weight"].uncovered == []


def test_an_importance_matrix_of_another_model_is_refused(tmp_path):
    model = read_contents(write(tmp_path / "m.gguf", {"blk.2.attn_q.weight": ((4, 3), Kind.F16)}))
    with pytest.raises(RefusedError) as caught:
        _importance().check(model)
    assert str(caught.value) == (
        "importance matrix: blk.2.attn_q.weight is of 1 x 2 columns; expected 1 x 3, as in m.gguf. Make one of this "
        "model."
    )
    model = read_contents(write(tmp_path / "m.gguf", {"blk.0.attn_q.weight": ((4, 3), Kind.F16)}))
    with pytest.raises(RefusedError) as caught:
        _importance().check(model)
    assert str(caught.value) == (
        "importance matrix: none of its 2 tensors is one of m.gguf: it was made of another model. Make one of this "
        "model."
    )
    model = read_contents(write(tmp_path / "m.gguf", {"blk.2.ffn_gate_exps.weight": ((3, 4, 2), Kind.F16)}))
    _importance().check(model)


def test_a_file_that_is_no_importance_matrix_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError) as caught:
        read_importance(path)
    assert str(caught.value) == (
        f"{path}: is not an importance matrix: no tensor is called *.in_sum2. Name another file."
    )
    for bad, message in {
        "a.in_sum2": "a.counts is missing or not in float32. Make the matrix again.",
        "a.in_sum2 a.counts": "a has 2 sums for 3 counts, or they are not sums of squares. Make the matrix again.",
    }.items():
        matrices = {name: ((3 if "counts" in name else 2,), Kind.F32) for name in bad.split()}
        with pytest.raises(CheckpointError) as caught:
            read_importance(write(path, matrices))
        assert str(caught.value) == f"{path}: {message}"
    cut = write(path, {"a.in_sum2": ((2,), Kind.F32), "a.counts": ((900,), Kind.F32)}).read_bytes()[:-2000]
    path.write_bytes(cut)
    with pytest.raises(CheckpointError) as caught:
        read_importance(path)
    assert str(caught.value) == f"{path}: a.counts goes beyond the file's end. Make the matrix again."


def test_room_is_asked_for_both_files_before_the_first(tmp_path, llamas, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda _: object())
    config = write_config(tmp_path / "c.yaml", llamas[0], llamas[1:3], prompts=False)
    merge(plan_merge(load_config(config)), tmp_path / "out")
    needed, file = 0, tmp_path / "q.gguf"

    def count(_file, tensors, more=0):
        nonlocal needed
        needed = sum(tensor.nbytes for tensor in tensors) + HEADER_BYTES + more + quantised_bytes(tensors, "q4_k_m")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "out", tmp_path / "a.gguf", room=count)

    def write(floats, room):
        write_gguf(tmp_path / "out", floats, room=room)
        raise KeyboardInterrupt

    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: disk._replace(free=needed - 1_000_000))
    with pytest.raises(OutputError) as caught:
        write_quantised(file, "q4_k_m", write)
    assert str(caught.value) == (
        f"{file}: the merged model, in floats and in q4_k_m, takes {shown_bytes(needed)}, but the disk has "
        f"{shown_bytes(needed - 1_000_000)} free. Free some space, or write to another disk."
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: disk._replace(free=needed))
    with pytest.raises(KeyboardInterrupt):
        write_quantised(file, "q4_k_m", write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "out"]


def run(words: list[object], monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["moemerge", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--type", "q8_0", "--imatrix"],
            "--imatrix: --type q8_0 does not use an importance matrix. Choose q4_k_m or the like.",
        ),
        (
            ["--imatrix-out", "i.gguf"],
            "--imatrix-out: --type auto does not use an importance matrix. Choose q4_k_m or the like.",
        ),
        (
            ["--type", "q4_k_m", "--imatrix-file", "i.gguf", "--imatrix-texts", "a.txt"],
            "--imatrix-file, --imatrix-texts: give one of them, not both.",
        ),
        (
            ["--ollama", "-f"],
            "--ollama -f: is not a model's name for Ollama. Expected letters, digits, `.`, `-` and `_`, such as my-mixture, "
            "user/my-mixture or my-mixture:q4.",
        ),
        (
            ["--type", "iq2_m"],
            "--type iq2_m: llama.cpp makes it only with an importance matrix: add --imatrix, or choose q3_k_s.",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(packages, "find_spec", lambda _: object())
    assert run(["gguf", tmp_path, tmp_path / "m.gguf", *words], monkeypatch, capsys) == (2, f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_into_a_quantised_file_is_refused_before_it_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "llama_cpp" else object())
    (tmp_path / "c.yaml").write_text("{}")
    assert run([tmp_path / "c.yaml", tmp_path / "m.gguf", "--type", "q4_k_m"], monkeypatch, capsys) == (
        2,
        "error: To make q4_k_m, the package llama-cpp-python is needed: pip install llama-cpp-python.\n",
    )


def test_every_type_of_the_engine_can_be_asked_for():
    assert [*GGUF_TYPES] == ["auto", "f32", "f16", "bf16", *FILE_TYPES]


@pytest.mark.parametrize("quiet", [True, False])
def test_where_nothing_but_warnings_is_asked_for_a_file_has_no_notes(tmp_path, monkeypatch, capsys, quiet):
    monkeypatch.setattr(packages, "find_spec", lambda _: object())
    monkeypatch.setattr(quantised_file, "write_quantised", lambda *_, **__: SimpleNamespace(notes=("of its types",)))
    (tmp_path / "out").mkdir()
    words = ["gguf", tmp_path / "out", tmp_path / "m.gguf", "--type", "q4_k_m", *(["-q"] if quiet else [])]
    assert run(words, monkeypatch, capsys) == (0, "" if quiet else "note: of its types\n")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Q4_K_M", "Q4_K_M: To make"),
        (
            "q4km",
            "Invalid value for '--type': 'q4km' is not known; did you mean q4_k_m? See `moemerge merge --help`.\n",
        ),
        (
            "Q4_K",
            "Invalid value for '--type': 'Q4_K' is not known; did you mean q4_k_s? See `moemerge merge --help`.\n",
        ),
        (
            "best",
            f"Invalid value for '--type': 'best' is not known; known: {', '.join(GGUF_TYPES)}. See `moemerge merge --help`.\n",
        ),
    ],
)
def test_types_are_read_as_others_write_them(tmp_path, monkeypatch, capsys, name, said):
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "llama_cpp" else object())
    (tmp_path / "c.yaml").write_text("{}")
    code, found = run([tmp_path / "c.yaml", tmp_path / "m.gguf", "--type", name], monkeypatch, capsys)
    assert code == 2
    assert found.endswith(said if "Invalid" in said else "pip install llama-cpp-python.\n")
    assert "Value error" not in found


def test_a_modelfile_is_written_beside_the_file(tmp_path, llamas, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    config = write_config(tmp_path / "c.yaml", llamas[0], llamas[1:3], prompts=False)
    merge(plan_merge(load_config(config)), tmp_path / "out")
    (tmp_path / "out" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    words = ["gguf", tmp_path / "out", tmp_path / "m.gguf", "--ollama", "mix", "-q"]
    code, said = run(words, monkeypatch, capsys)
    assert (code, said) == (0, "")
    assert (tmp_path / "Modelfile").read_text().startswith('FROM ./m.gguf\nTEMPLATE """{{ range .Messages }}')

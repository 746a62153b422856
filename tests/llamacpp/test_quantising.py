"""llama.cpp makes a mixture smaller when asked, and says why where it does not."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.gguf_contents import read_contents
from moemerge.cli.app import main
from moemerge.errors import OutputError
from moemerge.export import quantising
from moemerge.export.imatrix import ColumnSquares, Importance
from moemerge.export.quantising import FILE_TYPES, NEED_IMPORTANCE, quantise, quantised_bytes
from moemerge.export.writing import write_gguf
from tests.support.models import make_model, write_config
from tests.support.sentencepiece_model import VOCAB

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_folder) -> Path:
    """A mixture of three experts in float16: rows of 256, but for those of the down projections, of 96."""
    root = tmp_path_factory.mktemp("quantising")
    base, *experts = (
        make_model(root / name, seed, **SIZES) for seed, name in enumerate(("base", "fox", "code", "chat"))
    )
    shutil.copytree(tokenizer_folder, base, dirs_exist_ok=True)
    merge(plan_merge(load_config(write_config(root / "merge.yaml", base, experts))), root / "merged")
    converter = Path(os.environ["LLAMACPP"], "convert_hf_to_gguf.py")
    command = [sys.executable, converter, root / "merged", "--outtype", "f16", "--outfile", root / "merged.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root / "merged.gguf"


@pytest.fixture(scope="module")
def importance(model) -> Importance:
    """One that likes some columns a hundred times as much as others."""
    generator = np.random.default_rng(0)
    tensors = {}
    for name, tensor in read_contents(model).tensors.items():
        columns, _, *stack = (*tensor.sizes, 1, 1)
        if name.startswith("blk.") and len(tensor.sizes) > 1:
            sums = 100 * 10 ** generator.uniform(-1, 1, (stack[0], columns))
            tensors[name] = ColumnSquares(sums.astype(np.float32), np.full(stack[0], 100))
    return Importance(tensors)


def weights(path: Path, name: str) -> np.ndarray:
    """A tensor in float32."""
    stored = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return gguf.dequantize(stored.data, stored.tensor_type)


@pytest.mark.parametrize("type_", ["q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_m", "q2_k", "q4_0"])
def test_a_mixture_is_made_smaller_and_loads(model, tmp_path, type_):
    steps = []
    found = quantise(model, tmp_path / "q.gguf", type_, threads=1, progress=lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1] == len(steps) == len(read_contents(model).tensors)
    assert found.nbytes == (tmp_path / "q.gguf").stat().st_size < found.source_bytes / 1.4
    assert [path.name for path in tmp_path.iterdir()] == ["q.gguf"]
    made = read_contents(tmp_path / "q.gguf")
    assert made.settings["general.file_type"] == FILE_TYPES[type_]
    # Blocks of 256 do not divide rows of 96.
    downs = {f"blk.{layer}.ffn_down_exps.weight" for layer in range(2)}
    assert found.fallbacks.keys() == (downs if type_ not in {"q8_0", "q4_0"} else set())
    assert len(found.notes) == bool(found.fallbacks)
    assert found.engine == f"llama-cpp-python {llama_cpp.__version__}"
    llama = llama_cpp.Llama(str(tmp_path / "q.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    llama.eval([1, 5, 9, 30])
    assert np.isfinite(llama.scores[:4]).all()
    llama.close()


def test_all_types_that_are_offered_are_made(model, importance, tmp_path):
    tensors = []
    write_gguf(
        model.with_suffix(""), tmp_path / "floats.gguf", room=lambda _file, found, _more=0: tensors.extend(found) or 0
    )
    for type_ in FILE_TYPES:
        found = quantise(model, tmp_path / "q.gguf", type_, importance=importance, threads=1)
        assert found.nbytes < found.source_bytes, type_
        # The room that is asked for is about what is needed; header and vocabulary have their own.
        made = read_contents(tmp_path / "q.gguf")
        weights = made.nbytes - min(tensor.offset for tensor in made.tensors.values())
        assert weights <= quantised_bytes(tensors, type_) < 2 * weights, type_


def test_what_the_engine_does_not_make_without_an_importance_matrix_is_known(model, tmp_path, monkeypatch):
    monkeypatch.setattr(quantising, "NEED_IMPORTANCE", frozenset())
    for type_ in NEED_IMPORTANCE:
        with pytest.raises(OutputError) as caught:
            quantise(model, tmp_path / "q.gguf", type_, threads=1)
        assert str(caught.value) == (
            f"{model}: llama.cpp does not make {type_} of it: this quantization requires an imatrix."
        )
    for type_ in FILE_TYPES.keys() - NEED_IMPORTANCE:
        quantise(model, tmp_path / "q.gguf", type_, threads=1)


def test_what_matters_is_kept_better(model, importance, tmp_path):
    name = "blk.0.ffn_up_exps.weight"
    quantise(model, tmp_path / "plain.gguf", "q4_k_m", threads=1)
    quantise(model, tmp_path / "told.gguf", "q4_k_m", importance=importance, threads=1)
    exact, means = weights(model, name), importance.tensors[name].means()
    told = read_contents(tmp_path / "told.gguf").settings["quantize.imatrix.entries_count"]
    assert told == len(importance.tensors)
    lost = [
        float(((weights(tmp_path / file, name) - exact) ** 2 * means[:, None]).sum())
        for file in ("plain.gguf", "told.gguf")
    ]
    assert lost[1] < 0.9 * lost[0]


def test_each_expert_has_its_own_importance(model, importance, tmp_path):
    """What is told of one expert changes that expert alone."""
    name = "blk.0.ffn_up_exps.weight"
    flat = ColumnSquares(np.ones_like(importance.tensors[name].sums), importance.tensors[name].counts)
    one = ColumnSquares(flat.sums.copy(), flat.counts)
    one.sums[1] = importance.tensors[name].sums[1]
    for file, told in (("flat", flat), ("one", one)):
        quantise(model, tmp_path / f"{file}.gguf", "q4_k_m", importance=Importance({name: told}), threads=1)
    same = (weights(tmp_path / "flat.gguf", name) == weights(tmp_path / "one.gguf", name)).all(axis=(1, 2))
    assert same.tolist() == [True, False, True]


def test_columns_that_nothing_passes_leave_finite_weights(model, importance, tmp_path):
    name = "blk.0.ffn_up_exps.weight"
    told = ColumnSquares(importance.tensors[name].sums.copy(), importance.tensors[name].counts)
    told.sums[:, :200] = 0
    told.sums[2] = 0
    for type_ in ("q4_k_m", "q2_k", "iq4_xs", "q3_k_m"):
        quantise(model, tmp_path / "q.gguf", type_, importance=Importance({name: told}), threads=1)
        found, exact = weights(tmp_path / "q.gguf", name), weights(model, name)
        assert np.isfinite(found).all()
        assert np.abs(found).max() <= 1.5 * np.abs(exact).max(), type_


def test_an_engine_that_ends_its_process_is_one_message(model, tmp_path):
    content = model.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content.replace(b"llama.expert_count", b"llama.expert_cownt"))
    with pytest.raises(OutputError) as caught:
        quantise(broken, tmp_path / "q.gguf", "q4_k_m")
    assert str(caught.value) == (
        f"{broken}: llama.cpp does not make q4_k_m of it: GGML_ASSERT(n_expert_used_max <= hparams.n_expert) failed."
    )
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(OutputError, match="data is not within the file bounds, model is corrupted or incomplete.$"):
        quantise(broken, tmp_path / "q.gguf", "q4_k_m")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


def test_a_full_disk_is_named(model, tmp_path):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2); from pathlib import Path\n"
        "from moemerge.export.quantising import quantise\n"
        "try: quantise(Path(sys.argv[1]), Path(sys.argv[2]), 'q4_k_m')\n"
        "except Exception as error: print(error)"
    )
    command = [sys.executable, "-c", code, model, tmp_path / "q.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"{model}: llama.cpp does not make q4_k_m of it: basic_ios::clear: iostream error: the disk is full or cannot "
        "be written.\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run(monkeypatch, capsys):
    """From words of a command line to what it says on stderr; it has to succeed."""

    def of(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["moemerge", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return printed.err

    return of


def test_the_pages_commands_work(model, tmp_path, monkeypatch, run):
    page = (Path(__file__).parents[2] / "docs" / "gguf.md").read_text()
    lines = re.findall(r"^    moemerge ([^#\n]+)", page, re.MULTILINE)
    lines = [line for line in lines if "--type" in line and "q8_0" not in line]
    assert len(lines) == 5
    shutil.copytree(model.with_suffix(""), tmp_path / "out")
    shutil.copy(model.with_name("merge.yaml"), tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("What is said of one expert. " * 30)
    monkeypatch.chdir(tmp_path)
    for line in lines:
        Path("mixture.gguf").unlink(missing_ok=True)
        run(*line.split(), "-q")
        assert Path("mixture.gguf").is_file()


def test_the_command_line_quantises_both_ways(model, tmp_path, run):
    folder, file = model.with_suffix(""), tmp_path / "merged.gguf"
    (tmp_path / "a.txt").write_text("What is said of one expert. " * 30)
    said = run("gguf", folder, file, "--type", "q4_k_m", "--imatrix-texts", tmp_path / "a.txt", "--imatrix-out",
               tmp_path / "i.gguf")  # fmt: skip
    assert "note: q4_k_m: rows of 96 numbers are not a whole number of its blocks of 256, so llama.cpp " in said
    made = read_contents(file)
    assert made.settings["general.file_type"] == FILE_TYPES["q4_k_m"]
    assert made.settings["quantize.imatrix.entries_count"] == 14
    again = tmp_path / "again.gguf"
    run("gguf", folder, again, "--type", "q4_k_m", "--imatrix-file", tmp_path / "i.gguf", "-q")
    assert again.read_bytes() == file.read_bytes()
    # Without a checkpoint in between.
    run("gguf", folder, file, "--type", "q4_k_m", "--overwrite", "-q")
    direct = tmp_path / "direct" / "merged.gguf"
    direct.parent.mkdir()
    run(model.with_name("merge.yaml"), direct, "--type", "q4_k_m", "-q")
    assert direct.read_bytes() == file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.txt",
        "again.gguf",
        "direct",
        "i.gguf",
        "merged.gguf",
    ]
    assert [path.name for path in direct.parent.iterdir()] == ["merged.gguf"]

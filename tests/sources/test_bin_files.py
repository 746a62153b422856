"""`.bin` files: each number is what torch reads, what it cannot be is said, and nothing in them runs or grows."""

import json
import os
import random
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._utils import _rebuild_device_tensor_from_cpu_tensor as _rebuild_from_cpu

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint import packed
from moemerge.checkpoint.files import read_exactly
from moemerge.checkpoint.packed import Packed, notes_on
from moemerge.checkpoint.unreadable import reasons
from moemerge.checks.inspection import inspect_checkpoint
from moemerge.checks.verification import verify_merge
from moemerge.errors import CheckpointError, IncompatibleError
from moemerge.evaluation.runnable import open_dense
from moemerge.merging.options import MergeOptions
from moemerge.sources.bin_files import read_pickle
from moemerge.sources.model_folder import ModelFolder
from moemerge.sources.tensor_tables import read_tensor_table
from tests.support.machine import SINGLE
from tests.support.models import load_weights, make_model, write_config

BIN = "pytorch_model.bin"
TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "C64": torch.complex64,
    "U16": torch.uint16,
}


def read(folder: Path):
    return read_tensor_table(ModelFolder("", folder, folder, {}), print)


def raw(tensor: torch.Tensor) -> bytes:
    row = torch.empty(tensor.numel(), dtype=tensor.dtype)
    row.copy_(tensor.detach().reshape(-1))
    return row.view(torch.uint8).numpy().tobytes()


def stored_bytes(tensor, start: int = 0, nbytes: int | None = None) -> bytes:
    count = tensor.nbytes - start if nbytes is None else nbytes
    with tensor.path.open(start, count) if isinstance(tensor.path, Packed) else tensor.open() as reader:
        return read_exactly(reader, count)


def zip_again(path: Path, way: int = zipfile.ZIP_STORED, **changed: bytes) -> None:
    """Write an archive as other programs would: in another order, with entries for folders, compressed."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    folder = next(iter(records)).partition("/")[0]
    with zipfile.ZipFile(path, "w", way) as archive:
        archive.writestr(f"{folder}/", b"")
        archive.writestr(f"{folder}/data/", b"")
        for name, data in reversed(records.items()):
            archive.writestr(name, changed.get(name.rpartition("/")[2].partition(".")[0], data))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Hostile()}, BIN)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / BIN}: cannot be read as weights only (it names '{os.mkdir.__module__}.mkdir', which is not a part of "
        "weights). Convert it to safetensors with a program that you trust."
    )
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"not a zip",
            "is not a zip archive as PyTorch writes it since 1.6, or is cut off (File is not a zip file). Download it again, or convert it to safetensors with a program that you trust.",
        ),
        ([1, 2], "expected a table of tensors, found list."),
        ({"epoch": 3}, "expected a table of tensors, found 'epoch' -> int."),
        (
            {"epoch": 3, "state_dict": {"a": torch.ones(2)}},
            "expected a table of tensors, found 'epoch' -> int. Save what is in its 'state_dict' as a file of its own.",
        ),
        ({3: torch.ones(2)}, "expected names of tensors, found 3 -> StridedTensor."),
        ({"x" * 251: torch.ones(2)}, f"expected names of tensors, found '{'x' * 59} -> StridedTensor."),
    ],
)
def test_a_strange_pickle_gets_a_message(tmp_path, content, message):
    path = tmp_path / BIN
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert str(caught.value) == f"{path}: {message}"


def everything() -> dict:
    """Tensors in all the ways in which torch stores those that can be read."""
    torch.manual_seed(0)
    matrix = torch.randn(20, 30)
    told = torch.nn.Parameter(matrix.clone())
    told.comment = "an attribute"
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    return {
        "plain": matrix, "tied": matrix, "part": matrix[7:], "parameter": torch.nn.Parameter(matrix), "told": told,
        "transposed": matrix.T, "steps": matrix[3::3, 5:25:7], "column": matrix[:, 3], "turned": torch.randn(2, 3, 4).permute(2, 0, 1),
        "expanded": torch.randn(1, 30).expand(20, 30), "overlapping": torch.randn(60).as_strided((10, 10), (3, 2), 5),
        "negated": torch._neg_view(matrix.half()), "imaginary": torch.complex(matrix, matrix).conj().imag,
        "negated and transposed": torch._neg_view(matrix.bfloat16()).T, "complex": torch.complex(matrix, matrix),
        "number": torch.tensor(3.0), "empty": torch.empty(0, 5), "truths": torch.tensor([True, False]),
        "eight bits": matrix.to(torch.float8_e4m3fn), "sixteen bits": torch.arange(4).to(torch.uint16),
        "half": matrix.half(), "bfloat16": matrix.bfloat16(), **module.state_dict(),
    }  # fmt: skip


@pytest.mark.parametrize("way", ["as saved", "zipped again", "compressed"])
def test_each_tensor_is_what_torch_reads(tmp_path, way):
    tensors = everything()
    tensors["remembered"] = torch.randn(3)
    tensors["remembered"].comment = "an attribute"
    torch.save(tensors, tmp_path / BIN)
    if way != "as saved":
        zip_again(tmp_path / BIN, zipfile.ZIP_DEFLATED if way == "compressed" else zipfile.ZIP_STORED)
    found = read(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert TYPES[found[name].dtype] == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert stored_bytes(found[name]) == raw(tensor), name
    for name in ("transposed", "negated", "overlapping"):
        assert stored_bytes(found[name], 13, 150) == raw(tensors[name])[13:163]
    ordered = "9 tensors of pytorch_model.bin, such as transposed, do not lie row by row as they are, and are put in order while they are read"
    compressed = "pytorch_model.bin is compressed, and decompressed while it is read; transformers takes the compressed bytes for numbers"
    assert list(notes_on(found)) == [compressed if way == "compressed" else ordered]


def test_a_module_s_state_is_read(tmp_path):
    module = torch.nn.Linear(3, 4)
    torch.save(module.state_dict(), tmp_path / BIN)  # an OrderedDict with attributes
    found = read(tmp_path)
    assert stored_bytes(found["weight"]) == raw(module.weight)
    assert found.keys() == {"weight", "bias"}


@pytest.mark.parametrize("seed", range(40))
def test_any_view_is_put_in_order_in_small_blocks(tmp_path, monkeypatch, seed):
    chosen = random.Random(seed)
    monkeypatch.setattr(packed, "_BLOCK_BYTES", chosen.choice([8, 28, 64, 2**20]))
    monkeypatch.setattr(packed, "_SPAN_ELEMENTS", chosen.choice([1, 5, 50]))
    monkeypatch.setattr(packed, "_SMALL", chosen.choice([1, 3, 100]))
    view = torch.randn([chosen.randint(1, 9) for _ in range(chosen.randint(1, 4))])
    view = view.permute(*chosen.sample(range(view.dim()), view.dim()))
    for axis in range(view.dim()):
        start = chosen.randrange(view.shape[axis])
        view = view.narrow(axis, start, chosen.randint(1, view.shape[axis] - start))
        view = view[(slice(None),) * axis + (slice(None, None, chosen.randint(1, 3)),)]
    if seed % 3 == 0:
        view = view.unsqueeze(0).expand(chosen.randint(1, 4), *view.shape)
    if seed % 4 == 0:
        view = torch._neg_view(view)
    torch.save({"a": view}, tmp_path / BIN)
    if seed % 5 == 0:
        zip_again(tmp_path / BIN, zipfile.ZIP_DEFLATED)
    tensor, expected = read_pickle(tmp_path / BIN)["a"], raw(view)
    assert stored_bytes(tensor) == expected
    start = chosen.randrange(len(expected))
    count = chosen.randint(1, len(expected) - start)
    if isinstance(tensor.path, Packed):
        assert stored_bytes(tensor, start, count) == expected[start : start + count]


@pytest.mark.filterwarnings("ignore")  # torch's own, of quantised and nested tensors
def test_what_cannot_be_read_says_why(tmp_path):
    matrix = torch.randn(20, 30)
    kinds = {
        "meta": (matrix.to("meta"), "is a meta tensor, without numbers"),
        "sparse": (matrix.to_sparse(), "is a sparse tensor"),
        "rows": (matrix.to_sparse_csr(), "is a sparse tensor"),
        "quantised": (torch.quantize_per_tensor(matrix, 0.1, 0, torch.qint8), "is a quantised tensor"),
        "nested": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is a nested tensor"),
        "conjugated": (torch.complex(matrix, matrix).conj(), "is complex and conjugated"),
        "wide": (matrix.to(torch.complex128), "holds numbers of a type that safetensors has no name for"),
        "epoch": (3, "is not a tensor but int"),
        "table": ({"a": matrix}, "is not a tensor but dict"),
        "list": ([matrix], "is not a tensor but list"),
        "nothing": (None, "is not a tensor but NoneType"),
        "bytes": (b"abc", "is not a tensor but an object"),
        "large": (2**70, "is not a tensor but int"),
    }
    torch.save({"fine": matrix} | {name: value for name, (value, _) in kinds.items()}, tmp_path / BIN)
    found = read(tmp_path)
    assert reasons(found) == {name: reason for name, (_, reason) in kinds.items()}
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin: tensor 'sparse' is needed, but is a sparse tensor\."
    ):
        found["sparse"].open()


def test_entries_that_are_no_tensors_need_not_be_in_the_index(tmp_path):
    files = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    for name, file in files.items():
        torch.save({name: torch.ones(1), "epoch": 3}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert reasons(read(tmp_path)) == {"epoch": "is not a tensor but int"}
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    assert reasons(read(tmp_path)) == {"epoch": "is not a tensor but int"}


def test_an_archive_whose_bytes_are_not_the_tensors_is_refused(tmp_path):
    path = tmp_path / BIN
    for message, changed in {
        "tensor 'a' does not fit into its record. Download the file again.": {"0": b"\0" * 396},
        "was written on a big-endian machine. Convert it to safetensors.": {"byteorder": b"big"},
    }.items():
        torch.save({"a": torch.zeros(100)}, path)
        zip_again(path, **changed)
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path)
        assert str(caught.value) == f"{path}: {message}"
    for names, message in {
        ("a/data.pkl", "a/DATA.PKL"): "two records of one name",
        ("a/data.json",): "it has no data.pkl",
        ("data.pkl",): "it has no data.pkl",
    }.items():
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"\x80\x02}.")
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path)
        assert str(caught.value) == (
            f"{path}: is not a zip archive as PyTorch writes it since 1.6, or is cut off ({message}). Download it again, or convert it to "
            "safetensors with a program that you trust."
        )


def pickled(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


WEIGHTS_ONLY = "cannot be read as weights only ({}). Convert it to safetensors with a program that you trust."
NO_ARCHIVE = (
    "is not a zip archive as PyTorch writes it since 1.6, or is cut off ({}). Download it again, or convert it to safetensors with a program that "
    "you trust."
)


class Made:
    """Is pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def test_a_tensor_of_a_tpu_is_read_as_it_lies(tmp_path):
    matrix = torch.randn(2, 3)
    made = {
        name: Made(_rebuild_from_cpu, matrix, dtype, "xla:0", False)
        for name, dtype in (("same", torch.float32), ("other", torch.int8))
    }
    torch.save(made, tmp_path / BIN)
    found = read(tmp_path)
    assert stored_bytes(found["same"]) == raw(matrix)
    assert reasons(found) == {"other": "is a tensor of another type than its numbers"}


STORED = torch.zeros(4)._typed_storage()
WRONG_CALLS = {
    "a shape that is no tuple": Made(torch._utils._rebuild_tensor_v2, STORED, 0, 4, (1,), False, {}),
    "a dtype that is no name": Made(torch._utils._rebuild_tensor_v3, STORED, 0, (4,), (1,), False, {}, "F32", {}),
    "a parameter of a number": Made(torch.nn.parameter.Parameter, 3),
    "a size of a number": Made(torch.Size, 3),
    "attributes of a size": Made(torch._tensor._rebuild_from_type_v2, torch.Size, torch.Size, (), {}),
}


@pytest.mark.parametrize("what", WRONG_CALLS)
def test_a_call_with_arguments_of_another_kind_is_refused(tmp_path, what):
    torch.save({"a": WRONG_CALLS[what]}, tmp_path / BIN)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    told = re.sub(r"byte \d+", "byte N", str(caught.value))
    assert told == f"{tmp_path / BIN}: {WEIGHTS_ONLY.format('damaged at byte N: TypeError')}"


def persistent(count: int) -> bytes:
    """Instructions that push a storage of the record `0`."""
    return (
        b"("
        + pickled("storage")
        + b"ctorch\nFloatStorage\n"
        + pickled("0")
        + pickled("cpu")
        + b"K"
        + bytes([count])
        + b"tQ"
    )


def test_instructions_in_a_wrong_place_are_refused(tmp_path):
    wrong = "damaged at byte {}: TypeError"
    for data, message in (
        (b"X\xff\0\0\0a", "the pickle is cut off"),
        (b"}K\x01a.", wrong.format(6)),  # a number after what is no list
        (b"K\x01}b.", wrong.format(6)),  # attributes of a number
        (b"K\x01)R.", wrong.format(6)),  # a call of a number
        (b"(K\x01K\x01K\x01K\x01K\x01tQ.", wrong.format(15)),  # a storage of numbers
        (persistent(4) + persistent(5) + b".", "two storages share a record"),
    ):
        with zipfile.ZipFile(tmp_path / BIN, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02" + data)
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path)
        assert str(caught.value) == f"{tmp_path / BIN}: {WEIGHTS_ONLY.format(message)}"


def test_records_of_other_kinds_and_sizes_are_refused(tmp_path):
    path = tmp_path / BIN

    def refusal() -> str:
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path)
        return str(caught.value).removeprefix(f"{path}: ")

    torch.save({"a": torch.zeros(100)}, path)
    zip_again(path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data/0"))
        records = {record.filename: archive.read(record) for record in archive.infolist()}
        begin = archive.getinfo(name).header_offset
    # In the directory, its name stands behind 46 bytes; its compressed size is at 20.
    entry = content.rindex(name.encode()) - 46
    path.write_bytes(content[: entry + 20] + struct.pack("<I", 8) + content[entry + 24 :])
    assert refusal() == NO_ARCHIVE.format("a record has two sizes")
    path.write_bytes(content[:begin] + b"PK\0\0" + content[begin + 4 :])
    assert refusal() == NO_ARCHIVE.format("the record of storage 0 is not there")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        for record, data in records.items():
            archive.writestr(record, data)
    assert refusal() == NO_ARCHIVE.format("its data.pkl is encrypted, or compressed in an unusual way")
    for kept in (True, False):
        with zipfile.ZipFile(path, "w") as archive:
            for record, data in records.items():
                if record != name:
                    archive.writestr(record, data)
                elif kept:
                    archive.writestr(record, data, zipfile.ZIP_BZIP2)
        if kept:
            assert reasons(read(tmp_path)) == {"a": "is encrypted, or compressed in an unusual way"}
    assert refusal() == "tensor 'a' does not fit into its record. Download the file again."


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"K\x0aK\x0a\x86", b"K\x0aK\x0b\x86", "tensor 'a' does not fit into its record. Download the file again."),
        (b"K\x00K\x0aK\x0a", b"K\x01K\x0aK\x0a", "tensor 'a' does not fit into its record. Download the file again."),
        (b"Kd", b"K\xd0", "tensor 'a' does not fit into its record. Download the file again."),
        (b"K\x0aK\x01\x86", b"K\x0aK\xff\x86", "tensor 'a' does not fit into its record. Download the file again."),
        (b"K\x0aK\x0a\x86", b"K\x0aJ\xff\xff\xff\xff\x86", "cannot be read as weights only (a size that is not one). Convert it to safetensors with a program that you trust."),
        (b"K\x0aK\x0a\x86", b"(" + b"K\x01" * 17 + b"t", "cannot be read as weights only (a tensor of 17 axes and 2 strides). Convert it to safetensors with a program that you trust."),
        (b"_rebuild_tensor_v2", b"_rebuild_tensor_v9", "expected a table of tensors, found 'a' -> an object."),
        (b"storage", b"storages", "cannot be read as weights only (damaged at byte "),
    ],
)  # fmt: skip
def test_a_tensor_that_leaves_its_record_is_refused(tmp_path, before, after, message):
    path = tmp_path / BIN
    torch.save({"a": torch.zeros(10, 10)}, path)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        data = archive.read(name)
    assert before in data
    zip_again(path, data=data.replace(before, after, 1))
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_compressed_record_that_is_damaged_is_an_error(tmp_path):
    path = tmp_path / BIN
    torch.save({"a": torch.zeros(100_000)}, path)
    zip_again(path, zipfile.ZIP_DEFLATED)
    tensor = read(tmp_path)["a"]
    content = bytearray(path.read_bytes())
    content[tensor.path.stored.start + 20] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="tensor 'a' cannot be read"):
        stored_bytes(tensor)


LONG = 4 * 2**20 - 1000
NESTED = b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60  # a tuple of 2**60 tuples, which takes for ever to hash
HOSTILE = {
    "a key that hangs": (NESTED + b"}h\x00K\x01s.", WEIGHTS_ONLY.format("tuple as a key in dict")),
    "a list without end": (NESTED + b"}" + pickled("a") + b"h\x00s.", "expected a table of tensors, found 'a' -> tuple."),
    "a table in itself": (b"\x80\x02}q\x00" + pickled("a") + b"h\x00s.", "expected a table of tensors, found 'a' -> dict. Save what is in its 'a' as a file of its own."),
    "a large number": (b"\x80\x02\x8b" + struct.pack("<I", LONG) + b"\xff" * LONG + b".", WEIGHTS_ONLY.format("instruction b'\\x8b' at byte 2, which no file of weights has")),
    "a large power": (b"\x80\x02coperator\npow\nJ\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86R.", WEIGHTS_ONLY.format("it names 'operator.pow', which is not a part of weights")),
    "much memory": (b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "expected a table of tensors, found an object."),
    "marks": (b"\x80\x02" + b"(" * LONG, WEIGHTS_ONLY.format("it is longer than a table of weights")),
    "tables": (b"\x80\x02" + b"}" * LONG, WEIGHTS_ONLY.format("it is longer than a table of weights")),
    "depth": (b"\x80\x02)" + b"\x85" * LONG, WEIGHTS_ONLY.format("it is longer than a table of weights")),
    "chosen keys": (b"\x80\x02}(" + b"".join(b"\x8a\x08" + struct.pack("<q", i * (2**61 - 1) % 2**62) + b"N" for i in range(100_000)) + b"u.", WEIGHTS_ONLY.format("int as a key in dict")),
    "a long name": (b"\x80\x02c" + b"t" * LONG + b"\nx\n.", WEIGHTS_ONLY.format(f"it names '{'t' * 60}', which is not a part of weights")),
    "a long key": (b"\x80\x02}X" + struct.pack("<I", LONG) + b"a" * LONG + b"Ns.", f"expected names of tensors, found '{'a' * 59} -> NoneType."),
    "a long pickle": (b"\x80\x02" + b"N" * LONG * 2, NO_ARCHIVE.format("data.pkl is too long for a table of weights")),
}  # fmt: skip
MEASURE = """
import json, sys, time
from pathlib import Path
from moemerge.errors import MoemergeError
from moemerge.sources.bin_files import read_pickle
found = {}
for path in sorted(Path(sys.argv[1]).glob("*.bin")):
    start = time.monotonic()
    try:
        message = str(list(read_pickle(path)))
    except MoemergeError as error:
        message = str(error)
    found[path.stem] = time.monotonic() - start, message
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"peak": int(peak) * 1024, "torch": "torch" in sys.modules, "found": found}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
def test_hostile_archives_are_refused_at_once_in_little_memory(tmp_path):
    expected = {}
    for name, (data, message) in HOSTILE.items():
        with zipfile.ZipFile(tmp_path / f"{name}.bin", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/data.pkl", data)
        expected[name] = message
    with zipfile.ZipFile(tmp_path / "records.bin", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        for number in range(20_000):
            archive.writestr(f"a/{number:x}", b"")
    expected["records"] = "[]"
    with (tmp_path / "directory.bin").open("wb") as file:  # with holes
        file.truncate(8 * 2**30)
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 2, 1000, 0))
    expected["directory"] = NO_ARCHIVE.format("its directory is too long for a file of weights")
    command, alone = [sys.executable, "-c", MEASURE, tmp_path], {**os.environ}
    alone.pop("COVERAGE_PROCESS_CONFIG", None)  # which takes time, too
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=alone)
    measured = json.loads(done.stdout)
    for name, (seconds, message) in measured["found"].items():
        assert message.removeprefix(f"{tmp_path / name}.bin: ") == expected.pop(name), name
        assert seconds < 2, (name, seconds)
        assert len(message) < 4000
    assert not expected
    assert not measured["torch"]
    assert measured["peak"] < 300e6


UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.2.mlp.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
KEY = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture
def pickle_of(tmp_path, llamas):
    """Makes a model with a `.bin`: that of an expert, some of its tensors stored in another way."""

    def make(way: int | None = None, **changed):
        folder = make_model(tmp_path / "expert", 1)
        (folder / SINGLE).unlink()
        torch.save(load_file(llamas[1] / SINGLE) | changed, folder / BIN)
        if way is not None:
            zip_again(folder / BIN, way)
        return folder

    return make


def merged(tmp_path, base, experts, **keys):
    plan = plan_merge(load_config(write_config(tmp_path / "c.yaml", base, experts, prompts=False, **keys)))
    merge(plan, tmp_path / "out", MergeOptions(overwrite=True))
    return plan, load_weights(tmp_path / "out")


def test_strange_pickles_give_the_same_merge(tmp_path, llamas, pickle_of):
    base, fox, code, _ = llamas
    tensors = load_file(fox / SINGLE)
    _, expected = merged(tmp_path, base, [fox, code])
    folder = pickle_of(
        **{
            UP: tensors[UP].T.contiguous().T,
            DOWN: torch._neg_view(-tensors[DOWN]),
            QUERY: tensors[QUERY].to_sparse(),
            KEY: tensors[KEY].to("meta"),
            "epoch": 3,
        }
    )
    plan, found = merged(tmp_path, base, [folder, code])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [note for note in plan.notes if str(folder) in note] == [
        f"experts[0] {folder}: left out: tensor {KEY} is a meta tensor, without numbers",
        f"experts[0] {folder}: left out: tensor {QUERY} is a sparse tensor",
        f"experts[0] {folder}: left out: tensor epoch is not a tensor but int",
        f"experts[0] {folder}: 2 tensors of pytorch_model.bin, such as {UP}, do not lie row by row as they are, and are put in order while they are read",
    ]
    assert verify_merge(plan, tmp_path / "out").differences == ()
    assert inspect_checkpoint(str(folder)).warnings[:3] == (
        f"{KEY} is a meta tensor, without numbers",
        f"{QUERY} is a sparse tensor",
        "epoch is not a tensor but int",
    )
    for keys, problem in (
        ({"shared_weights": "average"}, f"experts[0] {folder}: {QUERY} is a sparse tensor"),
        ({"base_model": str(folder)}, f"base_model: tensor {QUERY} is a sparse tensor"),
    ):
        with pytest.raises(IncompatibleError) as caught:
            plan_merge(load_config(write_config(tmp_path / "c.yaml", base, [folder, code], prompts=False, **keys)))
        assert problem in caught.value.problems
    with pytest.raises(IncompatibleError) as caught:
        open_dense(str(folder), "expert", print)
    assert str(caught.value) == (
        f"{folder}: cannot be run:\n  - {KEY} is a meta tensor, without numbers\n  - {QUERY} is a sparse tensor"
    )


def test_what_is_needed_and_cannot_be_read_is_refused(tmp_path, llamas, pickle_of):
    folder = pickle_of(**{UP: load_file(llamas[1] / SINGLE)[UP].to_sparse()})
    config = write_config(tmp_path / "c.yaml", llamas[0], [folder, llamas[2]], prompts=False)
    with pytest.raises(IncompatibleError) as caught:
        plan_merge(load_config(config))
    assert caught.value.problems == (f"experts[0] {folder}: tensor {UP} is a sparse tensor",)


def test_a_compressed_pickle_is_merged_and_runs(tmp_path, llamas, pickle_of):
    base, fox, code, _ = llamas
    _, expected = merged(tmp_path, base, [fox, code])
    folder = pickle_of(zipfile.ZIP_DEFLATED)
    plan, found = merged(tmp_path, base, [folder, code])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    note = "pytorch_model.bin is compressed, and decompressed while it is read; transformers takes the compressed bytes for numbers"
    assert f"experts[0] {folder}: {note}" in plan.notes
    assert note in inspect_checkpoint(str(folder)).warnings
    running, plain = open_dense(str(folder), "a", print), open_dense(str(fox), "b", print)
    assert torch.equal(running.read(UP), plain.read(UP))
    table = "model.embed_tokens.weight"
    assert torch.equal(running.rows(table, [3, 7]), plain.rows(table, [3, 7]))

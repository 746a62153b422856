"""Files as hostile or broken as they come: headers, indexes, shard layout, copies."""

import errno
import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moemerge.checkpoint import copy, header, json_text, writer
from moemerge.checkpoint.derived import read_values
from moemerge.checkpoint.header import TensorInfo, build_header, read_header
from moemerge.checkpoint.index import Weights, choose_weights, read_json, read_weight_map
from moemerge.checkpoint.pieces import Piece
from moemerge.checkpoint.shards import TensorSpec, layout_shards, parse_size
from moemerge.checkpoint.writer import ShardWriter
from moemerge.errors import CheckpointError, OutputError
from moemerge.sources.local import resolve_file
from moemerge.sources.model_folder import ModelFolder, open_model
from moemerge.sources.tensor_tables import read_tensor_table
from tests.support.models import edit_json

NOWHERE = Path("/proc/self/mem")


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_reads_what_the_reference_library_writes(tmp_path):
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
    found = read_header(tmp_path / "m.safetensors")
    assert {name: (t.dtype, t.shape, t.nbytes) for name, t in found.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("BF16", (5,), 10),
        "empty": ("F32", (0, 4), 0),
    }
    data = (tmp_path / "m.safetensors").read_bytes()
    assert data[found["a"].start :][:24] == tensors["a"].numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 4)}, b"123", "tensor 'a': ends at byte {end}, but the file is"),
        ({"a": entry(0, 4), "b": entry(3, 5)}, b"12345", "tensor 'b': overlaps the tensor before it by 1 bytes"),
        ({"a": entry(0, 2), "b": entry(3, 5)}, b"12345", "tensor 'b': 1 bytes before it belong to no tensor"),
        ({"a": entry(0, 2)}, b"12345", "3 bytes after the last tensor belong to no tensor"),
        ({"a": entry(0, 4, [3])}, b"1234", "tensor 'a': U8 [3] takes 3 bytes, but its data_offsets span 4"),
        ({"a": entry(0, 4, [-4])}, b"1234", "tensor 'a': the shape has to be a list of sizes, found [-4]"),
        ({"a": entry(0, 4, [True, 4])}, b"1234", "tensor 'a': the shape has to be a list of sizes"),
        ({"a": entry(0, 4, [2**62] * 400_000)}, b"1234", "tensor 'a': the shape has to be a list of sizes"),
        ({"a": entry(0, 4, [2**70])}, b"1234", "tensor 'a': the shape has to be a list of sizes"),
        ({"a": entry(0, 4, dtype="Q9")}, b"1234", "tensor 'a': unknown dtype 'Q9'"),
        ({"a": entry(4, 0, [4])}, b"1234", "tensor 'a': data_offsets have to be [begin, end], found [4, 0]"),
        ({"a": {"dtype": "U8"}}, b"", "tensor 'a': expected dtype, shape and data_offsets"),
        ({"a": 5}, b"", "tensor 'a': expected dtype, shape and data_offsets"),
        ([1], b"", "the safetensors header is not a JSON object"),
        (b"{", b"", "the safetensors header is not valid JSON"),
        (b" {}", b"", "the safetensors header is not a JSON object"),
        ({"__metadata__": {"format": 1}}, b"", "__metadata__ in the header has to be a table of texts"),
        ({"__metadata__": []}, b"", "__metadata__ in the header has to be a table of texts"),
        ({"a\ud800": entry(0, 4)}, b"1234", "the header holds half of a letter, a lone surrogate, in 'a\\ud800'"),
        (b'{"a": 1, "a": 1}', b"", "the header names 'a' twice"),
    ],
)
def test_a_wrong_header_is_named_with_file_and_tensor(tmp_path, header, data, message):
    path = raw(tmp_path / "m.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: {message.format(end=path.stat().st_size + 1)}")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 1000])
def test_a_huge_header_length_is_refused_unread(tmp_path, length):
    path = raw(tmp_path / "m.safetensors", {}, length=length)
    with pytest.raises(CheckpointError, match=f"announces a header of {length} bytes"):
        read_header(path)


@given(st.binary(max_size=200))
def test_random_bytes_never_crash_the_reader(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("random") / "m.safetensors"
    path.write_bytes(data)
    try:
        read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017  either a table or this error


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 40), max_size=6), st.integers(0, 60))
def test_every_cut_of_a_file_is_noticed(tmp_path_factory, sizes, cut):
    path = tmp_path_factory.mktemp("cut") / "m.safetensors"
    sizes.pop("__metadata__", None)
    tensors = [(name, "U8", (size,), size) for name, size in sizes.items()]
    data = build_header(tensors, {}) + bytes(sum(sizes.values()))
    path.write_bytes(data)
    assert {name: tensor.nbytes for name, tensor in read_header(path).items()} == sizes
    if 0 < cut <= len(data):
        path.write_bytes(data[:-cut])
        with pytest.raises(CheckpointError):
            read_header(path)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=5), st.integers(0, 20))
def test_only_tensors_that_fill_the_data_without_overlap_are_read(tmp_path_factory, ranges, data_bytes):
    path = tmp_path_factory.mktemp("ranges") / "m.safetensors"
    raw(path, {f"t{n}": entry(begin, begin + size) for n, (begin, size) in enumerate(ranges)}, bytes(data_bytes))
    covered = sorted(byte for begin, size in ranges for byte in range(begin, begin + size))
    inside = [begin for begin, size in ranges if size == 0 and not _is_border(begin, ranges)]
    if covered == list(range(data_bytes)) and not inside:
        assert len(read_header(path)) == len(ranges)
    else:
        with pytest.raises(CheckpointError):
            read_header(path)


def _is_border(byte: int, ranges: list[tuple[int, int]]) -> bool:
    """Whether an empty tensor at this byte lies between others."""
    return byte in {0} | {begin + size for begin, size in ranges if size}


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "C:x"])
def test_a_weight_map_may_not_leave_its_folder(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t": name}}))
    with pytest.raises(CheckpointError, match="a weight_map may name only files beside it"):
        read_weight_map(index)


def read(folder: Path):
    return read_tensor_table(ModelFolder("", folder, folder, {}), print)


def test_index_and_headers_have_to_agree(tmp_path):
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model-00001-of-00001.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    file = "model-00001-of-00001.safetensors"
    for weight_map, message in (
        (
            {"a": file, "b": file, "c": file},
            "says that tensor 'c' is in model-00001-of-00001.safetensors, whose header has no",
        ),
        ({"a": file, "b": "gone.safetensors"}, r"names 1 file\(s\) that are not there: gone.safetensors"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path)


ONE, TWO, WHOLE = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors"
INDEX = "model.safetensors.index.json"


BESIDE = "m: has an index of shards beside {0}, which is read alone, as transformers does"


@pytest.mark.parametrize(
    ("files", "weight_map", "expected"),
    [
        ({WHOLE: 1.0, ONE: 2.0}, {"model.embed_tokens.weight": ONE}, (1.0, [BESIDE.format(WHOLE)])),
        ({WHOLE: 1.0}, {"model.embed_tokens.weight": ONE}, (1.0, [BESIDE.format(WHOLE)])),
        ({ONE: 2.0, "pytorch_model.bin": 3.0}, {"model.embed_tokens.weight": ONE}, (2.0, [])),
        ({"pytorch_model.bin": 3.0, "pytorch_model-00001-of-00001.bin": 4.0}, {},
         (3.0, [BESIDE.format("pytorch_model.bin")])),
        ({ONE: 2.0, TWO: 5.0}, {"model.embed_tokens.weight": ONE, "model.norm.weight": TWO},
         (5.0, ["m: model.safetensors.index.json does not say of 1 tensor(s), such as 'model.embed_tokens.weight', that "
                "they are in model-00002-of-00002.safetensors; they are read from there, the last of two, as transformers "
                "does"])),
        ({"pytorch_model.bin": 3.0, "model.fp16.safetensors": 7.0}, {},
         (3.0, [BESIDE.format("pytorch_model.bin")])),
        ({"pytorch_model-00001-of-00001.bin": 3.0, ONE: 7.0, "weights.safetensors": 8.0}, {}, (3.0, [])),
        ({ONE: 2.0, WHOLE: None}, {"model.embed_tokens.weight": ONE}, (2.0, [])),
        ({WHOLE: 1.0, "mine.safetensors": 6.0}, None,
         (6.0, ["m: config.json names mine.safetensors as the file of its weights, and that is read"])),
    ],
)  # fmt: skip
def test_the_weights_of_a_folder_are_those_that_transformers_takes(tmp_path, llamas, files, weight_map, expected):
    for path in llamas[0].iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(llamas[0] / WHOLE)
    embeddings = "model.embed_tokens.weight"
    for name, number in files.items():
        if number is None:
            (tmp_path / name).symlink_to(tmp_path / "gone")
            continue
        own = (
            tensors if name != ONE or TWO not in files else {embeddings: 0, "lm_head.weight": tensors["lm_head.weight"]}
        )
        own = {
            key: value.clone()
            for key, value in (own | {embeddings: torch.full_like(tensors[embeddings], number)}).items()
        }
        torch.save(own, tmp_path / name) if name.endswith(".bin") else save_file(own, tmp_path / name, {"format": "pt"})
    if weight_map is None:
        edit_json(tmp_path / "config.json", transformers_weights="mine.safetensors")
    elif weight_map:
        rest = dict.fromkeys(tensors.keys() - weight_map.keys(), next(reversed(weight_map.values())))
        (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": rest | weight_map}))
    else:
        file = "pytorch_model-00001-of-00001.bin"
        (tmp_path / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file)})
        )
    model = ModelFolder("m", tmp_path, tmp_path, json.loads((tmp_path / "config.json").read_text()))
    table = read_tensor_table(model, print)
    assert set(read_values(table[embeddings]).flatten().tolist()) == {expected[0]}
    assert model.notes == expected[1]
    # A key that transformers 4 does not know.
    if weight_map is not None or transformers.__version__ >= "5":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert set(loaded.get_input_embeddings().weight.flatten().tolist()) == {expected[0]}


def test_without_an_index_shards_are_found_and_strangers_left(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"shard model-00002-of-00002.safetensors is not there \(1 of 2\)"):
        read(tmp_path)
    save_file({"b": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert sorted(read(tmp_path)) == ["a", "b"]
    model = ModelFolder("m", tmp_path, tmp_path, {})
    read_tensor_table(model, print)
    assert model.notes == [
        "m: no index names its 2 files model-00001-of-00002.safetensors ...: all are read, but transformers would find no "
        "weights"
    ]
    save_file({"a": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'a' is in model-00001-of-00002.safetensors and in model-00002"):
        read(tmp_path)


def test_one_file_of_another_name_is_read_and_noted(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.fp16.safetensors")
    model = ModelFolder("m", tmp_path, tmp_path, {})
    assert list(read_tensor_table(model, print)) == ["a"]
    assert model.notes == [
        "m: no index names its model.fp16.safetensors: it is read, but transformers would find no weights"
    ]


def test_a_link_to_nowhere_that_should_be_the_weights_is_named(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(
        CheckpointError, match="model.safetensors: there is no such file, or it is a link that leads nowh"
    ):
        read(tmp_path)


def test_an_adapter_beside_whole_weights_is_noted(tmp_path, llamas):
    for path in llamas[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "adapter_config.json").write_text("{}")
    (note,) = open_model(str(tmp_path), print).notes
    assert note == (
        f"{tmp_path}: has an adapter_config.json beside its own weights, which are read; where peft is installed, "
        "transformers would load the adapter too. To merge both, write model+adapter"
    )


def test_an_empty_folder_has_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights found: expected \*.safetensors or pytorch_model"):
        read(tmp_path)
    assert choose_weights({"training_args.bin", "optimizer.bin", "adapter_model.safetensors"}, dict) == Weights(())


def test_links_lead_anywhere_but_out_of_the_cache(tmp_path):
    (tmp_path / "secret.txt").write_text("x")
    model, snapshot = tmp_path / "model", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    for folder in (model, snapshot):
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").symlink_to(tmp_path / "secret.txt")
    assert resolve_file(model, "tokenizer.json") == model / "tokenizer.json"
    with pytest.raises(CheckpointError, match="is a link to .*secret.txt, out of the Hub's cache"):
        resolve_file(snapshot, "tokenizer.json")
    os.mkfifo(model / "config.json")
    with pytest.raises(CheckpointError, match="config.json: is not a regular file"):
        resolve_file(model, "config.json")
    (model / "tokenizer.model").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="tokenizer.model: is not a regular file"):
        resolve_file(model, "tokenizer.model")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5k", 1500), ("7", 7), ("3b", 3), ("10g", 10**10)],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_size(text) == size


@given(st.integers(1, 10**6), st.sampled_from(["", "K", "MB", "GiB", "tb"]), st.sampled_from(["", " "]))
def test_sizes_scale_with_their_unit(number, unit, space):
    assert parse_size(f"{number}{space}{unit}") == number * parse_size(f"1{unit}")


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 GB GB", "0", "0.0001", "5PB", "1e9", "five"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no"):
        parse_size(text)


specs = st.lists(st.tuples(st.sampled_from(["F32", "BF16"]), st.integers(0, 50)), min_size=1, max_size=30)


@given(specs, st.integers(1, 200))
def test_shards_hold_every_tensor_once_in_order_aligned_and_within_the_limit(tensors, limit):
    widths = {"F32": 4, "BF16": 2}
    planned = [TensorSpec(f"t{n}", d, (size,), size * widths[d]) for n, (d, size) in enumerate(tensors)]
    shards = layout_shards(planned, limit)
    assert sorted(name for shard in shards for name in shard.starts) == sorted(spec.name for spec in planned)
    by_name = {spec.name: spec for spec in planned}
    for number, shard in enumerate(shards, start=1):
        total = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        assert shard.name == (total if len(shards) > 1 else "model.safetensors")
        data = sum(by_name[name].nbytes for name in shard.starts)
        assert shard.nbytes == len(shard.header) + data
        assert data <= limit or len([name for name in shard.starts if by_name[name].nbytes]) == 1
        assert all(start % widths[by_name[name].dtype] == 0 for name, start in shard.starts.items())


def write(
    folder: Path, pieces: dict[str, Piece], shapes: dict[str, tuple[int, ...]], report=lambda _: None, **keys
) -> dict:
    width = {"F32": 4, "BF16": 2, "F16": 2}
    tensors = [
        TensorSpec(name, piece.dtype, shapes[name], torch.Size(shapes[name]).numel() * width[piece.dtype])
        for name, piece in pieces.items()
    ]
    with ShardWriter(folder, layout_shards(tensors, 10**9), report, **keys) as shards:
        shards.add({name: ((piece,),) for name, piece in pieces.items()})
    return load_file(folder / "model.safetensors")


WAYS = ("_copy_file_range", "_sendfile", "_read_and_write")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("broken", ["errno", "zero"])
def test_each_way_of_copying_gives_the_same_bytes(tmp_path, monkeypatch, way, broken):
    def fail(*_):
        if broken == "zero":
            return 0
        raise OSError(errno.ENOSYS, "not here")

    for other in WAYS[: WAYS.index(way)]:
        monkeypatch.setattr(copy, other, fail)
    used = []
    original = getattr(copy, way)
    monkeypatch.setattr(copy, way, lambda *arguments: used.append(1) or original(*arguments))
    monkeypatch.setattr(writer, "CHUNK_BYTES", 1000)
    source = torch.randn(700, 3)
    save_file({"a": source}, tmp_path / "source.safetensors")
    tensor = read_header(tmp_path / "source.safetensors")["a"]
    moved = []
    out = tmp_path / "out"
    out.mkdir()
    found = write(
        out, {"b": Piece(b"\0" * 6, "BF16"), "a": Piece(tensor, "F32")}, {"b": (3,), "a": (700, 3)}, moved.append
    )
    assert torch.equal(found["a"], source)
    assert len(used) == 9
    assert sum(moved) == 8400 + 6


def test_with_low_memory_the_bytes_are_the_same_and_files_are_forgotten_on_the_way(tmp_path, monkeypatch):
    tensors = {"a": torch.randn(700, 3), "b": torch.randn(400, 5)}
    save_file(tensors, tmp_path / "source.safetensors")
    stored = read_header(tmp_path / "source.safetensors")
    monkeypatch.setattr(writer, "LOW_MEMORY_CHUNK_BYTES", 1000)
    done, forgotten, threads = [], [], set()
    forget = writer.forget
    monkeypatch.setattr(writer, "forget", lambda file, **keys: forgotten.append(sum(done)) or forget(file, **keys))

    def report(nbytes):
        done.append(nbytes)
        threads.add(threading.get_ident())

    pieces = {"a": Piece(stored["a"], "F32"), "b": Piece(stored["b"], "BF16")}
    found = write(tmp_path, pieces, {"a": (700, 3), "b": (400, 5)}, report, low_memory=True, threads=1)
    assert torch.equal(found["a"], tensors["a"])
    assert torch.equal(found["b"], tensors["b"].bfloat16())
    assert max(done[:9]) <= 1000
    assert len(threads) == 1
    # Both files of each tensor: after every chunk and at its end.
    assert len(set(forgotten)) >= 10


def test_a_source_cut_off_after_the_plan_is_an_error(tmp_path):
    tensor = TensorInfo("a", tmp_path / "source", "F32", (100,), 0, 400)
    (tmp_path / "source").write_bytes(bytes(300))
    for dtype in ("F32", "BF16"):
        with pytest.raises(CheckpointError, match="source: ended inside tensor 'a'"):
            write(tmp_path, {"a": Piece(tensor, dtype)}, {"a": (100,)})


def test_a_full_disk_is_said_so(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(copy, "_copy_file_range", full)
    tensor = TensorInfo("a", tmp_path / "source", "F32", (1,), 0, 4)
    (tmp_path / "source").write_bytes(bytes(4))
    with pytest.raises(OutputError, match="the disk is full"):
        write(tmp_path, {"a": Piece(tensor, "F32")}, {"a": (1,)})


@pytest.mark.skipif(sys.platform != "linux", reason="reads a file of Linux")
def test_what_the_system_refuses_is_named(tmp_path):
    tensor = TensorInfo("a", tmp_path / "source", "F32", (1,), 0, 4)
    (tmp_path / "source").write_bytes(bytes(4))
    out = tmp_path / "gone" / "model.safetensors"
    with pytest.raises(OutputError) as caught:
        write(out.parent, {"a": Piece(tensor, "F32")}, {"a": (1,)})
    assert str(caught.value) == f"{out}: cannot be written: No such file or directory."
    # Memory that no program has: it can be opened, but not read.
    with pytest.raises(CheckpointError) as unread:
        copy.copy_file(NOWHERE, tmp_path / "copy")
    assert str(unread.value) == f"{NOWHERE}: cannot be read: Input/output error."


def test_a_tensor_that_was_never_added_is_an_error_of_the_program(tmp_path):
    shards = layout_shards([TensorSpec("a", "F32", (1,), 4)], 10**9)
    with (
        pytest.raises(ValueError, match="^model.safetensors: some of its tensors were never added$"),
        ShardWriter(tmp_path, shards, lambda _: None),
    ):
        pass


def test_much_is_flushed_on_the_way(tmp_path, monkeypatch):
    """Before a shard is complete, so that the disk works while its other tensors are written."""
    flushed = []
    monkeypatch.setattr(writer, "FLUSH_BYTES", 8)
    monkeypatch.setattr(writer, "flush", flushed.append)
    pieces = {name: Piece(bytes(4), "F32") for name in "abc"}
    write(tmp_path, pieces, dict.fromkeys(pieces, (1,)), threads=1)
    assert flushed == [tmp_path / "model.safetensors"] * 2


def test_json_beyond_any_model_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("[" * 5_000_000)
    with pytest.raises(CheckpointError, match="^.*config.json: holds more values than any model has"):
        read_json(path)
    monkeypatch.setattr(json_text, "MOST_BYTES", 10)
    path.write_text('{"a": "0123456789"}')
    with pytest.raises(CheckpointError, match="config.json: has 19 bytes; at most 10 are read"):
        read_json(path)
    monkeypatch.setattr(header, "MOST_BYTES", 10)
    stored = raw(tmp_path / "m.safetensors", {"a": entry(0, 4)}, b"1234")
    with pytest.raises(CheckpointError, match=r"m.safetensors: its header has \d+ bytes; at most 10 are read\.$"):
        read_header(stored)


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json: is not a regular file\.$"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r": cannot be read: Is a directory\.$"):
        read_header(tmp_path)


def test_conversion_in_chunks_equals_conversion_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("moemerge.checkpoint.bands.CHUNK_ELEMENTS", 7)
    source = torch.randn(50, dtype=torch.float32)
    save_file({"a": source}, tmp_path / "s.safetensors")
    tensor = read_header(tmp_path / "s.safetensors")["a"]
    assert torch.equal(write(tmp_path, {"a": Piece(tensor, "BF16")}, {"a": (50,)})["a"], source.bfloat16())
    assert torch.equal(write(tmp_path, {"a": Piece(tensor, "F32", 0.5)}, {"a": (50,)})["a"], source * 0.5)


def test_a_weight_too_large_for_float16_stops_the_conversion(tmp_path):
    save_file({"a": torch.tensor([1.0, 70000.0])}, tmp_path / "s.safetensors")
    tensor = read_header(tmp_path / "s.safetensors")["a"]
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path, {"a": Piece(tensor, "F16")}, {"a": (2,)})
    assert str(caught.value) == (
        f"{tmp_path / 's.safetensors'}: tensor 'a' holds 70000, which float16 cannot express. "
        "Set `dtype: bfloat16` or `dtype: float32` in the config."
    )


def test_infinite_weights_stay_infinite(tmp_path):
    save_file({"a": torch.tensor([float("inf"), 1.0])}, tmp_path / "s.safetensors")
    tensor = read_header(tmp_path / "s.safetensors")["a"]
    assert write(tmp_path, {"a": Piece(tensor, "F16")}, {"a": (2,)})["a"][0].isinf()

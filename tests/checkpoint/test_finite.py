"""Stored numbers that are infinite or NaN are found in every dtype of floats, at their places, in bounded memory."""

import json
import shutil
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moemerge.checkpoint import finite
from moemerge.checkpoint.finite import Census, NotFinite, first_not_finite, has_floats, look_at
from moemerge.checkpoint.header import TensorInfo, read_header
from moemerge.checks.inspection import inspect_checkpoint
from moemerge.cli import main
from moemerge.errors import CheckpointError
from tests.sources.test_lora import make_adapter

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
}
UNSIGNED = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
WEIGHTS = "model.safetensors"


def stored(path: Path, tensor: torch.Tensor) -> TensorInfo:
    save_file({"a": tensor}, path)
    return read_header(path)["a"]


def bits_of(dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern, or of wider floats random ones and those at every border."""
    width = dtype.itemsize
    if width <= 2:
        return torch.arange(2 ** (8 * width)).to(UNSIGNED[width]).view(dtype)
    largest = torch.finfo(dtype).max
    borders = torch.tensor([0.0, largest, torch.inf, torch.nan, torch.finfo(dtype).smallest_normal], dtype=dtype)
    integers = torch.cat([borders, -borders]).view(UNSIGNED[width])
    around = torch.cat([integers - 1, integers, integers + 1])
    drawn = torch.randint(-(2**62), 2**62, (10_000,), generator=torch.Generator().manual_seed(0))
    return torch.cat([around, drawn.to(UNSIGNED[width])]).view(dtype)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("chunk", [8, 2**19])
def test_what_is_not_finite_is_what_torch_says(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(finite, "CHUNK_BYTES", chunk)
    numbers = bits_of(FLOATS[name])[None]
    expected = ~numbers.to(torch.float64).isfinite()
    read = []
    tensor = stored(tmp_path / "a", numbers)
    assert tensor.dtype == name
    found = look_at(tensor, read.append).not_finite
    first = int(expected[0].byte().argmax())
    assert found == NotFinite("a", str(tmp_path / "a"), int(expected.sum()), (0, first))
    assert sum(read) == tensor.nbytes
    sound = stored(tmp_path / "b", numbers[~expected])
    assert look_at(sound).not_finite is None


@given(
    shape=st.lists(st.integers(1, 5), max_size=4).map(tuple),
    data=st.data(),
    dtype=st.sampled_from(list(FLOATS.values())),
)
def test_the_first_one_has_an_index_along_each_axis(tmp_path_factory, shape, data, dtype):
    places = data.draw(st.lists(st.tuples(*(st.integers(0, size - 1) for size in shape)), min_size=1, max_size=4))
    numbers = torch.ones(shape, dtype=torch.float64)
    for place in places:
        numbers[place] = torch.nan
    found = look_at(stored(tmp_path_factory.mktemp("x") / "a", numbers.to(dtype))).not_finite
    assert (found.count, found.first) == (len(set(places)), min(places))


def test_zeros_are_told_from_what_is_almost_zero(tmp_path):
    for number, (tensor, zeros) in enumerate(
        (
            (torch.zeros(3, 4), True),
            (torch.full((3, 4), -0.0), False),
            (torch.zeros(0, 4), False),
            (torch.tensor([0.0, 1e-45]), False),
            (torch.full((2,), torch.nan), False),
        )
    ):
        assert look_at(stored(tmp_path / str(number), tensor)).only_zeros == zeros


def test_other_dtypes_are_no_floats(tmp_path):
    whole = stored(tmp_path / "a", torch.full((4,), -1, dtype=torch.int32))
    assert not has_floats(whole.dtype)
    assert first_not_finite([whole]) is None
    broken = stored(tmp_path / "b", torch.tensor([1.0, torch.inf, torch.nan]))
    assert str(first_not_finite([whole, broken])) == (
        f"a of {tmp_path / 'b'} holds 2 numbers that are infinite or NaN, the first at [1]"
    )


def test_a_file_that_ends_too_early_is_an_error(tmp_path):
    tensor = stored(tmp_path / "a", torch.ones(100))
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ended inside tensor 'a': was it changed meanwhile?"):
        look_at(tensor)


@pytest.mark.skipif(sys.platform != "linux", reason="reads a file of Linux")
def test_a_file_that_cannot_be_read_is_named():
    """Memory that no program has: it can be opened, but not read."""
    with pytest.raises(CheckpointError, match=r"^/proc/self/mem: cannot be read: Input/output error\.$"):
        look_at(TensorInfo("a", Path("/proc/self/mem"), "F32", (4,), 0, 16))


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    tensor = stored(tmp_path / "a", torch.full((2**22,), torch.inf))
    tracemalloc.start()
    assert look_at(tensor).not_finite.count == 2**22
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * finite.CHUNK_BYTES < tensor.nbytes


def test_a_census_goes_on_where_it_was(tmp_path):
    tensor = stored(tmp_path / "a", torch.tensor([[1.0, 2], [3, torch.nan], [torch.inf, 5]]))
    data = (tmp_path / "a").read_bytes()[tensor.start :]
    census = Census(tensor)
    for start in range(0, len(data), 4):
        census.add(data[start : start + 4])
    assert (census.not_finite.count, census.not_finite.first, census.first_byte) == (2, (1, 1), 12)


# ---- inspect --values


@pytest.fixture
def model(tmp_path, llamas) -> Path:
    """A model with a NaN, an infinity, a matrix of zeros and one of bytes."""
    folder = shutil.copytree(llamas[1], tmp_path / "fox")
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    tensors["model.norm.weight"][30:] = -torch.inf
    tensors["model.layers.2.mlp.up_proj.weight"].zero_()
    tensors["model.layers.2.input_layernorm.weight"].zero_()
    tensors["packed"] = torch.full((4, 4), 255, dtype=torch.uint8)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def test_an_inspection_names_what_is_not_finite(model, llamas):
    done = []
    found = inspect_checkpoint(str(model), values=True, progress=lambda *given: done.append(given))
    file = str(model / WEIGHTS)
    assert sorted(found.values.not_finite, key=lambda broken: broken.tensor) == [
        NotFinite("model.layers.1.mlp.up_proj.weight", file, 1, (3, 5)),
        NotFinite("model.norm.weight", file, 2, (30,)),
    ]
    assert (found.values.tensors, found.values.zeros) == (30, ("model.layers.2.mlp.up_proj.weight",))
    assert found.values.skipped == {"U8": 1}
    assert found.values.remarks == [
        "model.layers.2.mlp.up_proj.weight holds nothing but zeros: so do weights that are switched off, and files that "
        "were not downloaded whole",
        "tensors that are not floats, such as quantised weights, were not looked at: 1 of U8",
    ]
    assert done[-1] == (134016, 134016)
    assert inspect_checkpoint(str(model)).values is None
    sound = inspect_checkpoint(str(llamas[0]), values=True).values
    assert (sound.not_finite, sound.zeros, sound.skipped, sound.remarks) == ((), (), {}, [])


def test_the_command_fails_where_a_number_is_not_finite(model, llamas, monkeypatch, capsys):
    def inspect(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moemerge", "inspect", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    code, printed, errors = inspect(model, "--values")
    assert code == 1
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[-4:] == [
        "values infinite or NaN in 2 of 30 tensors",
        "tensor file infinite or NaN first at",
        f"model.layers.1.mlp.up_proj.weight {model / WEIGHTS} 1 [3, 5]",
        f"model.norm.weight {model / WEIGHTS} 2 [30]",
    ]
    assert "integrity index, headers and file sizes agree" in lines
    assert "warning: model.layers.2.mlp.up_proj.weight holds nothing but zeros: " in errors
    code, printed, _ = inspect(model, "--values", "--json")
    broken = json.loads(printed)["values"]["not_finite"]
    assert {"tensor": "model.norm.weight", "file": str(model / WEIGHTS), "count": 2, "first": [30]} in broken
    assert code == 1
    code, printed, errors = inspect(llamas[0], "--values")
    assert (code, "values 30 tensors of finite numbers" in " ".join(printed.split())) == (0, True)
    assert errors == ""
    code, printed, errors = inspect(model, "--json")
    assert (code, json.loads(printed)["values"], errors) == (0, None, "")


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_an_adapter_is_looked_at_too(tmp_path, llamas):
    make_adapter(tmp_path / "adapter", llamas[0])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.1.mlp.down_proj.lora_B" in name)
    tensors[name][0, 0] = torch.inf
    save_file(tensors, file, {"format": "pt"})
    found = inspect_checkpoint(f"{llamas[0]}+{tmp_path / 'adapter'}", values=True)
    assert found.values.not_finite == (NotFinite(name, str(file), 1, (0, 0)),)

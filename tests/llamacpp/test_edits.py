"""What llama.cpp's converter makes of edited mixtures: the same numbers in more and narrower experts."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.editing.test_exact import edit
from tests.llamacpp.engine import converted
from tests.support.mixtures import EXPERTS, make_mixture


def read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The tensors of a converted model, and its numbers of experts."""
    made = converted(folder, "f32")
    assert isinstance(made, Path), made
    reader = gguf.GGUFReader(made)
    fields = {name.split(".", 1)[1]: field for name, field in reader.fields.items() if ".expert_" in name}
    counts = {name: int(f.parts[f.data[0]][0]) for name, f in fields.items() if name.endswith("count")}
    return {tensor.name: np.array(tensor.data) for tensor in reader.tensors}, counts


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe", "deepseek_v3"])
def test_the_converter_reads_split_experts(tmp_path, model_type):
    folder = make_mixture(tmp_path / "mixture", model_type)
    whole, counts = read(folder)
    split, more = read(edit(folder, tmp_path / "split", list(range(EXPERTS)), granularity=2))
    assert more == {name: count if "group" in name else 2 * count for name, count in counts.items()}
    assert split.keys() == whole.keys()
    for name, wanted in whole.items():
        found = split[name]
        if "_exps." in name:  # (expert, row, column)
            axis = 2 if "down" in name else 1
            found = np.concatenate([found[::2], found[1::2]], axis=axis) / (2 if "down" in name else 1)
        elif found.shape != wanted.shape:  # routers, and vectors with a number for each expert
            found = found[::2]
        assert np.array_equal(found, wanted), name

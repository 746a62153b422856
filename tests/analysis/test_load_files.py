"""Load of experts: those that hardly a token or nearly every token chooses, and files for serving tools."""

import json
from dataclasses import replace

import numpy as np
import pytest

from moemerge.analysis.experts import dead_experts, super_experts
from moemerge.analysis.figures import TextFigures
from moemerge.analysis.load_files import load_counts, write_load
from moemerge.analysis.text import analyze_text
from moemerge.errors import OutputError, RefusedError
from moemerge.evaluation.runnable import open_mixture
from tests.editing.test_saliency import CPU, texts
from tests.support.mixtures import make_variant
from tests.support.models import load_weights, save_weights


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> TextFigures:
    """Figures of a mixture whose first layer is dense."""
    return analyze_text(open_mixture(make_variant(tmp_path_factory.mktemp("mixture"), "dots1")), texts(), CPU)


def with_load(figures: TextFigures, *load: list[float]) -> TextFigures:
    """The same figures with other load, equal in both domains."""
    return replace(figures, load=np.array([load, load]))


def test_experts_are_dead_below_a_tenth_of_an_equal_share(figures):
    # An equal share is 2 of 4.
    found = with_load(figures, [0.049, 0.051, 0.95, 0.95], [0.5, 0.5, 0.5, 0.5])
    assert dead_experts(found) == {1: (0,)}


def test_experts_are_super_from_nine_tenths_of_the_tokens(figures):
    found = with_load(figures, [0.9, 0.899, 0.101, 0.1], [0.5, 0.5, 0.5, 0.5])
    assert super_experts(found) == {1: (0,)}


def test_no_expert_is_super_where_all_take_every_token(figures):
    assert super_experts(with_load(figures, [1.0] * 4, [1.0, 0.9, 0.1, 0.0])) == {2: (0, 1)}


def test_an_expert_that_a_layer_lacks_is_not_dead(figures):
    lengths = figures.output_norm.copy()
    lengths[0, 3] = np.nan
    found = replace(with_load(figures, [1.0, 0.01, 0.99, 0.0], [0.6, 0.7, 0.7, 0.0]), output_norm=lengths)
    # Of three experts, an equal share is 2 of 3.
    assert dead_experts(found) == {1: (1,), 2: (3,)}


def test_counts_are_those_of_the_tokens(figures, tmp_path):
    folder = make_variant(tmp_path, "dots1")
    tensors = load_weights(folder)
    bias = tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    bias[:] = bias.new_tensor([9.0, 8.0, -9.0, -9.0])
    save_weights(folder, tensors)
    counts = load_counts(analyze_text(open_mixture(folder), texts(), CPU))
    assert counts[1].tolist() == [78, 78, 0, 0]
    assert counts.sum(axis=1).tolist() == load_counts(figures).sum(axis=1).tolist() == [156, 156]


def test_a_matrix_has_a_row_for_each_router(figures, tmp_path):
    write_load(tmp_path / "load.npy", figures, 3)
    found = np.load(tmp_path / "load.npy")
    assert (found.dtype, found.shape) == (np.int64, (2, 4))
    np.testing.assert_array_equal(found, load_counts(figures))


def test_a_json_file_has_a_row_for_each_layer(figures, tmp_path):
    write_load(tmp_path / "load.json", figures, 3)
    assert json.loads((tmp_path / "load.json").read_text()) == {
        "logical_count": [[0, 0, 0, 0], *load_counts(figures).tolist()],
        "experts": ["0", "1", "2", "3"],
        "tokens": 78,
    }


def test_files_of_another_kind_are_refused(figures, tmp_path):
    path = tmp_path / "load.pt"
    with pytest.raises(RefusedError) as refused:
        write_load(path, figures, 3)
    assert str(refused.value) == f"{path}: expected a name that ends in .json, for SGLang, or in .npy, for EPLB."


@pytest.mark.parametrize("name", ["load.json", "load.npy"])
def test_a_file_that_cannot_be_written_is_named(figures, tmp_path, name):
    path = tmp_path / name
    (tmp_path / f"{name}.new").mkdir()  # in the place of the draft
    with pytest.raises(OutputError) as failed:
        write_load(path, figures, 3)
    assert str(failed.value) == f"{path}: cannot be written: Is a directory."
    assert not path.exists()

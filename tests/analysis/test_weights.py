"""Every figure of weights against a direct computation with whole matrices of transformers' own models."""

import re
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import kendalltau
from transformers import AutoConfig

from moemerge.analysis import matching, projection
from moemerge.analysis.analyzer import AnalysisRequest, open_for_analysis
from moemerge.analysis.beside import dense_ffns
from moemerge.analysis.figures import WeightFigures
from moemerge.analysis.matching import NOTHING, Matching, choose_matching
from moemerge.analysis.weights import analyze_weights
from moemerge.checkpoint import derived
from moemerge.checkpoint.joined import Joined
from moemerge.errors import CheckpointError, RefusedError
from moemerge.evaluation.settings import EvaluationSettings
from moemerge.families.stored_mixture import StoredMixture
from moemerge.sources.stored_mixtures import read_mixture
from tests.passes.test_passes import IS_V4
from tests.support.mixtures import EXPERTS, PLAINEST, make_mixture, random_mixture
from tests.support.models import load, load_weights, make_model, save_weights

ROLES = ("gate", "up", "down")
Ffns = dict[str, dict[str, np.ndarray]]
"""Projections of an FFN by its name and role, in float64."""
SOME = ["mixtral", "granitemoeshared", "gemma4_text", "qwen3_moe", "deepseek_v3"]
BY_V5 = pytest.mark.skipif(IS_V4, reason="the modules of experts are others in transformers 4")


def opened(folder: Path) -> StoredMixture:
    return read_mixture(str(folder), lambda _: None)[1]


def wholes(folder: Path) -> dict[int, tuple[Ffns, np.ndarray]]:
    """All FFNs and the router of each layer with experts, taken out of the loaded model."""
    found = {}
    state = {name: tensor.double().numpy() for name, tensor in load(folder).state_dict().items()}
    for name, gate_up in state.items():
        if not (match := re.fullmatch(r"model\.layers\.(\d+)\.(.*)experts\.gate_up_proj", name)):
            continue
        prefix, module = f"model.layers.{match[1]}.", match[2]
        down = state[f"{prefix}{module}experts.down_proj"]
        ffns = {}
        for expert in range(EXPERTS):
            gate, up = np.split(gate_up[expert], 2)
            ffns[str(expert)] = {"gate": gate, "up": up, "down": down[expert]}
        inner = {name.removeprefix(prefix): values for name, values in state.items() if name.startswith(prefix)}
        shared = {name: values for name, values in inner.items() if re.search(r"shared_(mlp|experts?)\.", name)}
        if fused := [values for name, values in shared.items() if name.endswith("input_linear.weight")]:
            gate, up = np.split(fused[0], 2)
            (output,) = (values for name, values in shared.items() if name.endswith("output_linear.weight"))
            ffns["shared"] = {"gate": gate, "up": up, "down": output}
        elif shared:
            ffns["shared"] = {role: next(v for n, v in shared.items() if f"{role}_proj" in n) for role in ROLES}
        (router,) = (
            v for n, v in inner.items() if re.search(r"(gate|router)\.", n) and len(v) == EXPERTS and v.ndim == 2
        )
        found[int(match[1])] = (ffns, router)
    return found


def neurons(ffn: dict[str, np.ndarray], role: str) -> np.ndarray:
    return ffn[role].T if role == "down" else ffn[role]


def cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


def plane(vectors: np.ndarray) -> np.ndarray:
    left, lengths, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    found = (left * lengths)[:, :2]
    return found * np.sign(np.take_along_axis(found, np.abs(found).argmax(axis=0)[None], axis=0))


def evenly(count: int, total: int) -> list[int]:
    return [int((place + 0.5) * total / count) for place in range(count)]


def matched(one: np.ndarray, other: np.ndarray, places: list[int]) -> tuple[float, float]:
    chosen = one[places]
    lengths = np.outer(np.linalg.norm(chosen, axis=1), np.linalg.norm(other, axis=1))
    rows, columns = linear_sum_assignment(chosen @ other.T / lengths, maximize=True)
    return float((chosen @ other.T / lengths)[rows, columns].mean()), float(kendalltau(rows, columns).statistic)


def check_close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


def check(found: WeightFigures, layers: dict[int, tuple[Ffns, np.ndarray]], count: int) -> None:
    """Compare all figures with direct ones; `count` neurons are matched."""
    assert found.layers == tuple(sorted(layers))
    assert found.experts == EXPERTS
    assert found.matched_neurons == count
    for place, layer in enumerate(found.layers):
        ffns, router = layers[layer]
        assert found.names == tuple(ffns)
        check_close(found.router_similarity[place], cosines(router))
        check_close(found.router_norms[place], np.linalg.norm(router, axis=1))
        for role in ROLES:
            check_projection(found, place, role, list(ffns.values()), count)
            pairs = np.triu_indices(EXPERTS, 1)
            similarity = cosines(np.stack([ffn[role].ravel() for ffn in list(ffns.values())[:EXPERTS]]))
            expected = np.corrcoef(cosines(router)[pairs], similarity[pairs])[0, 1]
            check_close(found.correlation[role][place], expected)
        widths = [len(ffn["gate"]) for ffn in ffns.values()]
        shown = min(32, *widths)
        rows = [ffn["gate"][evenly(shown, width)] for ffn, width in zip(ffns.values(), widths, strict=True)]
        check_close(found.neuron_plane[place], plane(np.concatenate(rows)).reshape(len(ffns), shown, 2))


def check_projection(
    found: WeightFigures, place: int, role: str, ffns: list[dict[str, np.ndarray]], count: int
) -> None:
    check_close(found.norms[role][place], [np.linalg.norm(ffn[role]) for ffn in ffns])
    check_close(
        found.mean_similarity[role][place], cosines(np.stack([neurons(ffn, role).mean(axis=0) for ffn in ffns]))
    )
    alike = [number for number, ffn in enumerate(ffns) if ffn[role].shape == ffns[0][role].shape]
    flat = np.stack([ffns[number][role].ravel() for number in alike])
    expected = np.full((len(ffns), len(ffns)), np.nan)
    expected[np.ix_(alike, alike)] = cosines(flat)
    np.fill_diagonal(expected, 1)
    check_close(found.similarity[role][place], expected)
    coordinates = np.full((len(ffns), 2), np.nan)
    coordinates[alike] = plane(flat)
    check_close(found.plane[role][place], coordinates)
    places = evenly(count, len(neurons(ffns[0], role))) if count else []
    mean, order = np.full((2, len(ffns), len(ffns)), np.nan)
    for one in alike if count else []:
        for other in alike:
            mean[one, other], order[one, other] = matched(neurons(ffns[one], role), neurons(ffns[other], role), places)
    check_close(found.matched_similarity[role][place], mean)
    check_close(found.matched_order[role][place], order)


def check_model(folder: Path, model_type: str, layout: Any) -> None:
    mixture = opened(make_mixture(folder / layout, model_type, layout=layout))
    layers = wholes(make_mixture(folder / "loaded", model_type))
    found = analyze_weights(mixture)
    check(found, layers, mixture.expert_width)
    assert found.equal == ()
    assert found.nearly_equal == ()


@BY_V5
@pytest.mark.parametrize("layout", ["released", "in_memory"])
@pytest.mark.parametrize("model_type", SOME)
def test_figures_are_those_of_whole_matrices(tmp_path, model_type, layout):
    check_model(tmp_path, model_type, layout)


@BY_V5
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["released", "in_memory"])
@pytest.mark.parametrize("model_type", sorted(PLAINEST.keys() - SOME))
def test_figures_of_every_family_are_those_of_whole_matrices(tmp_path, model_type, layout):
    check_model(tmp_path, model_type, layout)


@BY_V5
@pytest.mark.parametrize("elements", [1, 700, 5000])
@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe"])
def test_blocks_of_any_size_give_the_same_figures(tmp_path, monkeypatch, model_type, elements):
    for name in ("_ELEMENTS", "_MATCHED_ELEMENTS", "_LEAST_ELEMENTS"):
        monkeypatch.setattr(projection, name, elements)
    check_model(tmp_path, model_type, "released")


@BY_V5
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_some_neurons_are_matched_with_all_of_other_ffns(tmp_path, model_type):
    mixture = opened(make_mixture(tmp_path, model_type))
    found = analyze_weights(mixture, matching=Matching(7, frozenset(mixture.moe_layers)))
    check(found, wholes(tmp_path), 7)


def test_layers_that_are_not_matched_have_no_figures_of_it(tmp_path):
    mixture = opened(make_mixture(tmp_path, "mixtral"))
    every = analyze_weights(mixture)
    some = analyze_weights(mixture, matching=Matching(every.matched_neurons, frozenset({1})))
    for kind in ("matched_similarity", "matched_order"):
        for role in ROLES:
            one, other = getattr(some, kind)[role], getattr(every, kind)[role]
            assert np.isnan(one[[0, 2]]).all()
            np.testing.assert_array_equal(one[1], other[1])


def test_without_scipy_nothing_is_matched(tmp_path, monkeypatch):
    mixture = opened(make_mixture(tmp_path, "mixtral"))
    every = analyze_weights(mixture)
    monkeypatch.setattr(matching, "find_spec", lambda _: None)
    found = analyze_weights(mixture)
    assert found.matched_neurons == 0
    for role in ROLES:
        assert np.isnan(found.matched_similarity[role]).all()
        assert np.isnan(found.matched_order[role]).all()
        np.testing.assert_array_equal(found.similarity[role], every.similarity[role])


def arrays(figures: WeightFigures) -> dict[str, np.ndarray]:
    """All arrays of figures, by name and role."""
    found = {}
    for field in fields(figures):
        value = getattr(figures, field.name)
        if isinstance(value, dict):
            found |= {f"{field.name} {role}": values for role, values in value.items()}
        elif isinstance(value, np.ndarray):
            found[field.name] = value
    return found


def test_turned_experts_turn_every_figure(tmp_path):
    before = analyze_weights(opened(make_mixture(tmp_path, "mixtral")))
    turn = [2, 0, 3, 1]  # the expert that is now there
    tensors = load_weights(tmp_path)
    turned = {}
    for name, values in tensors.items():
        if match := re.search(r"experts\.(\d)\.", name):
            turned[name] = tensors[name.replace(match[0], f"experts.{turn[int(match[1])]}.")]
        else:
            turned[name] = values[turn] if name.endswith("gate.weight") else values
    save_weights(tmp_path, turned)
    after = arrays(analyze_weights(opened(tmp_path)))
    for name, values in arrays(before).items():
        expected = values
        for axis in range(1, values.ndim):
            if values.shape[axis] == EXPERTS:
                expected = np.take(expected, turn, axis)
        np.testing.assert_allclose(after[name], expected, rtol=1e-3, atol=1e-5, err_msg=name)
    assert any(not np.allclose(after[name], values) for name, values in arrays(before).items())


def test_turned_neurons_of_an_expert_change_nothing_after_matching(tmp_path):
    before = analyze_weights(opened(make_mixture(tmp_path, "mixtral")))
    tensors = load_weights(tmp_path)
    turn = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    for name, values in list(tensors.items()):
        if ".experts.1." in name:
            tensors[name.replace(".experts.1.", ".experts.3.")] = values
            tensors[name] = values[:, turn].contiguous() if "w2" in name else values[turn]
    save_weights(tmp_path, tensors)
    after = analyze_weights(opened(tmp_path))
    for role in ROLES:
        one, other = before.matched_similarity[role], after.matched_similarity[role]
        np.testing.assert_allclose(other[:, :3, :3], one[:, :3, :3], rtol=1e-5)
        np.testing.assert_allclose(other[:, 1, 3], 1, rtol=1e-6)
        assert np.abs(after.matched_order[role][:, 1, 3]).max() < 0.3
        assert np.abs(after.similarity[role][:, 1, 3]).max() < 0.2
        np.testing.assert_allclose(after.norms[role], after.norms[role][:, [0, 3, 2, 1]], rtol=1e-5)
    assert after.equal == ()


def test_equal_experts_have_similarity_1_and_are_named(tmp_path):
    tensors = load_weights(make_mixture(tmp_path, "mixtral"))
    for name, values in list(tensors.items()):
        if ".experts.1." in name:
            tensors[name.replace(".experts.1.", ".experts.3.")] = values.clone()
        if ".experts.0." in name:
            noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(3))
            tensors[name.replace(".experts.0.", ".experts.2.")] = values + 1e-5 * noise
    save_weights(tmp_path, tensors)
    found = analyze_weights(opened(tmp_path))
    assert found.equal == ((1, 3),)
    assert found.nearly_equal == ((0, 2),)
    for role in ROLES:
        for kind in (found.similarity, found.mean_similarity, found.matched_similarity, found.matched_order):
            np.testing.assert_allclose(kind[role][:, [1, 3, 0], [3, 1, 2]], 1, atol=1e-6)
        np.testing.assert_allclose(found.plane[role][:, 1], found.plane[role][:, 3], rtol=1e-6, atol=1e-9)
    assert found.router_similarity[:, 1, 3].max() < 1 - 1e-3


def test_experts_that_differ_in_a_factor_alone_are_not_equal(tmp_path):
    tensors = load_weights(make_mixture(tmp_path, "gemma4_text"))
    for name, values in tensors.items():
        if ".experts." in name:
            values[1:] = values[0]
        if name.endswith("router.per_expert_scale"):
            values[:] = torch.tensor([1.5, 2.5, 1.5, 1.0])
    save_weights(tmp_path, tensors)
    found = analyze_weights(opened(tmp_path))
    assert found.equal == ((0, 2),)
    for role in ROLES:
        np.testing.assert_allclose(found.similarity[role], 1, rtol=1e-12)
        assert np.isnan(found.correlation[role]).all()
        np.testing.assert_array_equal(found.plane[role], 0)


def test_an_expert_of_zeros_has_no_direction(tmp_path):
    tensors = load_weights(make_mixture(tmp_path, "mixtral"))
    for name, values in tensors.items():
        if ".experts.0." in name:
            values.zero_()
    save_weights(tmp_path, tensors)
    found = analyze_weights(opened(tmp_path))
    for role in ROLES:
        assert np.isnan(found.similarity[role][:, 0]).all()
        assert np.isnan(found.mean_similarity[role][:, 0]).all()
        assert np.isfinite(found.similarity[role][:, 1:, 1:]).all()
        assert not found.matched_similarity[role][:, 0, 1:].any()
        assert not found.norms[role][:, 0].any()
        assert np.isfinite(found.correlation[role]).all()


def experts_of(tensors: dict[str, torch.Tensor], layer: int, name: str) -> list[np.ndarray]:
    """A matrix of each expert of a mixtral, in float64."""
    path = f"model.layers.{layer}.block_sparse_moe.experts"
    return [tensors[f"{path}.{expert}.{name}.weight"].double().numpy() for expert in range(EXPERTS)]


def distance(ffns: list[np.ndarray], one: int, other: int) -> float:
    """1 less the cosine of two matrices, from the difference of their directions, which cancels nothing."""
    units = [ffns[ffn] / np.linalg.norm(ffns[ffn]) for ffn in (one, other)]
    return float(np.square(units[0] - units[1]).sum() / 2)


@pytest.mark.parametrize("factor", [1e-2, 1e-4, 1e-8])
def test_small_experts_have_norms_and_cosines_too(tmp_path, factor):
    tensors = load_weights(make_mixture(tmp_path, "mixtral"))
    for name, values in tensors.items():
        if ".experts.2.w2." in name:
            values.zero_()
        if ".experts.3." in name:
            values.mul_(factor)
        if ".experts.1." in name:
            values.copy_(factor * (values + 0.5 * tensors[name.replace(".experts.1.", ".experts.0.")]))
    save_weights(tmp_path, tensors)
    found = analyze_weights(opened(tmp_path))
    for layer in range(3):
        for role, name in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            ffns = experts_of(tensors, layer, name)
            norms = np.array([np.linalg.norm(ffn) for ffn in ffns])
            np.testing.assert_allclose(found.norms[role][layer], norms, rtol=1e-6, atol=0)
            there = np.flatnonzero(norms)
            expected = np.full((EXPERTS, EXPERTS), np.nan)
            expected[np.ix_(there, there)] = cosines(np.stack([ffns[ffn].ravel() for ffn in there]))
            np.testing.assert_allclose(found.similarity[role][layer], expected, rtol=1e-5, atol=2e-6)
    assert found.nearly_equal == ()


def test_small_experts_that_are_nearly_equal_are_named(tmp_path):
    tensors = load_weights(make_mixture(tmp_path, "mixtral"))
    for name, values in tensors.items():
        if match := re.search(r"experts\.([123])\.", name):
            values.mul_(1e-6)
            if match[1] == "3":
                noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(3))
                values.copy_(tensors[name.replace(".experts.3.", ".experts.2.")] + 1e-9 * noise)
    save_weights(tmp_path, tensors)
    assert analyze_weights(opened(tmp_path)).nearly_equal == ((2, 3),)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_cosines_of_fine_tunes_are_told_from_1(tmp_path, size):
    tensors = load_weights(make_mixture(tmp_path, "mixtral"))
    for name, values in tensors.items():
        if match := re.search(r"experts\.([123])\.", name):
            first = tensors[name.replace(match[0], "experts.0.")]
            noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(int(match[1])))
            values.copy_(first + size * first.std() * noise)
    save_weights(tmp_path, tensors)
    found = analyze_weights(opened(tmp_path))
    for layer in range(3):
        for role, name in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            ffns = experts_of(tensors, layer, name)
            for one, other in combinations(range(EXPERTS), 2):
                expected = distance(ffns, one, other)
                assert 1 - found.similarity[role][layer, one, other] == pytest.approx(expected, rel=1e-3, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.block_sparse_moe.experts.0.w2.weight", np.inf),
        ("model.layers.2.block_sparse_moe.experts.3.w1.weight", np.nan),
        ("model.layers.1.block_sparse_moe.gate.weight", np.nan),
    ],
)
def test_numbers_that_are_not_finite_are_named(tmp_path, recwarn, name, value):
    tensors = load_weights(make_mixture(tmp_path, "mixtral"))
    tensors[name][2, 7] = value
    save_weights(tmp_path, tensors)
    with pytest.raises(CheckpointError) as error:
        analyze_weights(opened(tmp_path))
    assert str(error.value) == (
        f"{name} of {tmp_path / 'model.safetensors'} holds 1 number that is infinite or NaN, at [2, 7]. Download that "
        "file again."
    )
    assert not recwarn.list


def test_numbers_too_large_to_compare_are_named(tmp_path, recwarn):
    tensors = load_weights(make_mixture(tmp_path, "mixtral"))
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name] *= 1e25
    save_weights(tmp_path, tensors)
    with pytest.raises(CheckpointError) as error:
        analyze_weights(opened(tmp_path))
    assert str(error.value) == (
        f"{name} of {tmp_path / 'model.safetensors'} holds numbers that are too large to compare: float32 cannot express "
        "the sum of their squares. Download that file again."
    )
    assert not recwarn.list


def test_stacks_whose_experts_lie_in_several_shards_are_read_as_one(tmp_path):
    whole = analyze_weights(opened(make_mixture(tmp_path / "whole", "qwen3_5_moe_text")))
    config = AutoConfig.from_pretrained(tmp_path / "whole")
    random_mixture(config).save_pretrained(tmp_path / "shards", max_shard_size="10KB")  # it saves single experts
    mixture = opened(tmp_path / "shards")
    held = mixture.tensors[mixture.path(0, "mlp.experts.gate_up_proj")].path
    assert isinstance(held, Joined)
    assert len({part.path for part in held.parts}) > 1
    found = arrays(analyze_weights(mixture))
    for name, values in arrays(whole).items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_every_weight_is_read_once(tmp_path, monkeypatch):
    mixture = opened(make_mixture(tmp_path, "deepseek_v3"))
    read = []
    fill = derived.fill

    def counted(source: Any, view: memoryview, tensor: Any) -> None:
        read.append(len(view))
        fill(source, view, tensor)

    monkeypatch.setattr(derived, "fill", counted)
    done = []
    analyze_weights(mixture, progress=lambda *amounts: done.append(amounts), matching=NOTHING)
    parts = []
    for layer in mixture.moe_layers:
        parts += [mixture.projection(layer, expert, role) for expert in range(EXPERTS) for role in ROLES]
        parts += [mixture.shared_projection(layer, role) for role in ROLES]
        parts.append(mixture.router(layer))
    assert sum(read) == sum(part.nbytes for part in parts)
    assert done == [(1, 2), (2, 2)]


def test_a_dense_model_stands_beside_the_experts(tmp_path):
    make_mixture(tmp_path / "mixture", "mixtral")
    make_model(tmp_path / "dense", seed=5)
    tensors, dense = load_weights(tmp_path / "mixture"), load_weights(tmp_path / "dense")
    for name, values in tensors.items():
        if match := re.fullmatch(r"(model\.layers\.[01]\.)block_sparse_moe\.experts\.2\.(w\d)\.weight", name):
            role = {"w1": "gate", "w2": "down", "w3": "up"}[match[2]]
            dense[f"{match[1]}mlp.{role}_proj.weight"] = values.clone()
    save_weights(tmp_path / "dense", dense)
    mixture = opened(tmp_path / "mixture")
    beside = {"base": dense_ffns(str(tmp_path / "dense"), mixture, lambda _: None)}
    found, alone = analyze_weights(mixture, beside), analyze_weights(mixture)
    assert found.names == (*mixture.names, "base")
    assert found.experts == EXPERTS
    for role in ROLES:
        for kind in (found.similarity, found.mean_similarity, found.matched_similarity, found.matched_order):
            np.testing.assert_allclose(kind[role][:2, 2, 4], 1, rtol=1e-6)
            assert kind[role][2, 2, 4] < 0.9
        np.testing.assert_allclose(found.similarity[role][:, :4, :4], alone.similarity[role], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(found.correlation[role].shape, (3,))
        np.testing.assert_allclose(found.norms[role][:2, 4], found.norms[role][:2, 2], rtol=1e-6)
    assert (found.equal, found.equal_beside, found.nearly_equal_beside) == ((), (), ())


def test_a_dense_model_that_equals_an_expert_is_found(tmp_path):
    make_mixture(tmp_path / "mixture", "mixtral")
    make_model(tmp_path / "dense", num_hidden_layers=3)
    tensors, dense = load_weights(tmp_path / "mixture"), load_weights(tmp_path / "dense")
    for name, values in tensors.items():
        if match := re.fullmatch(r"(model\.layers\.\d\.)block_sparse_moe\.experts\.2\.(w\d)\.weight", name):
            role = {"w1": "gate", "w2": "down", "w3": "up"}[match[2]]
            dense[f"{match[1]}mlp.{role}_proj.weight"] = values.clone()
    mixture = opened(tmp_path / "mixture")

    def found() -> WeightFigures:
        save_weights(tmp_path / "dense", dense)
        return analyze_weights(mixture, {"base": dense_ffns(str(tmp_path / "dense"), mixture, lambda _: None)})

    assert (found().equal_beside, found().nearly_equal_beside) == (((2, 4),), ())
    dense["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.01
    assert (found().equal_beside, found().nearly_equal_beside) == ((), ((2, 4),))


def names_beside(mixture: Path, dense: str) -> tuple[str, ...]:
    (opened,) = open_for_analysis([str(mixture)], AnalysisRequest({}, EvaluationSettings(), dense), lambda _: None)
    return tuple(opened.beside)


def test_a_dense_model_has_the_name_of_its_folder(tmp_path, monkeypatch):
    mixture, dense = make_mixture(tmp_path / "mixture", "mixtral"), make_model(tmp_path / "dense", num_hidden_layers=3)
    (dense / "inner").mkdir()
    for place, reference in ((dense, "."), (dense, "./"), (dense / "inner", ".."), (tmp_path, "dense/")):
        monkeypatch.chdir(place)
        assert names_beside(mixture, reference) == ("dense",)
    (tmp_path / "link").symlink_to(dense)
    assert names_beside(mixture, str(tmp_path / "link")) == ("link",)
    assert names_beside(mixture, f"{mixture}#0") == ("mixture#0",)


def test_a_dense_model_has_a_name_of_its_own(tmp_path):
    mixture = opened(make_mixture(tmp_path / "mixture", "deepseek_v3"))
    make_model(tmp_path / "shared", num_hidden_layers=3)
    make_model(tmp_path / mixture.names[1], num_hidden_layers=3)
    assert names_beside(tmp_path / "mixture", str(tmp_path / "shared")) == ("shared (beside)",)
    assert names_beside(tmp_path / "mixture", str(tmp_path / mixture.names[1])) == (f"{mixture.names[1]} (beside)",)
    make_mixture(tmp_path / "without", "mixtral")
    assert names_beside(tmp_path / "without", str(tmp_path / "shared")) == ("shared (beside)",)


@pytest.mark.parametrize(
    ("key", "sizes", "expected", "found"),
    [("hidden_size", {"hidden_size": 64}, 32, 64), ("num_hidden_layers", {"num_hidden_layers": 2}, 3, 2)],
)
def test_a_dense_model_of_other_sizes_is_refused(tmp_path, key, sizes, expected, found):
    mixture = opened(make_mixture(tmp_path / "mixture", "mixtral"))
    dense = make_model(tmp_path / "dense", **sizes)
    with pytest.raises(RefusedError) as error:
        dense_ffns(str(dense), mixture, lambda _: None)
    assert str(error.value) == (
        f"{dense}: cannot stand beside the experts: expected the mixture's {key}, {expected}, found {found}. Name a "
        "dense model of the mixture's sizes, such as its base model."
    )


def test_a_mixture_does_not_stand_beside_experts_whole(tmp_path):
    folder = make_mixture(tmp_path, "qwen3_moe")
    with pytest.raises(RefusedError) as error:
        dense_ffns(str(folder), opened(folder), lambda _: None)
    assert str(error.value) == (
        f"{folder}: cannot stand beside the experts, since it is a mixture already (model_type 'qwen3_moe'): see `moemerge edit`, or name one of its "
        "experts, as in MODEL#0 or MODEL#NAME."
    )


def test_a_dense_model_that_lacks_a_tensor_is_damaged(tmp_path):
    mixture, dense = opened(make_mixture(tmp_path / "mixture", "mixtral")), make_model(tmp_path / "dense")
    tensors = load_weights(dense)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_weights(dense, tensors)
    with pytest.raises(CheckpointError) as error:
        dense_ffns(str(dense), mixture, lambda _: None)
    assert str(error.value) == f"{dense}: has no tensor 'model.layers.1.mlp.up_proj.weight'. Download it again."


def test_a_layer_without_a_shared_expert_has_no_figures_of_it(tmp_path):
    mixture = opened(make_mixture(tmp_path, "mixtral"))
    ffn = {role: mixture.projection(1, 0, role) for role in ROLES}
    found = analyze_weights(mixture, {"first": {1: ffn}})
    for values in (found.norms["up"][:, 4], found.similarity["up"][:, 4, 0], found.mean_similarity["up"][:, 4, 0]):
        assert np.isnan(values[[0, 2]]).all()
        assert np.isfinite(values[1])
    assert np.isnan(found.neuron_plane[[0, 2], 4]).all()
    np.testing.assert_allclose(found.neuron_plane[1, 4], found.neuron_plane[1, 0], rtol=1e-6)


def test_all_neurons_are_matched_where_they_are_few():
    assert choose_matching((3, 4, 5), 4, 96, 64) == Matching(96, frozenset({3, 4, 5}))
    assert choose_matching((3, 4, 5), 1, 96, 64) == NOTHING


@pytest.mark.parametrize(
    ("layers", "ffns", "width", "hidden"), [(32, 8, 14336, 4096), (56, 8, 16384, 6144), (16, 64, 1024, 2048)]
)
def test_of_large_models_some_neurons_are_matched_in_some_layers(layers, ffns, width, hidden):
    found = choose_matching(range(layers), ffns, width, hidden)
    assert 0 < found.neurons < width
    assert 0 < len(found.layers) < layers
    gaps = np.diff(sorted(found.layers))
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
    products = ffns * found.neurons * len(found.layers) * 3 * ffns * width * hidden
    assert products <= max(matching._BY_ELEMENT * 3 * ffns * width * hidden * layers, matching._LEAST)


def test_nothing_is_matched_where_products_would_not_fit_into_memory():
    assert choose_matching(range(58), 256, 2048, 7168) == NOTHING

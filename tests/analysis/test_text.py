"""What a mixture does with text, against a direct computation with transformers' own whole model."""

import json
import re
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom

from moemerge.analysis.analyzer import AnalysisRequest, Opened, analyze, open_for_analysis
from moemerge.analysis.choice_figures import LayerChoices, agreement
from moemerge.analysis.figures import TextFigures
from moemerge.analysis.output_figures import sum_outputs
from moemerge.analysis.text import analyze_text
from moemerge.editing.pruning.saliency import measure_saliency
from moemerge.errors import RefusedError
from moemerge.evaluation.choices import RouterWatcher
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.layer_tokens import run_by_layer
from moemerge.evaluation.runnable import open_mixture
from moemerge.evaluation.settings import EvaluationSettings
from moemerge.families.family import SWITCHED_OFF
from moemerge.passes.tokens import Window
from tests.editing.test_saliency import CPU, Watched, copy_expert, texts
from tests.generation.test_generation import generated
from tests.passes.test_passes import IS_V4
from tests.support.machine import ROOT
from tests.support.mixtures import EXPERTS, VARIANTS, make_variant
from tests.support.models import TEXT, VOCAB, load, load_weights, save_weights

pytestmark = pytest.mark.skipif(IS_V4, reason="the modules of experts are others in transformers 4")
DEFAULT = ("mixtral", "qwen3_moe, as released", "glm4_moe, groups", "hunyuan_v1_moe, lists by layer", "gemma4_text")


def entered_routers(model: Any, given: Texts) -> list[torch.Tensor]:
    """Logits (token, expert) of all tokens but the BOS ones, of each router."""
    routers = [
        module
        for name, module in model.named_modules()
        if re.search(r"(gate|router|wg)(\.\w+)?$", name)
        and getattr(module, "weight", torch.zeros(0)).shape == (EXPERTS, model.config.hidden_size)
    ]
    seen: list[list[torch.Tensor]] = [[] for _ in routers]
    handles = [
        module.register_forward_pre_hook(lambda _module, inputs, place=place: seen[place].append(inputs[0]))
        for place, module in enumerate(routers)
    ]
    with torch.no_grad():
        for window in given.windows:
            model(torch.tensor([window.ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        return [
            torch.cat([states.reshape(-1, states.shape[-1])[1:] @ module.weight.T for states in parts])
            for module, parts in zip(routers, seen, strict=True)
        ]


def direct_layer(watched: Watched, place: int, logits: torch.Tensor, given: Texts, scoring: str) -> dict[str, Any]:
    """The figures of one layer, token by token."""
    states, experts, weights = watched.tokens(place)
    outputs = torch.stack([watched.output(place, expert, states) for expert in range(EXPERTS)], dim=1).double()
    module = watched.modules[place]
    gates = [stack.chunk(2)[0] for stack in module.gate_up_proj.detach()]
    near = [float((module.act_fn(states @ gate.T).abs() < 0.001).double().mean()) for gate in gates]
    domain = np.array([of for window, of in zip(given.windows, given.domain, strict=True) for _ in window.ids[1:]])
    ids = [token for window in given.windows for token in window.ids[1:]]
    first = [int(row[weight.argmax()]) for row, weight in zip(experts, weights, strict=True)]
    chosen = np.array([[expert in row.tolist() for expert in range(EXPERTS)] for row in experts])
    lengths = outputs.norm(dim=2).numpy()
    cosines = np.array(
        [torch.nn.functional.cosine_similarity(row[:, None], row[None], dim=2).numpy() for row in outputs]
    )
    both = chosen[:, :, None] & chosen[:, None, :]
    neither = ~chosen[:, :, None] & ~chosen[:, None, :]
    ranks = np.zeros((EXPERTS, EXPERTS), int)
    for scores, row in zip(logits.tolist(), lengths.tolist(), strict=True):
        for expert in range(EXPERTS):
            ranks[sorted(scores)[::-1].index(scores[expert]), sorted(row)[::-1].index(row[expert])] += 1
    scores = (logits.softmax(dim=1) if scoring == "softmax" else logits.sigmoid()).double().numpy()
    centred = [(each - each.mean(axis=1, keepdims=True)).flatten() for each in (scores, lengths)]
    weighed = np.array([[float(weights[t][experts[t] == e].sum()) for e in range(EXPERTS)] for t in range(len(ids))])
    mass = (weighed * lengths).sum(axis=0)
    counts = chosen.sum(axis=0)
    shares = counts[counts > 0] / counts.sum()
    again = [place for place, token in enumerate(ids) if ids.count(token) > 1]
    hits = 0
    for at in again:
        votes = Counter(
            first[other] for other in range(len(ids)) if other != at and ids[other] == ids[at]
        ).most_common()
        hits += votes[0][0] == first[at] and (len(votes) == 1 or votes[1][1] < votes[0][1])
    return {
        "output_similarity": cosines.mean(axis=0),
        "output_similarity_chosen": masked_mean(cosines, both),
        "output_similarity_others": masked_mean(cosines, neither),
        "output_norm": lengths.mean(axis=0),
        "ranks": ranks,
        "largest_first": np.mean([first[t] == lengths[t].argmax() for t in range(len(ids))]),
        "chance": 1 / EXPERTS,
        "norm_correlation": np.corrcoef(*centred)[0, 1],
        "sparsity": near,
        "load": [chosen[domain == number].mean(axis=0) for number in range(len(given.domains))],
        "weight": weighed.sum(axis=0) / np.maximum(counts, 1),
        "choice_weight": np.mean(
            [
                np.pad(
                    sorted(row.abs() / row.abs().sum(), reverse=True), (0, EXPERTS - len(row)), constant_values=np.nan
                )
                for row in weights
            ],
            axis=0,
        ),
        "saliency": mass / np.maximum(counts, 1),
        "mass_share": mass / mass.sum(),
        "together": both.mean(axis=0),
        "entropy": -(shares * np.log(shares)).sum() / np.log(EXPERTS),
        "by_token": hits / len(again),
        "by_majority": Counter(first[at] for at in again).most_common()[0][1] / len(again),
        "first": first,
    }


def masked_mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask.any(axis=0), (values * mask).sum(axis=0) / np.maximum(mask.sum(axis=0), 1), np.nan)


def adjusted_information(one: list[int], other: list[int]) -> float:
    """Mutual information by the smaller entropy, both less what is expected of the same choices in any other order.

    By the definition with logarithms of quotients; each pair's count is hypergeometric in a random order.
    """
    of_one, of_other, pairs = Counter(one), Counter(other), Counter(zip(one, other, strict=True))
    count = len(one)

    def information(n: float, a: int, b: int) -> float:
        return n / count * np.log(n * count / of_one[a] / of_other[b]) if n else 0.0

    shared = sum(information(n, a, b) for (a, b), n in pairs.items())
    expected = sum(
        hypergeom.pmf(n, count, of_one[a], of_other[b]) * information(n, a, b)
        for a in of_one
        for b in of_other
        for n in range(1, min(of_one[a], of_other[b]) + 1)
    )
    smaller = min(-sum(n / count * np.log(n / count) for n in each.values()) for each in (of_one, of_other))
    return max((shared - expected) / (smaller - expected), 0)


def check_against_transformers(folder: Path) -> None:
    mixture, given = open_mixture(folder), texts()
    found = analyze_text(mixture, given, CPU)
    model = load(folder)
    watched, logits = Watched(model, given), entered_routers(model, given)
    assert len(watched.modules) == len(logits) == len(found.layers)
    layers = [
        direct_layer(watched, place, logits[place], given, mixture.choosing.scoring) for place in range(len(logits))
    ]
    expected = {name: np.stack([np.asarray(layer[name]) for layer in layers]) for name in layers[0]}
    expected["load"] = expected["load"].transpose(1, 0, 2)
    first = expected.pop("first").tolist()
    pairs = list(pairwise(first))
    # Found over some random orders, not all.
    agreements = [adjusted_information(*pair) for pair in pairs]
    np.testing.assert_allclose(found.agreement, agreements, atol=0.02)
    expected["same_first"] = np.array([np.equal(*pair).mean() for pair in pairs])
    expected["choice_weight"] = expected["choice_weight"][:, : mixture.experts_per_token]
    assert found.tokens == (59, 19)
    assert (found.layers, found.names) == (tuple(mixture.moe_layers), mixture.experts)
    assert {field.name for field in fields(TextFigures)} - expected.keys() == {
        "layers", "names", "domains", "tokens", "generated", "generated_tokens", "agreement",
    }  # fmt: skip
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", DEFAULT)
def test_figures_are_those_of_transformers_own_model(tmp_path, name):
    check_against_transformers(make_variant(tmp_path, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in DEFAULT])
def test_figures_of_all_other_families_are_those_of_transformers(tmp_path, name):
    check_against_transformers(make_variant(tmp_path, name))


def test_a_block_of_tokens_is_like_any_other(tmp_path, monkeypatch):
    mixture, given = open_mixture(make_variant(tmp_path, "mixtral")), texts()
    whole = analyze_text(mixture, given, CPU)
    monkeypatch.setattr("moemerge.analysis.output_figures._FEWEST", 5)
    monkeypatch.setattr("moemerge.analysis.output_figures._NUMBERS", 1)
    assert_same(analyze_text(mixture, given, CPU), whole)


def assert_same(found: TextFigures, expected: TextFigures, order: list[int] | None = None) -> None:
    """Compare all figures; with `order`, those of experts in that order."""
    for field in fields(TextFigures):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, np.ndarray):
            for axis in range(other.ndim) if order and field.name != "ranks" else ():
                if axis and other.shape[axis] == EXPERTS:
                    other = other.take(order, axis=axis)
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=field.name)


def test_experts_in_another_order_have_the_same_figures_in_that_order(tmp_path):
    order = [2, 0, 3, 1]
    folder, given = make_variant(tmp_path / "mixture", "mixtral"), texts()
    before = analyze_text(open_mixture(folder), given, CPU, generate=6)
    tensors = load_weights(folder)
    moved = dict(tensors)
    for name, values in tensors.items():
        if ".gate." in name:
            moved[name] = values[order].clone()
        for place, expert in enumerate(order):
            if f".experts.{place}." in name:
                moved[name] = tensors[name.replace(f".experts.{place}.", f".experts.{expert}.")].clone()
    save_weights(folder, moved)
    assert_same(analyze_text(open_mixture(folder), given, CPU, generate=6), before, order)


def test_equal_experts_have_equal_outputs(tmp_path):
    folder = make_variant(tmp_path, "mixtral")
    copy_expert(folder, 1, 3)
    found = analyze_text(open_mixture(folder), texts(), CPU)
    np.testing.assert_allclose(found.output_similarity[:, 1, 3], 1, rtol=1e-6)
    np.testing.assert_array_equal(found.output_norm[:, 1], found.output_norm[:, 3])
    assert np.abs(found.output_similarity[:, 0, 1]).max() < 0.5


def test_experts_that_are_all_equal_have_the_longest_output_by_chance(tmp_path):
    folder = make_variant(tmp_path, "mixtral")
    for other in range(1, EXPERTS):
        copy_expert(folder, 0, other)
    np.testing.assert_array_equal(analyze_text(open_mixture(folder), texts(), CPU).largest_first, 1 / EXPERTS)


@pytest.mark.parametrize("size", [1e-24, 1e24])
def test_outputs_of_any_size_have_cosines(size):
    outputs = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(0))
    chosen = torch.ones(50, 3)
    one, other = (
        sum_outputs([Given(each) for each in outputs * by], outputs[0], chosen, CPU).figures([0, 1, 2], 3)
        for by in (1, size)
    )
    np.testing.assert_allclose(other.similarity, one.similarity, rtol=1e-5)
    np.testing.assert_allclose(other.lengths, one.lengths * size, rtol=1e-5)


def test_tokens_without_outputs_are_left_out_of_their_mean_cosine():
    first = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    given = [Given(first), Given(first.clone()), Given(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))]
    chosen = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    found = sum_outputs(given, first, chosen, CPU).figures([0, 1, 2], 3)
    half = np.sqrt(0.5)
    np.testing.assert_allclose(found.similarity, [[1, 1, half / 3], [1, 1, half / 3], [half / 3, half / 3, 1]])
    np.testing.assert_allclose(found.similarity_chosen, [[1, 1, np.nan], [1, 1, np.nan], [np.nan, np.nan, np.nan]])
    np.testing.assert_allclose(found.similarity_others, [[1, 1, np.nan], [1, 1, np.nan], [np.nan, np.nan, 1]])


class Given:
    """An expert whose outputs are given."""

    def __init__(self, outputs: torch.Tensor) -> None:
        self.gate, self._outputs = torch.ones(1, 2), outputs

    def activated(self, states: torch.Tensor) -> torch.Tensor:
        return states[:, :1]

    def output(self, _states: torch.Tensor, _activated: torch.Tensor) -> torch.Tensor:
        return self._outputs


def test_saliency_is_that_of_pruning(tmp_path):
    mixture, given = open_mixture(make_variant(tmp_path, "glm4_moe, groups")), texts()
    found, expected = analyze_text(mixture, given, CPU), measure_saliency(mixture, given, CPU, {})
    np.testing.assert_allclose(found.saliency, expected.reap, rtol=1e-5)
    np.testing.assert_allclose(found.mass_share, expected.mass / expected.mass.sum(axis=1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(found.frequency, expected.frequency, rtol=1e-6)
    np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-5)


def test_a_router_that_reads_the_token_alone_is_told_from_others(tmp_path):
    folder = make_variant(tmp_path, "mixtral")
    tensors = load_weights(folder)
    tensors["model.layers.0.self_attn.o_proj.weight"].zero_()
    save_weights(folder, tensors)
    found = analyze_text(open_mixture(folder), texts(), CPU)
    assert found.by_token[0] == 1
    assert found.by_token[1:].max() < 1
    assert found.by_majority.max() < 1


def test_an_expert_that_is_switched_off_takes_part_in_nothing(tmp_path):
    folder = make_variant(tmp_path, "dots1")
    tensors = load_weights(folder)
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][2] = SWITCHED_OFF
    save_weights(folder, tensors)
    found = analyze_text(open_mixture(folder), texts(), CPU)
    assert found.layers == (1, 2)
    rest = [0, 1, 3]
    for figures in (found.output_similarity[0], found.output_similarity_chosen[0], found.output_similarity_others[0]):
        assert np.isnan(figures[2]).all()
        assert np.isnan(figures[:, 2]).all()
    assert np.isfinite(found.output_similarity[0][np.ix_(rest, rest)]).all()
    assert np.isfinite(found.output_similarity[1]).all()
    for figures in (found.output_norm, found.sparsity):
        assert np.isnan(figures).tolist() == [[False, False, True, False], [False] * 4]
    for figures in (found.frequency, found.weight, found.saliency, found.mass_share):
        assert figures[0, 2] == 0
    assert found.ranks.sum(axis=(1, 2)).tolist() == [3 * 78, 4 * 78]
    assert found.ranks[0, 3].sum() == found.ranks[0, :, 3].sum() == 0
    assert np.isfinite([found.norm_correlation, found.largest_first]).all()
    np.testing.assert_array_equal(found.chance, [1 / 3, 1 / 4])
    shares = found.frequency[0, rest] / found.frequency[0].sum()
    assert found.entropy[0] == pytest.approx(-(shares * np.log(shares)).sum() / np.log(3))


@pytest.mark.parametrize("name", ["mixtral", "hunyuan_v1_moe, lists by layer"])
def test_load_while_generating_is_that_of_the_new_tokens(tmp_path, name):
    folder, given = make_variant(tmp_path, name), texts()
    told = []
    found = analyze_text(
        open_mixture(folder), given, CPU, generate=6, progress=lambda task, *amounts: told.append((str(task), *amounts))
    )
    model = load(folder)
    counts, made = np.zeros(found.generated.shape), 0
    for window in given.windows:
        start = list(window.ids[: len(window.ids) // 2])
        new = generated(model, start, max_new_tokens=7, do_sample=False)[:6]
        whole = Window(0, tuple(start + list(new)), (True,) * (len(start) + len(new)))
        watched = Watched(model, Texts(("one",), (None,), (1,), (whole,), (0,)))
        for place in range(len(counts)):
            counts[place] += np.bincount(watched.tokens(place)[1][len(start) - 1 :].flatten(), minlength=EXPERTS)
        made += len(new)
    np.testing.assert_allclose(found.generated, counts / made, rtol=1e-12)
    assert told[-1] == (f"text of {folder}", 18, 18)
    assert analyze_text(open_mixture(folder), given, CPU).generated is None


def test_texts_that_end_at_once_have_no_load(tmp_path):
    folder = make_variant(tmp_path, "mixtral")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(VOCAB))}))
    assert analyze_text(open_mixture(folder), texts(), CPU, generate=6).generated is None


def test_a_model_that_is_too_large_to_generate_is_refused_before_it_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr("moemerge.analysis.text.free_memory", lambda _device: 1000)
    mixture, told = open_mixture(make_variant(tmp_path, "mixtral")), []
    with pytest.raises(RefusedError, match="of memory in float32, 1.00 kB are free on cpu"):
        analyze_text(mixture, texts(), CPU, generate=1, progress=lambda *given: told.append(given))
    assert told == []


def opened_with_text(folder: Path, **keys: Any) -> Opened:
    """A mixture opened with text, to run it in float32 on the CPU unless `keys` say otherwise."""
    generate = keys.pop("generate", 0)
    settings = EvaluationSettings(tokens=60, window=20, **{"device": "cpu", "compute_dtype": "float32", **keys})
    request = AnalysisRequest({"one": [TEXT]}, settings, generate=generate)
    return open_for_analysis([str(folder)], request, lambda _: None)[0]


def test_a_device_that_is_not_there_is_refused_when_a_mixture_is_opened(tmp_path):
    folder = make_variant(tmp_path, "mixtral")
    with pytest.raises(RefusedError, match="device 'nowhere' cannot be used here: .*. Choose --device cpu."):
        opened_with_text(folder, device="nowhere")


def test_a_model_too_large_to_generate_is_refused_when_it_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("moemerge.passes.device.free_memory", lambda _device: 1000)
    folder = make_variant(tmp_path, "mixtral")
    assert opened_with_text(folder).text
    with pytest.raises(RefusedError, match="of memory in float32, 1.00 kB are free on cpu"):
        opened_with_text(folder, generate=1)


def test_a_mixture_is_opened_without_torch_where_there_is_no_text(tmp_path):
    folder = make_variant(tmp_path, "mixtral")
    code = (
        "import sys\nfrom moemerge.analysis.analyzer import AnalysisRequest, analyze, open_for_analysis\n"
        "from moemerge.evaluation.settings import EvaluationSettings\n"
        "(opened,) = open_for_analysis(sys.argv[1:], AnalysisRequest({}, EvaluationSettings()), print)\n"
        "assert analyze(opened).text is None\nassert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_note_says_that_all_texts_ended_at_once(tmp_path):
    folder = make_variant(tmp_path, "mixtral")
    assert analyze(opened_with_text(folder, generate=2)).notes == ()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(VOCAB))}))
    assert analyze(opened_with_text(folder)).notes == ()
    found = analyze(opened_with_text(folder, generate=2))
    assert found.notes == (f"{folder}: nothing was generated, since every text ended at once",)


def test_states_of_windows_are_not_kept_beside_those_of_the_layer(tmp_path, monkeypatch):
    monkeypatch.setattr("moemerge.evaluation.running._TOKENS", 1)  # each window by itself
    watch, seen = RouterWatcher.watch, []

    def watched(self: RouterWatcher, *given: Any) -> Any:
        choices = watch(self, *given)
        seen.extend(weakref.ref(choice.states) for choice in choices or ())
        return choices

    monkeypatch.setattr(RouterWatcher, "watch", watched)
    kept = []
    run_by_layer(
        open_mixture(make_variant(tmp_path, "mixtral")),
        texts(),
        CPU,
        lambda _tokens: kept.append([state() is not None for state in seen[-3:]]),
        lambda _done, _total: None,
    )
    assert kept == [[False, False, True]] * 3  # the one at hand


def test_experts_that_give_nothing_have_no_mass(tmp_path):
    folder = make_variant(tmp_path, "mixtral")
    tensors = load_weights(folder)
    for name, values in tensors.items():
        if name.endswith(".w2.weight") and ".layers.1." in name:
            values.zero_()
    save_weights(folder, tensors)
    found = analyze_text(open_mixture(folder), texts(), CPU)
    for figures in (found.output_norm, found.saliency, found.mass_share):
        assert not figures[1].any()
        assert figures[[0, 2]].any()
    for figures in (found.output_similarity, found.output_similarity_chosen, found.output_similarity_others):
        assert np.isnan(figures[1]).all()
        assert np.isfinite(figures[[0, 2]]).all()
    assert found.largest_first[1] == 1 / EXPERTS
    assert np.isnan(found.norm_correlation).tolist() == [False, True, False]


def choices(ids: list[int], experts: list[int], present: int) -> LayerChoices:
    weights = np.ones((len(ids), 1))
    first = np.array(experts)[:, None]
    return LayerChoices(np.array(ids), np.zeros(len(ids), int), first, weights, np.arange(3) < present)


def test_what_cannot_be_said_is_not_a_number():
    one = choices([5, 6, 7], [0, 0, 0], 1)
    assert np.isnan(one.by_token()).all()
    assert one.entropy() == 0
    assert np.isnan(agreement(one.first, choices([5, 6, 7], [0, 1, 0], 3).first))


def test_ties_of_a_token_are_misses():
    found = choices([5, 5, 5, 6, 6, 7], [0, 0, 1, 1, 2, 2], 3)
    # Of token 5, the others of the first two are 0 and 1, those of the third 0 and 0; of token 6, each sees the other.
    assert found.by_token() == (0, 2 / 5)
    assert choices([5, 5, 5, 5], [0, 0, 0, 1], 3).by_token() == (3 / 4, 3 / 4)


@pytest.mark.parametrize(("experts", "tokens"), [(128, 8192), (8, 512), (64, 100)])
def test_independent_layers_do_not_agree(experts, tokens):
    random = np.random.default_rng(3)
    one, other = random.integers(experts, size=(2, tokens))
    assert agreement(one, other) == pytest.approx(0, abs=0.02)
    assert agreement(one, random.permutation(experts)[one]) == pytest.approx(1, rel=1e-12)
    mixed = np.where(random.random(tokens) < 0.5, one, other)
    assert 0.2 < agreement(one, mixed) < 0.8


def test_layers_of_which_every_order_tells_all_have_no_agreement():
    assert np.isnan(agreement(np.arange(5), np.arange(5)))


def test_layers_agree_where_one_tells_the_other():
    assert agreement(np.array([0, 1, 2, 0, 1, 2]), np.array([2, 0, 1, 2, 0, 1])) == pytest.approx(1)
    assert agreement(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == pytest.approx(0, abs=1e-12)

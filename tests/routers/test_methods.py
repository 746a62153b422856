"""Routers from labelled tokens and from weights: what each method computes, and what must not matter to it."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moemerge import load_config, plan_merge
from moemerge.config.loading import parse_config
from moemerge.config.router_methods import METHODS
from moemerge.config.schema import RouterSettings
from moemerge.errors import CheckpointError, IncompatibleError, RefusedError, RouterError
from moemerge.families.mixture_shape import Mixture
from moemerge.passes.compute_dtype import Compute
from moemerge.planning.options import PlanOptions
from moemerge.routers import fitting, logistic, regression
from moemerge.routers.initialisation import init_routers
from moemerge.routers.method_lookup import rows_from_pass
from moemerge.routers.pass_inputs import LayerRows, PassRequest, RouterInputs
from moemerge.routers.prompts import UNSORTED, encode_prompts
from moemerge.routers.scoring import top_weights
from moemerge.routers.streamed_pass import capture_router_inputs
from tests.support.models import PROMPTS, load, make_model, router_inputs, tokenizer

CPU = Compute(torch.device("cpu"), torch.float32)
FITTED = ("hidden", "ridge", "logistic")


def asked(experts=3, scoring="softmax", absent=frozenset(), **router) -> PassRequest:
    mixture = Mixture(1, 8, (8,) * experts, (), 2, (0,), {0: absent} if absent else {})
    return PassRequest(None, mixture, scoring, (), CPU, RouterSettings.model_validate(router))


def fit(method: str, inputs: RouterInputs, request: PassRequest) -> LayerRows:
    """A layer's router by a method of the table."""
    return rows_from_pass(METHODS[method])(inputs, request)


def clouds(experts=3, tokens=60, hidden=16, spread=1.0, seed=0):
    """Tokens around one centre for each expert, all with a large common part; ten documents each."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(experts, hidden, generator=generator)
    expert = torch.arange(experts).repeat_interleave(tokens)
    states = centres[expert] + spread * torch.randn(len(expert), hidden, generator=generator)
    states += 5 * torch.randn(hidden, generator=generator)
    documents = [int(e) * 10 + n % 10 for n, e in enumerate(expert)]
    return router_inputs(states, expert.tolist(), documents=documents)


def chosen(rows, states):
    weights, experts = top_weights(states @ rows.T, 2, "softmax")
    return weights, experts


def by_definition(inputs, experts: int, regularisation: float) -> np.ndarray:
    """Balanced centred ridge regression, in float64, without any of our code."""
    states, expert = inputs.states.double().numpy(), inputs.expert.numpy()
    weights = len(expert) / experts / np.bincount(expert)[expert]
    targets = np.eye(experts)[expert] - 1 / experts
    gram = (states * weights[:, None]).T @ states
    system = gram + regularisation * np.trace(gram) / len(gram) * np.eye(len(gram))
    rows = np.linalg.solve(system, (states * weights[:, None]).T @ targets).T
    return rows - rows.mean(0)


@pytest.mark.parametrize("tokens", [4, 60])  # fewer and more tokens than dimensions: two systems, one solution
def test_ridge_is_balanced_centred_ridge_regression(tokens):
    inputs = clouds(tokens=tokens, hidden=32)
    uneven = list(range(len(inputs.states)))[2:]
    inputs = router_inputs(
        inputs.states[uneven], inputs.expert[uneven].tolist(), documents=inputs.document[uneven].tolist()
    )
    found = fit("ridge", inputs, asked(**{"lambda": 0.1})).rows.numpy()
    expected = by_definition(inputs, 3, 0.1)
    cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine == pytest.approx(1, abs=1e-6)


def test_the_gram_matrix_is_a_sum_over_chunks(monkeypatch):
    states, weights = clouds().states, torch.rand(180)
    whole = states.T @ (states * weights[:, None])
    monkeypatch.setattr(regression, "_CHUNK_TOKENS", 7)
    assert torch.allclose(regression.gram_of(states, weights), whole, rtol=1e-5)


def test_each_logistic_step_lowers_the_loss(monkeypatch):
    inputs = clouds(spread=2.0)
    targets = torch.nn.functional.one_hot(inputs.expert).float()
    data = fitting.Labelled(inputs.states, targets, torch.ones(len(targets)), 0.01)
    losses = []
    for steps in range(8):
        monkeypatch.setattr(logistic, "_STEPS", steps)
        rows = logistic.solve(data)
        penalty = 0.01 * float(regression.gram_of(data.states, data.weights).trace()) / len(targets) / 16 / 2
        loss = torch.nn.functional.cross_entropy(data.states @ rows.T, inputs.expert)
        losses.append(float(loss + penalty * rows.square().sum()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("method", FITTED)
def test_held_out_tokens_reach_their_expert_and_are_counted(method):
    both = clouds(tokens=120, spread=0.7)
    known, fresh = both.document % 10 < 5, both.document % 10 >= 5
    inputs = router_inputs(both.states[known], both.expert[known].tolist(), documents=both.document[known].tolist())
    made = fit(method, inputs, asked())
    hits = ((both.states[fresh] @ made.rows.T).argmax(dim=1) == both.expert[fresh]).float().mean()
    assert hits > 0.9
    if method != "hidden":
        assert sum(made.held_out) / 3 == pytest.approx(float(hits), abs=0.1)
    assert torch.allclose(made.rows.sum(dim=0), torch.zeros(16), atol=1e-4)


def test_the_scale_says_how_sure_held_out_documents_make_it():
    """Where experts overlap, a router must not be sure of what it has only learned by heart."""
    generator = torch.Generator().manual_seed(0)
    noise = router_inputs(
        torch.randn(48, 64, generator=generator), [0, 1, 2] * 16, documents=[n // 3 * 3 + n % 3 for n in range(48)]
    )
    made = fit("ridge", noise, asked())
    assert sum(made.held_out) / 3 == pytest.approx(1 / 3, abs=0.25)
    weights, _ = chosen(made.rows, torch.randn(500, 64, generator=generator))
    assert float(weights[:, 0].mean()) < 0.75
    sure = fit("ridge", clouds(spread=0.1), asked())
    weights, _ = chosen(sure.rows, clouds(spread=0.1).states)
    assert float(weights[:, 0].mean()) > 0.97


@pytest.mark.parametrize("method", ["ridge", "logistic"])
def test_documents_of_unequal_length_do_not_tip_what_is_held_out(method):
    """Where an expert has few tokens in one part, it must not lose all of the other's."""
    generator = torch.Generator().manual_seed(0)
    documents = [
        (expert, number, length)
        for expert in range(3)
        for number, length in enumerate((4, 100) if expert == 1 else (100, 4))
    ]
    experts = [expert for expert, _, length in documents for _ in range(length)]
    states = 0.5 * torch.randn(3, 64, generator=generator)[experts] + torch.randn(len(experts), 64, generator=generator)
    states += 3 * torch.randn(64, generator=generator)
    numbers = [10 * expert + number for expert, number, length in documents for _ in range(length)]
    made = fit(method, router_inputs(states, experts, documents=numbers), asked())
    assert min(made.held_out) > 0.25
    assert sum(made.held_out) / 3 > 0.45
    weights, _ = chosen(made.rows, states)
    assert float(weights[:, 0].mean()) > 0.65


@pytest.mark.parametrize("method", FITTED)
@given(order=st.permutations([0, 1, 2]))
@settings(max_examples=6, deadline=None)
def test_permuting_experts_permutes_rows(method, order):
    inputs = clouds()
    rows = fit(method, inputs, asked()).rows
    moved = router_inputs(inputs.states, [order[e] for e in inputs.expert.tolist()], documents=inputs.document.tolist())
    again = fit(method, moved, asked()).rows
    assert torch.allclose(again[order], rows, rtol=1e-3, atol=1e-4 * float(rows.abs().max()))


@given(seed=st.integers(0, 1000), factor=st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_a_common_vector_changes_nothing_and_a_factor_no_choice(seed, factor):
    states = clouds(
        seed=seed
    ).states.double()  # in float32 some seeds have tokens whose logits are equal but for rounding
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)).double()
    weights, experts = chosen(rows, states)
    common = 10 * torch.randn(16, generator=torch.Generator().manual_seed(seed + 1)).double()
    moved_weights, moved = chosen(rows + common, states)
    assert torch.equal(moved, experts)
    assert torch.allclose(moved_weights, weights, atol=1e-3)
    _, scaled = chosen(rows * factor, states)
    assert torch.equal(scaled, experts)


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_absent_experts_have_rows_of_zeros_and_change_nothing(method, scoring):
    inputs = clouds(experts=4)
    keep = inputs.expert != 3
    inputs = replace(inputs, beginnings=inputs.beginnings.where(keep[:, None], torch.tensor(1e3)))
    three = router_inputs(inputs.states[keep], inputs.expert[keep].tolist(), documents=inputs.document[keep].tolist())
    rows = fit(method, inputs, asked(4, scoring, frozenset({3}))).rows
    assert torch.equal(rows[3], torch.zeros(16))
    assert torch.allclose(rows[:3], fit(method, three, asked(3, scoring)).rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", FITTED)
def test_sigmoids_choose_and_weigh_as_a_softmax_does(method):
    inputs = clouds(spread=0.5)
    soft, sharp = (fit(method, inputs, asked(3, scoring)).rows for scoring in ("softmax", "sigmoid"))
    expected, chosen_by_softmax = top_weights(inputs.states @ soft.T, 2, "softmax")
    found, chosen_by_sigmoid = top_weights(inputs.states @ sharp.T, 2, "sigmoid")
    assert (chosen_by_softmax[:, 0] == chosen_by_sigmoid[:, 0]).float().mean() > 0.97
    assert float(found[:, 0].mean()) == pytest.approx(float(expected[:, 0].mean()), abs=0.05)


@pytest.mark.parametrize("method", FITTED)
def test_sigmoids_are_lowered_at_first_tokens_as_elsewhere(method):
    inputs = clouds(spread=0.5)
    far = inputs.states + 30 * torch.eye(16)[0]  # an axis of its own, and further along the mean
    lowest = {
        name: float(
            (far @ fit(method, replace(inputs, beginnings=beginnings), asked(3, "sigmoid")).rows.mean(dim=0)).min()
        )
        for name, beginnings in (("with", far), ("without", inputs.states))
    }
    assert lowest["with"] > -9.7 > lowest["without"]  # 6.1e-5, which llama.cpp takes smaller sums for


def test_negative_text_turns_tokens_away():
    inputs = clouds()
    plain = fit("ridge", inputs, asked()).rows
    odd = inputs.states[inputs.expert == 1][:20] + 3 * torch.eye(16)[0]
    states = torch.cat([inputs.states, odd])
    experts, documents = inputs.expert.tolist() + [0] * 20, inputs.document.tolist() + list(range(100, 120))
    signs = [True] * len(inputs.states) + [False] * 20
    with_negative = fit("ridge", router_inputs(states, experts, signs, documents), asked()).rows

    def margin(rows):
        logits = (odd @ rows.T).softmax(dim=1)
        return float(logits[:, 0].mean())

    assert margin(with_negative) < margin(plain)


@pytest.mark.parametrize("prior", [[1.0, 1.0, 1.0], [0.2, 0.2, 0.6]])
def test_a_load_prior_is_met_without_a_bias(prior):
    inputs = clouds(spread=1.5)
    rows = fit("ridge", inputs, asked(load_prior=prior)).rows
    loads = (inputs.states @ rows.T).softmax(dim=1).mean(dim=0)
    assert loads.tolist() == pytest.approx([share / sum(prior) for share in prior], abs=0.03)


def test_a_load_prior_of_sharp_rows_is_finite():
    """An expert that no text is like has no weight that float32 can tell from 0."""
    inputs = clouds(spread=0.1)
    like_one = inputs.states[inputs.expert == 0]
    with_text = router_inputs(
        torch.cat([inputs.states, like_one]),
        inputs.expert.tolist() + [UNSORTED] * len(like_one),
        documents=inputs.document.tolist() + [99] * len(like_one),
    )
    assert fit("ridge", with_text, asked(load_prior=[1, 1, 1], scale=30)).rows.isfinite().all()


def test_the_scale_of_a_config_is_a_factor_on_the_fitted_one():
    inputs = clouds()
    once, twice = (fit("ridge", inputs, asked(scale=scale)).rows for scale in (1, 2))
    assert torch.allclose(twice, 2 * once, rtol=1e-5)


# ---- of whole models


def shifted(folder: Path, base: Path, layers: dict[int, torch.Tensor], size=0.05) -> Path:
    """A fine-tune of `base` whose gate and up projections changed by one direction (hidden,) in each layer."""
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(len(folder.name))
    for layer, direction in layers.items():
        for name in ("gate", "up"):
            weight = tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"]
            change = torch.outer(torch.randn(len(weight), generator=generator), direction / direction.norm())
            weight += change * size * weight.norm() / change.norm()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


TEXTS = (
    ["The quick brown fox jumps over the lazy dog. ", "The dog jumps over the quick fox and the lazy dog. "],
    ["def main(argv): return [item for item in argv if item] ", "return argv if main(item) "],
    ["Le chat dort sur le tapis et la souris danse. ", "la souris dort et le chat danse sur le tapis "],
)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A base, and experts whose change from it answers to their own texts, with the texts beside them."""
    root = tmp_path_factory.mktemp("tuned")
    base = make_model(root / "base", 0)
    for number, texts in enumerate(TEXTS):
        (root / f"{number}.txt").write_text("\n<|document|>\n".join(text * 3 for text in texts for _ in range(3)))
    config = parse_config(document(root, texts=True, gate_mode="ridge"))
    plan = plan_of(config, [base] * 3)
    means: dict[int, list[torch.Tensor]] = {}
    for inputs in capture_router_inputs(request_of(plan)):
        all_text = inputs.states.mean(dim=0)
        means[inputs.layer] = [inputs.mean(expert, positive=True) - 0.7 * all_text for expert in range(3)]
    for number in range(3):
        shifted(root / f"expert{number}", base, {layer: found[number] for layer, found in means.items()})
    return root


def document(root: Path, *, texts=False, prompts=False, **keys) -> str:
    experts = [
        {"source_model": str(root / f"expert{number}")}
        | ({"positive_texts": str(root / f"{number}.txt")} if texts else {})
        | ({"positive_prompts": PROMPTS[number]} if prompts else {})
        for number in range(3)
    ]
    return json.dumps({"base_model": str(root / "base"), "experts": experts, **keys})


def plan_of(config, folders=None):
    if folders:
        experts = [e.model_copy(update={"source_model": str(f)}) for e, f in zip(config.experts, folders, strict=True)]
        document = config.model_dump(by_alias=True) | {"experts": [expert.model_dump() for expert in experts]}
        config = load_config(document, allow_identical_experts=True)
    return plan_merge(config)


def request_of(plan, **keys) -> PassRequest:
    prompts = encode_prompts(plan.base_folder, plan.config, 128, 0)
    return PassRequest(
        plan.parts.base, plan.mixture, plan.family.scoring, prompts, CPU, plan.config.router, plan.experts,
        **keys,
    )  # fmt: skip


def routers(plan, seed=0):
    return init_routers(plan.router_request, seed=seed, progress=lambda *_: None)


def rows_by_layer(plan, made) -> dict[int, torch.Tensor]:
    return {
        layer: torch.frombuffer(bytearray(data), dtype=torch.float32).view(3, -1) for layer, data in made.rows.items()
    }


def accuracy(root: Path, rows: dict[int, torch.Tensor]) -> float:
    """Over the texts' tokens and all layers."""
    plan = plan_of(parse_config(document(root, texts=True, gate_mode="ridge")))
    hits = [
        ((inputs.states @ rows[inputs.layer].T).argmax(dim=1) == inputs.expert).float().mean()
        for inputs in capture_router_inputs(request_of(plan))
    ]
    return float(sum(hits) / len(hits))


def test_texts_make_routers_and_say_how_these_do_on_held_out_ones(tuned):
    for keys in ({}, {"gate_mode": "ridge"}):
        plan = plan_of(parse_config(document(tuned, texts=True, **keys)))
        made = routers(plan)
        assert accuracy(tuned, rows_by_layer(plan, made)) > 0.9
        assert all(0.5 < share <= 1 for share in made.report.held_out)


def test_texts_beside_prompts_are_read_too(tuned):
    both = routers(plan_of(parse_config(document(tuned, texts=True, prompts=True)))).rows
    assert both != routers(plan_of(parse_config(document(tuned, texts=True)))).rows
    assert both != routers(plan_of(parse_config(document(tuned, prompts=True)))).rows


def test_the_seed_of_the_config_goes_before_the_commands(tuned):
    text = document(tuned, texts=True, router={"tokens_per_expert": 20})
    assert routers(plan_of(parse_config(text)), 0).rows != routers(plan_of(parse_config(text)), 1).rows
    text = document(tuned, texts=True, router={"tokens_per_expert": 20, "seed": 1})
    assert routers(plan_of(parse_config(text)), 0).rows == routers(plan_of(parse_config(text)), 1).rows


def test_delta_is_the_slope_of_the_response_at_the_mean_of_any_text(tuned):
    plan = plan_of(parse_config(document(tuned, gate_mode="delta")))
    rows = rows_by_layer(plan, routers(plan))
    for inputs in capture_router_inputs(request_of(plan)):
        expected = []
        for number in range(3):
            base, expert = (load_file(tuned / name / "model.safetensors") for name in ("base", f"expert{number}"))
            names = [f"model.layers.{inputs.layer}.mlp.{part}_proj.weight" for part in ("gate", "up")]
            change = torch.cat([expert[name] - base[name] for name in names])
            slope = change.T @ (change @ inputs.states.mean(dim=0))
            expected.append(slope / slope.norm())
        expected = torch.stack(expected) - torch.stack(expected).mean(dim=0)
        found = rows[inputs.layer]
        assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.9999
    assert accuracy(tuned, rows) > 0.6
    assert not routers(plan).report.layers  # nothing says which text is whose


def test_delta_has_a_table_only_where_every_expert_has_text(tuned):
    text = json.loads(document(tuned, gate_mode="delta"))
    text["experts"][0]["positive_prompts"] = PROMPTS[0]
    assert not routers(plan_of(parse_config(json.dumps(text)))).report.layers
    text = document(tuned, prompts=True, gate_mode="delta")
    assert np.isfinite(routers(plan_of(parse_config(text))).report.load).all()


def test_text_of_shared_experts_changes_no_delta_row_and_makes_a_gate(tuned):
    text = json.loads(document(tuned, gate_mode="delta"))
    text["shared_experts"] = [{"source_model": str(tuned / "base")}]
    alone = routers(plan_of(parse_config(json.dumps(text))))
    text["shared_experts"][0]["positive_prompts"] = ["The lazy dog"]
    plan = plan_of(parse_config(json.dumps(text)))
    request = replace(plan.router_request, shared_gate=True)
    made = init_routers(request, seed=0, progress=lambda *_: None)
    assert len(made.shared_gates) == len(made.rows)
    for layer, row in rows_by_layer(plan, made).items():
        assert torch.allclose(row, rows_by_layer(plan, alone)[layer], rtol=1e-3, atol=1e-5)


def test_delta_bootstrap_labels_documents_by_what_they_move(tuned):
    texts = {"calibration_texts": [str(tuned / f"{number}.txt") for number in range(3)]}
    for gate_mode in ("delta_bootstrap", "combined"):
        plan = plan_of(parse_config(document(tuned, router=texts, gate_mode=gate_mode)))
        made = routers(plan)
        assert accuracy(tuned, rows_by_layer(plan, made)) > 0.9
        assert min(made.report.held_out) > 0.5


def test_delta_bootstrap_without_text_for_an_expert_is_refused(tuned):
    router = {"calibration_texts": str(tuned / "1.txt")}
    plan = plan_of(parse_config(document(tuned, router=router, gate_mode="delta_bootstrap")))
    with pytest.raises(
        RefusedError, match=r"none of the 6 documents is for experts\[0\] \(0, 6, 0 for the experts in turn\)"
    ):
        routers(plan)


def test_delta_refuses_models_that_were_not_tuned_from_the_base(tmp_path, tuned):
    stranger = make_model(tmp_path / "stranger", 9)
    with pytest.raises(
        IncompatibleError, match=r"experts\[1\]: its FFN differs from the base model's by 1\d\d% in layer 0"
    ):
        plan_of(parse_config(document(tuned)), [tuned / "expert0", stranger, tuned / "expert1"])
    with pytest.raises(IncompatibleError, match=r"experts\[1\]: its FFNs are the base model's own"):
        plan_of(parse_config(document(tuned)), [tuned / "expert0", tuned / "base", tuned / "expert1"])
    wide = make_model(tmp_path / "wide", 3, intermediate_size=64)
    with pytest.raises(IncompatibleError, match=r"experts\[1\] \(wide\): its FFN has 64 neurons, the base model's 48"):
        plan_of(parse_config(document(tuned)), [tuned / "expert0", wide, tuned / "expert1"])


def test_mergekit_hidden_is_the_last_tokens_residual_stream(tuned):
    text = json.loads(document(tuned, prompts=True, gate_mode="mergekit_hidden"))
    text["experts"][0]["negative_prompts"] = ["Le chat"]
    plan = plan_of(parse_config(json.dumps(text)))
    rows = rows_by_layer(plan, routers(plan))
    model = load(tuned / "base")

    def mean(prompts):
        with torch.no_grad():
            states = [
                model(torch.tensor([tokenizer()(p)["input_ids"]]), output_hidden_states=True).hidden_states[:-1]
                for p in prompts
            ]
        return torch.stack([torch.stack([layer[0, -1] for layer in of_prompt]) for of_prompt in states]).mean(dim=0)

    for number, expert in enumerate(plan.config.experts):
        expected = mean(expert.positive_prompts)
        expected = expected - mean(expert.negative_prompts) if expert.negative_prompts else expected
        for layer, row in enumerate(torch.nn.functional.normalize(expected, dim=1)):
            assert torch.allclose(rows[layer][number], row, atol=1e-5)


def test_files_that_are_not_there_are_refused_before_anything_is_read(tuned):
    text = json.loads(document(tuned, texts=True))
    text["experts"][2]["positive_texts"] = ["nowhere/*.txt"]
    with pytest.raises(RefusedError) as caught:
        plan_of(parse_config(json.dumps(text)))
    assert str(caught.value) == (
        "experts[2].positive_texts[0]: 'nowhere/*.txt' leads to no .txt, .jsonl or .parquet file. Paths count from the config's folder, else from the current one."
    )


def test_what_cannot_be_solved_ends_in_a_message(tuned):
    alike = json.loads(document(tuned, router={"lambda": 1e-12}))
    for expert in alike["experts"]:
        expert["positive_prompts"] = ["The fox", "The fox", "The dog"]
    alike["experts"][0]["negative_prompts"] = ["The fox"]
    with pytest.raises(RouterError, match=r"router inputs of layer 0 are too alike to be solved for"):
        routers(plan_of(parse_config(json.dumps(alike))))


def changed_model(tmp_path: Path, model: Path, change) -> Path:
    """A copy of a model, called like it, whose tensors `change` has changed in their places."""
    shutil.copytree(model, tmp_path / model.name)
    tensors = load_file(tmp_path / model.name / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / model.name / "model.safetensors", {"format": "pt"})
    return tmp_path / model.name


def damaged(tmp_path: Path, model: Path, name: str, *places: tuple[int, ...]) -> tuple[Path, str]:
    """A copy of a model with NaNs in a tensor, and how messages tell of it."""

    def put(tensors):
        for place in places:
            tensors[name][place] = math.nan

    folder = changed_model(tmp_path, model, put)
    count = (
        "1 number that is infinite or NaN, at"
        if len(places) == 1
        else "2 numbers that are infinite or NaN, the first at"
    )
    return folder, f"{name} of {folder / 'model.safetensors'} holds {count} {list(min(places))}"


@pytest.mark.parametrize("method", ["ridge", "logistic", "hidden"])
def test_a_base_model_that_overflows_is_refused(tmp_path, tuned, method):
    base = changed_model(
        tmp_path, tuned / "base", lambda found: found["model.layers.0.mlp.down_proj.weight"].mul_(1e38)
    )
    text = json.loads(document(tuned, prompts=True, gate_mode=method)) | {"base_model": str(base)}
    with pytest.raises(RouterError) as caught:
        routers(plan_of(parse_config(json.dumps(text))))
    assert str(caught.value) == (
        "the base model's numbers overflow in layer 0, whose weights are finite: they grow beyond 3.4e+38, the largest "
        "that float32 holds. gate_mode random needs no pass over it."
    )


@pytest.mark.parametrize(
    ("name", "place", "where"),
    [
        ("model.embed_tokens.weight", (slice(None), 3), "the embeddings"),
        ("model.layers.0.mlp.up_proj.weight", (3, 5), "layer 0"),
        ("model.layers.1.input_layernorm.weight", (31,), "layer 1"),
        ("model.layers.2.self_attn.o_proj.weight", (3, 5), "layer 2"),  # of which the FFN is never run
    ],
)
def test_a_damaged_base_model_is_refused_where_it_is_damaged(tmp_path, tuned, name, place, where):
    base, told = damaged(tmp_path, tuned / "base", name, place)
    if where == "the embeddings":
        told = told.replace(
            "1 number that is infinite or NaN, at [slice(None, None, None)",
            "160 numbers that are infinite or NaN, the first at [0",
        )
    text = json.loads(document(tuned, prompts=True, gate_mode="ridge")) | {"base_model": str(base)}
    with pytest.raises(RouterError) as caught:
        routers(plan_of(parse_config(json.dumps(text))))
    assert str(caught.value) == f"the base model's numbers are not finite from {where} on: {told}. Download it again."


def test_a_damaged_ffn_of_the_last_layer_does_not_matter_to_routers(tmp_path, tuned):
    base, _ = damaged(tmp_path, tuned / "base", "model.layers.2.mlp.up_proj.weight", (3, 5))
    text = json.loads(document(tuned, prompts=True, gate_mode="ridge"))
    found = routers(plan_of(parse_config(json.dumps(text | {"base_model": str(base)}))))
    assert found.rows == routers(plan_of(parse_config(json.dumps(text)))).rows


@pytest.mark.parametrize("method", ["delta", "delta_bootstrap"])
@pytest.mark.parametrize(("of", "layer", "expert"), [("expert1", 0, 1), ("base", 2, 0)])
def test_methods_that_read_weights_name_those_that_are_damaged(tmp_path, tuned, method, of, layer, expert):  # noqa: PLR0917
    """The base's too, in the last layer, whose FFN its pass does not run."""
    model, told = damaged(tmp_path, tuned / of, f"model.layers.{layer}.mlp.up_proj.weight", (7, 5), (40, 0))
    texts = {"router": {"calibration_texts": str(tuned / "*.txt")}} if method == "delta_bootstrap" else {}
    text = document(tuned, gate_mode=method, **texts).replace(str(tuned / of), str(model))
    with pytest.raises(RouterError) as caught:
        routers(plan_of(parse_config(text)))
    assert str(caught.value) == (
        f"experts[{expert}]: {told}, so what fine-tuning changed there is not known. Download that model again."
    )


def test_a_damaged_half_of_a_fused_projection_is_named_by_its_place_in_the_whole(tmp_path):
    base, expert = (make_model(tmp_path / name, 0, "phi3") for name in ("base", "expert"))
    near = changed_model(
        tmp_path / "near", expert, lambda found: [t.add_(0.01) for n, t in found.items() if "mlp" in n]
    )
    far, told = damaged(tmp_path / "far", expert, "model.layers.0.mlp.gate_up_proj.weight", (48 + 7, 5))
    text = {"base_model": str(base), "gate_mode": "delta", "experts": [{"source_model": str(m)} for m in (near, far)]}
    with pytest.raises(RouterError, match=re.escape(f"experts[1]: {told}, so what")):
        routers(plan_of(parse_config(json.dumps(text))))


def test_weights_whose_squares_overflow_are_told_from_damaged_ones(tmp_path, tuned, monkeypatch):
    name = "model.layers.0.mlp.up_proj.weight"
    model = changed_model(tmp_path, tuned / "expert1", lambda found: found[name].mul_(1e25))
    config = parse_config(document(tuned, gate_mode="delta").replace(str(tuned / "expert1"), str(model)))
    with pytest.raises(
        IncompatibleError, match="differs from the base model's by far more than its own size in layer 0"
    ):
        plan_of(config)
    # As in a layer that the plan does not look at.
    monkeypatch.setattr("moemerge.compatibility.differences.check_deltas", lambda *_: [])
    with pytest.raises(RouterError) as caught:
        routers(plan_of(config))
    assert str(caught.value) == (
        "experts[1]: its FFN is so far from the base model's in layer 0 that squares of the difference overflow. Give the "
        "experts prompts and choose gate_mode ridge."
    )


def test_rows_that_the_output_cannot_hold_are_refused(tuned):
    text = document(tuned, prompts=True, gate_mode="ridge", dtype="float16", router={"scale": 1e6})
    with pytest.raises(RouterError) as caught:
        routers(plan_of(parse_config(text)))
    assert str(caught.value) == (
        "some router weights are not finite numbers in float16: the base model's numbers, or router.scale, are too large "
        "for it. Set `dtype: bfloat16`, lower router.scale, or choose gate_mode random."
    )


def test_what_is_mixed_of_damaged_weights_names_them(tmp_path, tuned):
    model, told = damaged(tmp_path, tuned / "expert1", "model.layers.1.self_attn.q_proj.weight", (3, 5))
    text = document(tuned, prompts=True, gate_mode="ridge", shared_weights="average")
    with pytest.raises(CheckpointError) as caught:
        routers(plan_of(parse_config(text.replace(str(tuned / "expert1"), str(model)))))
    assert str(caught.value).endswith(f": cannot be computed, since {told}. Download that file again.")


def test_texts_are_needed_to_merge_and_not_to_verify(tuned, tmp_path):
    text = json.loads(document(tuned, texts=True))
    text["experts"][0]["positive_texts"] = [str(tmp_path / "a.txt")]
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(RefusedError, match=r"experts\[0\]\.positive_texts: these files hold no text\."):
        plan_of(parse_config(json.dumps(text)))
    assert plan_merge(parse_config(json.dumps(text)), PlanOptions(needs_texts=False)).config.method.name == "combined"


def test_the_order_of_batches_changes_nothing(tuned, monkeypatch):
    plan = plan_of(parse_config(document(tuned, texts=True)))
    whole = rows_by_layer(plan, routers(plan))
    monkeypatch.setattr("moemerge.routers.streamed_pass.TOKENS_PER_BATCH", 30)
    parts = rows_by_layer(plan, routers(plan))
    for layer, rows in whole.items():
        assert torch.allclose(parts[layer], rows, rtol=1e-2, atol=1e-3 * float(rows.abs().max()))


def test_methods_that_are_solved_leave_their_inputs_alone():
    inputs = clouds()
    before = inputs.states.clone()
    for method in FITTED:
        fit(method, inputs, asked())
    assert torch.equal(inputs.states, before)


def test_streamed_statistics_are_those_of_the_whole_model(tuned):
    """Ridge rows from a pass layer by layer, against ridge regression on what enters the FFNs of the whole model."""
    plan = plan_of(parse_config(document(tuned, prompts=True, gate_mode="ridge", router={"lambda": 0.1})))
    rows = rows_by_layer(plan, routers(plan))
    model, seen = load(tuned / "base"), {layer: [] for layer in range(3)}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _module, inputs, index=index: seen[index].append(inputs[0][0, 1:]))
    experts = []
    for number, expert in enumerate(plan.config.experts):
        for prompt in expert.positive_prompts:
            ids = tokenizer()(prompt)["input_ids"]
            experts += [number] * (len(ids) - 1)
            with torch.no_grad():
                model(torch.tensor([ids]))
    for layer, states in seen.items():
        expected = torch.from_numpy(by_definition(router_inputs(torch.cat(states), experts), 3, 0.1)).float()
        cosine = torch.nn.functional.cosine_similarity(rows[layer].flatten(), expected.flatten(), dim=0)
        assert float(cosine) > 0.9999


def test_an_expert_that_is_the_base_keeps_what_is_for_none_of_the_others(tuned):
    text = json.loads(document(tuned, texts=True, router={"load_prior": [1, 1, 2]}))
    text["experts"][2]["source_model"] = str(tuned / "base")
    plan = plan_of(parse_config(json.dumps(text)))
    made = routers(plan)
    assert made.report.top1_accuracy[2] > 0.9
    assert made.report.experts[2] == "base"

"""Routers from weights and text: what the weights say is a prior that text corrects."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from moemerge import load_config, plan_merge
from moemerge.errors import RefusedError
from moemerge.passes.compute_dtype import Compute
from moemerge.routers.combined import combined_rows
from moemerge.routers.fitting import Labelled
from moemerge.routers.initialisation import init_routers
from moemerge.routers.logistic import solve
from moemerge.routers.pass_inputs import PassRequest
from moemerge.routers.prior import prior_rows
from moemerge.routers.prompts import NEUTRAL, encode_prompts
from moemerge.routers.streamed_pass import capture_router_inputs
from tests.support.models import make_model

CPU = Compute(torch.device("cpu"), torch.float32)
PROMPTS = (["The quick fox", "A lazy dog"], ["def main(): pass", "return x + 1"], ["Le chat dort", "la nuit tombe"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three fine-tunes of it, the last with a change 10 times as large."""
    root = tmp_path_factory.mktemp("combined")
    folders = [make_model(root / "base", 0), *(make_model(root / f"e{n}", n, tuned_from=0) for n in (1, 2, 3))]
    return [str(folder) for folder in folders]


def plan_of(models, *, prompts=True, **keys):
    experts = [
        {"source_model": model} | ({"positive_prompts": PROMPTS[number]} if prompts else {})
        for number, model in enumerate(models[1:])
    ]
    return plan_merge(load_config({"base_model": models[0], "experts": experts, **keys}, allow_identical_experts=True))


def request_of(plan) -> PassRequest:
    prompts = encode_prompts(plan.base_folder, plan.config, 128, 0)
    return PassRequest(
        plan.parts.base, plan.mixture, plan.family.scoring, prompts, CPU, plan.config.router, plan.experts
    )


def routers(plan):
    return init_routers(plan.router_request, seed=0, progress=lambda *_: None)


def labelled(tokens: int, hidden: int) -> Labelled:
    generator = torch.Generator().manual_seed(0)
    expert = torch.arange(tokens) % 3
    states = torch.randn(3, hidden, generator=generator)[expert] + torch.randn(tokens, hidden, generator=generator)
    return Labelled(states, torch.nn.functional.one_hot(expert, 3).float(), torch.ones(tokens), 0.1)


def test_the_prior_is_the_slope_of_the_relative_response_and_even_on_neutral_text(models):
    request = request_of(plan_of(models, prompts=False))
    for inputs in capture_router_inputs(request):
        rows = prior_rows(inputs, request)
        neutral = inputs.states[inputs.neutral]
        mean = neutral.mean(dim=0)
        assert torch.allclose(rows.sum(dim=0), torch.zeros(len(mean)), atol=1e-5)
        assert torch.allclose(rows @ mean, torch.zeros(3), atol=1e-5)
        assert float(rows.norm(dim=1).mean()) == pytest.approx(1, abs=1e-5)


def test_a_change_that_is_larger_everywhere_gives_the_same_prior(models, monkeypatch):
    """Heavy fine-tunes must not win all text against light ones."""
    from moemerge.routers import delta

    request = request_of(plan_of(models, prompts=False))
    inputs = next(iter(capture_router_inputs(request)))
    before = prior_rows(inputs, request)
    given = delta._changes

    def heavier(expert, layer, request):
        return ((change * (10 if expert == 2 else 1), base) for change, base in given(expert, layer, request))

    monkeypatch.setattr(delta, "_changes", heavier)
    monkeypatch.setattr("moemerge.routers.prior.STRANGER", 1e9)
    assert torch.allclose(prior_rows(inputs, request), before, atol=1e-4)


def test_experts_without_a_meaningful_change_have_the_same_prior_as_each_other(tmp_path, models):
    """The base itself, a model trained apart, and an FFN of another width say nothing of what they are for."""
    stranger = make_model(tmp_path / "stranger", 9)
    wider = make_model(tmp_path / "wider", 4, intermediate_size=96)
    plan = plan_of([models[0], models[0], str(stranger), str(wider), models[1]], prompts=False, gate_mode="random")
    request = replace(request_of(plan), prompts=request_of(plan_of(models, prompts=False)).prompts)
    inputs = next(iter(capture_router_inputs(request)))
    rows = prior_rows(inputs, request)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert not torch.allclose(rows[0], rows[3])


def test_identical_experts_have_no_prior(models):
    plan = plan_of([models[0], models[1], models[1], models[1]])
    request = request_of(plan)
    for inputs in capture_router_inputs(request):
        assert not prior_rows(inputs, request).any()
        assert combined_rows(inputs, request).rows.isfinite().all()


@pytest.mark.parametrize("tokens", [9, 300])
def test_labels_pull_rows_away_from_the_prior_as_far_as_there_are_tokens(tokens):
    """The solution has no slope: the same with few tokens, in a basis of their own, as with many."""
    data, start = labelled(tokens, 20), torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    start -= start.mean(dim=0)
    rows = solve(data, start)
    ridge = 0.1 * float((data.states.T @ data.states / tokens).trace()) / 20

    def slope(found):
        misses = ((data.states @ found.T).softmax(dim=1) - data.targets) / tokens
        return misses.T @ data.states + ridge * (found - start)

    assert float(slope(rows).norm()) < 0.05 * float(slope(start).norm())
    assert torch.allclose(rows.sum(dim=0), torch.zeros(20), atol=1e-4)
    stiff = solve(replace(data, regularisation=1e6), start)
    assert torch.allclose(stiff, start, atol=1e-3)
    free = partial(solve, replace(data, regularisation=1e-3))
    hits = ((data.states @ free(start).T).argmax(dim=1) == data.targets.argmax(dim=1)).float().mean()
    assert hits > 0.8


def test_few_tokens_are_solved_for_as_many_are():
    data = labelled(9, 20)
    start = torch.zeros(3, 20)
    padded = Labelled(
        torch.cat([data.states, torch.zeros(30, 20)]),
        torch.cat([data.targets, torch.full((30, 3), 1 / 3)]),
        torch.ones(39),
        # The trace of the mean Gram matrix is of 39 tokens here.
        data.regularisation,
    )
    padded.weights[9:] = 1e-12
    assert torch.allclose(solve(data, start), solve(padded, start), atol=1e-3)


def test_auto_uses_weights_and_prompts_and_holds_documents_out(models):
    plan = plan_of(models)
    assert plan.config.method.name == "combined"
    made = routers(plan)
    assert made.report.held_out is not None
    assert len(made.report.held_out) == 3
    assert made.rows != routers(plan_of(models, gate_mode="logistic")).rows
    assert not routers(plan_of(models, prompts=False)).report.layers  # nothing says which text is whose


def test_neutral_text_is_for_no_expert(models):
    prompts = request_of(plan_of(models)).prompts
    assert {prompt.expert for prompt in prompts} == {0, 1, 2, NEUTRAL}
    ridge = request_of(plan_of(models, gate_mode="ridge")).prompts
    assert {prompt.expert for prompt in ridge} == {0, 1, 2}


def test_weights_are_needed_only_where_nothing_else_speaks(tmp_path, models):
    stranger = str(make_model(tmp_path / "stranger", 9))
    assert plan_of([*models[:3], stranger]).config.method.name == "combined"
    assert plan_of([models[0], models[0], *models[1:3]]).config.method.name == "combined"
    with pytest.raises(RefusedError, match=r"experts\[2\]: its FFN differs from the base model's"):
        plan_of([*models[:3], stranger], prompts=False)


def test_some_described_and_some_not_is_refused(models):
    experts = [{"source_model": models[1], "positive_prompts": ["a"]}, {"source_model": models[2]}]
    with pytest.raises(RefusedError, match="has neither positive_prompts nor positive_texts, though others have"):
        load_config(json.dumps({"base_model": models[0], "experts": experts}))

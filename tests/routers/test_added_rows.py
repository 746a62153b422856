"""Rows of experts that join a mixture whose other rows stay."""

from dataclasses import dataclass

import pytest
import torch

from moemerge.routers.added_rows import KeptRows, first_rows, fit_added_rows, label_added, sharpened
from moemerge.routers.fitting import Labelled
from moemerge.routers.logistic import solve
from moemerge.routers.pass_inputs import RouterInputs
from moemerge.routers.prompts import NEUTRAL, EncodedPrompt
from moemerge.routers.scoring import even_direction, lowering, top_weights

EXPERTS, HIDDEN, TOKENS = 4, 24, 400


@dataclass(frozen=True)
class World:
    """Tokens of four experts, each around a mean of its own, beside one that all text shares."""

    states: torch.Tensor
    expert: torch.Tensor

    @property
    def labelled(self) -> Labelled:
        targets = torch.nn.functional.one_hot(self.expert, EXPERTS).float()
        return Labelled(self.states, targets, torch.ones(len(self.states)), 0.01)


def world(apart: float, seed: int = 0) -> World:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(7)) * apart
    expert = torch.arange(TOKENS) % EXPERTS
    noise = torch.randn(TOKENS, HIDDEN, generator=generator)
    return World(means[expert] + noise + 2 * torch.ones(HIDDEN), expert)


def inputs_of(given: World, *, numbers: tuple[int, ...] = (0, 1, 2, 3)) -> RouterInputs:
    """Router inputs in which every fourth token is of each document, and expert e has the number `numbers[e]`."""
    prompts = tuple(EncodedPrompt(number, True, (0,), (True,), place) for place, number in enumerate(numbers))
    return RouterInputs(0, given.states, given.expert, prompts, torch.empty(0))


def joint(given: World) -> torch.Tensor:
    """Rows (expert, hidden) fitted to all experts together."""
    return solve(given.labelled, torch.zeros(EXPERTS, HIDDEN))


@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("apart", [1.0, 3.0])
def test_an_expert_that_was_left_out_comes_back_as_it_was(apart, shift):
    """Also where all kept rows have something in common, which changes no choice."""
    given, unseen = world(apart), world(apart, seed=1)
    whole = joint(given)
    kept = KeptRows(whole[:3] + shift * torch.linspace(-1, 1, HIDDEN), "softmax")
    data, chosen = label_added(inputs_of(given), 3, 0.01)
    assert chosen.all()
    row = fit_added_rows(kept, first_rows(kept, None, given.states, 1), data)
    wanted = (unseen.states @ whole.T).softmax(dim=1)
    found = (unseen.states @ torch.cat([kept.rows, row]).T).softmax(dim=1)
    assert float((found.argmax(dim=1) == wanted.argmax(dim=1)).float().mean()) > 0.97
    assert float((found - wanted).abs().sum(dim=1).mean()) < 0.1


def test_tokens_of_kept_experts_are_divided_among_these_as_before():
    given = world(2.0)
    kept = KeptRows(joint(given)[:3], "softmax")
    before = kept.rows.clone()
    row = fit_added_rows(kept, first_rows(kept, None, given.states, 1), label_added(inputs_of(given), 3, None)[0])
    assert torch.equal(kept.rows, before)
    theirs = given.states[given.expert < 3]
    old, new = (theirs @ kept.rows.T).softmax(dim=1), (theirs @ torch.cat([kept.rows, row]).T).softmax(dim=1)
    assert torch.allclose(new[:, :3] / new[:, :3].sum(dim=1, keepdim=True), old, atol=1e-5)
    assert float(new[:, 3].mean()) < 0.02


def test_the_loss_is_nowhere_smaller_near_the_rows():
    given = world(0.5)
    kept = KeptRows(joint(given)[:2], "softmax")
    data, _ = label_added(inputs_of(given), 2, 0.05)
    first = first_rows(kept, None, given.states, 2)
    rows = fit_added_rows(kept, first, data)
    penalty = 0.05 * float((data.states.square() * data.weights[:, None]).sum() / data.weights.sum()) / HIDDEN

    def loss(made: torch.Tensor) -> float:
        scores = torch.cat([kept.log_score(data.states)[:, None], data.states @ made.T], dim=1)
        losses = -(data.targets * scores.log_softmax(dim=1)).sum(dim=1)
        return float((losses * data.weights).sum() / data.weights.sum() + penalty / 2 * (made - first).square().sum())

    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0):
        near = rows + size * torch.randn(rows.shape, generator=generator) / HIDDEN**0.5
        assert loss(rows) < loss(near)
    assert loss(rows) < loss(first)


def test_an_expert_for_the_same_text_as_a_kept_one_shares_it():
    """Its tokens have two labels in equal parts, so neither may win."""
    given = world(2.0)
    twice = World(
        torch.cat([given.states, given.states[given.expert == 2]]), torch.cat([given.expert, torch.full((100,), 3)])
    )
    mine = twice.expert != 3
    mine[TOKENS:] = True
    twice = World(twice.states[mine], twice.expert[mine])
    kept = KeptRows(joint(given)[:3], "softmax")
    data, _ = label_added(inputs_of(twice), 3, None)
    row = sharpened(kept, fit_added_rows(kept, first_rows(kept, None, twice.states, 1), data), data)
    shared = given.states[given.expert == 2]
    share = (shared @ torch.cat([kept.rows, row]).T).softmax(dim=1).mean(dim=0)
    assert float(share[3]) == pytest.approx(0.5, abs=0.05)
    assert float(share[2]) == pytest.approx(0.5, abs=0.05)


def test_rows_are_sharpened_as_far_as_they_take_their_own_tokens():
    factors = []
    for apart in (0.2, 1.0, 3.0):
        given = world(apart)
        kept = KeptRows(joint(given)[:3], "softmax")
        data, _ = label_added(inputs_of(given), 3, 0.05)
        row = fit_added_rows(kept, first_rows(kept, None, given.states, 1), data)
        own = given.states[given.expert == 3] @ torch.cat([kept.rows, row]).T
        share, mean = float(own.softmax(dim=1)[:, 3].mean()), kept.rows.mean(dim=0)
        factors.append(max(1.0, 2 * share))
        assert torch.allclose(sharpened(kept, row, data) - mean, factors[-1] * (row - mean), atol=1e-5)
    assert factors == sorted(factors)
    assert factors[0] == 1
    assert factors[2] > 1.9


@pytest.mark.parametrize("lowered", [True, False])
def test_sigmoids_are_fitted_as_they_weigh(lowered):
    given, unseen = world(3.0), world(3.0, seed=1)
    rows = joint(given)[:3]
    kept = KeptRows(rows - lowering(given.states) if lowered else rows, "sigmoid")
    row = fit_added_rows(kept, first_rows(kept, None, given.states, 1), label_added(inputs_of(given), 3, None)[0])
    weights, chosen = top_weights(unseen.states @ torch.cat([kept.rows, row]).T, 2, "sigmoid")
    own = unseen.expert == 3
    assert float((chosen[own, 0] == 3).float().mean()) > 0.97
    assert float((chosen[~own, 0] == 3).float().mean()) < 0.03
    if lowered:
        assert float(weights[own, 0].mean()) > 0.9


def test_neutral_text_stands_for_kept_experts_without_text():
    given = world(2.0)
    neutral = inputs_of(given, numbers=(NEUTRAL, NEUTRAL, NEUTRAL, 3))
    data, chosen = label_added(neutral, 3, None)
    assert chosen.all()
    assert torch.equal(data.targets[:, 1], (given.expert == 3).float())
    own = given.expert == 3
    assert float(data.weights[~own].sum() / data.weights[own].sum()) == pytest.approx(3, rel=1e-5)
    described, chosen = label_added(inputs_of(given, numbers=(0, NEUTRAL, 1, 3)), 3, None)
    assert torch.equal(chosen, given.expert != 1)
    assert float(described.weights.sum()) == pytest.approx(300, rel=1e-5)


def test_a_prior_counts_by_half_at_the_scale_of_the_kept_rows():
    """Whatever its own scale is."""
    given = world(1.0)
    whole = joint(given)
    kept = KeptRows(whole[:3] + 5, "softmax")
    mean = kept.rows.mean(dim=0)
    said = whole[3] - whole[:3].mean(dim=0)
    for scale in (0.1, 10.0):
        (row,) = first_rows(kept, whole * scale, given.states, 1)
        assert torch.allclose(row - mean, said / 2, atol=1e-4)


def test_a_prior_that_contradicts_the_text_does_not_count():
    given = world(2.0)
    whole = joint(given)
    kept = KeptRows(whole[:3], "softmax")
    data, _ = label_added(inputs_of(given), 3, None)
    wrong = first_rows(kept, -whole, given.states, 1)
    plain = fit_added_rows(kept, first_rows(kept, None, given.states, 1), data)
    assert torch.allclose(fit_added_rows(kept, wrong, data), plain)


def test_one_kept_expert_has_no_scale_of_its_own():
    given = world(2.0)
    kept = KeptRows(even_direction(given.states)[None], "softmax")
    prior = joint(given)[:2]
    (row,) = first_rows(kept, prior, given.states, 1)
    assert row.isfinite().all()
    assert float((row - kept.rows[0]).norm()) > 0

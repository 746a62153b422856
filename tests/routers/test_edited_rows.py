"""Two routers in one layer."""

import pytest
import torch

from moemerge.routers.added_rows import KeptRows
from moemerge.routers.edited_rows import part_offset
from moemerge.routers.fitting import Labelled
from moemerge.routers.logistic import solve
from moemerge.routers.scoring import lowering

EXPERTS, HIDDEN, TOKENS = 6, 24, 600


def tokens(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """States (token, hidden) of tokens of experts with a mean each, and their experts (token,)."""
    means = 2 * torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(7))
    expert = torch.arange(TOKENS) % EXPERTS
    noise = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return means[expert] + noise + 2, expert


def part(states: torch.Tensor, expert: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Rows of a mixture of some of the experts, fitted to their own tokens alone."""
    own = (expert >= first) & (expert < first + count)
    targets = torch.nn.functional.one_hot(expert[own] - first, count).float()
    return solve(Labelled(states[own], targets, torch.ones(int(own.sum())), 0.01), torch.zeros(count, HIDDEN))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_two_routers_divide_tokens_rightly_and_choose_within_as_before(scoring):
    states, expert = tokens()
    lowered = lowering(states) if scoring == "sigmoid" else 0
    # As from mixtures whose rows are centred otherwise.
    apart = torch.linspace(-0.2, 0.4, HIDDEN)
    first = KeptRows(part(states, expert, 0, 2) - lowered, scoring)
    second = KeptRows(part(states, expert, 2, 4) - lowered + apart, scoring)
    targets = torch.nn.functional.one_hot((expert >= 2).long(), 2).float()
    offset = part_offset(first, second, Labelled(states, targets, torch.ones(TOKENS), 0.01))
    unseen, right = tokens(seed=1)
    alone = torch.cat([unseen @ first.rows.T, unseen @ second.rows.T], dim=1)
    joined = torch.cat([unseen @ first.rows.T, unseen @ (second.rows + offset).T], dim=1)
    assert float((joined.argmax(dim=1) == right).float().mean()) > 0.95
    assert float((alone.argmax(dim=1) == right).float().mean()) < 0.9
    assert torch.equal(joined[:, 2:].argmax(dim=1), alone[:, 2:].argmax(dim=1))

"""An evaluation in one sentence."""

import numpy as np
import pytest

from moemerge.evaluation.figures import Domain, Estimate, Evaluation, Routing, difference
from moemerge.evaluation.verdict import best_models, verdict

LOSSES = {
    "merged": (2.0, 3.0),
    "base": (2.4, 3.4),
    "expert code": (1.9, 3.6),
    "expert math": (2.6, 2.95),
    "uniform mixture": (2.2, 3.1),
    "weight average": (2.0, 3.004),
    "label oracle": (1.8, 2.9),
}


def evaluation(losses=None, accuracy=(0.9, 0.75), names=("code", "math"), *, documents=6, width=0.01):
    """An evaluation with differences of means whose intervals reach `width` to both sides."""
    losses = LOSSES if losses is None else losses
    experts = ("code", "math")
    found = {model: dict(zip(names, map(est, of), strict=False)) for model, of in losses.items()}
    means = {model: sum(of) / len(of) for model, of in losses.items()}
    gaps = {model: means["merged"] - mean for model, mean in means.items() if model != "merged"}
    return Evaluation(
        model="out",
        experts=experts,
        experts_per_token=1,
        layers=(0,),
        dtype="float32",
        domains=tuple(
            Domain(name, experts.index(name) if name in experts else None, documents, documents, 100) for name in names
        ),
        losses=found,
        mean_losses=means,
        differences={model: Estimate(gap, gap - width, gap + width) for model, gap in gaps.items()},
        recovered={},
        recovered_mean=None,
        routing={
            name: Routing(share, share, (0.5, 0.5), ((0.5, 0.5),), 0.5, 0.9)
            for name, share in zip(names, accuracy, strict=True)
        },
        notes=(),
    )


def est(value):
    return Estimate(value, None, None)


def test_it_says_what_the_mixture_beats_and_where_it_is_weakest():
    assert verdict(evaluation()) == (
        "merged 2.500 nats per token: better than every dense expert, the base and the uniform mixture; not surely "
        "different from the weight average; weakest on code, 0.100 above its own expert; 90% of its tokens go to code "
        "first"
    )


def test_it_says_what_is_better():
    losses = LOSSES | {"expert code": (1.9, 2.0), "base": (2.0, 3.0)}
    assert verdict(evaluation(losses)) == (
        "merged 2.500 nats per token: better than the dense expert math and the uniform mixture; not surely different "
        "from the base and the weight average; worse than the dense expert code; weakest on code, 0.100 above its own "
        "expert; 90% of its tokens go to code first"
    )


def test_the_mixture_that_was_edited_is_called_that():
    losses = {"merged": (2.0, 3.0), "before the edit": (1.9, 2.9), "uniform mixture": (2.2, 3.1)}
    assert verdict(evaluation(losses)).startswith(
        "merged 2.500 nats per token: better than the uniform mixture; worse than the mixture before the edit; weakest "
    )


def test_a_large_difference_with_a_wide_interval_is_not_sure():
    assert verdict(evaluation(width=0.6)) == (
        "merged 2.500 nats per token: not surely different from any dense expert, the base, the weight average and the "
        "uniform mixture; weakest on code, 0.100 above its own expert; 90% of its tokens go to code first"
    )


def test_a_small_difference_with_a_narrow_interval_is_sure():
    only = {model: LOSSES[model] for model in ("merged", "weight average")}
    assert verdict(evaluation(only, width=0.001)).startswith(
        "merged 2.500 nats per token: better than the weight average"
    )


def test_a_mixture_that_beats_its_experts_on_their_own_text_is_weakest_nowhere():
    losses = LOSSES | {"expert code": (2.1, 3.6), "expert math": (2.6, 3.1)}
    assert verdict(evaluation(losses)) == (
        "merged 2.500 nats per token: better than every dense expert, the base and the uniform mixture; not surely "
        "different from the weight average"
    )


@pytest.mark.parametrize(("documents", "named"), [(1, "1 document"), (4, "4 documents")])
def test_of_few_documents_nothing_is_sure(documents, named):
    assert verdict(evaluation(documents=documents)) == (
        "merged 2.500 nats per token: too few documents were read to be sure what it is better than "
        f"({named} of code, and 5 are needed: --max-tokens reads more, and a smaller --window more of them)"
    )


def test_without_dense_experts_the_weakest_is_where_the_router_errs_most():
    assert verdict(evaluation({"merged": (2.0, 3.0)})) == (
        "merged 2.500 nats per token: weakest on math: 75% of its tokens go to math first"
    )


def test_text_that_no_expert_owns_has_no_weakest():
    found = evaluation({"merged": (2.0, 3.0)}, (None, None), ("news", "mail"))
    assert verdict(found) == "merged 2.500 nats per token"


def test_the_best_of_each_column_is_no_oracle():
    assert best_models(evaluation()) == {"code": "expert code", "math": "expert math", "": "merged"}


def test_the_sign_of_a_difference_is_that_of_its_whole_interval():
    losses = np.stack([np.arange(20.0), np.full(20, 10.0)], axis=1)
    shift = np.array([1.0, 0.0])
    lower, higher = losses - shift, losses + shift
    uneven = losses + np.stack([np.resize([3.0, -3.0], 20), np.zeros(20)], axis=1)
    signs = [difference({"a": losses}, {"a": other}).sign for other in (lower, higher, losses, uneven)]
    assert signs == [1, -1, 0, 0]
    assert difference({"a": losses[:4]}, {"a": lower[:4]}).sign == 0


def test_a_difference_that_rounding_makes_is_none():
    losses = np.stack([np.arange(20.0), np.full(20, 10.0)], axis=1)
    lower = losses - np.array([1e-4, 0.0])
    found = difference({"a": losses}, {"a": lower})
    assert found.low is not None
    assert found.low > 0
    assert found.sign == 0

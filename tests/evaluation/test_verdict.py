"""An evaluation in one sentence."""

from moemerge.evaluation.figures import Domain, Estimate, Evaluation, Routing
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


def evaluation(losses=None, accuracy=(0.9, 0.75), names=("code", "math"), experts=("code", "math")):
    losses = LOSSES if losses is None else losses
    found = {model: dict(zip(names, map(est, of), strict=False)) for model, of in losses.items()}
    return Evaluation(
        model="out",
        experts=experts,
        experts_per_token=1,
        layers=(0,),
        dtype="float32",
        domains=tuple(Domain(name, experts.index(name) if name in experts else None, 6, 6, 100) for name in names),
        losses=found,
        mean_losses={model: sum(e.value for e in of.values()) / len(of) for model, of in found.items()},
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
        "merged 2.500 nats per token: better than every dense expert, the base and the uniform mixture; no different "
        "from the weight average; weakest on code, 0.100 above its own expert; 90% of its tokens go to code first"
    )


def test_it_says_what_is_better():
    losses = LOSSES | {"expert code": (1.9, 2.0), "base": (2.0, 3.0)}
    assert verdict(evaluation(losses)) == (
        "merged 2.500 nats per token: better than the dense expert math and the uniform mixture; no different from the "
        "base and the weight average; worse than the dense expert code; weakest on code, 0.100 above its own expert; "
        "90% of its tokens go to code first"
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

"""An evaluation in one sentence, and the words of its tables."""

from collections.abc import Sequence
from typing import Final

from moemerge.evaluation.figures import BASE, EXPERT, MERGED, NO_GAIN, ORACLE, SOUP, UNIFORM, Evaluation

WORDS: Final = {
    MERGED: "the mixture as it is",
    BASE: "the dense model that attention, embeddings and norms come from",
    "expert NAME": "the dense model that an expert's FFNs come from, by itself",
    UNIFORM: "the mixture with all its experts weighing alike: what routing adds is the difference to it",
    SOUP: "one dense model, the mean of all experts' weights: it costs as much as one expert",
    ORACLE: "the mixture with every token sent to the expert that its text is named after, which no router can know",
    "recovered": "(uniform mixture - merged) / (uniform mixture - label oracle): 1 is as good as knowing the label",
    "right first": "share of tokens whose first choice is the expert that their text is named after",
    "entropy": "0 where the router is sure of one expert, 1 where all weigh alike before the choice",
    "first's weight": "mean weight of the first choice among those that are chosen",
}
"""What the rows and columns of an evaluation are."""


def verdict(found: Evaluation) -> str:
    """Say in one sentence how the merged model does beside what it is made of, and where it is weakest."""
    if MERGED not in found.mean_losses:  # pragma: no cover  the mixture runs over every domain
        return ""
    merged = found.mean_losses[MERGED]
    parts = [*_against_others(found, merged), *_weakest(found)]
    return f"{MERGED} {merged:.3f} nats per token" + (f": {'; '.join(parts)}" if parts else "")


def best_models(found: Evaluation) -> dict[str, str]:
    """Name the model with the lowest loss in each domain, and under an empty name in the mean; the oracle aside."""
    models = [model for model in found.losses if model != ORACLE]
    columns = {
        domain.name: {m: found.losses[m][domain.name].value for m in models if domain.name in found.losses[m]}
        for domain in found.domains
    }
    columns[""] = {model: mean for model, mean in found.mean_losses.items() if model != ORACLE}
    return {name: min(column, key=column.__getitem__) for name, column in columns.items()}


def _against_others(found: Evaluation, merged: float) -> list[str]:
    """Compare mean losses; of less than `NO_GAIN` apart, neither is better."""
    means = found.mean_losses
    experts = [model for model in means if model.startswith(EXPERT)]
    said: dict[str, list[str]] = {"better than": [], "no different from": [], "worse than": []}
    for model in (BASE, *experts, SOUP, UNIFORM):
        if model in means:
            gap = means[model] - merged
            said["no different from" if abs(gap) < NO_GAIN else "better than" if gap > 0 else "worse than"].append(
                model
            )
    return [f"{word} {_listed(_named(models, experts))}" for word, models in said.items() if models]


def _named(models: Sequence[str], experts: Sequence[str]) -> list[str]:
    whole = len(experts) > 1 and set(experts) <= {*models}
    dense = ["every dense expert"] if whole else [f"the dense {model}" for model in models if model in experts]
    return [*dense, *(f"the {model}" for model in models if model not in experts)]


def _weakest(found: Evaluation) -> list[str]:
    """Name the domain that loses most against its own dense expert; without one, where the router errs most."""
    lost = {
        domain.name: found.losses[MERGED][domain.name].value - found.losses[own][domain.name].value
        for domain in found.domains
        if domain.expert is not None and domain.name in found.losses.get(own := f"{EXPERT}{domain.name}", {})
    }
    right = {name: routing.accuracy for name, routing in found.routing.items() if routing.accuracy is not None}
    if len(right) < 2:  # noqa: PLR2004
        return []
    name = max(lost, key=lambda domain: lost[domain]) if lost else min(right, key=lambda domain: right[domain])
    share = f"{right[name]:.0%} of its tokens go to {name} first"
    if name not in lost:
        return [f"weakest on {name}: {share}"]
    amount = f"{abs(lost[name]):.3f} {'above' if lost[name] > 0 else 'below'} its own expert"
    return [f"weakest on {name}, {amount}; {share}"]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

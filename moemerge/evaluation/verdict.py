"""An evaluation in one sentence, and the words of its tables."""

from collections.abc import Sequence
from typing import Final

from moemerge.evaluation.figures import (
    BASE,
    EXPERT,
    FEWEST_DOCUMENTS,
    MERGED,
    ORACLE,
    SOUP,
    UNEDITED,
    UNIFORM,
    Domain,
    Evaluation,
)

WORDS: Final = {
    MERGED: "the mixture as it is",
    UNEDITED: "the mixture that it was made from by `moemerge edit`",
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
# By the sign of what is sure: the words for one model, and for all experts together.
_SURE: Final = {
    -1: ("better than", "every dense expert"),
    0: ("not surely different from", "any dense expert"),
    1: ("worse than", "every dense expert"),
}


def verdict(found: Evaluation) -> str:
    """Say in one sentence how the merged model does beside what it is made of, and where it is weakest.

    It is better or worse only where the 95 % interval of the difference has no room for 0.
    """
    if MERGED not in found.mean_losses:  # pragma: no cover  the mixture runs over every domain
        return ""
    few = [domain for domain in found.domains if domain.documents < FEWEST_DOCUMENTS]
    parts = _too_few(few[0]) if few else [*_against_others(found), *_weakest(found)]
    return f"{MERGED} {found.mean_losses[MERGED]:.3f} nats per token" + (f": {'; '.join(parts)}" if parts else "")


def best_models(found: Evaluation) -> dict[str, str]:
    """Name the model with the lowest loss in each domain, and under an empty name in the mean; the oracle aside."""
    models = [model for model in found.losses if model != ORACLE]
    columns = {
        domain.name: {m: found.losses[m][domain.name].value for m in models if domain.name in found.losses[m]}
        for domain in found.domains
    }
    columns[""] = {model: mean for model, mean in found.mean_losses.items() if model != ORACLE}
    return {name: min(column, key=column.__getitem__) for name, column in columns.items()}


def _too_few(domain: Domain) -> list[str]:
    documents = f"{domain.documents} document{'' if domain.documents == 1 else 's'}"
    return [
        f"too few documents were read to be sure what it is better than ({documents} of {domain.name}, and "
        f"{FEWEST_DOCUMENTS} are needed: --max-tokens reads more, and a smaller --window more of them)"
    ]


def _against_others(found: Evaluation) -> list[str]:
    """Sort the other models by what is sure of their differences."""
    experts = [model for model in found.differences if model.startswith(EXPERT)]
    models = [model for model in (UNEDITED, BASE, *experts, SOUP, UNIFORM) if model in found.differences]
    parts = []
    for sign, (word, all_experts) in _SURE.items():
        if alike := [model for model in models if found.differences[model].sign == sign]:
            parts.append(f"{word} {_listed(_named(alike, experts, all_experts))}")
    return parts


def _named(models: Sequence[str], experts: Sequence[str], all_experts: str) -> list[str]:
    whole = len(experts) > 1 and set(experts) <= {*models}
    dense = [all_experts] if whole else [f"the dense {model}" for model in models if model in experts]
    others = (f"the {'mixture ' if model == UNEDITED else ''}{model}" for model in models if model not in experts)
    return [*dense, *others]


def _weakest(found: Evaluation) -> list[str]:
    """Name the domain that loses most against its own dense expert; without experts, where the router errs most.

    There is none where the mixture is no worse than any of them.
    """
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
    if not lost:
        return [f"weakest on {name}: {share}"]
    return [f"weakest on {name}, {lost[name]:.3f} above its own expert; {share}"] if lost[name] > 0 else []


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

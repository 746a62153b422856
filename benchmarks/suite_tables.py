"""The tables of router_suite.py: what is recovered, text of no expert and text that switches, regret."""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from moemerge.evaluation.figures import (
    BASE,
    MERGED,
    ORACLE,
    SOUP,
    UNIFORM,
    Estimate,
    Sums,
    difference,
    estimate,
    recovered,
)

OWN: Final = "own dense expert"
# The way whose mixture is judged beside dense models.
_JUDGED: Final = "combined, texts, 4096 tokens"

Row = dict[str, Any]
Results = dict[str, dict[str, Row]]
"""Losses by document, among others, of every row of every set."""


def tables(results: Results, ways: list[str]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Headings and rows of each table."""
    yield ["routers from", *results], list(recovered_table(results, ways))
    judged = {label: found for label, found in results.items() if _JUDGED in found}
    heads = ["set", "text", "merged", BASE, SOUP, "best dense model of each document", "best dense model"]
    yield heads, list(extra_table(judged))
    yield ["set", "merged", OWN, SOUP, BASE, "largest regret"], list(regret_table(judged))


def recovered_table(results: Results, ways: list[str]) -> Iterator[list[str]]:
    """What each way recovers on each set: of the gap between a uniform mixture and the label oracle, its share."""
    for name in (SOUP, *ways):
        cells = [name]
        for found in results.values():
            if name not in found:
                cells.append("-")
                continue
            losses = {row: owned(found, of) for row, of in ((UNIFORM, UNIFORM), (ORACLE, ORACLE), (MERGED, name))}
            share = recovered(losses, list(losses[MERGED]))
            cells.append("-" if share is None else with_interval(share, ".2f"))
        yield cells


def regret_table(results: Results) -> Iterator[list[str]]:
    """Nats by which the mixture is above each domain's own expert, and above the best single model of all."""
    for label, found in results.items():
        merged, own = owned(found, _JUDGED), owned(found, OWN)
        regrets = {domain: difference({domain: sums}, {domain: own[domain]}) for domain, sums in merged.items()}
        worst = max(regrets, key=lambda domain: regrets[domain].value)
        means = [
            np.mean([estimate(sums).value for sums in owned(found, name).values()])
            for name in (_JUDGED, OWN, SOUP, BASE)
        ]
        yield [label, *(f"{mean:.3f}" for mean in means), f"{worst} {with_interval(regrets[worst], '+.3f')}"]


def extra_table(results: Results) -> Iterator[list[str]]:
    """Losses on text of no expert and on text that switches, beside those of the models that it is made of."""
    for label, found in results.items():
        for domain in [domain for domain in found[_JUDGED]["losses"] if domain not in found[OWN]["losses"]]:
            sums = {name: np.array(of["losses"][domain]) for name, of in found.items() if domain in of["losses"]}
            dense = {name: of for name, of in sums.items() if set(found[name]) == {"losses"}}
            for mixed in (UNIFORM, SOUP):
                dense.pop(mixed)
            best = min(dense, key=lambda name: estimate(dense[name]).value)
            by_document = np.stack(list(dense.values()))
            chosen = by_document[by_document[:, :, 0].argmin(axis=0), np.arange(by_document.shape[1])]
            figures = [estimate(of).value for of in (sums[_JUDGED], sums[BASE], sums[SOUP], chosen, dense[best])]
            *cells, last = (f"{figure:.3f}" for figure in figures)
            yield [label, domain, *cells, f"{best} {last}"]


def owned(found: dict[str, Row], name: str) -> dict[str, Sums]:
    """Sums of the domains that have an expert."""
    return {domain: np.array(of) for domain, of in found[name]["losses"].items() if domain in found[ORACLE]["losses"]}


def with_interval(found: Estimate, form: str) -> str:
    """A number with its interval, in a format's digits."""
    interval = "" if found.low is None else f" ({found.low:{form}} to {found.high:{form}})"
    return f"{found.value:{form}}{interval}"

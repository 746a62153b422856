"""The flags of `moemerge init` that say what the experts are for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from moemerge.drafting.draft import Draft

Domains = Annotated[
    list[str],
    typer.Option(
        "--domain",
        metavar="NAME=DOMAIN",
        help="What an expert is for, such as code, math or french, which gives it prompts; none for no prompts.",
        show_default=False,
    ),
]
Prompts = Annotated[
    list[str],
    typer.Option(
        "--prompts",
        metavar="NAME=TEXT",
        help="A prompt that an expert should answer, instead of its domain's; give it again for more.",
        show_default=False,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(metavar="K", help="Experts per token.", show_default="1 of two, else 2"),
]


@dataclass(frozen=True)
class DescribingOptions:
    """Options for what the experts are for."""

    domain: Domains = field(default_factory=list)
    prompts: Prompts = field(default_factory=list)
    top_k: TopK = None

    @property
    def described(self) -> set[str]:
        """Names and references of the experts that a flag describes."""
        return {name for name, _ in _pairs("--domain", self.domain) + _pairs("--prompts", self.prompts)}


def changes_of(experts: Sequence[str], given: DescribingOptions) -> Callable[["Draft"], "Draft"]:
    """Read the flags that change what is proposed; returns the change.

    Raises:
        RefusedError: a flag names no expert, no domain or no prompt, or more experts per token than there are.
    """
    from moemerge.config.expert_names import expert_names

    names = expert_names(experts)
    numbers = {reference: number for number, reference in enumerate(experts)}
    numbers |= {name: number for number, name in enumerate(names)}
    chosen: dict[int, str | None] = {}
    written: dict[int, list[str]] = {}
    for name, value in _pairs("--domain", given.domain):
        chosen[_number("--domain", name, numbers, names)] = _domain(value)
    for name, value in _pairs("--prompts", given.prompts):
        written.setdefault(_number("--prompts", name, numbers, names), []).append(value)
    if given.top_k is not None and not 1 <= given.top_k <= len(experts):
        raise RefusedError(
            f"--top-k: {given.top_k} of {len(experts)} experts is not possible. Choose 1 to {len(experts)}."
        )

    def change(draft: "Draft") -> "Draft":
        changed = list(draft.experts)
        for number, domain in chosen.items():
            changed[number] = changed[number].of_domain(domain, "given by --domain")
        for number, texts in written.items():
            changed[number] = replace(changed[number], prompts=tuple(texts))
        return replace(draft, experts=tuple(changed), experts_per_token=given.top_k or draft.experts_per_token)

    return change


def _domain(name: str) -> str | None:
    from moemerge.drafting.domains import domain_named

    try:
        return domain_named(name)
    except ValueError as error:
        raise RefusedError(f"--domain: {error}") from error


def _pairs(flag: str, given: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in given:
        name, sign, value = text.partition("=")
        if not (name and sign and value.strip()):
            raise RefusedError(f"{flag}: expected NAME=..., as in {flag} code=..., found {text[:60]!r}.")
        pairs.append((name, value))
    return pairs


def _number(flag: str, name: str, numbers: dict[str, int], names: Sequence[str]) -> int:
    if name not in numbers:
        raise RefusedError(f"{flag}: {name[:60]!r} is not one of the experts: {', '.join(names)}.")
    return numbers[name]

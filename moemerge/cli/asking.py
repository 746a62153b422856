"""The questions that `moemerge init` asks on a terminal."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from rich.console import Console
from rich.prompt import Prompt

from moemerge.config.expert_names import checked_name, repeated_names
from moemerge.drafting.domains import NONE, all_domains, domain_named
from moemerge.drafting.draft import Draft, DraftExpert

_LIST = "?"
# What people try, and no domain is called.
_LISTS_TOO = ("help", "list")


def ask(console: Console, draft: Draft, *, answered: Collection[str], asks_top_k: bool) -> Draft:
    """Ask for names, domains and experts per token; an empty answer takes what is proposed.

    Args:
        console: where the questions are printed.
        draft: what is proposed.
        answered: names and references of experts whose domain is not asked for.
        asks_top_k: whether to ask for the experts per token.

    Raises:
        KeyboardInterrupt: the input ended.
    """
    console.print(f"Enter takes what stands in parentheses; {_LIST} lists the domains.")
    try:
        experts: list[DraftExpert] = []
        for expert in draft.experts:
            taken = [other.name for other in (*experts, *draft.experts[len(experts) + 1 :])]
            named = replace(expert, name=_name(console, expert.name, taken))
            known = {expert.name, expert.reference}.intersection(answered)
            experts.append(named if known else _with_domain(console, named))
        top_k = _top_k(console, draft.experts_per_token, len(experts)) if asks_top_k else draft.experts_per_token
    except EOFError:
        raise KeyboardInterrupt("nothing was written") from None
    return replace(draft, experts=tuple(experts), experts_per_token=top_k)


def _name(console: Console, proposed: str, taken: Sequence[str]) -> str:
    while True:
        answer = Prompt.ask("Name", console=console, default=proposed).strip()
        try:
            name = checked_name(answer)
        except ValueError as error:
            console.print(f"{error}", style="red")
            continue
        if not repeated_names([*taken, name]):
            return name
        console.print("another expert has this name", style="red")


def _with_domain(console: Console, expert: DraftExpert) -> DraftExpert:
    proposed = expert.domain or NONE
    while True:
        answer = Prompt.ask(f"Domain of {expert.name}", console=console, default=proposed).strip()
        if answer.lower() in {_LIST, *_LISTS_TOO}:
            console.print(f"{', '.join(all_domains())}, {NONE}", soft_wrap=False)
            continue
        if answer == proposed:
            return expert
        try:
            return expert.of_domain(domain_named(answer))
        except ValueError as error:
            console.print(f"{error}", style="red")


def _top_k(console: Console, proposed: int, count: int) -> int:
    while True:
        answer = Prompt.ask(f"Experts per token, 1 to {count}", console=console, default=str(proposed)).strip()
        if answer.isdecimal() and 1 <= int(answer) <= count:
            return int(answer)
        console.print(f"a number from 1 to {count}, please", style="red")

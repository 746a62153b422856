"""What `moemerge init` says of the config that it proposes."""

from typing import TYPE_CHECKING

from rich.console import Console

from moemerge.cli.console import announcer

if TYPE_CHECKING:
    from moemerge.drafting.draft import Draft, DraftExpert


def print_draft(console: Console, draft: "Draft") -> None:
    """Print what is proposed for each expert, and what speaks for another base."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("expert", "domain", "why", "from the base"):
        table.add_column(heading)
    for expert in draft.experts:
        why = expert.reason or ("" if expert.domain else "its name and card do not say")
        table.add_row(expert.name, expert.domain or "none", why, _shown_distance(expert))
    console.print(table, soft_wrap=False)
    for remark in draft.remarks:
        console.print(f"note: {remark}")


def print_undescribed(console: Console, draft: "Draft", *, quiet: bool) -> None:
    """Say how routers are made where not every expert has prompts of its own."""
    names = ", ".join(expert.name for expert in draft.undescribed)
    missing = f"no prompts that only it should answer are known for {names}"
    if draft.is_random:
        console.print(
            f"warning: {missing}, and where an expert is the base itself, or no fine-tune of it, the weights alone "
            "make no routers: they are random for now. Write prompts for every expert, and remove gate_mode",
            style="yellow",
        )
    else:
        announcer(console, quiet=quiet)(
            f"note: {missing}, so all prompts are comments, and the weights alone make the routers"
        )


def _shown_distance(expert: "DraftExpert") -> str:
    if expert.distance is None:
        return "is the base"
    return f"{expert.distance.mean:.1%}" if expert.distance.by_layer else "not known"

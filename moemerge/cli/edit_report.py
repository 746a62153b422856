"""Edit plans as text for people and as JSON for programs."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid

from moemerge.checkpoint.disk import shown_bytes as size
from moemerge.cli.render import billions
from moemerge.cli.tables import Table
from moemerge.editing.plan import EditPlan
from moemerge.editing.slots import Foreign, Kept, Slot

if TYPE_CHECKING:
    from moemerge.editing.added_routers import AddedReport


def edit_facts(plan: EditPlan) -> dict[str, Any]:
    """Turn the plan of an edit into the values that `--json` prints."""
    return {
        "family": plan.mixture.family.model_type,
        "experts": [{"name": name, "from": model, "router": router} for name, model, router in _rows(plan)],
        "dropped": list(plan.dropped),
        "experts_per_token": plan.config.experts_per_token,
        "granularity": plan.config.granularity,
        "total_parameters": plan.total_parameters,
        "active_parameters": plan.active_parameters,
        "output_bytes": plan.output_bytes,
        "download_bytes": plan.download_bytes,
        "sources": [{"reference": source.reference, "folder": str(source.folder)} for source in plan.sources],
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "config": dict(plan.output_config),
        "shards": [{"name": shard.name, "bytes": shard.nbytes} for shard in plan.shards],
        "yaml": plan.config.text,
    }


def print_edit(console: Console, plan: EditPlan) -> None:
    """Print the plan of an edit: the experts of the result, and what it takes."""
    mixture, parts = plan.mixture, plan.config.granularity
    experts, per_token = plan.experts, plan.experts_per_token
    facts = Grid.grid(padding=(0, 2))
    before = "" if experts == mixture.experts else f" (from {mixture.experts})"
    chosen = "" if per_token == mixture.experts_per_token else f" (from {mixture.experts_per_token})"
    rows = {
        "output": f"{mixture.family.model_type}, {experts} experts{before}, {per_token} per token{chosen}",
        "split": f"each expert into {parts}, always chosen together" if parts > 1 else "",
        "left out": ", ".join(plan.dropped),
        "parameters": f"{billions(plan.total_parameters)} in all, {billions(plan.active_parameters)} active per token",
        "disk": f"{size(plan.output_bytes)} in {len(plan.shards)} shard(s)",
        "to download": size(plan.download_bytes) if plan.download_bytes else "",
    }
    for name, value in rows.items():
        if value:
            facts.add_row(name, value)
    console.print(facts)
    table = Table("expert", "from", "router")
    for row in _rows(plan):
        table.add_row(*row)
    console.print(table)


def print_added(console: Console, report: "Sequence[AddedReport]") -> None:
    """Print what the rows of new experts do with documents that they were not fitted to."""
    for one in report:
        if one.first is not None and one.chosen is not None:
            taken = "" if one.taken is None else f"; of the other experts' tokens it comes first for {one.taken:.0%}"
            console.print(
                f"{one.name}: comes first for {one.first:.0%} of its tokens in held-out documents, is among the chosen "
                f"for {one.chosen:.0%}{taken}"
            )


def _rows(plan: EditPlan) -> Iterator[tuple[str, str, str]]:
    """Name, origin and router rows of each expert of the result."""
    for (name, origin), slot in zip(plan.origins_of_experts, plan.slots, strict=True):
        yield name, origin, _router(plan, slot)


def _router(plan: EditPlan, slot: Slot) -> str:
    if plan.config.gate_mode != "auto":
        return f"made anew, {plan.config.gate_mode}"
    if plan.config.router.fitted:
        return "fitted to text by prune"
    if isinstance(slot, Kept):
        return "kept" if not plan.computed or plan.new else "kept, scaled for more per token"
    return "its own, moved beside the others'" if isinstance(slot, Foreign) else "fitted beside the others'"

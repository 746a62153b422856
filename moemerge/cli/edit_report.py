"""Edit plans as text for people and as JSON for programs."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from moemerge.checkpoint.disk import shown_bytes as size
from moemerge.cli.render import billions
from moemerge.cli.tables import Table
from moemerge.editing.plan import EditPlan
from moemerge.editing.slots import Kept, Slot


def edit_facts(plan: EditPlan) -> dict[str, Any]:
    """Turn the plan of an edit into the values that `--json` prints."""
    return {
        "family": plan.mixture.family.model_type,
        "experts": [{"name": name, "from": model, "router": router} for name, model, router in _rows(plan)],
        "dropped": list(plan.dropped),
        "experts_per_token": plan.config.experts_per_token,
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
    mixture, per_token = plan.mixture, plan.config.experts_per_token
    facts = Grid.grid(padding=(0, 2))
    before = "" if len(plan.slots) == mixture.experts else f" (from {mixture.experts})"
    chosen = "" if per_token == mixture.experts_per_token else f" (from {mixture.experts_per_token})"
    rows = {
        "output": f"{mixture.family.model_type}, {len(plan.slots)} experts{before}, {per_token} per token{chosen}",
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


def _rows(plan: EditPlan) -> Iterator[tuple[str, str, str]]:
    """Name, origin and router rows of each expert of the result."""
    for (name, origin), slot in zip(plan.origins_of_experts, plan.slots, strict=True):
        yield name, origin, _router(plan, slot)


def _router(plan: EditPlan, slot: Slot) -> str:
    if plan.config.gate_mode != "auto":
        return f"made anew, {plan.config.gate_mode}"
    return "kept" if isinstance(slot, Kept) else "fitted beside the others'"

"""Edit plans as text for people and as JSON for programs."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid

from moemerge.checkpoint.changed_shards import ChangedShards
from moemerge.checkpoint.disk import shown_bytes as size
from moemerge.cli.render import billions
from moemerge.cli.tables import Table
from moemerge.editing.plan import EditPlan
from moemerge.editing.slots import Foreign, Kept, Slot

if TYPE_CHECKING:
    from moemerge.editing.added_routers import AddedReport


def edit_facts(plan: EditPlan, changed: ChangedShards | None = None) -> dict[str, Any]:
    """Turn the plan of an edit into the values that `--json` prints; `changed` are the shards of one in place."""
    shards = plan.shards if changed is None else changed.written
    return {
        "family": plan.mixture.family.model_type,
        "experts": [{"name": name, "from": model, "router": router} for name, model, router in _rows(plan)],
        "dropped": list(plan.dropped),
        "experts_per_token": plan.config.experts_per_token,
        "granularity": plan.config.granularity,
        "total_parameters": plan.total_parameters,
        "active_parameters": plan.active_parameters,
        "output_bytes": plan.output_bytes,
        "written_bytes": sum(shard.nbytes for shard in shards),
        "shared_bytes": plan.shared_bytes if changed is None else changed.shared_bytes,
        "download_bytes": plan.download_bytes,
        "sources": [{"reference": source.reference, "folder": str(source.folder)} for source in plan.sources],
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "config": dict(plan.output_config),
        "shards": [{"name": shard.name, "bytes": shard.nbytes} for shard in shards],
        **({"kept_shards": list(changed.kept), "replaced_shards": list(changed.removed)} if changed else {}),
        "yaml": plan.config.text,
    }


def print_edit(console: Console, plan: EditPlan, changed: ChangedShards | None = None) -> None:
    """Print the plan of an edit: the experts of the result, and what it takes; in place, what becomes of each shard."""
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
        "disk": _disk(plan, changed),
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
    if changed:
        _print_shards(console, changed)


def _disk(plan: EditPlan, changed: ChangedShards | None) -> str:
    """What is written, in words, and what of that takes no space."""
    shared = plan.shared_bytes if changed is None else changed.shared_bytes
    without = f", {size(shared)} of them shared on the disk with what is there" if shared else ""
    if changed is None:
        return f"{size(plan.output_bytes)} in {len(plan.shards)} shard(s){without}"
    nbytes = sum(shard.nbytes for shard in changed.written)
    return f"{size(nbytes)} to write in {len(changed.written)} shard(s){without}; {len(changed.kept)} shard(s) stay"


def _print_shards(console: Console, changed: ChangedShards) -> None:
    table = Table("shard", "in place")
    for name in changed.kept:
        table.add_row(name, "stays")
    for name in changed.removed:
        table.add_row(name, "kept beside the model until --commit")
    for shard in changed.written:
        table.add_row(shard.name, f"new, {size(shard.nbytes)}")
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
    experts = zip(plan.origins_of_experts, plan.slots, plan.config.experts, strict=True)
    for (name, origin), slot, expert in experts:
        yield name, origin, _router(plan, slot, has_text=expert.is_described)


def _router(plan: EditPlan, slot: Slot, *, has_text: bool) -> str:
    if plan.config.gate_mode != "auto":
        return f"made anew, {plan.config.gate_mode}"
    if plan.config.router.fitted:
        return "fitted to text by prune"
    if isinstance(slot, Kept):
        return "kept"
    if isinstance(slot, Foreign):
        return "its own, moved, or fitted beside the others'"
    return "fitted beside the others'" if has_text else "made from its weights"

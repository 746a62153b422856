"""`moemerge extract`: one expert of a mixture as a dense model."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moemerge.checkpoint.disk import shown_bytes as size
from moemerge.cli.console import announcer, console_session, end_dry_run, print_json, stdout, stoppable
from moemerge.cli.edit_options import EditOutputOptions
from moemerge.cli.grouping import grouped
from moemerge.cli.options import CacheDir, ResultOptions
from moemerge.cli.streams import say

if TYPE_CHECKING:
    from rich.console import Console

    from moemerge.editing.dense.dense_plan import DensePlan


@grouped
def extract_expert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL#EXPERT",
            help="A mixture's folder, or a Hub repository, and one of its experts, by name or number; or shared.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write; it must be empty or absent.", show_default=False)
    ],
    *,
    output: EditOutputOptions,
    cache_dir: CacheDir = None,
    messages: ResultOptions,
) -> None:
    """Take one expert out of a mixture, as a dense model.

    It has the mixture's attention, norms and embeddings, and the expert's FFNs, byte for byte: of a mixture that was
    merged here, the model that the expert came from, with what the experts share in place of its own.

    Examples:
        moemerge extract out#math math
        moemerge extract mistralai/Mixtral-8x7B-v0.1#3 third --dry-run
    """
    quiet = messages.quiet
    with console_session(
        quiet=quiet, verbose=0, debug=messages.debug, cache_dir=cache_dir, keeps_output=True
    ) as console:
        from moemerge.cli.plan_request import shard_bytes
        from moemerge.editing.dense.extracting import plan_extract
        from moemerge.planning.options import PlanOptions

        start, announce = time.monotonic(), announcer(console, quiet=quiet)
        options = PlanOptions(shard_bytes(output.max_shard_size), out)
        plan = plan_extract(model, options=options, announce=announce)
        for note in plan.notes:
            announce(f"note: {note}")
        carry_out(console, plan, out, output, messages, start=start)


def carry_out(
    console: "Console",
    plan: "DensePlan",
    out: Path,
    output: EditOutputOptions,
    messages: ResultOptions,
    *,
    start: float,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a dense model unless that is only tried, and print what was written; `facts` go into the JSON, too."""
    from moemerge.cli.progress import clock, show_progress
    from moemerge.editing.dense.dense_plan import write_dense
    from moemerge.editing.planned_model import check_model

    if output.dry_run:
        check_model(plan, out, overwrite=output.overwrite)
    else:
        with show_progress(console, quiet=messages.quiet) as progress:
            write_dense(plan, out, overwrite=output.overwrite, progress=stoppable(progress))
    if messages.json:
        print_json(dense_facts(plan) | dict(facts) | ({} if output.dry_run else {"out": str(out)}))
    elif output.dry_run or not messages.quiet:
        print_dense(stdout(), plan)
        if output.dry_run:
            end_dry_run(out, quiet=messages.quiet, json=messages.json)
        else:
            say(f"{out}: done, {size(plan.output_bytes)} in {clock(time.monotonic() - start)}")


def dense_facts(plan: "DensePlan") -> dict[str, Any]:
    """Turn the plan of a dense model into the values that `--json` prints."""
    return {
        "model_type": plan.view.model.family.model_type,
        "parameters": plan.parameters,
        "output_bytes": plan.output_bytes,
        "download_bytes": plan.download_bytes,
        "source": {"reference": plan.folder.reference, "folder": str(plan.folder.folder)},
        "notes": list(plan.notes),
        "config": plan.view.config,
        "shards": [{"name": shard.name, "bytes": shard.nbytes} for shard in plan.shards],
        "copied_files": sorted(plan.base_files.copied),
    }


def print_dense(console: "Console", plan: "DensePlan") -> None:
    """Print what a dense model is, and what it takes."""
    from rich.table import Table

    from moemerge.cli.render import billions

    facts = Table.grid(padding=(0, 2))
    rows = {
        "output": f"{plan.view.model.family.model_type}, {plan.view.model.layers} layers",
        "parameters": billions(plan.parameters),
        "disk": f"{size(plan.output_bytes)} in {len(plan.shards)} shard(s)",
        "to download": size(plan.download_bytes) if plan.download_bytes else "",
    }
    for name, value in rows.items():
        if value:
            facts.add_row(name, value)
    console.print(facts)

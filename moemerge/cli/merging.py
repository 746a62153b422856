"""The main command: moemerge CONFIG OUT."""

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moemerge.cli.console import announcer, console_session, end_dry_run, print_json, return_freed_memory, stoppable
from moemerge.cli.destination import Target, destination_of, hint_at_resume, location_in_store, target_of
from moemerge.cli.editing import write_from_config
from moemerge.cli.gguf_output import check_gguf, check_options, is_gguf, merge_into
from moemerge.cli.grouping import grouped
from moemerge.cli.merge_options import OutputOptions, PushOptions, ReadingOptions, RouterOptions, merge_options
from moemerge.cli.merge_report import interrupts_after_success, merge_facts, print_done, print_report
from moemerge.cli.mistakes import check_arguments
from moemerge.cli.options import Config, ModelOptions, VerboseOptions, check_processes
from moemerge.cli.plan_request import PlanRequest, edit_in, plan_from
from moemerge.cli.planning import print_or_dump_plan
from moemerge.cli.publishing import PlannedPush
from moemerge.cli.streams import say
from moemerge.errors import RefusedError
from moemerge.file_kinds import FOLDERS, what_is

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from moemerge.merging.options import MergeOptions
    from moemerge.planning.options import PlanOptions
    from moemerge.planning.plan import MergePlan
    from moemerge.publish.publisher import Publisher
    from moemerge.routers.report import RoutingReport
    from moemerge.sources.model_folder import ModelFolder


Out = Annotated[
    Path,
    typer.Argument(
        metavar="OUT",
        show_default=False,
        help="The folder to write; it must be empty or absent. Or one GGUF file, NAME.gguf, or "
        "s3://BUCKET/PATH or gs://BUCKET/PATH, in an object store.",
    ),
]


@grouped
def merge_models(
    config: Config,
    out: Out,
    *,
    output: OutputOptions,
    reading: ReadingOptions,
    push: PushOptions,
    routers: RouterOptions,
    models: ModelOptions,
    messages: VerboseOptions,
) -> None:
    """Build a mixture of experts from the models that a config names.

    The base model gives embeddings, attention and norms, each expert its FFNs; the routers start from the prompts.

    Examples:
        moemerge merge.yaml out                    merge into a folder
        moemerge merge.yaml out --dry-run          only show what it would be
        moemerge merge.yaml out --push user/name   send it to the Hub, too
        moemerge merge.yaml out.gguf --type q8_0   merge into a file for llama.cpp
    """
    with console_session(
        quiet=messages.quiet,
        verbose=messages.verbose,
        debug=messages.debug,
        cache_dir=models.cache_dir,
        keeps_output=True,
    ) as console:
        check_arguments(config, out)
        request = _request(config, output, models)
        carry_out(console, request, out, output, reading, push=push, routers=routers, messages=messages)


def carry_out(
    console: "Console",
    request: PlanRequest,
    out: Path,
    output: OutputOptions,
    reading: ReadingOptions,
    *,
    push: PushOptions,
    routers: RouterOptions,
    messages: VerboseOptions,
) -> None:
    """Merge, or edit where the base model is a mixture, and print what was made."""
    quiet, streaming, start = messages.quiet, push.push_streaming, time.monotonic()
    if streaming:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # ours are there at the same time
    planned_push = PlannedPush(push, announcer(console, quiet=quiet))
    location = location_in_store(out, output, push)
    if edit := edit_in(console, request, quiet=quiet):
        if location:
            raise RefusedError(f"{location}: an edit of a mixture is written to a folder. Name one, and copy it there.")
        write_from_config(
            console, edit, out, output=output, reading=reading, push=push, routers=routers, messages=messages
        )
        return
    target = target_of(out, location, announcer(console, quiet=quiet))
    # Before a plan may download weights.
    approve = _place_check(request, target, output, push, planned_push, routers=routers)
    options = merge_options(target.out, output, reading, routers)
    return_freed_memory()
    plan_options = _plan_options(target, reading, push, dry_run=output.dry_run)
    plan = plan_from(console, request, plan_options, quiet=quiet, approve=approve)
    if output.dry_run:
        print_or_dump_plan(plan, json=messages.json)
        end_dry_run(target.place, quiet=quiet, json=messages.json)
        return
    options = replace(options, licence=planned_push.licence)
    report = _merge(console, plan, target, options, output, push=push, publisher=planned_push.publisher, quiet=quiet)
    with interrupts_after_success(console, target.place, planned_push.publisher, streaming=streaming):
        print_report(console, target.place, plan, report, messages, kept_states=routers.keep_states)
        if not (quiet or messages.json or streaming):
            print_done(target.place, plan, time.monotonic() - start)
    _print_end(plan, report, None if streaming else target.place, planned_push.finish(out), json=messages.json)


def _print_end(plan: "MergePlan", report: "RoutingReport", out: object, url: str | None, *, json: bool) -> None:
    """Print all facts as JSON, or the page on the Hub if there is one."""
    if json:
        print_json(merge_facts(plan, report, out, url))
    elif url:
        say(url)


def _request(config: Path, output: OutputOptions, models: ModelOptions) -> PlanRequest:
    return PlanRequest(
        config,
        models.allow_identical_experts,
        models.engine,
        max_shard_size=output.max_shard_size,
        out_shard_size=output.out_shard_size,
    )


def _place_check(
    request: PlanRequest,
    target: Target,
    output: OutputOptions,
    push: PushOptions,
    planned_push: PlannedPush,
    *,
    routers: RouterOptions,
) -> "Callable[[Sequence[ModelFolder]], None]":
    """Refuse an output that could not be written; returns a check of the same for a merge whose models are known."""
    if store := target.store:
        store.check([], overwrite=output.overwrite, resume=output.resume)
        return partial(store.check, overwrite=output.overwrite, resume=output.resume)
    out, to_file = target.out, is_gguf(target.out)
    folders_only = {
        "--resume": output.resume,
        "--ray": output.ray is not None,
        "--push": push.push is not None,
        "--max-shard-size": output.max_shard_size is not None,
        "--out-shard-size": output.out_shard_size is not None,
    }
    check_options(to_file, output.type, output.llama_cpp, folders_only)
    check_processes(output.ray, output.workers, routers.device if routers.share_text else "auto")
    check_place: Callable[[list[Path]], None] = partial(
        _check_folder, out, [request.config], output, streaming=push.push_streaming
    )
    if to_file:
        check_place = partial(
            check_gguf, out, output.type, [request.config], output.llama_cpp, overwrite=output.overwrite
        )
    check_place(request.local_models() if what_is(out) in FOLDERS else [])

    def approve(sources: "Sequence[ModelFolder]") -> None:
        check_place([folder for source in sources for folder in source.folders])
        planned_push.approve(sources)

    return approve


def _plan_options(target: Target, reading: ReadingOptions, push: PushOptions, *, dry_run: bool) -> "PlanOptions":
    from moemerge.planning.options import PlanOptions

    to_file = is_gguf(target.out)
    return PlanOptions(
        target=None if push.push_streaming or target.store or to_file else target.out,
        to_store=target.store is not None and target.store.location.kind != "file",
        weights="stream" if reading.stream or dry_run else "auto",
        routing_table=reading.routing_table,
        proves_tokenizer=not dry_run,
        preferred="llamacpp" if to_file else None,
    )


def _merge(
    console: "Console",
    plan: "MergePlan",
    target: Target,
    options: "MergeOptions",
    output: OutputOptions,
    *,
    push: PushOptions,
    publisher: "Publisher | None",
    quiet: bool,
) -> "RoutingReport":
    """Carry out the plan into its target or to the Hub, and show progress; returns the routing report."""
    from moemerge.cli.progress import show_progress
    from moemerge.merging.merger import merge

    carry_out: Callable[..., Any] = partial(
        merge_into, console, plan, target.out, output.type, options, quiet=quiet, llama_cpp=output.llama_cpp
    )
    if publisher:
        publisher.check_replaced(plan.model_type, overwrite=options.overwrite)
    if not is_gguf(target.out):
        carry_out = partial(merge, plan, destination_of(target, output, push, publisher), options)
    with (
        hint_at_resume(console, target, streaming=push.push_streaming),
        show_progress(console, quiet=quiet) as progress,
    ):
        report: RoutingReport = carry_out(
            progress=stoppable(progress),
            warn=lambda line: console.print(f"warning: {line}", style="yellow"),
            announce=announcer(console, quiet=quiet),
        )
    return report


def _check_folder(
    out: Path, inputs: list[Path], output: OutputOptions, sources: list[Path], *, streaming: bool
) -> None:
    """Refuse a folder that a merge could not write, or not keep shards beside; before weights are downloaded."""
    from moemerge.checkpoint.output_folder import check_scratch, check_target, nothing_to_resume
    from moemerge.checkpoint.staging import kept_shards
    from moemerge.merging.overwriting import is_merge, replaceable_files

    if streaming:
        check_scratch(out, sources)
        return
    if output.resume and not output.overwrite and is_merge(out) and not kept_shards(out):
        raise nothing_to_resume(out)
    check_target(out, sources, inputs=inputs, replaceable=replaceable_files if output.overwrite else None)

"""`moemerge CONFIG s3://BUCKET/PATH`: a merge whose output is in an object store."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.cli.console import announcer, end_dry_run, print_json, return_freed_memory, stoppable
from moemerge.cli.merge_options import OutputOptions, PushOptions, ReadingOptions, RouterOptions, merge_options
from moemerge.cli.merge_report import interrupts_after_success, merge_facts, print_report, print_sent
from moemerge.cli.options import VerboseOptions
from moemerge.cli.plan_request import PlanRequest, edit_in, plan_from
from moemerge.cli.planning import print_or_dump_plan
from moemerge.errors import BusyError, RefusedError

if TYPE_CHECKING:
    from rich.console import Console

    from moemerge.planning.plan import MergePlan
    from moemerge.publish.store import StoreOutput
    from moemerge.sources.model_folder import ModelFolder


def to_store(out: Path) -> bool:
    """Whether a merge's output is in an object store, by its name.

    Raises:
        RefusedError: it is an address of another kind.
    """
    from moemerge.sources.reference import location_of, wrong_address

    if wrong := wrong_address(out):
        raise RefusedError(wrong)
    return location_of(out) is not None


def merge_to_store(
    console: "Console",
    request: PlanRequest,
    out: Path,
    *,
    output: OutputOptions,
    reading: ReadingOptions,
    push: PushOptions,
    routers: RouterOptions,
    messages: VerboseOptions,
) -> None:
    """Merge into an object store, and print what was made."""
    from moemerge.cli.progress import show_progress
    from moemerge.merging.merger import merge
    from moemerge.merging.store import Store, scratch_for
    from moemerge.publish.store import StoreOutput
    from moemerge.sources.reference import location_of

    quiet, start = messages.quiet, time.monotonic()
    location = location_of(out)
    assert location  # noqa: S101  `to_store` has said so
    _check_options(output, push)
    options = merge_options(scratch_for(location), output, reading, routers)
    if edit_in(console, request, quiet=quiet):
        raise RefusedError(f"{location}: an edit of a mixture is written to a folder. Name one, and copy it there.")
    target = StoreOutput(location, announcer(console, quiet=quiet))

    return_freed_memory()
    plan = _plan(console, request, target, output, reading, quiet=quiet)
    if output.dry_run:
        print_or_dump_plan(plan, json=messages.json)
        end_dry_run(location, quiet=quiet, json=messages.json)
        return
    with _hint_at_resume(console, target), show_progress(console, quiet=quiet) as progress:
        report = merge(
            plan,
            Store(scratch_for(location), target),
            options,
            progress=stoppable(progress),
            warn=lambda line: console.print(f"warning: {line}", style="yellow"),
            announce=announcer(console, quiet=quiet),
        )
    with interrupts_after_success(console, location, None, streaming=True):
        print_report(console, location, plan, report, messages, kept_states=routers.keep_states)
        if not (quiet or messages.json):
            print_sent(location, plan, time.monotonic() - start)
    if messages.json:
        print_json(merge_facts(plan, report, location, None))


@contextmanager
def _hint_at_resume(console: "Console", target: "StoreOutput") -> Iterator[None]:
    """Print how many shards a merge that fails or is interrupted has sent."""
    try:
        yield
    except (RefusedError, BusyError):
        raise
    except BaseException as error:
        if target.shards:
            console.print(
                f"{target.shards} complete shards are in the store: --resume continues from them, a run without it "
                "starts over."
            )
        if isinstance(error, KeyboardInterrupt) and not error.args and (target.shards or target.began):
            command = "the same command with --resume" if target.shards else "the same command"
            raise KeyboardInterrupt(f"nothing takes {target.location} for a model until {command} has ended") from error
        raise


def _plan(
    console: "Console",
    request: PlanRequest,
    target: "StoreOutput",
    output: OutputOptions,
    reading: ReadingOptions,
    *,
    quiet: bool,
) -> "MergePlan":
    from moemerge.planning.options import PlanOptions

    def approve(sources: "Sequence[ModelFolder]") -> None:
        target.check(sources, overwrite=output.overwrite, resume=output.resume)

    approve([])  # before models are looked up
    options = PlanOptions(
        target=None,
        weights="stream" if reading.stream or output.dry_run else "auto",
        routing_table=reading.routing_table,
        proves_tokenizer=not output.dry_run,
    )
    return plan_from(console, request, options, quiet=quiet, approve=approve)


def _check_options(output: OutputOptions, push: PushOptions) -> None:
    """Refuse options that belong to other outputs."""
    given = {
        "--push": push.push, "--push-streaming": push.push_streaming, "--private": push.private,
        "--revision": push.revision, "--create-pr": push.create_pr, "--license": push.license,
        "--type": output.type != "auto", "--llama-cpp": output.llama_cpp,
        "--ray": output.ray, "--workers": output.workers,
    }  # fmt: skip
    if found := [name for name, value in given.items() if value]:
        raise RefusedError(f"{found[0]}: a merge into an object store does not use it. Remove it, or name a folder.")

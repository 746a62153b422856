"""`moemerge inspect` and `moemerge verify`: whether a checkpoint's files agree, with each other and with a config."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moemerge.cli.console import announcer, console_session, print_json, stdout
from moemerge.cli.editing import plan_of
from moemerge.cli.grouping import grouped
from moemerge.cli.mistakes import check_arguments
from moemerge.cli.options import AllowIdentical, CacheDir, Debug, Json, VerboseOptions
from moemerge.cli.plan_request import PlanRequest, edit_in, plan_from
from moemerge.errors import RefusedError
from moemerge.progress import Task

if TYPE_CHECKING:
    from rich.console import Console

    from moemerge.checks.verification import Verification


def inspect_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model's folder, a Hub repository, or an address in an object store.",
            show_default=False,
        ),
    ],
    values: Annotated[
        bool, typer.Option("--values", help="Read every number, too; the exit code is 1 if any is infinite or NaN.")
    ] = False,
    cache_dir: CacheDir = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a checkpoint is, and whether its files agree.

    Index, headers and sizes of files are checked against each other.

    Examples:
        moemerge inspect out
        moemerge inspect user/name --values
    """
    with console_session(quiet=False, verbose=0, debug=debug, cache_dir=cache_dir) as console:
        from dataclasses import asdict

        from moemerge.checks.inspection import inspect_checkpoint
        from moemerge.cli.progress import show_progress
        from moemerge.cli.render import print_inspection

        with show_progress(console, quiet=not values) as progress:
            found = inspect_checkpoint(model, console.print, values=values, progress=partial(progress, Task("weights")))
        if json:
            print_json(asdict(found))
        else:
            print_inspection(stdout(), found)
        for warning in (*found.warnings, *(found.values.remarks if found.values else ())):
            console.print(f"warning: {warning}", style="yellow")
        if found.values and found.values.not_finite:
            raise typer.Exit(1)


@grouped
def verify_model(
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The merged model's folder, here or in an object store.", show_default=False
        ),
    ],
    *,
    against: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG", help="The config that it was merged from.", show_default="its copy in OUT"),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed that the merge was run with.")] = 0,
    cache_dir: CacheDir = None,
    allow_identical_experts: AllowIdentical = False,
    messages: VerboseOptions,
) -> None:
    """Check a merged model against its config and its sources.

    Every byte is compared with what a merge would write; routers are not computed again.

    Examples:
        moemerge verify out
        moemerge verify out --against merge.yaml
    """
    quiet = messages.quiet
    with console_session(quiet=quiet, verbose=messages.verbose, debug=messages.debug, cache_dir=cache_dir) as console:
        from dataclasses import asdict

        from moemerge.cli.render import print_verification
        from moemerge.sources.reference import location_of

        if against is not None:
            check_arguments(against, out, usage="moemerge verify {out} --against {config}")
        shown = str(location_of(out) or out)
        request = _request(out, shown, against, allow_identical_experts=allow_identical_experts)
        found = _verify(console, request, out, seed=seed, quiet=quiet)
        for note in found.notes:
            announcer(console, quiet=quiet)(f"note: {note}")
        if messages.json:
            print_json(asdict(found))
        elif found.differences or not quiet:
            print_verification(stdout(), shown, found)
        if found.differences:
            raise typer.Exit(1)


def _request(out: Path, shown: str, against: Path | None, *, allow_identical_experts: bool) -> PlanRequest:
    """Request the plan of a config, or of the copy that a merged model has, before weights may be downloaded."""
    from moemerge.config.schema import CONFIG_COPY
    from moemerge.sources.model_folder import open_merged

    model = open_merged(out, in_stores=True)
    config = against or model.file(CONFIG_COPY)
    if config is None:
        raise RefusedError(f"{shown}: has no {CONFIG_COPY}. Name the config that it was merged from with --against.")
    same = allow_identical_experts or against is None
    return PlanRequest(config, same, family=model.config.get("model_type"))


def _verify(console: "Console", request: PlanRequest, out: Path, *, seed: int, quiet: bool) -> "Verification":
    """Compare a folder with the plan of a config, of a merge or of an edit."""
    from moemerge.checks.verification import verify_merge
    from moemerge.cli.progress import show_progress
    from moemerge.editing.verifying import verify_edit
    from moemerge.planning.options import PlanOptions

    edit = edit_in(console, request, quiet=quiet)
    options = PlanOptions(needs_texts=False, weights="stream")
    plan: Any = (
        plan_of(console, edit, options, quiet=quiet) if edit else plan_from(console, request, options, quiet=quiet)
    )
    with show_progress(console, quiet=quiet) as progress:
        report = partial(progress, Task("weights"))
        return (verify_edit if edit else verify_merge)(plan, out, seed=seed, progress=report)

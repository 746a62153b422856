"""The commands. Whatever is slow to import is imported by the command that needs it."""

import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Final

import typer

from moemerge.cli.beginning import begin_config
from moemerge.cli.console import announcer, console_session, print_json, stdout
from moemerge.cli.evaluation import evaluate
from moemerge.cli.families import list_families
from moemerge.cli.gguf import write_file
from moemerge.cli.grouping import grouped
from moemerge.cli.merging import merge_models
from moemerge.cli.options import (
    AllowIdentical,
    CacheDir,
    Config,
    Debug,
    Json,
    ModelOptions,
    ShardSize,
    VerboseMessageOptions,
)
from moemerge.cli.plan_request import PlanRequest, plan_from
from moemerge.cli.publishing import push
from moemerge.cli.repairing import repair_model
from moemerge.cli.routes import show_routes
from moemerge.cli.schema import print_schema
from moemerge.cli.streams import Guarded, guarded_streams, say
from moemerge.cli.tuning import tune_routers

_EPILOG: Final = """\
Other commands, each with its own --help:

  moemerge init BASE ...  a config to begin with, for a base model and experts

  moemerge plan CONFIG    what a merge would do; nothing is written

  moemerge inspect MODEL  what a checkpoint is, and whether its files agree

  moemerge verify OUT     whether a merged checkpoint holds what its config says

  moemerge eval OUT       how good a merged model is, beside its parts and baselines

  moemerge routes OUT     which expert takes which token of a text

  moemerge tune OUT       train a merged model's routers a little, if held-out text surely gains

  moemerge gguf OUT FILE  write a merged model as one GGUF file, for llama.cpp

  moemerge repair OUT     put back what transformers 5 dropped when it saved a merged model again

  moemerge push OUT REPO  send a merged model to the Hub

  moemerge families       which dense models become which mixture

  moemerge schema         the JSON Schema of a config, for editors

A config or folder that is called like a command is written with its path: moemerge ./plan out/

Command lines of mergekit-moe work as they are; its flags are translated, or named as not needed.

Exit codes: 0 done, 1 failed, 2 the config or the command has to change, 130 interrupted.
"""


@grouped
def _plan(
    config: Config,
    *,
    json: Json = False,
    max_shard_size: ShardSize = None,
    models: ModelOptions,
    messages: VerboseMessageOptions,
) -> None:
    """Show what a merge would do: output family, parameters, disk, memory, and where each part comes from."""
    quiet = messages.quiet
    with console_session(
        quiet=quiet, verbose=messages.verbose, debug=messages.debug, cache_dir=models.cache_dir
    ) as console:
        from moemerge.cli.render import plan_facts, print_plan
        from moemerge.planning.options import PlanOptions

        request = PlanRequest(config, models.allow_identical_experts, models.engine, max_shard_size=max_shard_size)
        plan = plan_from(console, request, PlanOptions(weights="stream"), quiet=quiet)
        if json:
            print_json(plan_facts(plan))
        else:
            print_plan(stdout(), plan)


def _inspect(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model's folder, or a Hub repository.", show_default=False),
    ],
    values: Annotated[
        bool, typer.Option("--values", help="Read every number, too; the exit code is 1 if any is infinite or NaN.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a checkpoint is, and check its index, headers and sizes against each other."""
    with console_session(quiet=False, verbose=0, debug=debug) as console:
        from dataclasses import asdict

        from moemerge.checks.inspection import inspect_checkpoint
        from moemerge.cli.progress import show_progress
        from moemerge.cli.render import print_inspection

        with show_progress(console, quiet=not values) as progress:
            found = inspect_checkpoint(
                model, console.print, values=values, progress=lambda done, total: progress("weights", done, total)
            )
        if json:
            print_json(asdict(found))
        else:
            print_inspection(stdout(), found)
        for warning in (*found.warnings, *(found.values.remarks if found.values else ())):
            console.print(f"warning: {warning}", style="yellow")
        if found.values and found.values.not_finite:
            raise typer.Exit(1)


@grouped
def _verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder.", show_default=False)],
    *,
    against: Annotated[
        Path, typer.Option(metavar="CONFIG", help="The config that it was merged from.", show_default=False)
    ],
    seed: Annotated[int, typer.Option(help="Seed that the merge was run with.")] = 0,
    json: Json = False,
    cache_dir: CacheDir = None,
    allow_identical_experts: AllowIdentical = False,
    messages: VerboseMessageOptions,
) -> None:
    """Compare a merged checkpoint with what its config says, byte for byte; routers are not computed again."""
    quiet = messages.quiet
    with console_session(quiet=quiet, verbose=messages.verbose, debug=messages.debug, cache_dir=cache_dir) as console:
        from dataclasses import asdict

        from moemerge.checks.verification import verify_merge
        from moemerge.cli.progress import show_progress
        from moemerge.cli.render import print_verification
        from moemerge.planning.options import PlanOptions
        from moemerge.sources.model_folder import open_merged

        # Before a plan may download weights.
        family = open_merged(out).config.get("model_type")
        request = PlanRequest(against, allow_identical_experts, family=family)
        plan = plan_from(console, request, PlanOptions(needs_texts=False, weights="stream"), quiet=quiet)
        with show_progress(console, quiet=quiet) as progress:
            found = verify_merge(plan, out, seed=seed, progress=lambda done, total: progress("weights", done, total))
        for note in found.notes:
            announcer(console, quiet=quiet)(f"note: {note}")
        if json:
            print_json(asdict(found))
        elif found.differences or not quiet:
            print_verification(stdout(), out, found)
        if found.differences:
            raise typer.Exit(1)


_COMMANDS: Final[dict[str, Callable[..., None]]] = {
    "plan": _plan, "inspect": _inspect, "verify": _verify, "eval": evaluate, "routes": show_routes,
    "tune": tune_routers, "repair": repair_model, "gguf": write_file, "push": push, "families": list_families,
    "init": begin_config, "schema": print_schema,
}  # fmt: skip


# The result of these is a model; the empty name is a merge.
_WRITES_ELSEWHERE: Final = {"", "tune", "gguf", "repair", "push"}


def _misspelt(arguments: list[str]) -> str | None:
    """Find the command whose name is close to the first word; None if there is none, or the word is a file."""
    if not arguments or arguments[0].startswith("-") or Path(arguments[0]).exists():
        return None
    return next(iter(get_close_matches(arguments[0], _COMMANDS, n=1)), None)


def main() -> None:
    """The entry point: a first word that names a command is that command, anything else is a merge."""
    arguments = sys.argv[1:]
    word = arguments[0] if arguments and arguments[0] in _COMMANDS else ""
    with guarded_streams() as (out, _):
        code = 0
        try:
            _run(word, arguments[1:] if word else arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        out.flush()
        code = code or _stdout_exit_code(out, word)
    sys.exit(code)


def _run(word: str, arguments: list[str]) -> None:
    if not word and (near := _misspelt(arguments)):
        say(f"error: {arguments[0]}: there is no such config and no such command. Did you mean {near}?", error=True)
        sys.exit(2)
    if not word:
        from moemerge.cli.legacy import translate

        arguments, notes = translate(arguments)
        for note in () if {"-q", "--quiet"} & {*arguments} else notes:
            say(f"note: {note}", error=True)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    command = _COMMANDS[word] if word else merge_models
    app.command(no_args_is_help=command not in {list_families, print_schema}, epilog=None if word else _EPILOG)(command)
    app(args=arguments, prog_name=f"moemerge {word}" if word else "moemerge")


def _stdout_exit_code(out: Guarded, word: str) -> int:
    """Give the exit code of a command that succeeded: 0, or 1 if standard output did not take its whole result."""
    if out.failure is None:
        return 0
    if word in _WRITES_ELSEWHERE:
        say(f"warning: standard output did not take all of the output ({out.why}); the work is done", error=True)
        return 0
    if not isinstance(out.failure, BrokenPipeError):  # as when a pager was left
        say(f"error: the result cannot be written to standard output: {out.why}.", error=True)
    return 1

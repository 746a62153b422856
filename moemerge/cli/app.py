"""The commands. Whatever is slow to import is imported by the command that needs it."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from moemerge.cli.console import print_json, return_freed_memory, speaking, stdout, stoppable
from moemerge.cli.evaluation import evaluate
from moemerge.cli.families import list_families
from moemerge.cli.options import Debug, Json, Quiet, Verbose
from moemerge.cli.planned import plan_from
from moemerge.cli.publishing import push
from moemerge.cli.routes import show_routes
from moemerge.errors import BusyError, RefusedError

_EPILOG: Final = """\
Other commands, each with its own --help:

  moemerge plan CONFIG    what a merge would do; nothing is written

  moemerge inspect MODEL  what a checkpoint is, and whether its files agree

  moemerge verify OUT     whether a merged checkpoint holds what its config says

  moemerge eval OUT       how good a merged model is, beside its parts and baselines

  moemerge routes OUT     which expert takes which token of a text

  moemerge push OUT REPO  send a merged model to the Hub

  moemerge families       which dense models become which mixture

A config or folder that is called like a command is written with its path: moemerge ./plan out/

Command lines of mergekit-moe work as they are; its flags are translated, or named as not needed.

Exit codes: 0 done, 1 failed, 2 the config or the command has to change, 130 interrupted.
"""

_BITS_HELP: Final = (
    "Run the base model for the routers in {} bits, if one layer of it is too large; needs bitsandbytes."
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The merge config, a YAML file.", show_default=False)]
ShardSize = Annotated[str, typer.Option(help="Largest shard, such as 5GB or 500MB.")]
CacheDir = Annotated[
    Path | None, typer.Option(help="Where Hub models are kept, instead of HF_HUB_CACHE.", show_default=False)
]
AllowIdentical = Annotated[
    bool,
    typer.Option("--allow-identical-experts", help="Accept experts that are all one model, to be trained further."),
]
OutShardSize = Annotated[str | None, typer.Option(hidden=True)]


def _merge(
    config: Config,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The folder to write; it must be empty or absent.", show_default=False),
    ],
    max_shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint that OUT holds.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a merge that was cut off.")] = False,
    routing_table: Annotated[
        bool,
        typer.Option("--routing-table", help="Run the base on the prompts for the table, whatever the gate_mode."),
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read Hub models by byte ranges, past the cache: only what is needed.")
    ] = False,
    low_memory: Annotated[
        bool,
        typer.Option("--low-memory", "--lazy", help="One thread, small chunks, nothing left in the page cache."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of random routers and of noise_scale.")] = 0,
    device: Annotated[
        str, typer.Option(help="Runs the base model for the routers: auto, cpu, cuda, cuda:1, mps.")
    ] = "auto",
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help=_BITS_HELP.format(8))] = False,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help=_BITS_HELP.format(4))] = False,
    cache_dir: CacheDir = None,
    allow_identical_experts: AllowIdentical = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
    out_shard_size: OutShardSize = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=lambda value: _show_version(show=value)
        ),
    ] = False,
) -> None:
    """Build a mixture of experts: moemerge CONFIG OUT.

    The base model gives embeddings, attention and norms, each expert its FFNs; the routers start from the prompts.
    """
    del version
    with speaking(quiet=quiet, verbose=verbose, debug=debug) as console:
        from moemerge.checkpoint.staging import check_target, kept_shards
        from moemerge.cli.progress import show_progress
        from moemerge.cli.render import print_routing
        from moemerge.merging import merge
        from moemerge.routers import check_base_bits

        # Before a plan may download weights.
        check_target(out, (), overwrite=overwrite)
        if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", device):
            raise RefusedError(f"--device: {device!r} is none of auto, cpu, cuda, cuda:N, xpu, xpu:N, mps.")
        if load_in_8bit and load_in_4bit:
            raise RefusedError("--load-in-8bit, --load-in-4bit: give one of them, not both.")
        base_bits: Literal[4, 8] | None = 8 if load_in_8bit else 4 if load_in_4bit else None
        check_base_bits(base_bits)
        return_freed_memory()
        plan = plan_from(
            console, config, max_shard_size, out_shard_size, cache_dir, quiet, allow_identical_experts, out,
            routing_table, weights="stream" if stream else "auto",
        )  # fmt: skip
        try:
            with show_progress(console, quiet=quiet) as progress:
                report = merge(
                    plan, out, overwrite=overwrite, resume=resume, low_memory=low_memory, seed=seed, device=device,
                    base_bits=base_bits, progress=stoppable(progress),
                )  # fmt: skip
        except (RefusedError, BusyError):
            raise
        except BaseException:
            if kept := kept_shards(out):
                console.print(
                    f"{kept} complete shards are kept beside {out}: "
                    "--resume continues from them, a run without it starts over."
                )
            raise
        if not quiet:
            print_routing(stdout(), report, by_layer=verbose > 0)
        for warning in report.warnings():
            console.print(f"warning: {warning}", style="yellow")
        if not quiet:
            if plan.config.way == "delta" and not report.layers:
                console.print(
                    "note: no text says what the experts are for, so nothing is known of how these routers choose; "
                    f"`moemerge eval {out} --data NAME=PATH` measures it"
                )
            typer.echo(f"{out}: done")


def _plan(
    config: Config,
    json: Json = False,
    max_shard_size: ShardSize = "5GB",
    cache_dir: CacheDir = None,
    allow_identical_experts: AllowIdentical = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Show what a merge would do: output family, parameters, disk, memory, and where each part comes from."""
    with speaking(quiet=quiet, verbose=verbose, debug=debug) as console:
        from moemerge.cli.render import plan_facts, print_plan

        plan = plan_from(
            console, config, max_shard_size, None, cache_dir, quiet, allow_identical_experts, weights="stream"
        )
        if json:
            print_json(plan_facts(plan))
        else:
            print_plan(stdout(), plan)


def _inspect(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model's folder, or a Hub repository.", show_default=False),
    ],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a checkpoint is, and check its index, headers and sizes against each other."""
    with speaking(quiet=False, verbose=0, debug=debug) as console:
        from dataclasses import asdict

        from moemerge.cli.render import print_inspection
        from moemerge.inspection import inspect_checkpoint

        found = inspect_checkpoint(model, console.print)
        if json:
            print_json(asdict(found))
        else:
            print_inspection(stdout(), found)
        for warning in found.warnings:
            console.print(f"warning: {warning}", style="yellow")


def _verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder.", show_default=False)],
    against: Annotated[
        Path, typer.Option(metavar="CONFIG", help="The config that it was merged from.", show_default=False)
    ],
    seed: Annotated[int, typer.Option(help="That the merge had, for noise_scale.")] = 0,
    json: Json = False,
    cache_dir: CacheDir = None,
    allow_identical_experts: AllowIdentical = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Compare a merged checkpoint with what its config says, byte for byte; routers are not computed again."""
    with speaking(quiet=quiet, verbose=verbose, debug=debug) as console:
        from dataclasses import asdict

        from moemerge.cli.progress import show_progress
        from moemerge.cli.render import print_verification
        from moemerge.verification import open_merged, verify_merge

        # Before a plan may download weights.
        open_merged(out)
        plan = plan_from(
            console, against, "5GB", None, cache_dir, quiet, allow_identical_experts, needs_texts=False,
            weights="stream",
        )  # fmt: skip
        with show_progress(console, quiet=quiet) as progress:
            found = verify_merge(plan, out, seed=seed, progress=lambda done, total: progress("weights", done, total))
        if json:
            print_json(asdict(found))
        elif found.differences or not quiet:
            print_verification(stdout(), out, found)
        if found.differences:
            raise typer.Exit(1)


_COMMANDS: Final[dict[str, Callable[..., None]]] = {
    "plan": _plan, "inspect": _inspect, "verify": _verify, "eval": evaluate, "routes": show_routes,
    "push": push, "families": list_families,
}  # fmt: skip


def main() -> None:
    """The entry point: a first word that names a command is that command, anything else is a merge."""
    arguments = sys.argv[1:]
    word = arguments[0] if arguments and arguments[0] in _COMMANDS else None
    if word:
        arguments = arguments[1:]
    else:
        from moemerge.cli.legacy import translate

        arguments, notes = translate(arguments)
        for note in notes:
            typer.echo(f"note: {note}", err=True)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    command = _COMMANDS[word] if word else _merge
    app.command(no_args_is_help=command is not list_families, epilog=None if word else _EPILOG)(command)
    app(args=arguments, prog_name=f"moemerge {word}" if word else "moemerge")


def _show_version(*, show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"moemerge {version('moemerge')}")
        raise typer.Exit

"""The commands. Whatever is slow to import is imported by the command that needs it."""

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from moemerge.errors import MoemergeError, RefusedError

if TYPE_CHECKING:
    from rich.console import Console

    from moemerge.plan import MergePlan

_EPILOG: Final = """\
Other commands, each with its own --help:

  moemerge plan CONFIG    what a merge would do; nothing is written

  moemerge inspect MODEL  what a checkpoint is, and whether its files agree

A config or folder that is called plan or inspect is written with its path: moemerge ./plan out/

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
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more: routing by layer, log messages.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OutShardSize = Annotated[str | None, typer.Option(hidden=True)]


def _merge(
    config: Config,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The folder to write; it must be empty or absent.", show_default=False),
    ],
    max_shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint that OUT holds.")] = False,
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
    with _speaking(quiet=quiet, verbose=verbose, debug=debug) as console:
        from moemerge.checkpoint.staging import check_target
        from moemerge.cli.progress import show_progress
        from moemerge.cli.render import print_routing
        from moemerge.merging import check_base_bits, merge

        # Before a plan may download weights.
        check_target(out, (), overwrite=overwrite)
        if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", device):
            raise RefusedError(f"--device: {device!r} is none of auto, cpu, cuda, cuda:N, xpu, xpu:N, mps.")
        if load_in_8bit and load_in_4bit:
            raise RefusedError("--load-in-8bit, --load-in-4bit: give one of them, not both.")
        base_bits: Literal[4, 8] | None = 8 if load_in_8bit else 4 if load_in_4bit else None
        check_base_bits(base_bits)
        plan = _plan_from(console, config, max_shard_size, out_shard_size, cache_dir, quiet, allow_identical_experts)
        with show_progress(console, quiet=quiet) as progress:
            report = merge(
                plan, out, overwrite=overwrite, seed=seed, device=device, base_bits=base_bits, progress=progress
            )
        if not quiet:
            print_routing(_stdout(), report, by_layer=verbose > 0)
        for warning in report.warnings():
            console.print(f"warning: {warning}", style="yellow")
        if not quiet:
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
    with _speaking(quiet=quiet, verbose=verbose, debug=debug) as console:
        from moemerge.cli.render import plan_facts, print_plan

        plan = _plan_from(console, config, max_shard_size, None, cache_dir, quiet, allow_identical_experts)
        if json:
            _print_json(plan_facts(plan))
        else:
            print_plan(_stdout(), plan)


def _inspect(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model's folder, or a Hub repository.", show_default=False),
    ],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a checkpoint is, and check its index, headers and sizes against each other."""
    with _speaking(quiet=False, verbose=0, debug=debug) as console:
        from dataclasses import asdict

        from moemerge.cli.render import print_inspection
        from moemerge.inspection import inspect_checkpoint

        found = inspect_checkpoint(model, console.print)
        if json:
            _print_json(asdict(found))
        else:
            print_inspection(_stdout(), found)
        for warning in found.warnings:
            console.print(f"warning: {warning}", style="yellow")


_COMMANDS: Final[dict[str, Callable[..., None]]] = {"plan": _plan, "inspect": _inspect}


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
    app.command(no_args_is_help=True, epilog=None if word else _EPILOG)(_COMMANDS[word] if word else _merge)
    app(args=arguments, prog_name=f"moemerge {word}" if word else "moemerge")


def _plan_from(
    console: "Console", config: Path, max_shard_size: str, out_shard_size: str | None, cache_dir: Path | None,
    quiet: bool, allow_identical_experts: bool,
) -> "MergePlan":  # fmt: skip
    if cache_dir:
        os.environ["HF_HUB_CACHE"] = str(cache_dir)
    from moemerge.checkpoint.shards import parse_size
    from moemerge.cli.legacy import parse_parameter_count
    from moemerge.config import load_config
    from moemerge.plan import plan_merge

    loaded = load_config(config, allow_identical_experts=allow_identical_experts)
    try:
        max_bytes = parse_size(max_shard_size)
    except ValueError as error:
        raise RefusedError(f"--max-shard-size: {error}.") from error
    if out_shard_size is not None:
        max_bytes = parse_parameter_count(out_shard_size) * (4 if loaded.dtype == "float32" else 2)
    say: Callable[[str], None] = (lambda _line: None) if quiet else console.print
    plan = plan_merge(loaded, max_shard_bytes=max_bytes, announce=say)
    for note in plan.notes:
        say(f"note: {note}")
    return plan


@contextmanager
def _speaking(*, quiet: bool, verbose: int, debug: bool) -> Iterator["Console"]:
    """A console for messages; turns what goes wrong inside into a message and an exit code."""
    from rich.console import Console

    # Other libraries' chatter and bars belong to those who ask for more.
    for library in ("TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "info" if verbose or debug else "error")
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.DEBUG if debug else logging.INFO if verbose else logging.ERROR
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        yield console
    except (typer.Exit, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        message, exit_code = explain_error(error)
        typer.echo(message, err=True)
        raise typer.Exit(exit_code) from error


def explain_error(error: BaseException) -> tuple[str, int]:
    """What to tell the user, and the exit code."""
    if isinstance(error, MoemergeError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: the output is as it was before", 130
    if isinstance(error, MemoryError):
        return "error: memory ran out. `moemerge plan` says how much a merge needs.", 1
    fault = "This is a fault in moemerge: please report it, with what --debug shows."
    return f"error: {type(error).__name__}: {error}\n{fault}", 1


def _stdout() -> "Console":
    from rich.console import Console

    # Tables are as wide as the terminal; in a file they need not be narrow.
    width = None if sys.stdout.isatty() else 160
    return Console(soft_wrap=True, highlight=False, markup=False, width=width)


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


def _show_version(*, show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"moemerge {version('moemerge')}")
        raise typer.Exit

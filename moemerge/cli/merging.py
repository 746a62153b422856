"""The main command: moemerge CONFIG OUT."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from moemerge.cli.console import return_freed_memory, saying, speaking, stdout, stoppable
from moemerge.cli.gguf import check_gguf, check_options, is_gguf, merge_into
from moemerge.cli.options import (
    AllowIdentical,
    CacheDir,
    Config,
    CreatePr,
    Debug,
    For,
    GgufType,
    License,
    LlamaCpp,
    Private,
    Push,
    PushStreaming,
    Quiet,
    Revision,
    ShardSize,
    Verbose,
)
from moemerge.cli.planned import plan_from
from moemerge.cli.publishing import Pushing
from moemerge.cli.streams import say
from moemerge.errors import BusyError, RefusedError

if TYPE_CHECKING:
    from rich.console import Console

    from moemerge.planning.plan import MergePlan
    from moemerge.publish.publisher import Publisher
    from moemerge.routers.report import RoutingReport
    from moemerge.sources.model_folder import ModelFolder

_BITS_HELP: Final = (
    "Run the base model for the routers in {} bits, if one layer of it is too large; needs bitsandbytes."
)

OutShardSize = Annotated[str | None, typer.Option(hidden=True)]


def merge_models(
    config: Config,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            show_default=False,
            help="The folder to write; it must be empty or absent. Or one GGUF file, NAME.gguf.",
        ),
    ],
    max_shard_size: ShardSize = None,
    type: GgufType = "auto",  # noqa: A002  the option's name
    llama_cpp: LlamaCpp = None,
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
    push: Push = None,
    push_streaming: PushStreaming = False,
    private: Private = False,
    revision: Revision = None,
    create_pr: CreatePr = False,
    license: License = None,  # noqa: A002  the option's name, as in model cards
    seed: Annotated[int, typer.Option(help="Of random routers and of noise_scale.")] = 0,
    device: Annotated[
        str, typer.Option(help="Runs the base model for the routers: auto, cpu, cuda, cuda:1, mps.")
    ] = "auto",
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help=_BITS_HELP.format(8))] = False,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help=_BITS_HELP.format(4))] = False,
    cache_dir: CacheDir = None,
    allow_identical_experts: AllowIdentical = False,
    engine: For = None,
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
    with speaking(quiet=quiet, verbose=verbose, debug=debug, cache_dir=cache_dir) as console:
        from moemerge.cli.progress import show_progress
        from moemerge.merging.checkpoint import merge, merge_to_hub

        if push_streaming:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # ours are there at the same time
        pushing = Pushing(
            push, license, saying(console, quiet=quiet), streaming=push_streaming, private=private,
            revision=revision, create_pr=create_pr,
        )  # fmt: skip
        # Before a plan may download weights.
        to_file = is_gguf(out)
        folders_only = {
            "--resume": resume, "--push": push is not None, "--max-shard-size": max_shard_size is not None,
            "--out-shard-size": out_shard_size is not None,
        }  # fmt: skip
        check_options(to_file, type, llama_cpp, folders_only)
        check_place: Callable[[list[Path]], None] = partial(
            _check_folder, out, [config], overwrite=overwrite, streaming=push_streaming
        )
        if to_file:
            check_place = partial(check_gguf, out, type, [config], llama_cpp, overwrite=overwrite)
        check_place([])

        def approve(sources: "Sequence[ModelFolder]") -> None:
            check_place([folder for source in sources for folder in source.folders])
            pushing.approve(sources)

        base_bits = _check_pass(device, load_in_8bit=load_in_8bit, load_in_4bit=load_in_4bit)
        return_freed_memory()
        plan = plan_from(
            console, config, max_shard_size, out_shard_size, quiet, allow_identical_experts,
            None if push_streaming or to_file else out, routing_table, weights="stream" if stream else "auto",
            approve=approve, prove=True, engine=engine, to_gguf=to_file,
        )  # fmt: skip
        way = partial(merge, plan, out, name=push, resume=resume)
        if to_file:
            way = partial(merge_into, console, plan, out, type, llama_cpp, quiet)
        if pushing.publisher:
            pushing.publisher.check_replaced(plan.family.model_type, overwrite=overwrite)
            way = partial(way, ready=pushing.publisher.create)
            if push_streaming:
                way = partial(merge_to_hub, plan, out, pushing.publisher, resume=resume)
        with (
            _told_what_is_kept(console, out, streaming=push_streaming),
            show_progress(console, quiet=quiet) as progress,
        ):
            report = way(
                overwrite=overwrite, low_memory=low_memory, seed=seed, device=device,
                base_bits=base_bits, licence=pushing.licence, progress=stoppable(progress),
                warn=lambda line: console.print(f"warning: {line}", style="yellow"),
            )  # fmt: skip
        with _complete(console, out, pushing.publisher, streaming=push_streaming):
            _print_report(console, out, plan, report, quiet=quiet, by_layer=verbose > 0)
            if not quiet and not push_streaming:
                say(f"{out}: done")
        if pushing.publisher:
            say(pushing.publisher.url if push_streaming else pushing.publisher.push(out))


def _check_folder(
    out: Path, inputs: list[Path], sources: list[Path], *, overwrite: bool, streaming: bool
) -> None:  # fmt: skip
    """Refuse a folder that a merge could not write, or not keep shards beside; before weights are downloaded."""
    from moemerge.checkpoint.target import check_scratch, check_target
    from moemerge.merging.overwriting import replaceable_files

    if streaming:
        check_scratch(out, sources)
    else:
        check_target(out, sources, inputs=inputs, replaceable=replaceable_files if overwrite else None)


def _check_pass(device: str, *, load_in_8bit: bool, load_in_4bit: bool) -> Literal[4, 8] | None:
    from moemerge.routers.initialisation import check_base_bits

    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", device):
        raise RefusedError(f"--device: {device!r} is none of auto, cpu, cuda, cuda:N, xpu, xpu:N, mps.")
    if load_in_8bit and load_in_4bit:
        raise RefusedError("--load-in-8bit, --load-in-4bit: give one of them, not both.")
    base_bits: Literal[4, 8] | None = 8 if load_in_8bit else 4 if load_in_4bit else None
    check_base_bits(base_bits)
    return base_bits


@contextmanager
def _told_what_is_kept(console: "Console", out: Path, *, streaming: bool) -> Iterator[None]:
    """Say what a merge that stops leaves for `--resume`."""
    from moemerge.checkpoint.staging import kept_shards

    try:
        yield
    except (RefusedError, BusyError):
        raise
    except BaseException as error:
        if kept := kept_shards(out):
            where = "on the Hub" if streaming else f"beside {out}"
            console.print(
                f"{kept} complete shards are kept {where}: --resume continues from them, a run without it starts over."
            )
        if isinstance(error, KeyboardInterrupt) and streaming and not error.args:
            raise KeyboardInterrupt(f"{out} is not written; what was sent stays on the Hub") from error
        raise


@contextmanager
def _complete(console: "Console", out: Path, publisher: "Publisher | None", *, streaming: bool) -> Iterator[None]:
    """Let nothing that comes while results are shown look like a failure of the merge that is done."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError) as error:
        if publisher and not streaming:
            raise KeyboardInterrupt(f"{out} is complete, and not pushed") from error
        where = publisher.url if publisher else out
        console.print(f"warning: {where}: is complete; not all of its report is shown", style="yellow")


def _print_report(
    console: "Console", out: Path, plan: "MergePlan", report: "RoutingReport", *, quiet: bool, by_layer: bool
) -> None:
    from moemerge.cli.render import print_routing

    if not quiet:
        print_routing(stdout(), report, by_layer=by_layer)
    for warning in report.warnings():
        console.print(f"warning: {warning}", style="yellow")
    if not quiet and plan.config.method.reads == {"weights"} and not report.layers:
        console.print(
            "note: no text says what the experts are for, so nothing is known of how these routers choose; "
            f"`moemerge eval {out} --data NAME=PATH` measures it"
        )


def _show_version(*, show: bool) -> None:
    if show:
        from importlib.metadata import version

        say(f"moemerge {version('moemerge')}")
        raise typer.Exit

"""Options of the main command, in groups, in the order in which its help lists them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

import typer

from moemerge.cli.options import (
    ComputeIn,
    CreatePr,
    GgufType,
    License,
    LlamaCpp,
    Private,
    Push,
    PushStreaming,
    Revision,
    ShardSize,
    devices_option,
    ray_option,
    workers_option,
)
from moemerge.errors import RefusedError
from moemerge.passes.device_names import DEVICES, is_device

if TYPE_CHECKING:
    from moemerge.merging.options import MergeOptions

_BITS_HELP: Final = (
    "Run the base model for the routers in {} bits, if one layer of it is too large; needs bitsandbytes."
)


@dataclass(frozen=True)
class OutputOptions:
    """Options for what is written."""

    heading: ClassVar[str] = "Output"

    max_shard_size: ShardSize = None
    type: GgufType = "auto"
    llama_cpp: LlamaCpp = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint that OUT holds.")] = False
    resume: Annotated[bool, typer.Option("--resume", help="Continue a merge that was cut off.")] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be written, as `moemerge plan`; write nothing.")
    ] = False
    ray: Annotated[
        str | None, ray_option("Write shards in processes of a Ray cluster, whose machines share the disk")
    ] = None
    workers: Annotated[int | None, workers_option("one on each machine")] = None
    out_shard_size: Annotated[str | None, typer.Option(hidden=True)] = None


@dataclass(frozen=True)
class ReadingOptions:
    """Options for how models and prompts are read."""

    heading: ClassVar[str] = "Reading"

    routing_table: Annotated[
        bool,
        typer.Option(
            "--routing-table", help="Run the base on the prompts for the routing table, whatever the gate_mode."
        ),
    ] = False
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Read only what is needed of Hub models, by byte ranges and without the cache."),
    ] = False
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory", "--lazy", help="Use one thread and small chunks, and leave nothing in the page cache."
        ),
    ] = False


@dataclass(frozen=True)
class PushOptions:
    """Options for a push to the Hub."""

    heading: ClassVar[str] = "Hub"

    push: Push = None
    push_streaming: PushStreaming = False
    private: Private = False
    revision: Revision = None
    create_pr: CreatePr = False
    license: License = None


@dataclass(frozen=True)
class RouterOptions:
    """Options for how routers are made."""

    heading: ClassVar[str] = "Routers"

    seed: Annotated[int, typer.Option(metavar="N", help="Seed for random routers and noise_scale.")] = 0
    device: Annotated[
        str,
        devices_option("Device that runs models, to make routers and choose shared weights"),
    ] = "auto"
    compute_dtype: ComputeIn = "auto"
    share_text: Annotated[
        bool,
        typer.Option(
            "--share-text",
            help="With --ray, let each process run the base model on a part of the text; the routers are then equal to "
            "rounding.",
        ),
    ] = False
    keep_states: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder that keeps the base model's router inputs, so that the next merge runs it over new text only.",
        ),
    ] = None
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help=_BITS_HELP.format(8))] = False
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help=_BITS_HELP.format(4))] = False


def merge_options(out: Path, output: OutputOptions, reading: ReadingOptions, routers: RouterOptions) -> "MergeOptions":
    """Make the options of a merge of those of the command line; refuse those that make no sense."""
    from moemerge.merging.options import MergeOptions

    if routers.keep_states is not None:
        from moemerge.routers.kept_folder import check_kept_states

        check_kept_states(routers.keep_states, out)
    if routers.share_text and output.ray is None:
        raise RefusedError("--share-text: needs --ray. Add `--ray local` for processes on this machine.")
    return MergeOptions(
        overwrite=output.overwrite,
        resume=output.resume,
        low_memory=reading.low_memory,
        seed=routers.seed,
        device=routers.device,
        compute_dtype=routers.compute_dtype,
        ray=output.ray if routers.share_text else None,
        workers=output.workers,
        base_bits=_base_bits(routers),
        kept_states=routers.keep_states,
    )


def _base_bits(routers: RouterOptions) -> Literal[4, 8] | None:
    """Give the bits of the base model's weights for the routers, None for all of them.

    Raises:
        RefusedError: the device is unknown, or the options for bits cannot be followed.
    """
    from moemerge.routers.initialisation import check_base_bits

    for device in routers.device.split(","):
        if not is_device(device):
            raise RefusedError(f"--device: {device!r} is not one of {DEVICES}.")
    if routers.load_in_8bit and routers.load_in_4bit:
        raise RefusedError("--load-in-8bit, --load-in-4bit: give one of them, not both.")
    base_bits: Literal[4, 8] | None = 8 if routers.load_in_8bit else 4 if routers.load_in_4bit else None
    check_base_bits(base_bits)
    return base_bits

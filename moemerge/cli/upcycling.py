"""`moemerge upcycle`: copies of a model's FFNs as experts that are to be trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer

from moemerge.cli.console import announcer, console_session
from moemerge.cli.edit_options import EditOutputOptions
from moemerge.cli.grouping import grouped
from moemerge.cli.merge_options import OutputOptions, PushOptions, ReadingOptions, RouterOptions
from moemerge.cli.merging import carry_out
from moemerge.cli.options import CacheDir, For, ResultOptions, VerboseOptions
from moemerge.cli.plan_request import PlanRequest
from moemerge.cli.streams import say
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from moemerge.config.schema import MergeConfig


@dataclass(frozen=True)
class CopyOptions:
    """Options for how many copies there are, and how they differ."""

    heading: ClassVar[str] = "Experts"

    experts: Annotated[int, typer.Option(metavar="N", min=2, help="How many experts the result has.")] = 8
    experts_per_token: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="How many of them take each token. [default: 2; of a mixture, all copies of those chosen before]",
            show_default=False,
        ),
    ] = None
    noise_scale: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, help="Standard deviation of noise on the weights.", show_default=False),
    ] = None
    reinit: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=1,
            help="Share of each expert's neurons that is drawn anew (drop-upcycling); 0.5 is usual.",
            show_default=False,
        ),
    ] = None
    gate: Annotated[
        Literal["random", "uniform_random"], typer.Option(help="How a dense model's routers are drawn.")
    ] = "random"
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed for routers, noise and drawn neurons.")] = 0


@grouped
def upcycle_model(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A dense model or a mixture, a folder or on the Hub.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write; it must be empty or absent.", show_default=False)
    ],
    *,
    copies: CopyOptions,
    output: EditOutputOptions,
    engine: For = None,
    cache_dir: CacheDir = None,
    messages: ResultOptions,
) -> None:
    """Make a mixture of copies of one model, for training.

    A dense model becomes N equal experts with random routers; each expert of a mixture is there several times. Without
    noise and --reinit the result computes what the model does. The same can be written as a config, which is printed,
    and kept beside the result.

    Examples:
        moemerge upcycle Qwen/Qwen3-0.6B start --experts 8 --reinit 0.5
        moemerge upcycle mistralai/Mistral-7B-v0.1 start --noise-scale 0.001
        moemerge upcycle mixture start --experts 16 --dry-run
    """
    quiet = messages.quiet
    with console_session(
        quiet=quiet, verbose=0, debug=messages.debug, cache_dir=cache_dir, keeps_output=True
    ) as console:
        config = _config_of(model, copies, announcer(console, quiet=quiet))
        if not (quiet or messages.json):
            say(config.written)
        carry_out(
            console,
            PlanRequest(Path(model), True, engine, max_shard_size=output.max_shard_size, given=config),
            out,
            OutputOptions(output.max_shard_size, overwrite=output.overwrite, dry_run=output.dry_run),
            ReadingOptions(),
            push=PushOptions(),
            routers=RouterOptions(copies.seed),
            messages=VerboseOptions(messages.json, quiet, debug=messages.debug),
        )


def _config_of(model: str, copies: CopyOptions, announce: "Callable[[str], None]") -> "MergeConfig":
    """Write the config of the merge, or of the edit if the model is a mixture."""
    from moemerge.config.loading import parse_config
    from moemerge.config.yaml_text import write_yaml
    from moemerge.editing.upcycling import Copies, upcycled_dense, upcycled_mixture
    from moemerge.sources.model_folder import open_model
    from moemerge.sources.stored_mixtures import is_mixture, read_stored_mixture

    if copies.reinit == 0:
        raise RefusedError("--reinit: 0 draws no neurons anew. Leave it out.")
    asked = Copies(copies.experts, copies.experts_per_token, copies.noise_scale, copies.reinit, copies.seed)
    folder = open_model(model, announce)
    if is_mixture(folder):
        document = upcycled_mixture(model, read_stored_mixture(folder, announce), asked)
    else:
        document = upcycled_dense(model, asked, copies.gate)
    return parse_config(write_yaml(document), "the upcycling", allow_identical_experts=True)

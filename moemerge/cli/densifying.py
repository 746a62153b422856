"""`moemerge densify`: all experts of a mixture as one dense model."""

import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from moemerge.cli.console import announcer, console_session, stoppable
from moemerge.cli.edit_options import EditOutputOptions
from moemerge.cli.evaluation import by_name
from moemerge.cli.extracting import carry_out
from moemerge.cli.grouping import grouped
from moemerge.cli.options import CacheDir, ComputeIn, Devices, ResultOptions
from moemerge.dtypes import ComputeDtype
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from moemerge.evaluation.mean_weights import MeasuredMixture


@dataclass(frozen=True)
class FoldingOptions:
    """Options for how experts become one FFN."""

    heading: ClassVar[str] = "Experts"

    average: Annotated[
        bool, typer.Option("--average", help="Average all experts' weights: a beginning for training.")
    ] = False
    widen: Annotated[
        int | None,
        typer.Option(
            "--widen",
            metavar="N",
            min=1,
            help="Put the neurons of each layer's N most loaded experts side by side, scaled by their mean weights.",
            show_default=False,
        ),
    ] = None
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="NAME=PATH",
            help="Text that the experts are weighed by, as eval takes it; it is also what both models are judged on.",
            show_default="all alike",
        ),
    ] = None
    max_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens that are read of each NAME.")] = 8192


@grouped
def densify_mixture(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A mixture's folder, or a Hub repository.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write; it must be empty or absent.", show_default=False)
    ],
    *,
    folding: FoldingOptions,
    output: EditOutputOptions,
    device: Devices = "auto",
    compute_dtype: ComputeIn = "auto",
    cache_dir: CacheDir = None,
    messages: ResultOptions,
) -> None:
    """Make one dense model of all experts of a mixture.

    Their FFNs are averaged, or put side by side into wider ones. With text, experts count by the weight that the
    routers give them there, and the dense model's loss is printed beside the mixture's.

    Examples:
        moemerge densify out dense --average --data code=code.txt
        moemerge densify out wide --widen 2 --data code=code.txt
    """
    quiet = messages.quiet
    with console_session(
        quiet=quiet, verbose=0, debug=messages.debug, cache_dir=cache_dir, keeps_output=True
    ) as console:
        from moemerge.cli.plan_request import shard_bytes
        from moemerge.editing.dense.densifying import plan_densify
        from moemerge.planning.options import PlanOptions

        if folding.average == (folding.widen is not None):
            raise RefusedError("densify: give one of --average and --widen N.")
        start, announce = time.monotonic(), announcer(console, quiet=quiet)
        options = PlanOptions(shard_bytes(output.max_shard_size), out)
        with _measured(console, model, folding, device=device, compute_dtype=compute_dtype, quiet=quiet) as measured:
            plan, losses = plan_densify(
                model, widen=folding.widen, measured=measured, options=options, announce=announce
            )
        for note in plan.notes:
            announce(f"note: {note}")
        facts = {"losses": {name: {"mixture": ours, "dense": dense} for name, (ours, dense) in losses.items()}}
        carry_out(console, plan, out, output, messages, start=start, facts=facts)


@contextmanager
def _measured(
    console: "Console",
    model: str,
    folding: FoldingOptions,
    *,
    device: str,
    compute_dtype: ComputeDtype,
    quiet: bool,
) -> "Iterator[MeasuredMixture | None]":
    """A context with the mixture, run over the text that was given, and progress; None without text."""
    if not folding.data:
        yield None
        return
    from moemerge.cli.progress import show_work
    from moemerge.evaluation.evaluator import read_domains
    from moemerge.evaluation.settings import EvaluationSettings

    documents = read_domains(by_name(folding.data))
    from moemerge.evaluation.mean_weights import MeasuredMixture  # imports torch and transformers

    settings = EvaluationSettings(tokens=folding.max_tokens, device=device, compute_dtype=compute_dtype)
    with show_work(console, quiet=quiet) as progress:
        yield MeasuredMixture(model, documents, settings, stoppable(progress))

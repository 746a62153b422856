"""`moemerge tune` and what it prints: held-out losses before and after."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer
from rich.console import Console

from moemerge.cli.console import announcer, console_session, print_json, return_freed_memory, stdout, stoppable
from moemerge.cli.evaluation import by_name
from moemerge.cli.grouping import grouped
from moemerge.cli.options import (
    ROLES_OF_CHATS,
    CacheDir,
    ChatRoles,
    Device,
    ResultOptions,
    compute_option,
    named_roles,
    one_of,
)
from moemerge.cli.tables import Table
from moemerge.dtypes import ComputeDtype
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from moemerge.tuning.settings import TuningResult


@dataclass(frozen=True)
class TrainingOptions:
    """Options for how routers are trained: the fields of `moemerge.tuning.settings.Settings` but for `roles`."""

    heading: ClassVar[str] = "Training"

    steps: Annotated[int, typer.Option(metavar="N", help="Steps of training; with phatgoose, of each expert.")] = 20
    tokens_per_step: Annotated[int, typer.Option(metavar="N", help="Tokens in a step, at least 16 of every NAME.")] = (
        512
    )
    lr: Annotated[
        float, typer.Option(metavar="X", help="Learning rate, which is about how far a step moves a logit.")
    ] = 0.07
    seed: Annotated[int, typer.Option(metavar="N", help="Seed for the order of texts and the noise.")] = 0
    noise: Annotated[
        float, typer.Option(metavar="X", help="Standard deviation of the noise on the logits while training.")
    ] = 0.0
    distil: Annotated[
        bool, typer.Option("--distil/--no-distil", help="Learn from each text's own dense expert, too.")
    ] = False
    method: Annotated[
        Literal["gates", "phatgoose"],
        typer.Option(
            metavar="METHOD",
            parser=one_of(("gates", "phatgoose")),
            help="gates trains all together; phatgoose trains a gate for each expert, on its own text alone.",
        ),
    ] = "gates"
    train: Annotated[
        Literal["gates", "gates,norms"],
        typer.Option(
            metavar="WHAT",
            parser=one_of(("gates", "gates,norms"), {"norms,gates": "gates,norms"}),
            help="gates, or gates,norms for the norms that experts share, too.",
        ),
    ] = "gates"
    compute_dtype: Annotated[
        ComputeDtype,
        compute_option(
            "What mixture and teachers are run in: float32, bfloat16, or auto: bfloat16, but on a CPU the mixture in "
            "float32 unless accelerate says bf16, and teachers in the faster one by a short trial."
        ),
    ] = "auto"
    allow_missing_domains: Annotated[
        bool,
        typer.Option(
            "--allow-missing-domains", help="Accept experts without text, although what they lose is not seen."
        ),
    ] = False


@dataclass(frozen=True)
class WritingOptions:
    """Options for what is written, and what of an earlier tuning is used."""

    copy: Annotated[
        Path | None,
        typer.Option("--out", metavar="COPY", help="Write a copy, and leave OUT as it is.", show_default=False),
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Continue a tuning that was cut off.")] = False


Data = Annotated[
    list[str],
    typer.Option(
        metavar="NAME=PATH",
        show_default=False,
        help="Text or chats to train on, as eval takes them, for every expert, whose name NAME is. There may be other "
        "names, too, without --distil.",
    ),
]


@grouped
def tune_routers(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder.", show_default=False)],
    *,
    data: Data,
    training: TrainingOptions,
    chat_roles: ChatRoles = ROLES_OF_CHATS,
    writing: WritingOptions,
    device: Device = "auto",
    cache_dir: CacheDir = None,
    messages: ResultOptions,
) -> None:
    """Train a merged model's routers a little.

    They are kept if held-out text is surely predicted better.

    Examples:
        moemerge tune out --data code=code.txt --data math=math.jsonl --out tuned
    """
    first = os.environ.get("RANK", "0") == "0"  # of the processes that accelerate has launched
    quiet = messages.quiet or not first
    with console_session(
        quiet=quiet, verbose=0, debug=messages.debug, cache_dir=cache_dir, keeps_output=True
    ) as console:
        from moemerge.cli.progress import show_steps
        from moemerge.tuning.settings import Settings
        from moemerge.tuning.tuner import tune

        return_freed_memory()
        settings = Settings(**vars(training), roles=named_roles(chat_roles))
        try:
            with show_steps(console, quiet=quiet) as progress:
                found = tune(
                    out,
                    by_name(data),
                    settings,
                    copy=writing.copy,
                    device=device,
                    resume=writing.resume,
                    progress=stoppable(progress),
                    announce=announcer(console, quiet=quiet),
                )
        except RefusedError:
            if first:
                raise
            raise typer.Exit(2) from None  # all are refused alike, and the first says why
        if first:
            _print_result(console, found, json=messages.json, quiet=quiet)


def _print_result(console: Console, found: "TuningResult | None", *, json: bool, quiet: bool) -> None:
    """Print the result on standard output, and on the console its notes and whether the model was written."""
    from dataclasses import asdict

    if json:
        print_json(found and asdict(found))
    elif found:
        print_tuned(stdout(), found)
    if found is None:
        return
    for note in () if quiet else found.notes:
        console.print(f"note: {note}", style="yellow")
    console.print(f"{found.model}: {'written' if found.improved else 'not touched'}")


def print_tuned(console: Console, found: "TuningResult") -> None:
    """Print held-out losses and the share of tokens whose expert comes first, before and after."""
    console.print("Held-out loss in nats per token, with 95 % intervals over documents:")
    table = Table("", *found.before.losses, "mean")
    rows = (("before", found.before), ("after", found.after))
    for name, held in rows:
        cells = [f"{held.losses[domain].value:.3f}{held.losses[domain].interval}" for domain in found.before.losses]
        table.add_row(name, *cells, f"{held.mean_loss:.3f}")
    table.add_row("lower by", *(gain.precise for gain in found.gains.values()), found.gain.precise)
    console.print(table)
    known = [name for name, share in found.before.accuracy.items() if share is not None]
    if known:
        console.print("Right expert first:")
        table = Table("", *known)
        for name, held in rows:
            table.add_row(name, *(f"{held.accuracy[domain]:.1%}" for domain in known))
        console.print(table)
    best = f"best after step {found.step} of {found.steps}" if found.step else f"none of {found.steps} steps was better"
    chance = ", which may be chance" if found.step and not found.improved else ""
    read = (
        f"{n} {tokens} tokens of {found.held_out_documents[n]} documents" for n, tokens in found.held_out_tokens.items()
    )
    console.print(f"{best}{chance}; {found.seconds_per_step:.2f} s per step; held out: {', '.join(read)}")

"""`moemerge eval` and what it prints: losses beside baselines, and what the routers do."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from moemerge.cli.console import announcer, console_session, print_json, stdout, stoppable
from moemerge.cli.grouping import grouped
from moemerge.cli.options import (
    ROLES_OF_CHATS,
    CacheDir,
    ChatRoles,
    ComputeIn,
    Device,
    Json,
    VerboseMessageOptions,
    named_roles,
)
from moemerge.cli.standard_input import path_of
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from moemerge.evaluation.figures import Evaluation

_LARGEST_LOSS: Final = math.log(1e6)


@dataclass(frozen=True)
class MeasuringOptions:
    """Options for what is run, on how much text, and on which device."""

    baselines: Annotated[
        bool, typer.Option("--baselines", help="Run the weight average, the uniform mixture and the label oracle too.")
    ] = False
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens that are read of each NAME.")] = 8192
    window: Annotated[int, typer.Option(min=2, help="Tokens that a model sees at a time.")] = 512
    chat_roles: ChatRoles = ROLES_OF_CHATS
    device: Device = "auto"
    compute_dtype: ComputeIn = "auto"


@grouped
def evaluate(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder.", show_default=False)],
    *,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=PATH",
            show_default=False,
            help="Text or chats to judge by: a file, folder or pattern of .txt, .jsonl or .parquet, or "
            "hf://datasets/user/name:split#column, or - for standard input. NAME is an expert's, or any other.",
        ),
    ],
    measuring: MeasuringOptions,
    cache_dir: CacheDir = None,
    update_card: Annotated[bool, typer.Option("--update-card", help="Write the result into the model card.")] = False,
    json: Json = False,
    messages: VerboseMessageOptions,
) -> None:
    """Compare a merged model's loss on held-out text with those of its base, its experts and simpler mixtures."""
    with console_session(quiet=messages.quiet, verbose=0, debug=messages.debug, cache_dir=cache_dir) as console:
        from dataclasses import asdict

        from moemerge.model_card.card import read_card, update_evaluation

        if update_card:
            read_card(out)  # before what takes minutes
        found = _measure(console, out, data, measuring, quiet=messages.quiet)
        if json:
            print_json(asdict(found))
        else:
            print_evaluation(stdout(), found, by_layer=messages.verbose > 0)
        for note in () if messages.quiet else found.notes:
            console.print(f"note: {note}", style="yellow")
        if update_card:  # last: what took minutes is not lost with the card
            update_evaluation(out, found)
            console.print(f"{out / 'README.md'}: updated")


def _measure(console: Console, out: Path, data: list[str], measuring: MeasuringOptions, *, quiet: bool) -> "Evaluation":
    """Evaluate the model, and show how far that is."""
    from moemerge.cli.progress import show_layers
    from moemerge.evaluation.evaluator import evaluate as run

    with show_layers(console, quiet=quiet) as progress:
        return run(
            out,
            by_name(data),
            baselines=measuring.baselines,
            tokens=measuring.max_tokens,
            window=measuring.window,
            roles=named_roles(measuring.chat_roles),
            device=measuring.device,
            compute_dtype=measuring.compute_dtype,
            progress=stoppable(progress),
            announce=announcer(console, quiet=quiet),
        )


def by_name(data: list[str]) -> dict[str, list[str]]:
    """Collect the paths of `--data NAME=PATH` options, by name.

    Raises:
        RefusedError: one is not of this form.
    """
    named: dict[str, list[str]] = {}
    for given in data:
        name, equals, path = given.partition("=")
        if not (name and equals and path):
            raise RefusedError(f"--data: expected NAME=PATH, such as code=code.txt, found {given!r}.")
        named.setdefault(name, []).append(path_of(path))
    return named


def print_evaluation(console: Console, found: "Evaluation", *, by_layer: bool) -> None:
    """Print losses by model and domain, what choosing experts recovers, and the routers' choices."""
    console.print(f"Loss in nats per token (perplexity) in {found.dtype}, lower is better:")
    table = Table("", *(domain.name for domain in found.domains), "mean", box=None, header_style="")
    for model, losses in found.losses.items():
        cells = [_loss(losses[d.name].value) if d.name in losses else "-" for d in found.domains]
        table.add_row(model, *cells, _loss(found.mean_losses[model]) if model in found.mean_losses else "-")
    console.print(table)
    console.print(
        "tokens: "
        + ", ".join(f"{d.name} {d.tokens} of {d.documents} of {d.available} documents" for d in found.domains)
    )
    if found.recovered_mean:
        mean = found.recovered_mean
        parts = [f"{name} {part.value:.2f}" for name, part in found.recovered.items()]
        console.print(
            "Recovered of what choosing the right expert gains over mixing all alike: "
            f"{mean.value:.2f}{mean.interval}; {', '.join(parts)}"
        )
    console.print("Routing, averaged over layers:")
    table = Table(
        "",
        "right first",
        f"right in {found.experts_per_token}",
        *(f"to {name}" for name in found.experts),
        "entropy",
        "first's weight",
        box=None,
        header_style="",
    )
    for name, routing in found.routing.items():
        right = ["-" if share is None else f"{share:.1%}" for share in (routing.accuracy, routing.hit_rate)]
        loads = [f"{share:.1%}" for share in routing.load]
        table.add_row(name, *right, *loads, f"{routing.entropy:.2f}", f"{routing.top_weight:.2f}")
    console.print(table)
    if by_layer:
        for name, routing in found.routing.items():
            console.print(f"Load by layer, {name}:")
            table = Table("layer", *found.experts, box=None, header_style="")
            for layer, loads_of in zip(found.layers, routing.load_by_layer, strict=True):
                table.add_row(str(layer), *(f"{share:.0%}" for share in loads_of))
            console.print(table)


def _loss(value: float) -> str:
    """Format a loss with its perplexity, which is cut at 1e6: a model that predicts nothing has a page of digits."""
    perplexity = f"{math.exp(value):.2f}" if value < _LARGEST_LOSS else "over 1e6"
    return f"{value:.3f} ({perplexity})"

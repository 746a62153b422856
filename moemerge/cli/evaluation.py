"""`moemerge eval`: merged models on held-out text, beside what they are made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from rich.console import Console

from moemerge.cli.console import announcer, console_session, print_json, stdout, stoppable
from moemerge.cli.grouping import grouped
from moemerge.cli.options import (
    ROLES_OF_CHATS,
    CacheDir,
    ChatRoles,
    ComputeIn,
    Devices,
    Ray,
    VerboseOptions,
    Workers,
    check_processes,
    named_roles,
)
from moemerge.cli.standard_input import path_of
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from moemerge.evaluation.figures import Estimate, Evaluation


@dataclass(frozen=True)
class MeasuringOptions:
    """Options for what is run, on how much text, and on which device."""

    heading: ClassVar[str] = "Measuring"

    baselines: Annotated[
        bool, typer.Option("--baselines", help="Run the weight average, the uniform mixture and the label oracle too.")
    ] = False
    max_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens that are read of each NAME.")] = 8192
    window: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens that a model sees at a time.")] = 512
    rerun: Annotated[
        bool,
        typer.Option(
            "--rerun", help="Run dense models again whose losses on this text are kept, and keep the new ones."
        ),
    ] = False
    chat_roles: ChatRoles = ROLES_OF_CHATS
    device: Devices = "auto"
    compute_dtype: ComputeIn = "auto"
    ray: Ray = None
    workers: Workers = None


@dataclass(frozen=True)
class ReportingOptions:
    """Options for what is said of the result, and where."""

    update_card: Annotated[bool, typer.Option("--update-card", help="Write the result into the model card.")] = False
    explain: Annotated[bool, typer.Option("--explain", help="Say what the rows and columns of the tables are.")] = False


@grouped
def evaluate(
    out: Annotated[
        list[Path],
        typer.Argument(metavar="OUT...", help="A merged model's folder, or several to compare.", show_default=False),
    ],
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
    reporting: ReportingOptions,
    messages: VerboseOptions,
) -> None:
    """Judge a merged model by its loss on held-out text.

    It is compared with its base, its experts and, with --baselines, simpler mixtures.

    Examples:
        moemerge eval out --data code=code.txt --data math=math.jsonl
        moemerge eval out --data code=hf://datasets/user/name:test#text --baselines
        moemerge eval out tuned --data code=code.txt           compare two mixtures
    """
    with console_session(quiet=messages.quiet, verbose=0, debug=messages.debug, cache_dir=cache_dir) as console:
        from moemerge.model_card.card import read_card, update_evaluation

        check_processes(measuring.ray, measuring.workers, measuring.device)
        for folder in out if reporting.update_card else ():
            read_card(folder)  # before what takes minutes
        found, differences = _measure(console, out, data, measuring, quiet=messages.quiet)
        if messages.json:
            print_json(_facts(found, differences))
        else:
            _print(found, differences, explain=reporting.explain, by_layer=messages.verbose > 0)
        for note in () if messages.quiet else dict.fromkeys(note for one in found for note in one.notes):
            console.print(f"note: {note}", style="yellow")
        for folder, one in zip(out, found, strict=True) if reporting.update_card else ():
            update_evaluation(folder, one)  # last: what took minutes is not lost with the card
            console.print(f"{folder / 'README.md'}: updated")


def _facts(found: "list[Evaluation]", differences: "list[Estimate | None]") -> Any:
    """Give what `--json` prints: an object for one model, a list for several."""
    from dataclasses import asdict

    from moemerge.evaluation.verdict import verdict

    facts = [
        asdict(one) | {"verdict": verdict(one), "against_first": difference and asdict(difference)}
        for one, difference in zip(found, [None, *differences], strict=True)
    ]
    return facts[0] if len(facts) == 1 else facts


def _print(found: "list[Evaluation]", differences: "list[Estimate | None]", *, explain: bool, by_layer: bool) -> None:
    from moemerge.cli.evaluation_report import print_differences, print_evaluation

    for number, one in enumerate(found):
        if len(found) > 1:
            stdout().print(f"{'' if number == 0 else chr(10)}{one.model}")
        print_evaluation(stdout(), one, by_layer=by_layer, explain=explain and number == len(found) - 1)
    print_differences(stdout(), found, differences)


def _measure(
    console: Console, out: list[Path], data: list[str], measuring: MeasuringOptions, *, quiet: bool
) -> "tuple[list[Evaluation], list[Estimate | None]]":
    """Evaluate the models, and show how far that is."""
    from moemerge.cli.progress import show_work
    from moemerge.evaluation.evaluator import compare
    from moemerge.evaluation.kept_losses import default_folder
    from moemerge.evaluation.settings import EvaluationSettings
    from moemerge.sources.reference import location_of

    with show_work(console, quiet=quiet) as progress:
        return compare(
            [str(location_of(folder) or folder) for folder in out],
            by_name(data),
            EvaluationSettings(
                baselines=measuring.baselines,
                tokens=measuring.max_tokens,
                window=measuring.window,
                roles=named_roles(measuring.chat_roles),
                device=measuring.device,
                compute_dtype=measuring.compute_dtype,
                ray=measuring.ray,
                workers=measuring.workers,
                kept_losses=default_folder(),
                rerun=measuring.rerun,
            ),
            progress=stoppable(progress),
            announce=announcer(console, quiet=quiet),
        )


def by_name(data: list[str], option: str = "--data") -> dict[str, list[str]]:
    """Collect the paths of `--data NAME=PATH` options, or of others, by name.

    Raises:
        RefusedError: one is not of this form.
    """
    named: dict[str, list[str]] = {}
    for given in data:
        name, equals, path = given.partition("=")
        if not (name and equals and path):
            raise RefusedError(f"{option}: expected NAME=PATH, such as code=code.txt, found {given!r}.")
        named.setdefault(name, []).append(path_of(path))
    return named

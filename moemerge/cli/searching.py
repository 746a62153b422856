"""`moemerge search`: recipes that are tried without writing a model, and the best of them as a merge config."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, get_args

import typer
from rich.console import Console

from moemerge.cli.beginning import Overwrite
from moemerge.cli.console import announcer, console_session, print_json, return_freed_memory, stdout, stoppable
from moemerge.cli.draft_file import STDOUT, check_file
from moemerge.cli.evaluation import by_name
from moemerge.cli.grouping import grouped
from moemerge.cli.options import (
    ROLES_OF_CHATS,
    CacheDir,
    ChatRoles,
    ComputeIn,
    Device,
    ResultOptions,
    Workers,
    check_processes,
    named_roles,
    one_of,
    ray_option,
)
from moemerge.cli.streams import say
from moemerge.errors import OutputError, RefusedError
from moemerge.searching.settings import Cost, Objective

if TYPE_CHECKING:
    from moemerge.searching.results import SearchResult
    from moemerge.searching.settings import SearchSettings

_COSTS: Final = get_args(Cost)


@dataclass(frozen=True)
class SearchOptions:
    """Options for which recipes are tried, and what they are judged by."""

    heading: ClassVar[str] = "Search"

    trials: Annotated[int, typer.Option(metavar="N", min=1, help="How many recipes are tried.")] = 24
    objective: Annotated[
        Objective,
        typer.Option(
            metavar="WHAT",
            parser=one_of(get_args(Objective)),
            help="What is to be small: mean, the mean loss over all NAMEs; or worst, the most that the loss on a NAME "
            "is above that of its own dense expert.",
        ),
    ] = "mean"
    cost: Annotated[
        Cost | None,
        typer.Option(
            metavar="WHAT",
            parser=one_of(_COSTS),
            show_default=False,
            help="What is to be small beside it: bytes of the weights, or active parameters of a token; prints the "
            "recipes that no other beats in both.",
        ),
    ] = None
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed for recipes and for what is held out.")] = 0
    keep_states: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            show_default=False,
            help="Keep router inputs of the base model here, for the next search or merge.",
        ),
    ] = None
    ray: Annotated[str | None, ray_option("Try recipes in processes of a Ray cluster")] = None
    workers: Workers = None


@dataclass(frozen=True)
class TextOptions:
    """Options for how much text is read, and how models are run."""

    heading: ClassVar[str] = "Measuring"

    test: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=PATH", show_default=False, help="Text that is held out, in place of text in --data."
        ),
    ] = field(default_factory=list)
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens that are read of each NAME, and held out of it.")
    ] = 8192
    window: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens that a model sees at a time.")] = 512
    chat_roles: ChatRoles = ROLES_OF_CHATS
    device: Device = "auto"
    compute_dtype: ComputeIn = "auto"


Recipe = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", show_default=False, help="A merge config in which values may be choices or ranges."
    ),
]
Data = Annotated[
    list[str],
    typer.Option(
        metavar="NAME=PATH",
        show_default=False,
        help="Text or chats to search by, as for `eval`; every second document is held out. NAME is an expert's, or "
        "any other.",
    ),
]
Output = Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The config to write; - prints it.")]


@grouped
def search_recipes(
    recipe: Recipe,
    *,
    data: Data,
    output: Output = "best.yaml",
    overwrite: Overwrite = False,
    searching: SearchOptions,
    measuring: TextOptions,
    cache_dir: CacheDir = None,
    messages: ResultOptions,
) -> None:
    """Find the best of many merges by their losses.

    Tries them without writing a model, writes the config of the best, and says how it does on text that was held out.

    Examples:
        moemerge search recipe.yaml --data code=code.txt --data math=math.txt
        moemerge search recipe.yaml --data code=code.txt --cost active --trials 40
    """
    quiet = messages.quiet
    with console_session(quiet=quiet, verbose=0, debug=messages.debug, cache_dir=cache_dir) as console:
        _check_output(recipe, output, overwrite=overwrite)
        return_freed_memory()
        found = _search(
            console, recipe, by_name(data), by_name(measuring.test, "--test"), _settings(searching, measuring), quiet
        )
        text = _write(found, output)
        if messages.json:
            print_json(_facts(found, text))
            return
        from moemerge.cli.search_report import print_search

        print_search(stdout(), found)
        if output == STDOUT:
            say(text.removesuffix("\n"))
        elif not quiet:
            console.print(f"{output}: written. Next:\n  moemerge {output} merged/")


def _check_output(recipe: Path, output: str, *, overwrite: bool) -> None:
    if output != STDOUT and Path(output).resolve() == recipe.resolve():
        raise RefusedError(f"{output}: is the recipe. Name another file with -o.")
    check_file(output, overwrite=overwrite)


def _settings(searching: SearchOptions, measuring: TextOptions) -> "SearchSettings":
    check_processes(searching.ray, searching.workers, measuring.device)
    from moemerge.checkpoint.disk import cache_folder
    from moemerge.searching.settings import SearchSettings

    return SearchSettings(
        trials=searching.trials,
        seed=searching.seed,
        objective=searching.objective,
        cost=searching.cost,
        tokens=measuring.max_tokens,
        window=measuring.window,
        roles=named_roles(measuring.chat_roles),
        device=measuring.device,
        compute_dtype=measuring.compute_dtype,
        kept_states=searching.keep_states,
        kept_losses=cache_folder("losses"),
        ray=searching.ray,
        workers=searching.workers,
    )


def _search(  # noqa: PLR0917
    console: Console,
    recipe: Path,
    data: dict[str, list[str]],
    test: dict[str, list[str]],
    settings: "SearchSettings",
    quiet: bool,
) -> "SearchResult":
    """Search, and show how far that is."""
    from moemerge.cli.progress import show_work
    from moemerge.searching.searcher import search

    try:
        with show_work(console, quiet=quiet) as progress:
            return search(
                recipe,
                data,
                settings,
                test=test,
                progress=stoppable(progress),
                announce=announcer(console, quiet=quiet),
            )
    except KeyboardInterrupt as error:
        folder = settings.kept_states
        kept = f"router inputs are in {folder}" if folder else "--keep-states FOLDER would keep router inputs"
        raise KeyboardInterrupt(f"no config is written; {kept} for the next search") from error


def _write(found: "SearchResult", output: str) -> str:
    """Write the chosen config; returns its text.

    Raises:
        OutputError: the file cannot be written.
    """
    from moemerge.searching.chosen_config import chosen_text

    text = chosen_text(found, Path.cwd() if output == STDOUT else Path(output).parent)
    if output != STDOUT:
        try:
            Path(output).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{output}: cannot be written: {error.strerror}.") from error
    return text


def _facts(found: "SearchResult", text: str) -> dict[str, Any]:
    """Give what `--json` prints: all of the result, with the chosen config as YAML."""
    facts = {key: getattr(found, key) for key in ("recipe", "objective", "cost", "seed", "dtype", "dense")}
    trials = [asdict(trial) for trial in found.trials]
    held_out = asdict(found.held_out)
    return {
        **facts,
        "trials": trials,
        "chosen": found.chosen,
        "front": found.front,
        "held_out": held_out,
        "config": text,
    }

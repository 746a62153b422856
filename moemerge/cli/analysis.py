"""`moemerge analyze`: a closer look into a mixture, or two side by side."""

from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from moemerge.cli.console import announcer, console_session, return_freed_memory, stdout, stoppable
from moemerge.cli.evaluation import by_name
from moemerge.cli.grouping import grouped
from moemerge.cli.options import (
    ROLES_OF_CHATS,
    CacheDir,
    ChatRoles,
    ComputeIn,
    Devices,
    Ray,
    ResultOptions,
    Workers,
    check_processes,
    named_roles,
)
from moemerge.cli.streams import say
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from rich.console import Console

    from moemerge.analysis.analyzer import AnalysisRequest, Opened
    from moemerge.analysis.figures import Analysis


@dataclass(frozen=True)
class ComparingOptions:
    """Options for what stands beside the mixture."""

    heading: ClassVar[str] = "Comparing"

    beside: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE", help="A dense model to compare the experts with, such as the base.", show_default=False
        ),
    ] = None
    compare: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="A second mixture, analysed likewise, side by side.", show_default=False),
    ] = None


@dataclass(frozen=True)
class RunningOptions:
    """Options for the text that the mixture is run over."""

    heading: ClassVar[str] = "Text"

    data: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=PATH",
            help="Text or chats to run the mixture over, as eval takes them; without any, only weights are analysed.",
            show_default=False,
        ),
    ] = field(default_factory=list)
    generate: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Tokens to generate after the beginning of some documents, to see what the router chooses then; the "
            "whole model has to fit into memory.",
        ),
    ] = 0
    max_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens that are read of each NAME.")] = 8192
    window: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens that a model sees at a time.")] = 512
    chat_roles: ChatRoles = ROLES_OF_CHATS
    device: Devices = "auto"
    compute_dtype: ComputeIn = "auto"
    ray: Ray = None
    workers: Workers = None


@dataclass(frozen=True)
class WritingOptions:
    """Options for files that are written."""

    heading: ClassVar[str] = "Files"

    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with all figures of every layer.", show_default=False),
    ] = None
    plots: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Draw the main figures into it, as PNG and SVG.", show_default=False),
    ] = None
    load: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write MODEL's load of experts for serving tools: a .json file for SGLang, .npy for EPLB.",
            show_default=False,
        ),
    ] = None


@grouped
def analyze_model(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A mixture's folder, or one on the Hub.", show_default=False)
    ],
    *,
    comparing: ComparingOptions,
    running: RunningOptions,
    writing: WritingOptions,
    cache_dir: CacheDir = None,
    messages: ResultOptions,
) -> None:
    """Look into a mixture: are its experts different, what does the router choose by, and which are wasted?

    From weights alone, it says how alike experts are in each layer. With text, it also says how alike their outputs
    are, how the router chooses, and which experts, layers and choices could be spared.

    Examples:
        moemerge analyze out
        moemerge analyze out --data code=code.txt --html analysis.html
        moemerge analyze before --compare after --data code=code.txt
    """
    with console_session(quiet=messages.quiet, verbose=0, debug=messages.debug, cache_dir=cache_dir) as console:
        _check(running, writing)
        return_freed_memory()
        opened = _open(console, [model, *filter(None, [comparing.compare])], comparing.beside, running, messages)
        found = _analyze(console, opened, quiet=messages.quiet)
        _print(found, as_json=messages.json)
        # Last: what took minutes is not lost with a file.
        written = _write(found, writing, opened[0])
        for line in () if messages.quiet else (*(f"{path}: written" for path in written), *_notes(found)):
            console.print(line)


def _check(running: RunningOptions, writing: WritingOptions) -> None:
    """Refuse options that do not fit each other, and files that could not be written, before anything slow.

    Raises:
        RefusedError: says what is expected.
    """
    if not running.data and (given := [*_given(running), *(["--load"] if writing.load else [])]):
        raise RefusedError(f"{given[0]}: needs text to run the mixture over. Give --data NAME=PATH.")
    by_name(running.data)
    named_roles(running.chat_roles)
    check_processes(running.ray, running.workers, running.device)
    if writing.load:
        from moemerge.analysis.load_files import check_load

        check_load(writing.load)
    if writing.html:
        from moemerge.analysis.page import PAGE

        PAGE.check(writing.html)
    if writing.plots:
        from moemerge.analysis.plots import check_plots

        check_plots(writing.plots)


def _given(options: RunningOptions) -> list[str]:
    """Options that are given, and say something else than they do by default."""
    other, default = asdict(options), asdict(RunningOptions())
    return [f"--{name.replace('_', '-')}" for name, value in other.items() if value != default[name]]


def _open(
    console: "Console", models: list[str], beside: str | None, running: RunningOptions, messages: ResultOptions
) -> "list[Opened]":
    """Open all models, and read the text, before the first is analysed."""
    from moemerge.analysis.analyzer import open_for_analysis

    return open_for_analysis(models, _request(beside, running), announcer(console, quiet=messages.quiet))


def _request(beside: str | None, running: RunningOptions) -> "AnalysisRequest":
    from moemerge.analysis.analyzer import AnalysisRequest
    from moemerge.evaluation.evaluator import read_domains
    from moemerge.evaluation.settings import EvaluationSettings

    settings = EvaluationSettings(
        tokens=running.max_tokens,
        window=running.window,
        roles=named_roles(running.chat_roles),
        device=running.device,
        compute_dtype=running.compute_dtype,
        ray=running.ray,
        workers=running.workers,
    )
    return AnalysisRequest(read_domains(by_name(running.data)), settings, beside, running.generate)


def _analyze(console: "Console", opened: "list[Opened]", *, quiet: bool) -> "list[Analysis]":
    """Analyse the models, and show how far that is."""
    from moemerge.analysis.analyzer import analyze
    from moemerge.cli.progress import show_work

    with show_work(console, quiet=quiet) as progress:
        return [analyze(one, stoppable(progress)) for one in opened]


def _write(found: "list[Analysis]", writing: WritingOptions, first: "Opened") -> list[Path]:
    """Write the files that are asked for, and name them."""
    if writing.html:
        from moemerge.analysis.page import write_page

        write_page(writing.html, found)
    if writing.plots:
        from moemerge.analysis.plots import write_plots

        write_plots(writing.plots, found)
    if writing.load and first.text and found[0].text:
        from moemerge.analysis.load_files import write_load

        write_load(writing.load, found[0].text, first.text[0].runnable.layers)
    return [path for path in (writing.html, writing.plots, writing.load) if path]


def _notes(found: "list[Analysis]") -> list[str]:
    notes = [f"note: {note}" for analysis in found for note in analysis.notes]
    if find_spec("scipy") or any(analysis.weights.matched_neurons for analysis in found):
        return notes
    return [*notes, "note: neurons are not matched without scipy, which pip install 'moemerge[analysis]' brings"]


def _print(found: "list[Analysis]", *, as_json: bool) -> None:
    if as_json:
        from moemerge.analysis.facts import analysis_facts, difference_facts, json_text

        facts = analysis_facts(found[0])
        for other in found[1:]:
            facts |= {"compared_with": analysis_facts(other), "differences": difference_facts(found[0], other)}
        say(json_text(facts))
        return
    from moemerge.cli.analysis_report import print_analysis, print_differences

    for number, analysis in enumerate(found):
        print_analysis(stdout(), analysis, begins=number == 0)
    for other in found[1:]:
        print_differences(stdout(), found[0], other)

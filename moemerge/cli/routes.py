"""`moemerge routes`: a text coloured by the experts that take its tokens, in the terminal or as a page."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Final

import typer
from rich.console import Console
from rich.text import Text

from moemerge.chats import Document
from moemerge.cli.colours import has_colours, legend
from moemerge.cli.console import console_session, print_json, stdout, stoppable
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
    check_text,
    named_roles,
)
from moemerge.cli.standard_input import path_of
from moemerge.errors import RefusedError
from moemerge.evaluation.routes.palette import style_of
from moemerge.printable import printable
from moemerge.progress import Task
from moemerge.sources.data_sets import SCHEME
from moemerge.texts.documents import TextSource, find_files, read_documents

if TYPE_CHECKING:
    from moemerge.evaluation.routes.traced import Routes, TracedText

# Of files; a page of as many long ones is some ten megabytes.
_MOST_DOCUMENTS: Final = 50


@dataclass(frozen=True)
class TextOptions:
    """Options for the texts to route."""

    heading: ClassVar[str] = "Texts"

    text: Annotated[list[str], typer.Option(metavar="TEXT", help="A text to route.", show_default=False)] = field(
        default_factory=list
    )
    file: Annotated[
        list[str],
        typer.Option(
            metavar="PATH",
            help="A file, folder or pattern of documents to route, split as those of --data, Hub data, or - for "
            "standard input; a file with any other ending is one document.",
            show_default=False,
        ),
    ] = field(default_factory=list)


@dataclass(frozen=True)
class TracingOptions:
    """Options for what of the texts is read, and on which device."""

    heading: ClassVar[str] = "Running"

    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens that are read of each text.")] = 2000
    chat_roles: ChatRoles = ROLES_OF_CHATS
    device: Devices = "auto"
    compute_dtype: ComputeIn = "auto"
    ray: Ray = None
    workers: Workers = None


@grouped
def show_routes(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder.", show_default=False)],
    *,
    given: TextOptions,
    layer: Annotated[
        int | None,
        typer.Option(metavar="N", help="Show this layer's choices, not the majority of all.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with every layer's choices.", show_default=False)
    ] = None,
    tracing: TracingOptions,
    cache_dir: CacheDir = None,
    messages: ResultOptions,
) -> None:
    """Show which expert of a merged model takes which token.

    Examples:
        moemerge routes out --text "def main(): return 2 + 2"
        moemerge routes out --file texts --html routes.html
    """
    quiet = messages.quiet
    with console_session(quiet=quiet, verbose=0, debug=messages.debug, cache_dir=cache_dir) as console:
        check_processes(tracing.ray, tracing.workers, tracing.device)
        texts = _read_texts(console, given)
        if html:
            from moemerge.evaluation.routes.page import PAGE

            PAGE.check(html)
        routes = _trace(console, out, texts, layer, tracing, quiet=quiet)
        if html:
            from moemerge.evaluation.routes.page import write_page

            write_page(html, routes)
            console.print(f"{html}: written")
        if messages.json:
            print_json(_facts(routes))
        elif not html:
            print_routes(stdout(), routes, layer)


def _trace(
    console: Console,
    out: Path,
    texts: dict[str, Document],
    layer: int | None,
    tracing: TracingOptions,
    *,
    quiet: bool,
) -> "Routes":
    """Run the model over the texts, and show how far that is."""
    from moemerge.cli.progress import show_work
    from moemerge.evaluation.routes.tracer import trace_routes
    from moemerge.evaluation.settings import TraceSettings

    settings = TraceSettings(
        tracing.max_tokens,
        layer,
        named_roles(tracing.chat_roles),
        tracing.device,
        tracing.compute_dtype,
        tracing.ray,
        tracing.workers,
    )
    with show_work(console, quiet=quiet) as progress:
        report = partial(stoppable(progress), Task("routes", in_parts=tracing.ray is not None))
        return trace_routes(out, texts, settings, progress=report)


def _read_texts(console: Console, given: TextOptions) -> dict[str, Document]:
    """Read the texts of the command line and of its files, by name; warns of documents that are too many.

    Raises:
        RefusedError: there is no text, it is no UTF-8, or there is no such file.
    """
    texts: dict[str, Document] = {f"text {number}": text for number, text in enumerate(given.text, 1)}
    for name, text in zip(texts, given.text, strict=True):
        check_text(f"--text: {name}", text)
    documents = list(_documents(given.file))
    for name, document in documents[:_MOST_DOCUMENTS]:
        texts[name if name not in texts else f"{name} (file)"] = document
    if not texts:
        raise RefusedError("nothing to route: give --text or --file.")
    if len(documents) > _MOST_DOCUMENTS:
        left = f"of {len(documents)} documents, the first {_MOST_DOCUMENTS} are read"
        console.print(f"warning: {left}", style="yellow")
    return texts


def _documents(given: Sequence[str]) -> Iterator[tuple[str, Document]]:
    """Read the documents of files, folders and patterns, each with its file's name, numbered if the file holds several.

    Raises:
        RefusedError: there is no such file, or no text in it.
    """
    files = list(dict.fromkeys(file for path in given for file in _files(path_of(path))))
    names = [file.name for file in files]
    for file in files:
        name = file.name if names.count(file.name) == 1 else str(file)
        try:
            documents = read_documents([file])
        except RefusedError as error:
            raise RefusedError(f"--file: {error}") from error
        if not documents:
            raise RefusedError(f"--file: {file}: holds no text.")
        for number, document in enumerate(documents, 1):
            yield f"{name}:{number}" if len(documents) > 1 else name, document


def _files(path: str) -> list[TextSource]:
    is_pattern = path.startswith(SCHEME) or (any(sign in path for sign in "*?[") and not os.path.lexists(path))
    # Neither raises where a text was given in place of a path.
    return find_files([path], "--file") if is_pattern or os.path.isdir(path) else [Path(path)]  # noqa: PTH112


def print_routes(console: Console, routes: "Routes", layer: int | None) -> None:
    """Print texts with each token in its expert's colour; without colours, the expert's name precedes its tokens."""
    index = None if layer is None else routes.layers.index(layer)
    where = f"averaged over {len(routes.layers)} layers" if layer is None else f"in layer {layer}"
    most = "the largest weight summed over layers" if layer is None else "the largest weight"
    console.print(f"Percentages: tokens that choose the expert first, {where}. Tokens: the expert with {most}.")
    for text in routes.texts:
        experts = routes.majority(text) if index is None else text.experts[index, :, 0]
        shares = routes.shares(text, index)
        line = Text(printable(f"{text.name}: "))
        for entry in legend(routes.experts, shares):
            line.append_text(entry).append("  ")
        console.print(line)
        console.print(_coloured(text, experts.tolist(), routes.experts, named=not has_colours(console)), "")


def _coloured(text: "TracedText", experts: list[int], names: tuple[str, ...], *, named: bool) -> Text:
    line, last = Text(), None
    for token, expert in zip(text.tokens, experts, strict=True):
        if named and expert != last:
            line.append(printable(f"[{names[expert]}]"))
        line.append(printable(token), style_of(expert))
        last = expert
    return line


def _facts(routes: "Routes") -> dict[str, object]:
    return {
        "model": routes.model,
        "experts": routes.experts,
        "layers": routes.layers,
        "load": routes.load().tolist(),
        "texts": [
            {
                "name": text.name,
                "tokens": text.tokens,
                "shares": routes.shares(text).tolist(),
                "experts": text.experts.tolist(),
                "weights": text.weights.tolist(),
            }
            for text in routes.texts
        ],
    }

"""`moemerge routes`: a text coloured by the experts that take its tokens, in the terminal or as a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from moemerge.cli.console import print_json, speaking, stdout, stoppable
from moemerge.cli.options import Debug, Device, Json, Quiet
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from moemerge.routes.traced import Routes, TracedText

_COLOURS: Final = ("cyan", "yellow", "magenta", "green", "blue", "red", "bright_cyan", "bright_yellow")


def show_routes(  # noqa: PLR0917  typer makes options of arguments
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder.", show_default=False)],
    text: Annotated[list[str], typer.Option(help="A text to route.", show_default=False)] = [],  # noqa: B006
    file: Annotated[list[Path], typer.Option(help="A text file to route.", show_default=False)] = [],  # noqa: B006
    layer: Annotated[
        int | None, typer.Option(help="Show this layer's choices, not the majority of all.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with every layer's choices.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are read of each text.")] = 2000,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show which expert of a merged model takes which token."""
    with speaking(quiet=quiet, verbose=0, debug=debug) as console:
        texts = {f"text {number}": given for number, given in enumerate(text, 1)}
        names = [path.name for path in file]
        texts |= {path.name if names.count(path.name) == 1 else str(path): _read(path) for path in file}
        if not texts:
            raise RefusedError("nothing to route: give --text or --file.")
        if html and (html.is_dir() or not html.resolve().parent.is_dir()):
            raise RefusedError(f"--html: {html}: {'is a folder' if html.is_dir() else 'there is no such folder'}.")
        from moemerge.cli.progress import show_layers
        from moemerge.evaluation.tracing import trace

        with show_layers(console, quiet=quiet) as progress:
            report = stoppable(progress)
            routes = trace(
                out, texts, tokens=max_tokens, layer=layer, device=device,
                progress=lambda done, of: report("routes", done, of),
            )  # fmt: skip
        if html:
            from moemerge.routes.page import write_page

            write_page(html, routes)
            console.print(f"{html}: written")
        if json:
            print_json(_facts(routes))
        elif not (html and quiet):
            print_routes(stdout(), routes, layer)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RefusedError(f"--file: {path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RefusedError(f"--file: {path}: is not text in UTF-8.") from error


def print_routes(console: Console, routes: "Routes", layer: int | None) -> None:
    """Texts with each token in its expert's colour; where there are no colours, the expert's name before its tokens."""
    index = None if layer is None else routes.layers.index(layer)
    where = f"all {len(routes.layers)} layers" if layer is None else f"layer {layer}"
    for text in routes.texts:
        experts = routes.majority(text) if index is None else text.experts[index, :, 0]
        shares = routes.shares(text, index)
        legend = Text(f"{text.name}, {where}: ")
        for expert, name in enumerate(routes.experts):
            legend.append(f"{name} {shares[expert]:.1%}", _style(expert)).append("  ")
        console.print(legend)
        console.print(_coloured(text, experts.tolist(), routes.experts, named=not console.color_system), "")


def _coloured(text: "TracedText", experts: list[int], names: tuple[str, ...], *, named: bool) -> Text:
    line, last = Text(), None
    for token, expert in zip(text.tokens, experts, strict=True):
        if named and expert != last:
            line.append(f"[{names[expert]}]")
        line.append(token, _style(expert))
        last = expert
    return line


def _style(expert: int) -> str:
    return f"{_COLOURS[expert % len(_COLOURS)]}{' underline' if expert >= len(_COLOURS) else ''}"


def _facts(routes: "Routes") -> dict[str, object]:
    return {
        "model": routes.model, "experts": routes.experts, "layers": routes.layers,
        "load": routes.load().tolist(),
        "texts": [
            {
                "name": text.name, "tokens": text.tokens, "shares": routes.shares(text).tolist(),
                "experts": text.experts.tolist(), "weights": text.weights.tolist(),
            }
            for text in routes.texts
        ],
    }  # fmt: skip

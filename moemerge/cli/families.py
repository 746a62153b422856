"""`moemerge families`: the table of output families, as text, JSON or Markdown."""

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from moemerge.cli.console import console_session, print_json, stdout
from moemerge.cli.options import MESSAGES, CacheDir, Debug, Json
from moemerge.cli.streams import say
from moemerge.cli.tables import Table
from moemerge.engines import ENGINES, Engine
from moemerge.errors import RefusedError
from moemerge.file_kinds import Kind, what_is

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from moemerge.families.known_models import Becomes
    from moemerge.families.overview import FamilyRow

_SHORT: Final = {"right": "yes", "wrong": "no", "fails": "no", "not written": "no", "not tried": ""}
_LETTERS: Final[dict[Engine, str]] = {
    "transformers": "T",
    "vllm": "V",
    "llamacpp": "L",
    "converter": "C",
    "mlx": "M",
    "openvino": "O",
}
_BECOMES: Final = ("you have", "you get", "with a shared expert", "with experts in the upper layers alone")
_HEADINGS: Final = ("family", "dense models", "they may have", "shared experts", "dense layers", "router")


def list_families(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Only those for this model type, model folder or Hub repository; or one family.",
            show_default=False,
        ),
    ] = None,
    cache_dir: CacheDir = None,
    json: Json = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown.", rich_help_panel=MESSAGES)
    ] = False,
    debug: Debug = False,
) -> None:
    """List which dense models become which mixture.

    Each output family is listed with the engines that compute it rightly, and the dense models that it repeats
    exactly; with NAME, also what it can hold, and what engines get wrong.

    Examples:
        moemerge families
        moemerge families qwen3
        moemerge families user/name
    """
    with console_session(quiet=False, verbose=0, debug=debug, cache_dir=cache_dir) as console:
        from dataclasses import asdict

        from moemerge.families.overview import family_rows

        rows, kind = _chosen(family_rows(), name, console.print) if name else (family_rows(), "")
        if json:
            print_json([asdict(row) for row in rows])
        elif markdown:
            say(models_as_markdown())
            say("")
            say(as_markdown(rows))
        elif name:
            print_families(stdout(), rows, kind)
        else:
            print_overview(stdout(), rows)


def _chosen(rows: "list[FamilyRow]", name: str, announce: "Callable[[str], None]") -> "tuple[list[FamilyRow], str]":
    """Choose the rows of a family, or of those that take a model type or a model; returns them and that type.

    Raises:
        RefusedError: no family is of that name, or takes such a model.
        SourceError: the model cannot be read.
    """
    from moemerge.families.multimodal import MULTIMODAL, dense_types
    from moemerge.families.overview import read_as

    known = {row.family for row in rows} | {model_type for row in rows for model_type in row.takes} | {*MULTIMODAL}
    kind = model_type = name.lower()
    if model_type not in known and ("/" in name or what_is(Path(name)) is not Kind.ABSENT):
        from moemerge.families.dense import read_dense
        from moemerge.sources.model_folder import open_model

        opened = open_model(name, announce)
        kind, config = opened.stored_type, opened.config
        read = read_dense(config)
        model_type = str(config.get("model_type")) if isinstance(read, str) else read.family.model_type
        if isinstance(read, str) and model_type not in {row.family for row in rows}:
            raise RefusedError(f"{name}: {read}")
    plain = {renamed.lower(): kind for kind, others in read_as().items() for renamed in others}
    types = {model_type, *dense_types(plain.get(model_type, model_type))}
    found = [row for row in rows if not {row.family, *row.takes}.isdisjoint(types)]
    if found:
        return found, kind
    from moemerge.families.dense.tables import NOT_MERGED

    if model_type in NOT_MERGED:
        raise RefusedError(
            f"{name}: no output family repeats models of the type {model_type!r}: {NOT_MERGED[model_type]}."
        )
    near = get_close_matches(model_type[:60], known, n=1)
    hint = f"Did you mean {near[0]}?" if near else "`moemerge families` lists all."
    raise RefusedError(f"{name}: no output family repeats models of the type {model_type!r}. {hint}")


def models_as_markdown() -> str:
    """Format the table of what well-known models become, with its legend, for docs/families.md."""
    from moemerge.families.engines import readings
    from moemerge.families.known_models import known_models

    def cell(becomes: "Becomes") -> str:
        right, untried = (
            " ".join(_LETTERS[engine] for engine in engines) for engines in (becomes.right_in, becomes.untried)
        )
        letters = " ".join(filter(None, [right, untried and f"({untried})"]))
        return f"`{becomes.family}` {letters or '-'}" if becomes.family else "none"

    table = [_BECOMES, tuple("---" for _ in _BECOMES)]
    table += [(row.name, cell(row.plain), cell(row.shared), cell(row.upper)) for row in known_models()]
    legend = []
    for engine, letter in _LETTERS.items():
        reading = next(iter(readings()[engine].values()))
        legend.append(f"- {letter}: {ENGINES[engine]} ({reading.version}), {reading.dates}")
    return "\n".join([*map(_line, table), "", *legend])


def as_markdown(rows: "list[FamilyRow]") -> str:
    """Format the tables of families, of engines and of what is refused, with their notes, for docs/families.md."""
    from moemerge.families.overview import not_merged

    table = [_HEADINGS, tuple("---" for _ in _HEADINGS), *(_cells(row, code="`") for row in rows)]
    versions = dict.fromkeys(f"{cell.engine} ({cell.version})" for row in rows for cell in row.engines)
    engines = [("family", *versions), tuple("---" for _ in range(len(versions) + 1))]
    engines += [(f"`{row.family}`", *(cell.short for cell in row.engines)) for row in rows]
    notes = [f"- `{row.family}`: {note}" for row in rows for note in row.notes]
    refused = [("no family repeats", "since"), ("---", "---")]
    refused += [(", ".join(f"`{name}`" for name in names), reason) for reason, names in not_merged().items()]
    return "\n".join([*map(_line, table), "", *map(_line, engines), "", *notes, "", *map(_line, refused)])


def _line(cells: "Sequence[str]") -> str:
    return f"| {' | '.join(cells)} |"


def print_overview(console: "Console", rows: "list[FamilyRow]") -> None:
    """Print one line for each family: whether engines compute it rightly, and its dense models."""
    from moemerge.families.multimodal import MULTIMODAL
    from moemerge.families.overview import read_as

    console.print(_overview(rows))
    others = "; ".join(f"{', '.join(renamed)} as {plain}" for plain, renamed in read_as().items())
    console.print(
        "\nyes: the engine computed every mixture that was measured as transformers 5 does; most: all but those with "
        "facts that `moemerge families NAME` lists; converter: llama.cpp's own, in place of `moemerge gguf`.\n"
        f"Models of other types are read as these: {others}.\n"
        f"Text models are also read inside multimodal ones: {', '.join(MULTIMODAL)}."
    )


def _overview(rows: "list[FamilyRow]") -> Table:
    engines = dict.fromkeys(cell.engine for row in rows for cell in row.engines)
    table = Table("family", *(engine.removeprefix("llama.cpp's ") for engine in engines), "dense models")
    for row in rows:
        found = {cell.engine: _SHORT.get(cell.short, "most") for cell in row.engines}
        table.add_row(row.family, *(found.get(engine, "") for engine in engines), ", ".join(row.takes))
    return table


def print_families(console: "Console", rows: "list[FamilyRow]", kind: str) -> None:
    """Print the table of some families in short, then a section for each: its facts, and what each engine gets wrong.

    Args:
        console: where to print.
        rows: the families.
        kind: the type of models that they were asked for by.
    """
    from moemerge.families.multimodal import VISION_MIXTURES

    console.print(_overview(rows))
    if vision := VISION_MIXTURES.get(kind):
        console.print(
            f"\nThe text model inside a {kind} becomes a mixture; with `keep_vision: true` its towers are kept, "
            f"in a {vision.model_type}."
        )
    for row in rows:
        console.print(f"\n{row.family}", style="bold")
        for heading, cell in zip(_HEADINGS[1:], _cells(row)[1:], strict=True):
            console.print(f"  {heading}: {cell}")
        for note in row.notes:
            console.print(f"  note: {note}")
        console.print("  engines:")
        for engine in row.engines:
            found = "" if engine.troubles else f" {engine.short}"
            console.print(f"    {engine.engine} ({engine.version}):{found}", markup=False)
            untried = [f"was not tried with {', '.join(engine.untried)}"] if engine.untried else []
            for line in (*engine.troubles, *untried):
                console.print(f"      - {line}", markup=False)


def _cells(row: "FamilyRow", code: str = "") -> tuple[str, ...]:
    takes = ", ".join(f"{code}{model_type}{code}" for model_type in row.takes)
    holds = ", ".join(row.holds) or "nothing more"
    return (f"{code}{row.family}{code}", takes, holds, row.shared, row.dense_layers, row.scoring)

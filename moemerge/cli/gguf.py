"""`moemerge gguf`: a merged model as one GGUF file."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Final

import typer
from rich.console import Console

from moemerge.cli.console import console_session, return_freed_memory, stoppable
from moemerge.cli.gguf_output import WRITTEN_HERE, quantise_into
from moemerge.cli.grouping import grouped
from moemerge.cli.imatrix import ImatrixMaker, ImatrixOptions
from moemerge.cli.options import CacheDir, GgufType, LlamaCpp, MessageOptions
from moemerge.cli.streams import say
from moemerge.errors import RefusedError
from moemerge.file_kinds import Kind, what_is
from moemerge.progress import Task

if TYPE_CHECKING:
    from moemerge.export.writing import GgufOptions, SpaceCheck

MODELFILE: Final = "Modelfile"

Ollama = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Write a Modelfile beside FILE, and create NAME in Ollama.", show_default=False),
]


@dataclass(frozen=True)
class FileOptions:
    """Options for how the file is written."""

    heading: ClassVar[str] = "Output"

    type: GgufType = "auto"
    llama_cpp: LlamaCpp = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a GGUF file of that name.")] = False
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Use one thread and small chunks, and leave nothing in the page cache.")
    ] = False


@grouped
def write_file(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder.", show_default=False)],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, NAME.gguf.", show_default=False)],
    *,
    writing: FileOptions,
    matrix: ImatrixOptions,
    ollama: Ollama = None,
    cache_dir: CacheDir = None,
    messages: MessageOptions,
) -> None:
    """Write a merged model as one GGUF file, for llama.cpp.

    The file is as llama.cpp's converter writes it, for all programs built on it.

    Examples:
        moemerge gguf out out.gguf
        moemerge gguf out out.gguf --type q4_k_m --imatrix --ollama my-mixture
    """
    quiet, kind, overwrite = messages.quiet, writing.type, writing.overwrite
    with console_session(
        quiet=quiet, verbose=0, debug=messages.debug, cache_dir=cache_dir, keeps_output=True
    ) as console:
        _check_merged(out, file)
        importance = ImatrixMaker(console, out, matrix, quiet).check(kind, overwrite=overwrite)
        _check_names(out, file, ollama, overwrite=overwrite)
        from moemerge.export.writing import GgufOptions

        return_freed_memory()
        write = partial(_write, console, out, quiet=quiet)
        if kind in WRITTEN_HERE:
            write(file, GgufOptions(**vars(writing)))
        else:
            floats_options = GgufOptions(low_memory=writing.low_memory, llama_cpp=writing.llama_cpp)
            quantise_into(
                console,
                file,
                kind,
                lambda floats, room: write(floats, floats_options, room),
                importance,
                quiet=quiet,
                overwrite=overwrite,
            )
        if not quiet:
            say(f"{file}: done")
        if ollama is not None:
            _describe_to_ollama(console, out, file, ollama, quiet=quiet)


def _check_merged(out: Path, file: Path) -> None:
    if what_is(out) is Kind.CONFIG:
        raise RefusedError(f"{out}: is a config, not a model. Merge it with `moemerge {out} {file}`.")


def _check_names(out: Path, file: Path, ollama: str | None, *, overwrite: bool) -> None:
    """Refuse names of what will be written, before minutes of work."""
    from moemerge.export.ollama import check_modelfile, check_name
    from moemerge.export.writing import check_file, sources_of

    if ollama is not None:
        check_name(ollama)
        check_modelfile(file.with_name(MODELFILE), overwrite=overwrite)
    check_file(file, overwrite=overwrite, sources=sources_of(out))


def _write(
    console: Console, out: Path, file: Path, options: "GgufOptions", room: "SpaceCheck | None" = None, *, quiet: bool
) -> None:
    """Write a file in a type that is written here, and show how far it is."""
    from moemerge.cli.progress import show_progress
    from moemerge.export.writing import check_room, write_gguf

    with show_progress(console, quiet=quiet) as progress:
        report = stoppable(progress)
        write_gguf(
            out,
            file,
            options,
            room=room or check_room,
            tell=lambda note: console.print(f"warning: {note}", style="yellow"),
            progress=lambda done, total: report(Task("weights"), done, total),
        )


def _describe_to_ollama(console: Console, out: Path, file: Path, name: str, *, quiet: bool) -> None:
    from moemerge.export.ollama import create, write_modelfile

    written = write_modelfile(out, file, file.with_name(MODELFILE))
    for note in () if quiet else written.notes:
        console.print(f"note: {note}", style="yellow")
    following = create(name, written.path)
    if not quiet:
        say(f"next: {following}")

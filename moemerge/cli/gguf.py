"""`moemerge gguf`: a merged model as one GGUF file."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.console import return_freed_memory, speaking, stoppable
from moemerge.cli.options import Debug, GgufType, LlamaCpp, Quiet
from moemerge.cli.streams import say
from moemerge.errors import RefusedError


def is_gguf(out: Path) -> bool:
    """Whether a merge's output is one file, by its name."""
    return out.suffix == ".gguf" and not out.is_dir()


def check_options(to_file: bool, kind: str, llama_cpp: Path | None, folders_only: Mapping[str, bool]) -> None:
    """Refuse options of a merge that say nothing of such an output.

    Args:
        to_file: whether it is a GGUF file.
        kind: what `--type` asks for.
        llama_cpp: what `--llama-cpp` names.
        folders_only: of options that a GGUF file has no use of, whether they are given.

    Raises:
        RefusedError: one is given.
    """
    if to_file and (given := [name for name, value in folders_only.items() if value]):
        raise RefusedError(f"{given[0]}: a merge into a GGUF file has no use of it. Remove it, or name a folder.")
    if not to_file and (kind != "auto" or llama_cpp):
        name = "--llama-cpp" if kind == "auto" else "--type"
        raise RefusedError(f"{name}: is of GGUF files, and OUT is none. Name a file that ends in .gguf.")


def check_gguf(file: Path, inputs: Collection[Path], llama_cpp: Path | None, *, overwrite: bool) -> None:
    """Refuse a file that a merge could not write, before anything is downloaded.

    Raises:
        RefusedError: says why.
        OutputError: the system does not let it be written.
    """
    from moemerge.export.converter import check_checkout
    from moemerge.export.writing import check_file

    check_file(file, overwrite=overwrite, inputs=inputs)
    if llama_cpp is not None:
        check_checkout(llama_cpp)


def write_file(  # noqa: PLR0917  typer makes options of arguments
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder.", show_default=False)],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, NAME.gguf.", show_default=False)],
    type: GgufType = "auto",  # noqa: A002  the option's name
    llama_cpp: LlamaCpp = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a GGUF file of that name.")] = False,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="One thread, small chunks, nothing left in the page cache.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a merged model as one GGUF file, for llama.cpp and what is built on it: the bytes of its own converter."""
    with speaking(quiet=quiet, verbose=0, debug=debug) as console:
        from moemerge.cli.progress import show_progress
        from moemerge.export.writing import write_gguf

        return_freed_memory()
        with show_progress(console, quiet=quiet) as progress:
            report = stoppable(progress)
            write_gguf(
                out, file, type=type, overwrite=overwrite, low_memory=low_memory, llama_cpp=llama_cpp,
                tell=lambda note: console.print(f"warning: {note}", style="yellow"),
                progress=lambda done, total: report("weights", done, total),
            )  # fmt: skip
        if not quiet:
            say(f"{file}: done")

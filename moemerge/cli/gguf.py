"""`moemerge gguf`: a merged model as one GGUF file."""

from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.console import return_freed_memory, speaking, stoppable
from moemerge.cli.options import Debug, GgufType, LlamaCpp, Quiet
from moemerge.cli.streams import say


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
                progress=lambda done, total: report("weights", done, total),
            )  # fmt: skip
        if not quiet:
            say(f"{file}: done")

"""`moemerge gguf`: a merged model as one GGUF file."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from moemerge.cli.console import return_freed_memory, saying, speaking, stoppable
from moemerge.cli.options import Debug, Device, GgufType, LlamaCpp, Quiet
from moemerge.cli.streams import say
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from rich.console import Console

    from moemerge.export.imatrix import Importance
    from moemerge.export.model import AskedType

_MODELFILE: Final = "Modelfile"


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


def check_gguf(
    file: Path, kind: str, inputs: Collection[Path], llama_cpp: Path | None, *,
    overwrite: bool, calibrated: bool = False,
) -> None:  # fmt: skip
    """Refuse a file that could not be written, before anything is downloaded or read.

    `calibrated` says whether there will be an importance matrix.

    Raises:
        RefusedError: says why.
        OutputError: the system does not let it be written.
    """
    from moemerge.export.converter import check_checkout
    from moemerge.export.writing import check_file

    check_file(file, overwrite=overwrite, inputs=inputs)
    _check_kind(kind, calibrated=calibrated)
    if llama_cpp is not None:
        check_checkout(llama_cpp)


def _check_kind(kind: str, *, calibrated: bool) -> None:
    from moemerge.export.imatrix import Importance
    from moemerge.export.model import ASKED_TYPES
    from moemerge.export.quantising import FILE_TYPES, check_type

    if kind not in ASKED_TYPES and kind not in FILE_TYPES:
        raise RefusedError(f"--type {kind}: is none of {', '.join(ASKED_TYPES | FILE_TYPES)}.")
    if kind not in ASKED_TYPES:
        check_type(kind, Importance({}) if calibrated else None)
    elif calibrated:
        raise RefusedError(f"--imatrix: says nothing of {kind}. Remove it, or choose a type such as q4_k_m.")


@contextmanager
def quantised(
    console: "Console", file: Path, kind: str, *, quiet: bool,
    importance: "Callable[[Path], Importance | None]" = lambda _: None,
) -> Iterator[tuple[Path, "AskedType"]]:  # fmt: skip
    """Where to write a GGUF file first and of what type; llama.cpp then makes it smaller, if `kind` asks for that.

    Args:
        console: for notes.
        file: what there is at the end.
        kind: what its matrices are stored as.
        quiet: whether notes are left out.
        importance: the importance matrix of what was written first.
    """
    from moemerge.checkpoint.staging import staged
    from moemerge.export.model import ASKED_TYPES
    from moemerge.export.quantising import quantise

    if kind in ASKED_TYPES:
        yield file, ASKED_TYPES[kind]
        return
    tell = saying(console, quiet=quiet)
    with staged(file, temporary=True) as stage:
        floats = stage / file.name
        yield floats, "auto"
        matrix = importance(floats)
        tell(f"{kind}: made by llama.cpp")
        report = quantise(floats, file, kind, importance=matrix)
    for note in report.notes:
        tell(f"note: {note}")


def write_file(  # noqa: PLR0917  typer makes options of arguments
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder.", show_default=False)],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, NAME.gguf.", show_default=False)],
    type: GgufType = "auto",  # noqa: A002  the option's name
    imatrix: Annotated[
        bool, typer.Option("--imatrix", help="Weigh columns by what the routers' own prompts and texts activate.")
    ] = False,
    imatrix_texts: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Files of text for --imatrix, instead of the routers'.", show_default=False),
    ] = None,
    imatrix_out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Keep the importance matrix, for llama.cpp.", show_default=False)
    ] = None,
    ollama: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Write a Modelfile too, and make it a model of Ollama's.", show_default=False
        ),
    ] = None,
    llama_cpp: LlamaCpp = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a GGUF file of that name.")] = False,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="One thread, small chunks, nothing left in the page cache.")
    ] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a merged model as one GGUF file, for llama.cpp and what is built on it: the bytes of its own converter."""
    with speaking(quiet=quiet, verbose=0, debug=debug) as console:
        from moemerge.cli.progress import show_progress
        from moemerge.export.ollama import check_name
        from moemerge.export.writing import write_gguf

        calibrated = imatrix or bool(imatrix_texts) or imatrix_out is not None
        check_gguf(file, type, [], llama_cpp, overwrite=overwrite, calibrated=calibrated)
        if ollama is not None:
            check_name(ollama)
        importance = partial(_importance, console, out, imatrix_texts or (), imatrix_out, device, quiet=quiet)
        return_freed_memory()
        with (
            quantised(
                console, file, type, quiet=quiet, importance=importance if calibrated else lambda _: None
            ) as (target, kind),
            show_progress(console, quiet=quiet) as progress,
        ):  # fmt: skip
            report = stoppable(progress)
            write_gguf(
                out, target, type=kind, overwrite=overwrite, low_memory=low_memory, llama_cpp=llama_cpp,
                tell=lambda note: console.print(f"warning: {note}", style="yellow"),
                progress=lambda done, total: report("weights", done, total),
            )  # fmt: skip
        if not quiet:
            say(f"{file}: done")
        if ollama is not None:
            say(_make_ollama(console, out, file, ollama, quiet=quiet))


def _importance(  # noqa: PLR0917  bound one by one
    console: "Console", out: Path, texts: Collection[str], kept: Path | None, device: str, gguf: Path, *, quiet: bool
) -> "Importance":  # fmt: skip
    from moemerge.cli.progress import show_progress
    from moemerge.export.importance import importance_of

    with show_progress(console, quiet=quiet) as progress:
        report = stoppable(progress)
        found = importance_of(
            out, gguf, tuple(texts), device=device, progress=lambda done, total: report("routers", done, total)
        )
    if kept is not None:
        found.write(kept)
    return found


def _make_ollama(console: "Console", out: Path, file: Path, name: str, *, quiet: bool) -> str:
    """Write the Modelfile beside the file; gives what to do next."""
    from moemerge.export.ollama import create, write_modelfile

    written = write_modelfile(out, file, file.with_name(_MODELFILE))
    for note in written.notes:
        saying(console, quiet=quiet)(f"note: {note}")
    return create(name, written.path)

"""GGUF files as outputs of commands: which options belong to them, and how they are merged into and quantised."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from rich.console import Console

from moemerge.cli.console import stoppable
from moemerge.errors import RefusedError
from moemerge.progress import Task

if TYPE_CHECKING:
    from moemerge.export.imatrix import Importance
    from moemerge.export.model import AskedType
    from moemerge.merging.options import MergeOptions
    from moemerge.planning.plan import MergePlan

WRITTEN_HERE: Final = ("auto", "f32", "f16", "bf16", "q8_0")
"""Values of `--type` that are written without llama.cpp."""


def is_gguf(out: Path) -> bool:
    """Whether a merge's output is one file, by its name."""
    return out.suffix.lower() == ".gguf" and not out.is_dir()


def check_options(to_file: bool, kind: str, llama_cpp: Path | None, folders_only: Mapping[str, bool]) -> None:
    """Refuse options of a merge that do not belong to its kind of output.

    Args:
        to_file: whether the output is a GGUF file, and not a folder.
        kind: the value of `--type`.
        llama_cpp: the value of `--llama-cpp`.
        folders_only: by name of an option that only a merge into a folder uses: whether it is given.

    Raises:
        RefusedError: one is given.
    """
    if to_file and (given := [name for name, value in folders_only.items() if value]):
        raise RefusedError(f"{given[0]}: a merge into a GGUF file does not use it. Remove it, or name a folder.")
    if not to_file and (kind != "auto" or llama_cpp):
        name = "--llama-cpp" if kind == "auto" else "--type"
        raise RefusedError(f"{name}: is for GGUF files, and OUT is a folder. Name a file that ends in .gguf.")


def check_gguf(
    file: Path,
    kind: str,
    inputs: Collection[Path],
    llama_cpp: Path | None,
    sources: Collection[Path],
    *,
    overwrite: bool,
) -> None:
    """Refuse a file that a merge could not write, before weights are downloaded.

    Args:
        file: the file to write.
        kind: the value of `--type`.
        inputs: files that the merge reads.
        llama_cpp: the value of `--llama-cpp`.
        sources: folders of the models, as far as they are known.
        overwrite: whether a GGUF file of this name may be replaced.

    Raises:
        RefusedError: says why.
        OutputError: the system does not let it be written.
    """
    from moemerge.export.converter import check_checkout
    from moemerge.export.quantising import check_type
    from moemerge.export.writing import check_file

    if kind not in WRITTEN_HERE:
        check_type(kind, with_importance=False)
    check_file(file, overwrite=overwrite, inputs=inputs, sources=sources)
    if llama_cpp is not None:
        check_checkout(llama_cpp)


def merge_into(
    console: Console,
    plan: "MergePlan",
    out: Path,
    kind: str,
    options: "MergeOptions",
    *,
    quiet: bool,
    llama_cpp: Path | None,
    **how: Any,
) -> Any:
    """Merge into a GGUF file, by way of one in floats where llama.cpp quantises it; returns the routing report.

    Args:
        console: the console for progress, and for notes on tensors that are quantised otherwise.
        plan: the plan to carry out.
        out: the file to write.
        kind: the value of `--type`.
        options: the options of the merge.
        quiet: whether progress and notes are left out.
        llama_cpp: the value of `--llama-cpp`.
        how: further arguments of `merge_to_gguf`.
    """
    from moemerge.export.model import GgufFormat
    from moemerge.export.writing import check_file
    from moemerge.merging.gguf import merge_to_gguf

    check_file(out, overwrite=options.overwrite, inputs=plan.inputs)
    merge: Callable[..., Any] = partial(merge_to_gguf, plan, **how)
    if kind in WRITTEN_HERE:
        return merge(out, options, form=GgufFormat(cast("AskedType", kind), llama_cpp))
    reports: list[Any] = []
    floats_options, floats = replace(options, overwrite=False), GgufFormat(llama_cpp=llama_cpp)
    quantise_into(
        console,
        out,
        kind,
        lambda file, room: reports.append(merge(file, floats_options, form=floats, room=room)),
        quiet=quiet,
        overwrite=options.overwrite,
    )
    return reports[0]


def quantise_into(
    console: Console,
    file: Path,
    kind: str,
    write: Callable[..., object],
    importance: "Callable[[Path], Importance] | None" = None,
    *,
    quiet: bool,
    overwrite: bool,
) -> None:
    """Write a quantised file by way of one in floats, and show how far it is.

    Args:
        console: the console for progress and notes.
        file: the file to write.
        kind: the type of its matrices, one that llama.cpp makes.
        write: writes the model in floats into the file that it is given, checking for space by what it is given.
        importance: makes the importance matrix for the file in floats.
        quiet: whether progress and notes are left out.
        overwrite: whether a GGUF file of this name is replaced.
    """
    from moemerge.cli.progress import show_steps
    from moemerge.export.quantised_file import write_quantised

    with show_steps(console, quiet=quiet) as progress:
        report = stoppable(progress)
        made = write_quantised(
            file,
            kind,
            write,
            overwrite=overwrite,
            importance=importance,
            progress=lambda done, total: report(Task("quantised weights"), done, total),
        )
    for note in () if quiet else made.notes:
        console.print(f"note: {note}", style="yellow")

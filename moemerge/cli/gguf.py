"""`moemerge gguf`: a merged model as one GGUF file."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from moemerge.cli.console import return_freed_memory, saying, speaking, stoppable
from moemerge.cli.options import Debug, Device, GgufType, LlamaCpp, Quiet
from moemerge.cli.streams import say
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from moemerge.export.imatrix import Importance
    from moemerge.merging.options import MergeOptions
    from moemerge.planning.plan import MergePlan

_WRITTEN_HERE: Final = ("auto", "f32", "f16", "bf16", "q8_0")
_CONFIGS: Final = (".yaml", ".yml")
MODELFILE: Final = "Modelfile"


def is_gguf(out: Path) -> bool:
    """Whether a merge's output is one file, by its name."""
    return out.suffix.lower() == ".gguf" and not out.is_dir()


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
        file: the file.
        kind: what `--type` asks for.
        inputs: files that are read.
        llama_cpp: what `--llama-cpp` names.
        sources: folders of the models, as far as they are known.
        overwrite: whether it may be replaced.

    Raises:
        RefusedError: says why.
        OutputError: the system does not let it be written.
    """
    from moemerge.export.converter import check_checkout
    from moemerge.export.quantising import check_type
    from moemerge.export.writing import check_file

    if kind not in _WRITTEN_HERE:
        check_type(kind, with_importance=False)
    check_file(file, overwrite=overwrite, inputs=inputs, sources=sources)
    if llama_cpp is not None:
        check_checkout(llama_cpp)


def merge_into(
    console: Console, plan: "MergePlan", out: Path, kind: str, options: "MergeOptions", *, quiet: bool, **how: Any
) -> Any:
    """Merge into a GGUF file, by way of one in floats where llama.cpp quantises it; gives the routers' report.

    Args:
        console: where it is said what was quantised otherwise.
        plan: the merge.
        out: the file.
        kind: what `--type` asks for.
        options: how it is done.
        quiet: whether nothing is said.
        how: what else `merge_to_gguf` takes.
    """
    from moemerge.export.writing import check_file
    from moemerge.merging.gguf import merge_to_gguf

    check_file(out, overwrite=options.overwrite, inputs=plan.inputs)
    merge: Callable[..., Any] = partial(merge_to_gguf, plan, **how)
    if kind in _WRITTEN_HERE:
        return merge(out, options, type=kind)
    reports: list[Any] = []
    floats_options = replace(options, overwrite=False)
    _quantise(
        console,
        out,
        kind,
        lambda floats, room: reports.append(merge(floats, floats_options, room=room)),
        quiet=quiet,
        overwrite=options.overwrite,
    )
    return reports[0]


@dataclass(frozen=True)
class Imatrix:
    """Where an importance matrix comes from, and where it is kept."""

    wanted: bool
    texts: tuple[str, ...]
    file: Path | None
    out: Path | None
    tokens: int
    device: str

    def maker(
        self, console: Console, folder: Path, kind: str, *, quiet: bool, overwrite: bool
    ) -> "Callable[[Path], Importance] | None":
        """What makes it of a file in floats; None where none is wanted. What could not be read or written is refused.

        Raises:
            RefusedError: what is given belongs to no file of this kind, or not together; a file is not there, or there
                already.
            SourceError: the matrix cannot be read.
            CheckpointError: it is damaged.
        """
        from moemerge.export.imatrix import read_importance
        from moemerge.export.writing import check_file, sources_of
        from moemerge.texts.documents import find_files

        given = {
            "--imatrix": self.wanted,
            "--imatrix-texts": self.texts,
            "--imatrix-file": self.file,
            "--imatrix-out": self.out,
        }
        named = [name for name, value in given.items() if value]
        if named and kind in _WRITTEN_HERE:
            raise RefusedError(
                f"{named[0]}: --type {kind} has no use of an importance matrix. Choose q4_k_m or the like."
            )
        if self.file and len(named) > 1:
            other = next(name for name in named if name != "--imatrix-file")
            raise RefusedError(f"--imatrix-file, {other}: give one of them, not both.")
        if self.file:
            given_matrix = read_importance(self.file)
            return lambda _floats: given_matrix
        if self.texts:
            find_files(self.texts, "--imatrix-texts")
        if self.out:
            check_file(self.out, overwrite=overwrite, sources=sources_of(folder))
        return partial(self._make, console, folder, quiet) if named else None

    def _make(self, console: Console, folder: Path, quiet: bool, floats: Path) -> "Importance":
        from moemerge.cli.progress import show_steps
        from moemerge.export.importance import importance_of  # imports torch and transformers

        saying(console, quiet=quiet)(f"importance matrix: the model reads up to {self.tokens} tokens")
        with show_steps(console, quiet=quiet) as progress:
            report = stoppable(progress)
            found = importance_of(
                folder,
                floats,
                self.texts,
                tokens=self.tokens,
                device=self.device,
                progress=lambda done, total: report("importance matrix", done, total),
            )
        if self.out:
            found.write(self.out)
        return found


def _quantise(
    console: Console,
    file: Path,
    kind: str,
    write: Callable[..., object],
    importance: "Callable[[Path], Importance] | None" = None,
    *,
    quiet: bool,
    overwrite: bool,
) -> None:
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
            progress=lambda done, total: report(kind, done, total),
        )
    for note in () if quiet else made.notes:
        console.print(f"note: {note}", style="yellow")


UseImatrix = Annotated[
    bool, typer.Option("--imatrix", help="Quantise by what the texts that the routers were made from need most.")
]
ImatrixTexts = Annotated[
    list[str] | None,
    typer.Option(metavar="PATH", help="The same by other text: files, folders, patterns.", show_default=False),
]
ImatrixFile = Annotated[Path | None, typer.Option(help="The same by a file of llama-imatrix.", show_default=False)]
ImatrixOut = Annotated[
    Path | None, typer.Option(help="Keep the importance matrix, for llama.cpp's tools.", show_default=False)
]
Ollama = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Write a Modelfile beside FILE, and create NAME in Ollama.", show_default=False),
]


def write_file(  # noqa: PLR0917  typer makes options of arguments
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder.", show_default=False)],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, NAME.gguf.", show_default=False)],
    type: GgufType = "auto",  # noqa: A002  the option's name
    llama_cpp: LlamaCpp = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a GGUF file of that name.")] = False,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="One thread, small chunks, nothing left in the page cache.")
    ] = False,
    imatrix: UseImatrix = False,
    imatrix_texts: ImatrixTexts = None,
    imatrix_file: ImatrixFile = None,
    imatrix_out: ImatrixOut = None,
    imatrix_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are read for it.")] = 16384,
    ollama: Ollama = None,
    device: Device = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a merged model as one GGUF file, for llama.cpp and what is built on it: the bytes of its own converter."""
    with speaking(quiet=quiet, verbose=0, debug=debug) as console:
        _check_merged(out, file)
        told = Imatrix(imatrix, tuple(imatrix_texts or ()), imatrix_file, imatrix_out, imatrix_tokens, device)
        importance = told.maker(console, out, type, quiet=quiet, overwrite=overwrite)
        _check_names(out, file, ollama, overwrite=overwrite)
        return_freed_memory()
        write = partial(_write, console, out, low_memory=low_memory, llama_cpp=llama_cpp, quiet=quiet)
        if type in _WRITTEN_HERE:
            write(file, type=type, overwrite=overwrite)
        else:
            _quantise(
                console,
                file,
                type,
                lambda floats, room: write(floats, type="auto", room=room),
                importance,
                quiet=quiet,
                overwrite=overwrite,
            )
        if not quiet:
            say(f"{file}: done")
        if ollama is not None:
            _describe_to_ollama(console, out, file, ollama, quiet=quiet)


def _check_merged(out: Path, file: Path) -> None:
    if out.suffix.lower() in _CONFIGS and not out.is_dir():
        raise RefusedError(
            f"{out}: is a config, and no merged model's folder. It is merged into a GGUF file by `moemerge {out} "
            f"{file}`."
        )


def _check_names(out: Path, file: Path, ollama: str | None, *, overwrite: bool) -> None:
    """Refuse names of what will be written, before minutes of work."""
    from moemerge.export.ollama import check_modelfile, check_name
    from moemerge.export.writing import check_file, sources_of

    if ollama is not None:
        check_name(ollama)
        check_modelfile(file.with_name(MODELFILE), overwrite=overwrite)
    check_file(file, overwrite=overwrite, sources=sources_of(out))


def _write(console: Console, out: Path, file: Path, *, quiet: bool, **options: Any) -> None:
    """Write a file in a type that is written here, and show how far it is."""
    from moemerge.cli.progress import show_progress
    from moemerge.export.writing import write_gguf

    with show_progress(console, quiet=quiet) as progress:
        report = stoppable(progress)
        write_gguf(
            out,
            file,
            **options,
            tell=lambda note: console.print(f"warning: {note}", style="yellow"),
            progress=lambda done, total: report("weights", done, total),
        )


def _describe_to_ollama(console: Console, out: Path, file: Path, name: str, *, quiet: bool) -> None:
    from moemerge.export.ollama import create, write_modelfile

    written = write_modelfile(out, file, file.with_name(MODELFILE))
    for note in () if quiet else written.notes:
        console.print(f"note: {note}", style="yellow")
    following = create(name, written.path)
    if not quiet:
        say(f"next: {following}")

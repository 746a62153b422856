"""The importance matrix of `moemerge gguf`: read from a file, or made by running the model over text."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer
from rich.console import Console

from moemerge.cli.console import announcer, stoppable
from moemerge.cli.gguf_output import WRITTEN_HERE
from moemerge.cli.options import ComputeIn, Device
from moemerge.errors import RefusedError
from moemerge.progress import Task

if TYPE_CHECKING:
    from collections.abc import Callable

    from moemerge.export.imatrix import Importance


@dataclass(frozen=True)
class ImatrixOptions:
    """Options for where an importance matrix comes from, and where it is kept."""

    heading: ClassVar[str] = "Importance matrix"

    imatrix: Annotated[
        bool, typer.Option("--imatrix", help="Quantise by what the texts that the routers were made from need most.")
    ] = False
    imatrix_texts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="Like --imatrix, with other text: files, folders or patterns.", show_default=False
        ),
    ] = None
    imatrix_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Like --imatrix, with a file that llama-imatrix has written.", show_default=False
        ),
    ] = None
    imatrix_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep the importance matrix in this file, for llama.cpp's tools.", show_default=False
        ),
    ] = None
    imatrix_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens that are read for the importance matrix.")
    ] = 16384
    device: Device = "auto"
    compute_dtype: ComputeIn = "auto"


@dataclass(frozen=True)
class ImatrixMaker:
    """A maker of the importance matrix that the options ask for."""

    console: Console
    folder: Path
    options: ImatrixOptions
    quiet: bool

    def check(self, kind: str, *, overwrite: bool) -> "Callable[[Path], Importance] | None":
        """Refuse what could not be read or written, before any work.

        Args:
            kind: the value of `--type`.
            overwrite: whether the file of `--imatrix-out` may be replaced.

        Returns:
            A function that makes the matrix for a file in floats; None where no matrix is asked for.

        Raises:
            RefusedError: an option does not fit the type or another option; a file is missing, or there already.
            SourceError: the matrix cannot be read.
            CheckpointError: the matrix is damaged.
        """
        from moemerge.export.imatrix import read_importance
        from moemerge.export.writing import check_file, sources_of
        from moemerge.texts.documents import find_files

        options = self.options
        given = {
            "--imatrix": options.imatrix,
            "--imatrix-texts": options.imatrix_texts,
            "--imatrix-file": options.imatrix_file,
            "--imatrix-out": options.imatrix_out,
        }
        named = [name for name, value in given.items() if value]
        if named and kind in WRITTEN_HERE:
            raise RefusedError(
                f"{named[0]}: --type {kind} does not use an importance matrix. Choose q4_k_m or the like."
            )
        if options.imatrix_file and len(named) > 1:
            other = next(name for name in named if name != "--imatrix-file")
            raise RefusedError(f"--imatrix-file, {other}: give one of them, not both.")
        if options.imatrix_file:
            matrix = read_importance(options.imatrix_file)
            return lambda _floats: matrix
        if options.imatrix_texts:
            find_files(options.imatrix_texts, "--imatrix-texts")
        if options.imatrix_out:
            check_file(options.imatrix_out, overwrite=overwrite, sources=sources_of(self.folder))
        return self._make if named else None

    def _make(self, floats: Path) -> "Importance":
        from moemerge.cli.progress import show_steps
        from moemerge.export.importance import importance_of  # imports torch and transformers

        options = self.options
        announcer(self.console, quiet=self.quiet)(
            f"importance matrix: the model reads up to {options.imatrix_tokens} tokens"
        )
        with show_steps(self.console, quiet=self.quiet) as progress:
            report = stoppable(progress)
            found = importance_of(
                self.folder,
                floats,
                tuple(options.imatrix_texts or ()),
                tokens=options.imatrix_tokens,
                device=self.options.device,
                compute_dtype=self.options.compute_dtype,
                progress=lambda done, total: report(Task("importance matrix"), done, total),
            )
        if options.imatrix_out:
            found.write(options.imatrix_out)
        return found

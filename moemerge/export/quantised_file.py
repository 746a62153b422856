"""Write a quantised GGUF file in one go: first the model in floats in the file's stage, then the quantised file."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from moemerge.export.imatrix import Importance
from moemerge.export.quantising import QuantisedReport, check_type, quantise, quantised_bytes
from moemerge.export.tensors import GgufTensor
from moemerge.export.writing import MEMORY_BYTES, STAGED, SpaceCheck, check_file, check_room, staged_file

_FLOATS: Final = "floats"


def write_quantised(
    file: Path,
    kind: str,
    write: Callable[[Path, SpaceCheck], object],
    *,
    overwrite: bool = False,
    importance: Callable[[Path], Importance] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> QuantisedReport:
    """Write a model in floats and quantise it: the file is complete when this returns, and untouched when it raises.

    Args:
        file: the file to write.
        kind: a key of `FILE_TYPES`.
        write: writes the model in floats into the file that it is given, which has the name of `file`, and checks for
            space with the function that it is given.
        overwrite: replace a GGUF file of this name.
        importance: makes the importance matrix for the file in floats.
        progress: called with the tensors quantised and all there are.

    Raises:
        RefusedError: see `quantise` and `check_file`.
        OutputError: see `quantise`; or the disk has no space for both files.
    """
    check_type(kind, with_importance=importance is not None)
    check_file(file, overwrite=overwrite)
    with staged_file(file, overwrite=overwrite) as stage:
        floats = stage / _FLOATS / file.name
        floats.parent.mkdir()
        write(floats, partial(_check_both, file, kind))
        matrix = importance(floats) if importance else None
        report = quantise(floats, stage / STAGED, kind, importance=matrix, progress=progress)
        floats.unlink()
        floats.parent.rmdir()
    return replace(report, path=file)


def _check_both(
    file: Path, kind: str, _floats: Path, tensors: Sequence[GgufTensor], more: int = 0, memory: int = MEMORY_BYTES
) -> None:
    """Refuse to begin if the disk cannot hold the model in floats and the quantised file at the same time."""
    what = f"the merged model, in floats and in {kind},"
    check_room(file, tensors, more + quantised_bytes(tensors, kind), memory, what=what)

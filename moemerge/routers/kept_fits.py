"""Rows that were fitted to labelled tokens, kept in a folder, so that no fit is computed twice.

They depend on the tokens, their labels and the method, not on the scale or on how many experts take each token. A
search makes routers that differ in these alone.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from moemerge.checkpoint.header import build_header, read_header
from moemerge.errors import CheckpointError
from moemerge.passes.weights import read_into
from moemerge.routers.kept_folder import draft_of, path_of

_ROWS = "rows"


def hash_of(values: Sequence[object], tensors: Sequence[torch.Tensor]) -> str:
    """Make a text that any change of some values, or of the contents of some tensors, changes."""
    key = hashlib.sha256(repr(values).encode())
    for tensor in tensors:
        key.update(repr(tuple(tensor.shape)).encode())
        key.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return key.hexdigest()


def kept_rows(folder: Path, key: str, fit: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Read the rows (expert, hidden) of a fit, or compute and keep them; a disk that takes none is no error.

    Args:
        folder: the folder.
        key: the hash of all that the fit depends on.
        fit: computes it.
    """
    path = path_of(folder, key)
    try:
        kept = read_header(path)[_ROWS]
        rows = torch.empty(kept.shape)
        read_into(kept, rows)
    except (OSError, CheckpointError):
        rows = fit()
        with suppress(OSError):
            _keep(path, rows)
    return rows


def _keep(path: Path, rows: torch.Tensor) -> None:
    rows = rows.float().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    header = build_header([(_ROWS, "F32", tuple(rows.shape), rows.nbytes)], {})
    draft.write_bytes(header + rows.view(torch.uint8).numpy().tobytes())
    draft.replace(path)

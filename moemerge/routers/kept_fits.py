"""Rows that were fitted to labelled tokens, kept in a folder, so that no fit is computed twice.

They depend on the tokens, their labels and the method, not on the scale or on how many experts take each token. A
search makes routers that differ in these alone.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from moemerge.checkpoint.header import build_header, read_header
from moemerge.errors import CheckpointError
from moemerge.passes.weights import read_into
from moemerge.routers.kept_folder import path_of

_ROWS = "rows"


@dataclass(frozen=True)
class KeptFits:
    """Fits by what they depend on, each in a small file of its own."""

    folder: Path

    def rows(
        self, method: str, tensors: Sequence[torch.Tensor], numbers: Sequence[float], fit: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Read the rows (expert, hidden) of a fit, or compute and keep them; a disk that takes none is no error.

        Args:
            method: what the fit is, in a word.
            tensors: all tensors that it depends on.
            numbers: all numbers that it depends on.
            fit: computes it.
        """
        key = hashlib.sha256(repr((method, numbers, version("moemerge"), version("torch"))).encode())
        for tensor in tensors:
            key.update(repr(tuple(tensor.shape)).encode())
            key.update(tensor.contiguous().view(torch.uint8).numpy().data)
        path = path_of(self.folder, key.hexdigest())
        try:
            kept = read_header(path)[_ROWS]
            rows = torch.empty(kept.shape)
            read_into(kept, rows)
        except (OSError, CheckpointError):
            rows = fit()
            with suppress(OSError):
                self._keep(path, rows)
        return rows

    def _keep(self, path: Path, rows: torch.Tensor) -> None:
        rows = rows.float().contiguous()
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        header = build_header([(_ROWS, "F32", tuple(rows.shape), rows.nbytes)], {})
        draft.write_bytes(header + rows.view(torch.uint8).numpy().tobytes())
        draft.replace(path)

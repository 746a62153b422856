"""Losses that are kept on the disk, so that no model is run twice over the same text.

They are found by what they depend on: the model's files, the tokens, and what it was run in and by.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from moemerge.checkpoint.disk import cache_folder
from moemerge.evaluation.runnable import Runnable
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window


def default_folder() -> Path | None:
    """The folder for kept losses in the user's cache; None where there is no cache."""
    return cache_folder("losses")


class KeptLosses:
    """Losses by model and windows of text, each in a small file of its own."""

    def __init__(self, folder: Path | None, compute: Compute, *, replace: bool = False) -> None:
        """Keep losses in a folder, which need not exist; with None, keep none.

        Args:
            folder: the folder.
            compute: what models are run in.
            replace: whether to find none that are there, so that new ones take their place.
        """
        self._folder, self._replace = folder, replace
        self._settings = [compute.dtype_name, compute.device.type, *map(version, ("moemerge", "transformers", "torch"))]

    def find(self, model: Runnable, windows: Sequence[Window]) -> torch.Tensor | None:
        """Read the losses (window,) of a model on some windows; None where they are not kept."""
        path = None if self._replace else self._path(model, windows)
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path else None
        except (OSError, ValueError):
            return None
        if not isinstance(found, list) or len(found) != len(windows):
            return None
        if not all(isinstance(loss, float) and math.isfinite(loss) for loss in found):
            return None
        return torch.tensor(found, dtype=torch.float64)

    def keep(self, model: Runnable, windows: Sequence[Window], losses: torch.Tensor) -> None:
        """Keep the losses (window,) of a model on some windows; a disk that takes none is no error."""
        path = self._path(model, windows)
        if path is None:
            return
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(losses.double().tolist()), encoding="utf-8")
            draft.replace(path)

    def _path(self, model: Runnable, windows: Sequence[Window]) -> Path | None:
        if self._folder is None or not model.identity:
            return None
        read = [(window.ids, window.counted) for window in windows]
        return self._folder / f"{_hashed([model.identity, self._settings, read])}.json"


def _hashed(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()

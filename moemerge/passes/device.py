"""The device that models run on, and what to say when its memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moemerge.errors import RouterError


def find_device(name: str) -> torch.device:
    """The device of this name, or the best that `auto` finds.

    Raises:
        RouterError: there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise RouterError(f"device {name!r} cannot be used here: {why}. Choose --device cpu.") from error
    return device


@contextmanager
def memory_watched(doing: str) -> Iterator[None]:
    """Torch's ways of saying that memory ran out turned into one message: while what, and what to do about it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise RouterError(f"memory ran out while {doing}") from error

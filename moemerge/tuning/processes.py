"""Device, precision and processes of a tuning, set up by accelerate; only this module of tuning imports it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from moemerge.dtypes import ComputeDtype
from moemerge.errors import RefusedError, RouterError
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.device import find_device

_WHOLE: Final = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")
"""Kinds of accelerate's distribution in which every process holds the whole model."""
_PRECISIONS: Final[dict[ComputeDtype, str]] = {"float32": "no", "bfloat16": "bf16"}
_Part = TypeVar("_Part")
# The others wait while the first process runs the teachers.
_TIMEOUT: Final = timedelta(hours=24)


@dataclass(frozen=True)
class Processes:
    """The processes that tune together, each with the whole model; usually there is only one."""

    _accelerator: Any
    rank: int
    count: int
    device: torch.device
    """The device of this process."""
    dtype: torch.dtype
    """The dtype of frozen weights: bfloat16 where that is computed in, as on a GPU, else float32."""

    @property
    def compute(self) -> Compute:
        """What the tuned model computes on, and in."""
        return Compute(self.device, self.dtype)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """A context that computes in the precision that was asked for."""
        found: AbstractContextManager[Any] = self._accelerator.autocast()
        return found

    def wait(self) -> None:
        """Wait until all processes are here.

        Raises:
            RouterError: one of the processes has ended.
        """
        with _lost():
            self._accelerator.wait_for_everyone()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add values up over all processes, on the device where they are.

        Raises:
            RouterError: a process has ended.
        """
        if self.count == 1:
            return values
        here = values.to(self.device)
        with _lost():
            summed: torch.Tensor = self._accelerator.reduce(here, "sum")
        return summed.to(values.device)

    def least(self, value: int) -> int:
        """Find the smallest of all processes' values.

        Raises:
            RouterError: a process has ended.
        """
        if self.count == 1:
            return value
        here = torch.tensor([value], device=self.device)
        with _lost():
            return int(self._accelerator.gather(here).min())

    def mine(self, everything: Sequence[_Part]) -> Sequence[_Part]:
        """This process's part of a sequence: one of as many runs as there are processes."""
        start, end = (place * len(everything) // self.count for place in (self.rank, self.rank + 1))
        return everything[start:end]


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RouterError("another process of this tuning has ended; what it said tells why.") from error


def open_processes(device: str, compute_dtype: ComputeDtype = "auto") -> Processes:
    """Set up this process alone on a device, or as one of those that `accelerate launch` or `torchrun` has started.

    Raises:
        RefusedError: there is no such device; or the processes divide the model, are on several machines, or compute in
            another precision.
    """
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local < count > 1:
        raise RefusedError(
            f"{count} processes, {local} of them on this machine: all have to be on one, since what the first writes "
            "for the others lies beside the model."
        )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in {"no", "bf16"}:
        raise RefusedError(f"accelerate: mixed precision {asked!r}: tuning computes in bf16, or in float32 with no.")
    if count > 1 and device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    found = find_device(device)
    if found.type == "cuda" and found.index is not None:
        torch.cuda.set_device(found)
    if count == 1:
        # Without this, the settings of an earlier call stay.
        AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001  there is no other way
    accelerator = Accelerator(
        cpu=found.type == "cpu",
        mixed_precision=_PRECISIONS.get(compute_dtype, asked if found.type == "cpu" else "bf16"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)] if count > 1 else [],
    )
    if accelerator.distributed_type.name not in _WHOLE:
        raise RefusedError(
            f"accelerate: {accelerator.distributed_type.name} divides the model, which tune does not: every process "
            "holds all of it. Use --multi_gpu, or see docs/tuning.md."
        )
    return Processes(
        accelerator,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32,
    )

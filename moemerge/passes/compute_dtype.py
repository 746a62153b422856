"""Choose what a pass computes in: on a CPU, bfloat16 where a short trial finds it clearly faster than float32."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from math import inf, prod
from time import perf_counter
from typing import Final, cast, get_args

import torch

from moemerge.dtypes import ComputeDtype, DType
from moemerge.errors import RefusedError
from moemerge.passes.device import find_devices

logger = logging.getLogger(__name__)

# A model whose first layer has no matrix of so many numbers is run in less time than a trial would be worth.
_SMALL: Final = 2**18
# With more rows and columns, the trial would take longer and give the same ratio.
_LARGEST_SIDE: Final = 1024
# So few that a product takes a few milliseconds: a longer one is more often interrupted on a busy machine, and then the
# slower dtype seems slower than it is.
_TOKENS: Final = 128
_ROUNDS: Final = 5
# Far from what was measured, so that the noise of a busy machine does not change the choice from one run to the next:
# on one thread of a Xeon, bfloat16 is 3.7 times as fast, without AMX 0.6 times, without AVX512_BF16 0.06 times.
_MARGIN: Final = 1.3
_HOPELESS: Final = 0.5


@dataclass(frozen=True)
class Compute:
    """What a pass computes on, and in."""

    device: torch.device
    dtype: torch.dtype
    """The dtype of weights and states; statistics, logits and losses are float32 or wider."""
    others: tuple[torch.device, ...] = ()
    """Further devices, which share the text of a pass; what is no pass runs on `device` alone."""

    @property
    def each(self) -> "tuple[Compute, ...]":
        """What is computed on each device."""
        return tuple(Compute(device, self.dtype) for device in (self.device, *self.others))

    @property
    def dtype_name(self) -> DType:
        """The dtype as `config.json` spells it."""
        return cast("DType", str(self.dtype).removeprefix("torch."))


def find_compute(device: str, dtype: ComputeDtype, shapes: Iterable[tuple[int, ...]]) -> Compute:
    """Find devices by their names, and the dtype to compute in there; see `find_devices` and `choose_dtype`."""
    first, *others = find_devices(device)
    return Compute(first, choose_dtype(first, dtype, shapes), tuple(others))


def choose_dtype(device: torch.device, asked: ComputeDtype, shapes: Iterable[tuple[int, ...]]) -> torch.dtype:
    """Choose the dtype of a pass: the one that is asked for; with `auto`, on a CPU the faster one, else bfloat16.

    Args:
        device: the device of the pass.
        asked: `auto`, `float32` or `bfloat16`.
        shapes: shapes of the tensors of a layer, whose largest matrix is tried.

    Raises:
        RefusedError: `asked` is none of these.
    """
    if asked not in get_args(ComputeDtype):
        known = ", ".join(get_args(ComputeDtype))
        raise RefusedError(f"compute_dtype: {asked!r} is not one of {known}.")
    if asked != "auto":
        chosen: torch.dtype = getattr(torch, asked)
        return chosen
    if device.type != "cpu":
        return torch.bfloat16
    rows, columns = max((shape[-2:] for shape in shapes if len(shape) > 1), key=prod, default=(0, 0))
    if rows * columns < _SMALL:
        return torch.float32
    return faster_dtype(min(rows, _LARGEST_SIDE), min(columns, _LARGEST_SIDE))


def _seconds_of_product(dtype: torch.dtype, rows: int, columns: int) -> float:
    """Time the product of some tokens' states with a matrix (rows, columns) on the CPU."""
    states, matrix = torch.ones(_TOKENS, columns, dtype=dtype), torch.ones(rows, columns, dtype=dtype)
    start = perf_counter()
    torch.nn.functional.linear(states, matrix)
    return perf_counter() - start


@cache
def faster_dtype(
    rows: int, columns: int, seconds: Callable[[torch.dtype, int, int], float] = _seconds_of_product
) -> torch.dtype:
    """Find the dtype of matrices (rows, columns) on this CPU: bfloat16 where it is faster by a clear margin.

    Both take turns, so that a busy moment of the machine slows both, and the shortest times count. What was found is
    kept until the process ends.
    """
    single = half = inf
    for done in range(_ROUNDS):
        single = min(single, seconds(torch.float32, rows, columns))
        half = min(half, seconds(torch.bfloat16, rows, columns))
        if done and single < _HOPELESS * half:  # the first products of a process are slow
            break
    chosen = torch.bfloat16 if single >= _MARGIN * half else torch.float32
    logger.info(
        "computing in %s: a product takes %.1f ms in float32 and %.1f ms in bfloat16", chosen, 1e3 * single, 1e3 * half
    )
    return chosen

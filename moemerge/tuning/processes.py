"""Device, precision and processes, by accelerate: the one place that imports it here."""

import os
from datetime import timedelta
from typing import Any, Final

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from moemerge.errors import RefusedError
from moemerge.routers.computed import find_device

_WHOLE: Final = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")
"""Ways of accelerate in which every process holds the whole model."""
# The others wait while the first runs the teachers.
_PATIENCE: Final = timedelta(hours=24)


def open_accelerator(device: str) -> Any:
    """The accelerator for a device, or for what `accelerate launch` has set up.

    Raises:
        RouterError: there is no such device.
        RefusedError: `accelerate launch` was told to divide the model, or to compute in float16.
    """
    found = find_device(device)
    if found.type == "cuda" and found.index is not None:
        torch.cuda.set_device(found)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(
        cpu=found.type == "cpu", mixed_precision=None if found.type == "cpu" else "bf16",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)] if several else [],
    )  # fmt: skip
    if accelerator.distributed_type.name not in _WHOLE:
        raise RefusedError(
            f"accelerate launch: {accelerator.distributed_type.name} divides the model, which tune does not: every "
            "process holds all of it. Use --multi_gpu, or see docs/tuning.md."
        )
    if accelerator.mixed_precision == "fp16":
        raise RefusedError("accelerate launch: --mixed_precision fp16 is too narrow for tuning. Use bf16 or no.")
    return accelerator


def weight_dtype(accelerator: Any) -> torch.dtype:
    """What frozen weights are held in: bfloat16 where that is computed in, as on a GPU."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32

"""Find the device that models run on and its free memory, and turn out-of-memory errors into messages."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from moemerge.errors import RefusedError, RouterError
from moemerge.passes.device_names import DEVICES, is_device

# https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html
_GROUPS: Final = Path("/sys/fs/cgroup")


def find_device(name: str) -> torch.device:
    """Find the device of this name, or the best one for `auto`.

    Raises:
        RefusedError: there is no such device.
    """
    if not is_device(name):
        raise RefusedError(f"device {name!r} cannot be used here: it is not one of {DEVICES}. Choose --device cpu.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise RefusedError(f"device {name!r} cannot be used here: {why}. Choose --device cpu.") from error
    return device


def find_devices(names: str) -> list[torch.device]:
    """Find one device, or several with commas between their names; see `find_device`."""
    return [find_device(name) for name in names.split(",")]


@contextmanager
def memory_watched(doing: str) -> Iterator[None]:
    """A context that turns torch's out-of-memory errors into one message: during what, and what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        if isinstance(error, RuntimeError) and ("memory" not in said or "illegal memory access" in said):
            raise
        raise RouterError(f"memory ran out while {doing}") from error


def free_memory(device: torch.device) -> int | None:
    """The free bytes of a device; for a CPU within the limits of a container; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux
        return None
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*available, *_free_in_group(_GROUPS)], default=None)


def _free_in_group(folder: Path) -> Iterator[int]:
    """Yield the free bytes of the control group mounted here (a container's own); droppable page cache is free."""
    for part, limit, used, cache in (
        ("", "memory.max", "memory.current", "inactive_file "),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
    ):
        try:
            most, now = ((folder / part / name).read_text().strip() for name in (limit, used))
            lines = (folder / part / "memory.stat").read_text().splitlines()
        except OSError:  # another version, or none
            continue
        if most.isdecimal():  # and not "max"
            yield int(most) - int(now) + sum(int(line.split()[1]) for line in lines if line.startswith(cache))

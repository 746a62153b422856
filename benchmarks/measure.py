"""What a program took: wall time, processor time, peak memory, bytes read, as the Linux kernel reports them; and disk.

The kernel counts to a program's peak what its process held before the program was loaded: a peak is never lower than
the caller's own. Who calls `run` therefore imports nothing but the standard library, and stays at 20 MB.
"""

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# Nothing is looked up on the Hub, whatever the caller's settings are.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
SAMPLE_SECONDS = 0.05
BLOCK_BYTES = 512


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    read_bytes: int
    """By read calls, from the page cache or from the disk; copies within the kernel are among them."""
    output: str
    disk_bytes: int = 0
    """The most room that the watched folder took, as far as samples show."""


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None, watch: Path | None = None) -> Run:
    """Run a program to its end.

    Args:
        command: the program and its arguments.
        environment: variables beside the caller's; they win over `ENVIRONMENT`.
        watch: a folder whose size is looked up meanwhile.

    Raises:
        SystemExit: it failed; with what it printed.
    """
    variables = {**os.environ, **ENVIRONMENT, **(environment or {})}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors, watching(watch) as most:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=errors, env=variables)
        try:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            seconds = time.perf_counter() - start
            io = dict(line.split(": ") for line in Path(f"/proc/{child.pid}/io").read_text().splitlines())
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if child.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}: exit code {child.returncode}\n{errors.read()}")
        return Run(
            seconds,
            usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss * 1024,
            int(io["rchar"]),
            output.read(),
            most(),
        )


@contextmanager
def watching(folder: Path | None) -> Iterator[Callable[[], int]]:
    """Look up a folder's size every `SAMPLE_SECONDS`, in a thread; gives a function that says the largest so far."""
    sizes, end = [0], threading.Event()

    def look() -> None:
        while folder and not end.wait(SAMPLE_SECONDS):
            sizes[0] = max(sizes[0], allocated_bytes(folder))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: sizes[0]
    finally:
        end.set()
        thread.join()


def allocated_bytes(folder: Path) -> int:
    """What a folder takes on the disk: of every file, folder and link the blocks that it has, holes left out."""
    total = 0
    for path, _, files in os.walk(folder):
        for name in (path, *(os.path.join(path, file) for file in files)):  # noqa: PTH118  it is to be quick
            with suppress(FileNotFoundError):
                total += os.lstat(name).st_blocks
    return total * BLOCK_BYTES

"""What a program took: wall time, processor time, peak memory, bytes read, as the Linux kernel reports them.

The kernel counts to a program's peak what its process held before the program was loaded: a peak is never lower than
the caller's own. Who calls `run` therefore imports nothing but the standard library, and stays at 20 MB.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Nothing is looked up on the Hub, whatever the caller's settings are.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    read_bytes: int
    """By read calls, from the page cache or from the disk; copies within the kernel are among them."""
    output: str


def run(command: Sequence[str | Path]) -> Run:
    """Run a program to its end.

    Raises:
        SystemExit: it failed; with what it printed.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=errors, env=os.environ | ENVIRONMENT)
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
        return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, int(io["rchar"]), output.read())

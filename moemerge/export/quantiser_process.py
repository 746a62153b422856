"""Run llama.cpp's quantiser in a process of its own, since it may abort, and find out why it failed."""

import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from moemerge.errors import OutputError
from moemerge.printable import printable

_PROGRESS: Final = re.compile(rb"^\[ *(\d+)/ *(\d+)\]")
_REASONS: Final = re.compile(
    r"failed to quantize: (.+)|error loading model: (.+)|(GGML_ASSERT\(.*\) failed)|(^\w*Error: .+)"
)
_KEPT_LINES: Final = 200
_REASON_BYTES: Final = 400


def run_engine(command: list[str], gguf: Path, type_: str, progress: Callable[[int, int], None]) -> None:
    """Run the engine in a process of its own, which imports modules from where this one does.

    Args:
        command: arguments of `moemerge.export.quantiser_program`.
        gguf: the file in floats, for the message.
        type_: the type that is made, for the message.
        progress: called with the tensors done and all there are.

    Raises:
        OutputError: the engine failed, with its reason.
    """
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)  # noqa: PTH100  links stay as they are
    # Before it aborts, ggml would call a debugger, which takes seconds.
    environment = os.environ | {"PYTHONPATH": paths, "GGML_NO_BACKTRACE": "1"}
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    with subprocess.Popen(  # noqa: S603  this program itself
        [sys.executable, "-m", "moemerge.export.quantiser_program", *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as engine:
        try:
            for line in engine.stderr or ():
                if step := _PROGRESS.match(line):
                    progress(int(step[1]), int(step[2]))
                lines.append(line.decode(errors="replace"))
        except BaseException:
            engine.kill()
            raise
    if engine.returncode:
        raise OutputError(f"{gguf}: llama.cpp does not make {type_} of it: {failure_reason(lines, engine.returncode)}.")


def failure_reason(output: Iterable[str], code: int) -> str:
    """Find the last reason that the engine's output gives for its end, as one line.

    Args:
        output: the last lines that the engine printed.
        code: its exit code; negative for a signal.
    """
    lines = [line.strip() for line in output if line.strip()]
    reasons = [next(filter(None, match.groups())) for line in lines for match in _REASONS.finditer(line)]
    if code < 0 and not any("GGML_ASSERT" in reason for reason in reasons[-1:]):
        named = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        reasons.append(f"its process was ended by {named}" + (f" after {lines[-1]!r:.200}" if lines else ""))
    found = reasons[-1] if reasons else (lines[-1] if lines else "it gave no reason")
    if "iostream" in found or "basic_ios" in found:
        found += ": the disk is full or cannot be written"
    return printable(found.rstrip(".!"), _REASON_BYTES)

"""Progress for people who wait: bars with the time left on a terminal, elsewhere a line every ten seconds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from moemerge.checkpoint.disk import shown_bytes as size
from moemerge.progress import Progress, Task

_SECONDS: Final = 10.0


@contextmanager
def show_progress(console: Console, *, quiet: bool) -> Iterator[Progress]:
    """A context with a progress callback for tasks that may go on side by side: each has its own bar."""
    with _show(console, quiet=quiet, together=False) as report:
        yield report


@contextmanager
def show_work(console: Console, *, quiet: bool) -> Iterator[Progress]:
    """A context with a progress callback for one piece of work: one bar, which says what is being done."""
    with _show(console, quiet=quiet, together=True) as report:
        yield report


@contextmanager
def show_steps(console: Console, *, quiet: bool) -> Iterator[Progress]:
    """A context with a progress callback that shows bars on a terminal, and nothing elsewhere."""
    with _show(console, quiet=quiet or not console.is_terminal, together=False) as report:
        yield report


@contextmanager
def _show(console: Console, *, quiet: bool, together: bool) -> Iterator[Progress]:
    if quiet:
        yield lambda _task, _done, _total: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[amount]}"))
        with Bars(*columns, console=console) as bars:
            yield _Bars(bars, together=together).report
    else:
        yield _Lines(console).report


class Pace:
    """How fast a task goes on: the amount done, its rate, and the time left."""

    def __init__(self, task: Task, done: int) -> None:
        self._unit, self._first, self._start = task.unit, done, time.monotonic()
        self._ended: float | None = None

    def amount(self, done: int, total: int) -> str:
        """Say in words how much is done, and how long the rest takes, or how long all of it took."""
        now = time.monotonic()
        if done >= total:
            self._ended = self._ended or now
            whole = size(total) if self._unit == "bytes" else f"{total} {self._unit}"
            return f"{whole} in {clock(self._ended - self._start)}"
        self._ended = None
        seconds, new = now - self._start, done - self._first
        left = f", {clock(seconds * (total - done) / new)} left" if new > 0 else ""
        if self._unit != "bytes":
            return f"{done} of {total} {self._unit}{left}"
        return f"{size(done)} of {size(total)}, {size(new / max(seconds, 1e-9))}/s{left}"


def clock(seconds: float) -> str:
    """Format a time as `42 s`, or as hours, minutes and seconds from a minute on."""
    return f"{seconds:.0f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))  # noqa: PLR2004


class _Bars:
    """Bars on a terminal: one for each piece of work, or one for all."""

    def __init__(self, bars: Bars, *, together: bool) -> None:
        self._bars, self._together = bars, together
        self._known: dict[Task | None, tuple[TaskID, Pace]] = {}

    def report(self, task: Task, done: int, total: int) -> None:
        key = None if self._together else task
        known = self._known.get(key)
        if known is None or (done <= 1 and self._bars.tasks[known[0]].finished):  # the same work once more
            known = self._known[key] = self._bars.add_task(str(task), total=total, amount=""), Pace(task, done)
        bar, pace = known
        self._bars.update(bar, description=str(task), completed=done, total=total, amount=pace.amount(done, total))


class _Lines:
    """Lines in a log: at most one every ten seconds."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, time.monotonic()
        self._known: dict[Task, tuple[int, Pace]] = {}
        """How much of each task was done at its last report, and its pace."""

    def report(self, task: Task, done: int, total: int) -> None:
        before, pace = self._known.get(task, (0, Pace(task, done)))
        if done < before:  # the same work once more
            pace = Pace(task, done)
        self._known[task] = done, pace
        if time.monotonic() - self._last >= _SECONDS:
            self._last = time.monotonic()
            self._console.print(f"{task}: {pace.amount(done, total)}")

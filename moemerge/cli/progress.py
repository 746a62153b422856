"""Progress for people who wait: bars with bytes and rates on a terminal, a line for every tenth elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from moemerge.cli.render import size
from moemerge.merging import Progress as Report
from moemerge.merging import Stage

_TITLES: Final[dict[Stage, str]] = {"routers": "routers", "weights": "weights"}
_LINES: Final = 10


@contextmanager
def show_progress(console: Console, *, quiet: bool) -> Iterator[Report]:
    """Give the callback for `merge`."""
    if quiet:
        yield lambda _stage, _done, _total: None
    elif console.is_terminal:
        bars = _Bars(console)
        try:
            yield bars.report
        finally:
            bars.stop()
    else:
        yield _Lines(console).report


class _Bars:
    def __init__(self, console: Console) -> None:
        start = (TextColumn("{task.description}"), BarColumn())
        self._layers = Progress(
            *start, TextColumn("{task.completed}/{task.total} layers"), TimeRemainingColumn(), console=console
        )
        self._bytes = Progress(*start, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=console)
        self._tasks: dict[Stage, TaskID] = {}

    def stop(self) -> None:
        """Leave the terminal as it should be, whatever happened."""
        for bars in (self._layers, self._bytes):
            bars.stop()

    def report(self, stage: Stage, done: int, total: int) -> None:
        bars = self._bytes if stage == "weights" else self._layers
        if stage not in self._tasks:
            self._layers.stop()
            bars.start()
            self._tasks[stage] = bars.add_task(_TITLES[stage], total=total)
        bars.update(self._tasks[stage], completed=done)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: Stage | None = None
        self._shown = 0
        self._start = 0.0

    def report(self, stage: Stage, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage, self._shown, self._start = stage, 0, time.monotonic()
        tenth = done * _LINES // max(total, 1)
        if tenth <= self._shown:
            return
        self._shown = tenth
        if stage == "weights":
            rate = done / max(time.monotonic() - self._start, 1e-9)
            self._console.print(f"{_TITLES[stage]}: {size(done)} of {size(total)}, {size(rate)}/s")
        else:
            self._console.print(f"{_TITLES[stage]}: layer {done} of {total}")

"""Progress for people who wait: bars with bytes and rates on a terminal, a line for every tenth elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moemerge.checkpoint.disk import shown_bytes as size
from moemerge.merging.options import Progress as Report
from moemerge.merging.options import Stage

_LINES: Final = 10


@contextmanager
def show_progress(console: Console, *, quiet: bool) -> Iterator[Report]:
    """A context with a progress callback for `merge`."""
    if quiet:
        yield lambda _stage, _done, _total: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[amount]}"))
        with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
            yield _Bars(bars).report
    else:
        yield _Lines(console).report


@contextmanager
def show_layers(console: Console, *, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A context with a progress callback for models that run one after the other, layer by layer."""
    if quiet:
        yield lambda _name, _done, _total: None
    elif console.is_terminal:
        with Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn(), console=console
        ) as bars:
            tasks: dict[str, TaskID] = {}

            def report(name: str, done: int, total: int) -> None:
                if name not in tasks or (done == 1 and bars.tasks[tasks[name]].finished):
                    tasks[name] = bars.add_task(name, total=total)
                bars.update(tasks[name], completed=done)

            yield report
    else:
        yield lambda name, done, total: console.print(f"{name}: {total} layers") if done == total else None


@contextmanager
def show_steps(console: Console, *, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A context with a progress callback for steps: it shows a bar on a terminal, and nothing elsewhere."""
    if quiet or not console.is_terminal:
        yield lambda _name, _done, _total: None
    else:
        with show_layers(console, quiet=False) as report:
            yield report


class _Amount:
    """Describes the amount done in words: layers, or bytes with their rate."""

    def __init__(self, stage: Stage, done: int) -> None:
        self._stage, self._first, self._start = stage, done, time.monotonic()

    def __call__(self, done: int, total: int) -> str:
        if self._stage != "weights":
            return f"layer {done} of {total}"
        rate = (done - self._first) / max(time.monotonic() - self._start, 1e-9)
        return f"{size(done)} of {size(total)}, {size(rate)}/s"


class _Bars:
    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[Stage, tuple[TaskID, _Amount]] = {}

    def report(self, stage: Stage, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, amount=""), _Amount(stage, done)
        task, amount = self._tasks[stage]
        self._bars.update(task, completed=done, amount=amount(done, total))


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._stages: dict[Stage, tuple[int, _Amount]] = {}

    def report(self, stage: Stage, done: int, total: int) -> None:
        tenth = done * _LINES // max(total, 1)
        shown, amount = self._stages.get(stage) or (0, _Amount(stage, done))
        self._stages[stage] = max(tenth, shown), amount
        if tenth > shown:
            self._console.print(f"{stage}: {amount(done, total)}")

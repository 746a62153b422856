"""Progress on a terminal and in a log."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from moemerge.cli import progress
from moemerge.cli.progress import _Bars, show_progress, show_steps, show_work
from moemerge.progress import Task


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def last_line(console, word):
    return [line for line in console.file.getvalue().splitlines() if word in line][-1]


def test_stages_side_by_side_say_what_is_left_and_what_was_done(clock):
    console = terminal()
    with show_progress(console, quiet=False) as report:
        report(Task("weights"), 0, 4_000_000)
        report(Task("routers"), 0, 4)
        clock[0] = 10.0
        report(Task("weights"), 4_000_000, 4_000_000)
        clock[0] = 60.0
        report(Task("routers"), 3, 4)
    assert "4.00 MB in 10 s" in last_line(console, "weights")
    assert "3 of 4 layers, 20 s left" in last_line(console, "routers")


def test_weights_have_a_rate_and_long_times_have_minutes(clock):
    console = terminal()
    with show_progress(console, quiet=False) as report:
        report(Task("weights"), 0, 100_000_000)
        clock[0] = 10.0
        report(Task("weights"), 10_000_000, 100_000_000)
    assert "10.00 MB of 100.00 MB, 1.00 MB/s, 0:01:30 left" in last_line(console, "weights")


def test_what_is_done_says_what_was_counted(clock):
    console = terminal()
    with show_progress(console, quiet=False) as report:
        report(Task("text", "code"), 0, 64)
        clock[0] = 30.0
        report(Task("text", "code"), 64, 64)
    assert "64 tokens in 30 s" in last_line(console, "text of code")


def test_one_piece_of_work_has_one_bar_that_says_what_is_done(clock):
    console = terminal()
    with show_work(console, quiet=False) as report:
        report(Task("losses", "merged (1 of 2)"), 1, 8)
        clock[0] = 4.0
        report(Task("losses", "base (2 of 2)"), 5, 8)
    assert "5 of 8 layers, 3 s left" in last_line(console, "losses of base (2 of 2)")
    assert "merged" not in console.file.getvalue().splitlines()[-1]


def test_work_that_is_done_once_more_has_a_new_bar():
    with Progress(console=terminal()) as bars:
        report = _Bars(bars, together=False).report
        for name, done in (("fox", 1), ("fox", 2), ("fox", 1), ("code", 1)):
            report(Task("text", name), done, 2)
        assert [task.description for task in bars.tasks] == ["text of fox", "text of fox", "text of code"]


def test_a_log_gets_a_line_every_ten_seconds(clock):
    console = Console(file=io.StringIO(), width=100)
    with show_progress(console, quiet=False) as report:
        for second in range(26):
            clock[0] = float(second)
            report(Task("routers"), second, 50)
            report(Task("weights"), second * 1_000_000, 50_000_000)
    assert console.file.getvalue() == "routers: 10 of 50 layers, 40 s left\nrouters: 20 of 50 layers, 30 s left\n"


def test_a_log_counts_the_time_of_work_that_is_done_once_more_from_its_beginning(clock):
    console = Console(file=io.StringIO(), width=100)
    with show_progress(console, quiet=False) as report:
        for second, done in ((0, 1), (5, 30), (1000, 1), (1020, 11)):
            clock[0] = float(second)
            report(Task("losses", "fox"), done, 30)
    assert console.file.getvalue().splitlines()[-1] == "losses of fox: 11 of 30 layers, 38 s left"


def test_quiet_shows_nothing(clock):
    console = terminal()
    for show in (show_progress, show_work, show_steps):
        with show(console, quiet=True) as report:
            clock[0] += 100.0
            report(Task("weights"), 1, 2)
    assert console.file.getvalue() == ""

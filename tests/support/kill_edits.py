"""Kills edits at random moments: `python -m tests.support.kill_edits MIXTURE FOLDER KILLS`; prints counts as JSON.

Each command is run whole, `moemerge edit` with its words, in a fork of this program: a kill costs no import. After a
kill every model is the old one, the new one or none that a reader could open, and the next command makes it whole.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moemerge.checkpoint import writer
from moemerge.cli import main as moemerge
from tests.support.kill_changes import contents

DROP = ("--drop", "fox")
IN_PLACE = ("--in-place", *DROP)
Files = dict[str, bytes]


def start(*words: str | Path) -> int:
    """Begin a command in a fork, which says nothing; gives its process."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        status = run(*words)
    finally:
        os._exit(status)


def run(*words: str | Path) -> int:
    """Run a command in this process; gives the exit code."""
    sys.argv = ["moemerge", "edit", *map(str, words)]
    try:
        moemerge()
    except SystemExit as end:
        return int(end.code or 0)
    return 1


def command(*words: str | Path) -> int:
    """Run a command to its end; gives the exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(start(*words), 0)[1])


@dataclass(frozen=True)
class Case:
    """A command that is killed."""

    words: tuple[str | Path, ...]
    prepare: Callable[[], None]
    """Makes what is there before it."""
    model: Path
    """The folder that it changes."""
    old: Files
    """What that holds before; nothing where there is no such folder."""
    new: Files
    """What it holds after."""
    following: tuple[tuple[str | Path, ...], ...]
    """Commands, each of which may come next; after the kill the model is the new one then, or else `after`."""
    after: Files

    def seen(self) -> str:
        """What a reader finds now: `old`, `new`, or `none` where it finds no model."""
        found = contents(self.model) if self.model.exists() else {}
        if found in (self.old, self.new):
            return "old" if found == self.old else "new"
        assert "config.json" not in found, found.keys()
        return "none"


def cases(mixture: Path, folder: Path) -> list[Case]:
    home, model, out = folder / "home", folder / "home" / "model", folder / "home" / "out"

    def fresh(*made: tuple[str | Path, ...]) -> Callable[[], None]:
        def prepare() -> None:
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            shutil.copytree(mixture, model)
            for words in made:
                assert command(*words) == 0, words

        return prepare

    def after(target: Path, *made: tuple[str | Path, ...]) -> Files:
        fresh(*made)()
        return contents(target)

    other = (model, out, "--keep", "0,1")
    to_folder, over, inside = (model, out, *DROP), (model, out, *DROP, "--overwrite"), (model, *IN_PLACE)
    undo, commit = (model, "--undo"), (model, "--commit")
    whole, edited, earlier, dropped = after(model), after(model, inside), after(out, other), after(out, to_folder)
    return [
        Case(to_folder, fresh(), out, {}, dropped, (over,), dropped),
        Case(over, fresh(other), out, earlier, dropped, (over,), dropped),
        Case(inside, fresh(), model, whole, edited, (undo, commit, inside), whole),
        Case(undo, fresh(inside), model, edited, whole, (undo,), whole),
        Case(commit, fresh(inside), model, edited, edited, (commit,), edited),
    ]


def kill(case: Case, duration: float, rng: random.Random) -> str | None:
    """Kill a command at a random moment and give what a reader finds then; None where it ended before that."""
    case.prepare()
    process = start(*case.words)
    time.sleep(rng.uniform(0, duration))
    if os.waitpid(process, os.WNOHANG) != (0, 0):
        return None
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return case.seen()


def duration_of(case: Case) -> float:
    """Seconds that a command takes whole."""
    case.prepare()
    begin = time.monotonic()
    assert command(*case.words) == 0, case.words
    duration = time.monotonic() - begin
    assert contents(case.model) == case.new
    return duration


def main(mixture: Path, folder: Path, kills: int) -> None:
    setattr(writer, "CHUNK_BYTES", 1024)  # noqa: B010  it is final for everybody else
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(mixture, folder / "first", *DROP, "--quiet") == 0  # here, so that forks import next to nothing
    rng = random.Random(0)
    counts = {"old": 0, "new": 0, "none": 0}
    made = [(case, duration_of(case)) for case in cases(mixture, folder)]
    while sum(counts.values()) < kills:
        case, duration = rng.choice(made)
        if (seen := kill(case, duration, rng)) is None:
            continue
        counts[seen] += 1
        following = rng.choice(case.following)
        # Where the edit was not begun, or was carried out, there may be nothing to undo or to make final.
        assert command(*following) in {0, 2}, following
        found = contents(case.model)
        assert found in (case.new, case.after), (case.words, seen, following, found.keys())
        left = {path.name for path in case.model.parent.iterdir()} - {"model", "out"}
        assert left <= {".model.moemerge-undo"}, left
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

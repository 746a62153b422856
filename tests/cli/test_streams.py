"""Standard output and error that are closed, full or of a small alphabet, and names that would move the cursor."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moemerge.cli.console import explain_error, stdout
from moemerge.cli.streams import Guarded, guarded_streams, say
from moemerge.errors import CheckpointError, ConfigError
from moemerge.model_card.markdown import as_code, as_text
from moemerge.printable import printable
from tests.support.models import write_config

ROOT = Path(__file__).parents[2]
WARNING = "warning: standard output did not take all of the output ({}); the work is done\n"


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess:
    command = line.replace("moemerge", f"{sys.executable} -m moemerge", 1)
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
        | {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "LC_ALL": "C"},
    )


@pytest.mark.parametrize(
    ("line", "code", "err"),
    [
        ("moemerge c.yaml out >/dev/full 2>err", 0, WARNING.format("No space left on device")),
        ("moemerge c.yaml out >&- 2>err", 0, WARNING.format("it is closed")),
        ("moemerge c.yaml out 2>/dev/full", 0, ""),
        ("moemerge c.yaml out <&- >&- 2>&-", 0, ""),
        ("PYTHONIOENCODING=ascii moemerge c.yaml ö", 0, ""),
        (
            "moemerge plan c.yaml -q >/dev/full 2>err",
            1,
            "error: the result cannot be written to standard output: No space left on device.\n",
        ),
    ],
)
def test_a_merge_ends_whatever_becomes_of_its_words(tmp_path, llamas, line, code, err):
    write_config(tmp_path / "c.yaml", llamas[0], llamas[1:3], prompts=False)
    done = shell(line, tmp_path)
    said = (tmp_path / "err").read_text() if (tmp_path / "err").exists() else done.stderr
    assert done.returncode == code, done.stderr
    assert said.endswith(err)
    assert "Traceback" not in said
    if code == 0:
        assert any((tmp_path / name / "config.json").exists() for name in ("out", "ö"))


def test_a_stream_that_fails_is_asked_no_more():
    class Full(io.StringIO):
        tries = 0

        def write(self, _text):
            self.tries += 1
            raise OSError(28, "No space left on device")

    full = Full()
    guard = Guarded(full)
    assert guard.write("one") == 3
    guard.write("two")
    guard.flush()
    assert full.tries == 1
    assert guard.why == "No space left on device"


def test_streams_are_put_back(capsys):
    before = sys.stdout, sys.stderr
    with guarded_streams() as (out, err):
        assert (sys.stdout, sys.stderr) == (out, err)
        say("one \x1b[31mred\x07")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "one \\x1b[31mred\\x07\n"


def test_nothing_that_is_printed_moves_the_cursor(capsys):
    from rich.table import Table

    console = stdout()
    table = Table("na\x1bme", box=None)
    table.add_row("\x9b31m")
    console.print("a\rb\u202ec")
    console.print(table)
    found = capsys.readouterr().out
    assert not set("\x1b\r\u202e\x9b").intersection(found)
    assert "a\\rb\\u202ec" in found
    assert "\\x9b31m" in found


def test_messages_are_short_and_safe():
    long = str(CheckpointError("x" * 400_000 + "\x1b[2J end"))
    assert len(long.encode()) < 4000
    assert long.startswith("xxx")
    assert long.endswith("\\x1b[2J end")
    assert len(str(CheckpointError("\U0001f389" * 5000)).encode()) < 4000
    many = ConfigError("c.yaml: 5000 problems:", [f"line {n}: {'y' * 900}" for n in range(5000)])
    assert len(many.problems) == 5000
    assert len(str(many).encode()) < 4000
    assert "and 4970 more" in str(many)
    text, code = explain_error(RuntimeError("z" * 400_000))
    assert (len(text) < 4000, code) == (True, 1)
    assert explain_error(RuntimeError("can't start new thread")) == (
        "error: the system starts no more threads. Raise its limits, `ulimit -u` and `ulimit -v`.",
        1,
    )
    assert explain_error(OSError(24, "Too many open files"))[0].startswith("error: too many files are open.")
    assert printable("a\ud83cb\tc\n") == "a\\ud83cb\tc\n"


@pytest.mark.parametrize(
    ("text", "plain", "code"),
    [
        ("a|b", "a\\|b", "`a\\|b`"),
        ("<img src=x>", "&lt;img src=x&gt;", "`<img src=x>`"),
        ("[x](http://y) **b**", "\\[x\\](http://y) \\*\\*b\\*\\*", "`[x](http://y) **b**`"),
        ("a\n# b", "a \\# b", "`a # b`"),
        ("``tick`", "\\`\\`tick\\`", "``` ``tick` ```"),
    ],
)
def test_text_of_anybody_stays_text_on_a_card(text, plain, code):
    assert as_text(text) == plain
    assert as_code(text) == code

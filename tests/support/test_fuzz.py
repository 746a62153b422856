"""The fuzzer itself: it finds nothing in a few cases, and notices what it is there to notice."""

import time

import pytest

from moemerge.errors import CheckpointError
from tests.support import fuzz


def test_a_few_cases_of_each_kind_have_no_faults(capsys):
    assert fuzz.main(["--cases", str(12 * len(fuzz.TARGETS)), "--seed", "1"]) == 0
    assert capsys.readouterr().out.endswith("no faults\n")


def _break(error):
    def target(_fuzz, _rng):
        raise error

    return target


def _slow(_fuzz, _rng):
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass


def _long(_fuzz, _rng):
    error = CheckpointError("x")
    error.args = ("x" * 5000,)
    raise error


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (_break(KeyError("x")), "KeyError: 'x'"),
        (_slow, "0.3 s, "),
        (_long, "a message of 5000 bytes"),
        (lambda *_: bytearray(80_000_000), " MB"),
        (_break(CheckpointError("refused")), ""),
    ],
)
def test_faults_are_noticed(monkeypatch, capsys, tmp_path, target, told):
    monkeypatch.setattr(fuzz, "TARGETS", {"cards": target})
    monkeypatch.setattr(fuzz, "FAMILIES", ())
    monkeypatch.setattr(fuzz, "SECONDS", 0.25)
    monkeypatch.setattr(fuzz, "MEGABYTES", 60)
    monkeypatch.setattr(fuzz.tempfile, "tempdir", str(tmp_path))  # where a failing case is kept
    assert fuzz.main(["--cases", "1"]) == int(bool(told))
    printed = capsys.readouterr().out
    assert told in printed if told else printed.endswith("no faults\n")

"""Models that many tests share, built once."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moemerge.cli import main
from tests.support.hub_world import machine, world  # noqa: F401  fixtures
from tests.support.models import make_model
from tests.support.store_server import bucket, store_server  # noqa: F401  fixtures


@pytest.fixture(scope="session", autouse=True)
def _no_losses_of_other_runs(tmp_path_factory) -> Iterator[None]:
    """Keeps losses that `moemerge eval` keeps in a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def llamas(tmp_path_factory) -> list[Path]:
    """A base and three fine-tunes of it; tests must not change them."""
    root = tmp_path_factory.mktemp("llamas")
    return [
        make_model(root / "base"),
        *(make_model(root / name, seed, tuned_from=0) for seed, name in enumerate(("fox", "code", "chat"), 1)),
    ]


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process; gives the exit code and both outputs."""

    def run_here(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moemerge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run_here

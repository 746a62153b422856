"""The Hub of the tests, in a process of its own, which serves folders of models as they lie there."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from workshop import HERE


@dataclass(frozen=True)
class Counts:
    """What went over the wire."""

    weights_sent: int
    """Bytes of safetensors files, headers among them."""
    received: int
    """Bytes of large files that were uploaded."""
    requests: dict[str, int]
    """To the Hub, and to its hosts for downloads and uploads."""


class HubProcess:
    """A Hub that was started."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        assert process.stdout
        self.environment = dict(pair.split("=", 1) for pair in process.stdout.readline().split())
        """What a client needs to be told."""

    def counts(self) -> Counts:
        """Of what happened since the last call; what was pushed since is removed."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        files = [(path, count) for sent in told["sent"].values() for path, count in sent.items()]
        sent = sum(count for path, count in files if path.endswith(".safetensors"))
        return Counts(sent, told["received"], {name: told["requests"].get(name, 0) for name in HOSTS})


HOSTS = ("hub", "cdn", "uploads")


@contextmanager
def serving(served: Path, store: Path) -> Iterator[HubProcess]:
    """Serve every `user/name` below `served`; uploads are kept in `store`, which is removed at the end.

    Nothing is hashed: gigabytes of it would compete with what is measured.
    """
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "tests.support.hub_server",
        served,
        store,
        "--unhashed",
        "--counts",
    ]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE.parent
    ) as process:
        try:
            yield HubProcess(process)
        finally:
            process.kill()
            shutil.rmtree(store, ignore_errors=True)

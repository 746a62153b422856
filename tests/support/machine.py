"""A machine of its own: a folder, a cache, and the address of a Hub; each command line runs in its own process."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.support.forks import run_forked

ROOT = Path(__file__).parents[2]
SINGLE = "model.safetensors"
SECONDS = 120
"""After so long a command is ended."""
# Runs command lines one after the other, each with changes to the environment.
SESSION = """
import contextlib, io, json, os, sys
from moemerge.cli import main

results = []
for arguments, environment in json.loads(sys.argv[1]):
    os.environ.update(environment)
    sys.argv[1:] = arguments
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""
HURRIED = """
import os

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the command line does before it imports the Hub's client
from moemerge.cli import main
from moemerge.sources import retries

retries.FIRST_WAIT = 0.01
main()
"""


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Machine:
    """A machine with a cache of its own, and the address that it knows the Hub by."""

    folder: Path
    hub_url: str

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self._environment() | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def python(self, *arguments: str, **environment: str) -> Result:
        if platform.system() == "Linux":
            return Result(*run_forked([*arguments], self.folder, self._environment() | environment, SECONDS))
        with self.start(*arguments, **environment) as child:
            try:
                out, err = child.communicate(timeout=SECONDS)
            except BaseException:
                child.kill()
                raise
        return Result(child.returncode, out, err)

    def _environment(self) -> dict[str, str]:
        ours = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHONPATH")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
        hub = {"HF_ENDPOINT": self.hub_url, "HF_HOME": str(self.folder / "home"), "HF_HUB_CACHE": str(self.cache)}
        return kept | hub | {"PYTHONPATH": str(ROOT)}

    def moemerge(self, *arguments: str, **environment: str) -> Result:
        return self.python("-m", "moemerge", *arguments, **environment)

    def in_a_hurry(self, *arguments: str, **environment: str) -> Result:
        """A command line that hardly waits, where what goes on after a wait is tested, and not the wait."""
        return self.python("-c", HURRIED, *arguments, **environment)

    def session(self, *commands: list[str] | tuple[list[str], dict[str, str]], **environment: str) -> list[Result]:
        """Several command lines in one process, which starts faster than many."""
        pairs = [command if isinstance(command, tuple) else (command, {}) for command in commands]
        done = self.python("-c", SESSION, json.dumps(pairs), **environment)
        assert (done.code, done.err) == (0, "")
        return [Result(*values) for values in json.loads(done.out)]

    def snapshot(self, repo: str) -> Path:
        (found,) = (self.cache / f"models--{repo.replace('/', '--')}" / "snapshots").iterdir()
        return found

    def write_config(self, base: str, *experts: str) -> str:
        document = {"base_model": base, "gate_mode": "random", "experts": [{"source_model": e} for e in experts]}
        path = self.folder / f"merge{len(list(self.folder.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(document))
        return str(path)

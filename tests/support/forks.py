"""Python processes that do not wait for imports: forks of a server that has imported what takes long.

The server imports third-party modules alone, and none that reads the environment meanwhile: each fork imports
`moemerge`, `huggingface_hub` and `transformers` with the environment of its own command.
"""

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLOW = (
    "torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor",
    "torch.export", "numpy", "scipy.optimize", "safetensors.torch", "tokenizers", "httpx", "httpx2", "jinja2", "pydantic",
    "rich.console", "typer", "yaml",
)  # fmt: skip


def run_forked(words: list[str], folder: Path, environment: dict[str, str], seconds: int) -> tuple[int, str, str]:
    """Run `python WORDS`, which begin with -c or -m, in a folder; gives the exit code and both outputs.

    After so many seconds it is killed.
    """
    server = _server(os.getpid())
    assert server.stdin
    assert server.stdout
    with tempfile.TemporaryDirectory() as outputs:
        places = [f"{outputs}/out", f"{outputs}/err"]
        json.dump([seconds, words, str(folder), environment, places], server.stdin)
        server.stdin.write("\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        out, err = (Path(place).read_text() for place in places)
    return code, out, err


@cache
def _server(process: int) -> subprocess.Popen[str]:
    """The server of a process, which ends with it."""
    command = [sys.executable, "-m", "tests.support.forks"]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _serve() -> None:
    """Fork for each request, until nobody can write any more."""
    for name in SLOW:
        with contextlib.suppress(ImportError):  # not every version of our dependencies has all of them
            importlib.import_module(name)
    gc.freeze()  # forks share the pages of what is there, as long as they do not look for garbage in it
    while line := sys.stdin.readline():
        seconds, *request = json.loads(line)
        process = multiprocessing.get_context("fork").Process(target=_become, args=request)
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        print(process.exitcode, flush=True)


def _become(words: list[str], folder: str, environment: dict[str, str], outputs: list[str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    way, what, *arguments = words
    sys.path[0] = folder
    sys.argv = [way, *arguments]
    if way == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})  # noqa: S102


if __name__ == "__main__":
    _serve()

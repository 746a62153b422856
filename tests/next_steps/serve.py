"""Serve a merged model by the command that its card and docs/next-steps.md name, and ask the server once.

python -m tests.next_steps.serve VLLM_PYTHON FOLDER
"""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from moemerge.card_usage import use_it

PAGE = Path(__file__).parents[2] / "docs" / "next-steps.md"
ADDRESS = "http://127.0.0.1:8000/v1/completions"
SECONDS = 900
STOP_SECONDS = 60


def command(folder: str) -> list[str]:
    """The words of the card's command; the page has the same."""
    named = {
        name: next(line for line in "\n".join(use_it(name, "mixtral", ["vllm"])).split("`") if "vllm." in line)
        for name in (folder, "out/")
    }
    assert f"    {named['out/']}\n" in PAGE.read_text(), named["out/"]
    return shlex.split(named[folder])


@contextmanager
def served(python: str, words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The server, ended by its id."""
    assert words[0] == "python"
    server = subprocess.Popen([python, *words[1:]])
    try:
        yield server
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()


def ask(server: subprocess.Popen[bytes], folder: str, prompt: str) -> str:
    """How the model goes on with a text, once the server answers."""
    asked = json.dumps({"model": folder, "prompt": prompt, "max_tokens": 20, "temperature": 0}).encode()
    for _ in range(SECONDS):
        assert server.poll() is None, f"the server has ended with {server.returncode}"
        try:
            with urlopen(Request(ADDRESS, asked, {"Content-Type": "application/json"})) as answer:
                return str(json.load(answer)["choices"][0]["text"])
        except URLError:  # not yet
            time.sleep(1)
    raise TimeoutError(f"the server has not answered within {SECONDS} seconds")


def main() -> None:
    python, folder = sys.argv[1:]
    with served(python, command(folder)) as server:
        text = ask(server, folder, "Once upon a time")
    assert text.strip()
    print(f"Once upon a time{text}")


if __name__ == "__main__":
    main()

"""Serve a merged model by the command that its card and docs/next-steps.md name, and ask the server once.

python -m tests.next_steps.serve VLLM_PYTHON FOLDER
"""

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from moemerge.model_card.usage import use_it

PAGE = Path(__file__).parents[2] / "docs" / "next-steps.md"
HOST = "127.0.0.1"
SECONDS = 900
STOP_SECONDS = 60


def command(folder: str, port: int) -> list[str]:
    """The words of the card's command, with a port; the page has the same."""
    named = {
        name: next(line for line in use_it(name, "mixtral", ["vllm"]).split("`") if "vllm." in line)
        for name in (folder, "out/")
    }
    assert f"    {named['out/']}\n" in PAGE.read_text(), named["out/"]
    return [*shlex.split(named[folder]), "--port", str(port)]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        return int(listening.getsockname()[1])


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
            server.wait()


def ask(server: subprocess.Popen[bytes], port: int, folder: str, prompt: str) -> str:
    """How the model goes on with a text, once the server answers.

    Raises:
        RuntimeError: the server refuses the request; with its words.
        TimeoutError: it does not answer.
    """
    address = f"http://{HOST}:{port}/v1/completions"
    asked = json.dumps({"model": folder, "prompt": prompt, "max_tokens": 20, "temperature": 0}).encode()
    for _ in range(SECONDS):
        assert server.poll() is None, f"the server has ended with {server.returncode}"
        try:
            with urlopen(Request(address, asked, {"Content-Type": "application/json"}), timeout=SECONDS) as answer:
                return str(json.load(answer)["choices"][0]["text"])
        except HTTPError as error:
            raise RuntimeError(f"{error}: {error.read().decode(errors='replace')}") from error
        except URLError:  # not yet
            time.sleep(1)
    raise TimeoutError(f"the server has not answered within {SECONDS} seconds")


def main() -> None:
    python, folder = sys.argv[1:]
    port = free_port()
    with served(python, command(folder, port)) as server:
        text = ask(server, port, folder, "Once upon a time")
    assert text.strip()
    print(f"Once upon a time{text}")


if __name__ == "__main__":
    main()

"""What llama.cpp's converter and engine make of a model, each asked in a process of its own."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

_CHILDREN = multiprocessing.get_context("forkserver")
# Imported once, by the process of which all others are copies.
_CHILDREN.set_forkserver_preload(["tests.llamacpp.child", "pytest"])


def converted(folder: Path, kind: str, pre: str = "llama-bpe", options: tuple[str, ...] = ()) -> Path | str:
    """The file that the converter makes of a checkpoint, matrices stored as `kind`, or with what message it fails."""
    return _answer(folder, _convert, folder, ("--outtype", kind, *options), pre)


def encoded(gguf: Path, texts: list[str]) -> list[list[int]] | str:
    """What the engine's tokenizer makes of texts, with what it puts around each; a message where it reads no file."""
    return _answer(gguf, _encode, gguf, texts) or "engine: gave no answer"


def computed(gguf: Path, tokens: list[list[int]]) -> np.ndarray | None:
    """Logits of a file, (sequence, position, vocab); None where the engine does not load it."""
    return _answer(gguf, _compute, gguf, tokens)


def _answer(path: Path, target: Callable[..., None], *arguments: Any) -> Any:
    """What a process of its own sends; None where it ends without."""
    receiver, sender = _CHILDREN.Pipe(duplex=False)
    process = _CHILDREN.Process(target=target, args=(sender, path.with_suffix(".log"), *arguments))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = None
    process.join()
    receiver.close()
    return answer


def _writing_to(log: Path) -> None:
    """Have all output go to a file: the engine writes its reasons from C++."""
    with log.open("wb") as written:
        os.dup2(written.fileno(), 1)
        os.dup2(written.fileno(), 2)


def _convert(sender: Connection, log: Path, folder: Path, options: tuple[str, ...], pre: str) -> None:
    from tests.llamacpp import child

    _writing_to(log)
    try:
        sender.send(child.convert(folder, options, pre=pre))
    except (Exception, SystemExit) as error:  # noqa: BLE001
        sender.send(f"converter: {type(error).__name__}: {error}")


def _compute(sender: Connection, log: Path, gguf: Path, tokens: list[list[int]]) -> None:
    from tests.llamacpp import child

    _writing_to(log)
    try:
        sender.send(child.compute(gguf, tokens))
    except ValueError:
        sender.send(None)


def _encode(sender: Connection, log: Path, gguf: Path, texts: list[str]) -> None:
    from tests.llamacpp import child

    _writing_to(log)
    sender.send(child.encode(gguf, texts))

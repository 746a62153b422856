"""What llama.cpp makes of a model: its logits, or in words why there are none."""

import multiprocessing
import os
import re
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

_CHILDREN = multiprocessing.get_context("forkserver")
# Imported once, by the process of which all others are copies.
_CHILDREN.set_forkserver_preload(["tests.llamacpp.child", "pytest"])
_REASON = re.compile(r"error loading model: (.*)|(GGML_ASSERT\(.*\) failed)")


def logits(
    folder: Path, tokens: list[list[int]], options: tuple[str, ...] = (), *, own_vocab: bool = True
) -> np.ndarray | str:
    """Logits of a model, (sequence, position, vocab), or which step fails and with what message."""
    receiver, sender = _CHILDREN.Pipe(duplex=False)
    log = folder.with_suffix(".log")
    process = _CHILDREN.Process(target=_run, args=(sender, log, folder, tokens, (options, own_vocab)))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = None
    process.join()
    receiver.close()
    if answer is None:
        reasons = _REASON.findall(log.read_text(errors="replace"))
        return "engine: " + "".join(reasons[-1] if reasons else ["gave no reason"])
    return answer


def _run(
    sender: Connection, log: Path, folder: Path, tokens: list[list[int]], how: tuple[tuple[str, ...], bool]
) -> None:
    from tests.llamacpp import child

    # The engine writes its reasons there, from C++.
    with log.open("wb") as written:
        os.dup2(written.fileno(), 1)
        os.dup2(written.fileno(), 2)
    try:
        options, own_vocab = how
        gguf = child.convert(folder, options, own_vocab=own_vocab)
    except (Exception, SystemExit) as error:  # noqa: BLE001
        sender.send(f"converter: {type(error).__name__}: {error}")
        return
    try:
        sender.send(child.compute(gguf, tokens))
    except ValueError:
        sender.send(None)

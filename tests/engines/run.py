"""Run one engine over every case: what it computes is compared with what transformers computes.

    ENGINE'S PYTHON run.py ENGINE FOLDER [BEGINNING]

Engines have environments of their own: it imports nothing of moemerge, but for llama.cpp's, whose files moemerge writes.
Of each case a process of its own is asked, which the engine may end; only cases without an answer of this engine are
tried (and of the same `MADE_BY`, where its module has one), and whose folder's name begins as asked.
"""

import importlib
import json
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_SECONDS = 300
_REASONS = re.compile(r"error loading model: (.*)|(GGML_ASSERT\(.*\) failed)")


def main(engine: str, root: Path, beginning: str = "") -> None:
    """Ask the engine about every case."""
    sys.path.insert(0, str(Path(__file__).parent))
    module = importlib.import_module(f"{engine}_engine")
    identity = {"engine": module.version()}
    if hasattr(module, "MADE_BY"):
        identity["made_by"] = module.MADE_BY
    for path in sorted(root.glob(f"{beginning}*/case.json")):
        answer = path.with_name(f"{engine}.answer.json")
        if answer.exists() and identity.items() <= json.loads(answer.read_text()).items():
            continue
        begun = time.monotonic()
        found = _ask(module, path.parent)
        answer.write_text(json.dumps(found | identity | {"date": time.strftime("%Y-%m-%d")}))
        sys.stdout.write(f"{time.monotonic() - begun:4.0f} s  {path.parent.name}: {found}\n")
        sys.stdout.flush()


def _ask(module: Any, folder: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    log = folder / f"{module.__name__}.log"
    process = context.Process(target=_answer, args=(sender, module, folder, log))
    process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(_SECONDS) else None
    except EOFError:
        answer = None
    if answer is None:
        process.kill()
    process.join()
    text = log.read_text(errors="replace")
    log.unlink()
    if answer is None:
        answer = {"fails": f"the process ends with code {process.exitcode}"}
    if "fails" in answer and (reasons := _REASONS.findall(text)):
        answer["fails"] = "".join(reasons[-1])
    return answer


def _answer(sender: Any, module: Any, folder: Path, log: Path) -> None:
    with log.open("wb") as written:  # engines write their reasons there, from C++ too
        os.dup2(written.fileno(), 1)
        os.dup2(written.fileno(), 2)
    tokens = json.loads((folder / "tokens.json").read_text())
    expected = np.load(folder / "expected.npz")
    try:
        logprobs, generated = module.compute(folder, tokens, expected["generated"].shape[1])
    except (Exception, SystemExit) as error:  # noqa: BLE001
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        sender.send({"fails": " ".join(line.strip() for line in lines)[:300]})
        return
    # The first token's is known to no engine.
    apart = np.abs(np.asarray(logprobs, dtype=np.float64) - expected["logprobs"][:, : np.shape(logprobs)[1]])
    sender.send(
        {
            "apart": None if np.isnan(apart).any() else float(f"{apart.max():.1e}"),
            "generates": bool(np.array_equal(generated, expected["generated"])),
        }
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])

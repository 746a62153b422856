"""What a document's own dense expert predicts, computed once and kept in files.

No teacher is in memory with the student.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file

from moemerge.checkpoint.disk import flush
from moemerge.evaluation.runnable import Runnable
from moemerge.evaluation.running import run_model
from moemerge.passes.tokens import Window

# Of the teacher's distribution; all others together are one more class.
_TOP: Final = 64


class Predictions:
    """A teacher's most likely tokens after each token of some windows."""

    def __init__(self, path: Path, windows: Sequence[Window]) -> None:
        """Read predictions that `predict` has written for these windows."""
        stored = load_file(path)
        self._likely = dict(zip(windows, stored["tokens"].split([len(w.ids) for w in windows]), strict=True))
        self._logs = dict(zip(windows, stored["logs"].split([len(w.ids) for w in windows]), strict=True))

    def divergence(self, window: Window, logits: torch.Tensor) -> torch.Tensor:
        """KL(teacher || student) in nats after each token but the last: (token - 1,).

        Args:
            window: of text.
            logits: (token, vocab) of the student, in float32.
        """
        device = logits.device
        likely, teacher = self._likely[window][:-1].long().to(device), self._logs[window][:-1].to(device)
        student = logits[:-1].log_softmax(dim=1).gather(1, likely)
        rest, mine = _rest(teacher), _rest(student)
        kept: torch.Tensor = (teacher.exp() * (teacher - student)).sum(dim=1) + rest.exp() * (rest - mine)
        return kept


def _rest(logs: torch.Tensor) -> torch.Tensor:
    """Logarithm of the probability that is not in (token, top) logarithms: (token,)."""
    return (1 - logs.exp().sum(dim=1)).clamp_min(1e-6).log()


def predict(  # noqa: PLR0917
    expert: Runnable, windows: Sequence[Window], path: Path, vocab: int, device: torch.device,
    progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Run a dense expert a layer at a time, and write its most likely tokens to `path`, which then appears whole.

    Args:
        expert: the teacher.
        windows: of text.
        path: where to.
        vocab: tokens that the student has; of more, the teacher's are left out.
        device: where it runs.
        progress: called with the layers done and all there are.

    Raises:
        CheckpointError: its tensors do not fit its class, or it lacks a token.
    """
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(window: int, logits: torch.Tensor) -> None:
        top = logits[:, :vocab].log_softmax(dim=1).topk(min(_TOP, vocab), dim=1)
        found[window] = top.indices.int().cpu(), top.values.cpu()

    run_model(expert, windows, device, predicted=keep, progress=progress)
    tokens, logs = zip(*(found[place] for place in range(len(windows))), strict=True)
    draft = path.with_name(f"{path.name}.new")
    save_file({"tokens": torch.cat(tokens), "logs": torch.cat(logs)}, draft)
    flush(draft)
    draft.replace(path)

"""The dense models that a mixture was merged from, opened again, and what they predict, computed once and kept.

No teacher is in memory with the student.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file

from moemerge.checkpoint.disk import drafted
from moemerge.config.schema import CONFIG_COPY
from moemerge.errors import MoemergeError, RefusedError
from moemerge.evaluation.runnable import MixtureModel, Runnable, open_dense
from moemerge.evaluation.running import run_model
from moemerge.passes.tokens import Window
from moemerge.tuning.batches import Batches
from moemerge.tuning.context import TuningContext

# Of the teacher's distribution; all others together are one more class.
_TOP: Final = 64


def open_source(
    mixture: MixtureModel, expert: int | None, needs: str, announce: Callable[[str], None]
) -> Runnable:  # fmt: skip
    """A dense expert, or the base for None.

    Args:
        mixture: what was merged.
        expert: its number.
        needs: what it is needed for, in words.
        announce: called with a line about what takes long.

    Raises:
        RefusedError: it cannot be had.
    """
    if mixture.config is None:
        raise RefusedError(
            f"{mixture.folder}: does not say what it was merged from, and {needs}. Give --no-distil and --method gates."
        )
    reference = mixture.config.base_model if expert is None else mixture.config.experts[expert].source_model
    try:
        return open_dense(reference, reference, announce)
    except MoemergeError as error:
        raise RefusedError(
            f"{needs}, and one cannot be had: {error} Paths in {CONFIG_COPY} count from the folder that it was merged "
            "in; --no-distil and --method gates do without."
        ) from error


class Predictions:
    """A teacher's most likely tokens after each token of some windows."""

    def __init__(self, path: Path, windows: Sequence[Window]) -> None:
        """Read predictions that `predict` has written for these windows."""
        stored, lengths = load_file(path), [len(window.ids) for window in windows]
        self._top_tokens = dict(zip(windows, stored["tokens"].split(lengths), strict=True))
        self._log_probs = dict(zip(windows, stored["log_probs"].split(lengths), strict=True))

    def divergence(self, window: Window, logits: torch.Tensor) -> torch.Tensor:
        """KL(teacher || student) in nats after each token but the last: (token - 1,).

        Args:
            window: of text.
            logits: (token, vocab) of the student, in float32.
        """
        device = logits.device
        top, teacher = self._top_tokens[window][:-1].long().to(device), self._log_probs[window][:-1].to(device)
        student = logits[:-1].log_softmax(dim=1).gather(1, top)
        rest, mine = _rest(teacher), _rest(student)
        kept: torch.Tensor = (teacher.exp() * (teacher - student)).sum(dim=1) + rest.exp() * (rest - mine)
        return kept


def _rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Logarithm of the probability that is not in (token, top) logarithms: (token,)."""
    return (1 - log_probs.exp().sum(dim=1)).clamp_min(1e-6).log()


def open_teachers(context: TuningContext, batches: Batches, *, resume: bool) -> dict[int, Runnable]:
    """By domain the expert that teaches, unless its predictions are there to be resumed with.

    Raises:
        RefusedError: one cannot be had.
    """
    needs = "distillation needs the dense experts"
    return {
        domain: open_source(context.mixture, expert, needs, context.announce)
        for domain, expert in enumerate(batches.training.expert)
        if not (resume and _file(context, domain).exists())
    }


def teach(context: TuningContext, batches: Batches, teachers: Mapping[int, Runnable]) -> dict[int, Predictions]:
    """By domain, what its expert predicts after the text that steps with distillation read.

    The first process computes it, unless an earlier run has; all others wait.

    Args:
        context: the tuning.
        batches: of all domains.
        teachers: by domain, those of `open_teachers`.

    Raises:
        CheckpointError: an expert's tensors do not fit its class.
    """
    found = {}
    for domain, name in enumerate(batches.training.domains):
        path, windows = _file(context, domain), batches.taught(domain)
        if context.processes.first and not path.exists():
            tokens = sum(len(window.ids) for window in windows)
            context.announce(f"{name}: its own expert predicts {tokens} tokens of it")
            vocab = int(context.mixture.runnable.keys["vocab_size"])
            report = partial(context.progress, f"teacher {name}")
            predict(teachers[domain], windows, path, vocab, context.processes.device, report)
        context.processes.wait()
        found[domain] = Predictions(path, windows)
    return found


def _file(context: TuningContext, domain: int) -> Path:
    return context.work.folder / f"teacher-{domain}.safetensors"


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
    tokens, log_probs = zip(*(found[place] for place in range(len(windows))), strict=True)
    with drafted(path) as draft:
        save_file({"tokens": torch.cat(tokens), "log_probs": torch.cat(log_probs)}, draft)

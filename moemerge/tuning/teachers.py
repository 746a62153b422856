"""Open the dense models that a mixture was merged from, and keep their predictions, which are computed once.

No teacher is in memory together with the student.
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
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window
from moemerge.progress import Task
from moemerge.tuning.batches import Batches
from moemerge.tuning.context import TuningContext

# Tokens kept of the teacher's distribution; all others together are one more class.
_TOP: Final = 64


def open_source(mixture: MixtureModel, expert: int | None, needs: str, announce: Callable[[str], None]) -> Runnable:
    """Open a dense expert, or the base for None.

    Args:
        mixture: the mixture that was merged from it.
        expert: the expert's number.
        needs: what the model is needed for, in words.
        announce: called with a line about each step that takes long.

    Raises:
        RefusedError: the model cannot be opened.
    """
    if mixture.config is None:
        raise RefusedError(
            f"{mixture.folder}: does not say what it was merged from, and {needs}. Leave that option out."
        )
    reference = mixture.config.base_model if expert is None else mixture.config.experts[expert].source_model
    try:
        return open_dense(reference, reference, announce, ids_of=mixture.ids_of)
    except MoemergeError as error:
        raise RefusedError(
            f"{needs}, and one cannot be had: {error} Paths in {CONFIG_COPY} count from its folder, "
            "else from the current one; without that option none is needed."
        ) from error


class Predictions:
    """A teacher's most likely tokens after each token of some windows."""

    def __init__(self, path: Path, windows: Sequence[Window]) -> None:
        """Read the predictions that `predict` has written for these windows."""
        stored, lengths = load_file(path), [len(window.ids) for window in windows]
        self._top_tokens = dict(zip(windows, stored["tokens"].split(lengths), strict=True))
        self._log_probs = dict(zip(windows, stored["log_probs"].split(lengths), strict=True))

    def divergence(self, window: Window, logits: torch.Tensor) -> torch.Tensor:
        """KL(teacher || student) in nats after each token but the last: (token - 1,).

        Args:
            window: the window of text.
            logits: logits (token, vocab) of the student, in float32.
        """
        device = logits.device
        top, teacher = self._top_tokens[window][:-1].long().to(device), self._log_probs[window][:-1].to(device)
        student = logits[:-1].log_softmax(dim=1).gather(1, top)
        rest, mine = _rest(teacher), _rest(student)
        kept: torch.Tensor = (teacher.exp() * (teacher - student)).sum(dim=1) + rest.exp() * (rest - mine)
        return kept


def _rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Logarithm (token,) of the probability that is not in the logarithms (token, top)."""
    return (1 - log_probs.exp().sum(dim=1)).clamp_min(1e-6).log()


def distillation_loss(windows: Sequence[Window], logits: torch.Tensor, teachers: Sequence[Predictions]) -> torch.Tensor:
    """KL(teacher || mixture) in nats, summed over each window's tokens that are scored: (window,).

    Args:
        windows: the windows of text.
        logits: the mixture's logits (window, position, vocab).
        teachers: for each window, its own expert's predictions.
    """
    losses = []
    for window, found, teacher in zip(windows, logits, teachers, strict=True):
        scored = torch.tensor(window.scored, device=logits.device)
        losses.append(teacher.divergence(window, found[: len(window.ids)].float())[scored].sum())
    return torch.stack(losses)


def open_teachers(context: TuningContext, batches: Batches, *, resume: bool) -> dict[int, Runnable]:
    """Open the expert that teaches each domain, unless its predictions can be resumed; returns them by domain.

    Raises:
        RefusedError: an expert cannot be opened.
    """
    needs = "--distil needs the dense experts"
    return {
        domain: open_source(context.mixture, expert, needs, context.announce)
        for domain, expert in enumerate(batches.training.expert)
        if not (resume and _file(context, domain).exists())
    }


def teach(context: TuningContext, batches: Batches, teachers: Mapping[int, Runnable]) -> dict[int, Predictions]:
    """Let each domain's expert predict the text that steps with distillation read; returns predictions by domain.

    The first process computes them, unless an earlier run has; all others wait.

    Args:
        context: the context of the tuning.
        batches: the windows of all domains.
        teachers: the experts of `open_teachers`, by domain.

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
            report = partial(context.progress, Task("teacher", name))
            predict(teachers[domain], windows, path, vocab, context.teaching, report)
        context.processes.wait()
        found[domain] = Predictions(path, windows)
    return found


def _file(context: TuningContext, domain: int) -> Path:
    return context.work.folder / f"teacher-{domain}.safetensors"


def predict(  # noqa: PLR0917
    expert: Runnable,
    windows: Sequence[Window],
    path: Path,
    vocab: int,
    compute: Compute,
    progress: Callable[[int, int], None],
) -> None:
    """Run a dense expert a layer at a time, and write its most likely tokens to `path`, which then appears whole.

    Args:
        expert: the teacher.
        windows: the windows of text.
        path: the file to write.
        vocab: the student's number of tokens; further tokens of the teacher are left out.
        compute: the device and dtype to run in.
        progress: called with the layers done and all there are.

    Raises:
        CheckpointError: the expert's tensors do not fit its class, or it lacks a token.
    """
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(window: int, logits: torch.Tensor) -> None:
        top = logits[:, :vocab].log_softmax(dim=1).topk(min(_TOP, vocab), dim=1)
        found[window] = top.indices.int().cpu(), top.values.cpu()

    run_model(expert, windows, compute, predicted=keep, progress=progress)
    tokens, log_probs = zip(*(found[place] for place in range(len(windows))), strict=True)
    with drafted(path) as draft:
        save_file({"tokens": torch.cat(tokens), "log_probs": torch.cat(log_probs)}, draft)

"""The dense models that a mixture was merged from, opened again: as teachers, and for PHATGOOSE."""

from collections.abc import Callable
from functools import partial
from typing import Any

from moemerge.config import CONFIG_COPY
from moemerge.errors import MoemergeError, RefusedError
from moemerge.evaluation.runnable import MixtureModel, Runnable, open_dense
from moemerge.tuning.batches import Batches
from moemerge.tuning.teacher import Predictions, predict
from moemerge.tuning.work import Work


def open_expert(
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


def teach(  # noqa: PLR0917
    mixture: MixtureModel, batches: Batches, work: Work, accelerator: Any, progress: Callable[[str, int, int], None],
    announce: Callable[[str], None],
) -> dict[int, Predictions]:  # fmt: skip
    """By domain, what its expert predicts after the text that steps with distillation read.

    The first process computes it, unless an earlier run has; all others wait.

    Raises:
        RefusedError: an expert cannot be had.
        CheckpointError: its tensors do not fit its class.
    """
    found = {}
    for domain, expert in enumerate(batches.training.expert):
        path = work.folder / f"teacher-{domain}.safetensors"
        windows = batches.taught(domain)
        if accelerator.is_main_process and not path.exists():
            model = open_expert(mixture, expert, "distillation needs the dense experts", announce)
            report = partial(progress, f"teacher {batches.training.domains[domain]}")
            vocab = int(mixture.runnable.keys["vocab_size"])
            predict(model, windows, path, vocab, accelerator.device, report)
        accelerator.wait_for_everyone()
        found[domain] = Predictions(path, windows)
    return found

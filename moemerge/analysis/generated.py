"""Load of experts while a mixture generates text."""

from typing import Final

import numpy as np

from moemerge.analysis.figures import Numbers
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.runnable import MixtureModel
from moemerge.generation.loading import load_model
from moemerge.generation.recorder import RouterRecorder
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.device import memory_watched
from moemerge.passes.generating import Sampling, generate_tokens, stop_tokens
from moemerge.passes.tokens import load_tokenizer
from moemerge.progress import Progress, Task

# Windows of each domain that are continued, and how many of their first tokens are read.
_WINDOWS: Final = 4
_TOKENS: Final = 32


def generated_load(
    mixture: MixtureModel, texts: Texts, compute: Compute, tokens: int, progress: Progress
) -> tuple[Numbers, int]:
    """Continue the beginnings of some windows of each domain, and count the experts of the new tokens.

    Each new token is the most likely one. Of 4 windows of a domain, those of its first documents, the first 32 tokens
    are read, or the first half of a shorter window.

    Args:
        mixture: the mixture.
        texts: windows of text by domain.
        compute: the device and dtype to run in.
        tokens: most new tokens of each window; a text may end before.
        progress: called with the layers that are loaded, and then with the tokens done and all there are.

    Returns:
        Share of the new tokens that choose each expert (layer, expert), and their number, 0 where all texts end at
        once.

    Raises:
        RefusedError: the whole model does not fit into memory.
        CheckpointError: its files are damaged, or its numbers are not finite.
        RouterError: memory ran out, or there is no tokenizer.
    """
    tokenizer = load_tokenizer(mixture.folder)
    name = mixture.runnable.name
    model = load_model(mixture.runnable, compute, lambda done, total: progress(Task("load", name), done, total))
    recorder = RouterRecorder(mixture, model)
    stops = stop_tokens(mixture.folder, mixture.runnable.keys, tokenizer)
    counts = np.zeros((len(recorder.layers), len(mixture.experts)))
    made = 0
    numbers = [number for domain in range(len(texts.domains)) for number in texts.of(domain)[:_WINDOWS]]
    for done, number in enumerate(numbers):
        ids = texts.windows[number].ids
        recorder.clear()
        with memory_watched(f"{name} was generating text. Use another device."):
            # What a token chooses is known when it is read, to make the next one.
            start = ids[: max(1, min(_TOKENS, len(ids) // 2))]
            generate_tokens(model, [start], Sampling(tokens + 1), folder=mixture.folder, stops=stops)
        recorder.skip()  # the pass of the prompt
        while recorder.has_pass:
            for place, (layer, experts) in enumerate(zip(recorder.layers, recorder.choices()[0], strict=True)):
                counts[place, experts[: mixture.per_token(layer)].numpy()] += 1
            made += 1
        progress(Task("text", name), tokens * (done + 1), tokens * len(numbers))
    return counts / max(made, 1), made

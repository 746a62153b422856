"""Estimate how much text the base model reads for the routers, and what that takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

import numpy as np

from moemerge.chats import ROLES
from moemerge.config.schema import MergeConfig
from moemerge.families.layer_names import layer_prefix
from moemerge.planning.estimates import written_tokens
from moemerge.planning.parts import Parts
from moemerge.planning.shape import Shape
from moemerge.sources.data_sets import SCHEME
from moemerge.texts.documents import matching_files

# Tokens of moemerge's own text.
_NEUTRAL_TOKENS: Final = 250
# Fewer than most tokenizers take, so that no more tokens are expected than there are in most languages.
_BYTES_PER_TOKEN: Final = 3
_LETTERS_PER_TOKEN: Final = 3
# A weight is read, converted and compared in the time of so many multiplications.
_READING: Final = 100
# Of the speed of one product in float32, what a pass with the fits reached: 0.56 in float32, 1.1 in bfloat16.
_EFFICIENCY: Final = 0.75
_TRIALS: Final = 10
# The product is small enough that some trial is not interrupted on a busy machine.
_TRIAL_TOKENS: Final = 128
_TRIAL_SIDE: Final = 1024


@dataclass(frozen=True)
class PassWork:
    """What the base model reads for the routers, and the arithmetic of it."""

    tokens: int
    """About how many tokens are read, unsorted ones once."""
    layers: int
    """Layers that they pass through."""
    operations: float
    """Additions and multiplications of all passes, and of what it takes to read the weights."""

    @property
    def seconds(self) -> float:
        """About how long it takes on this CPU, which multiplies some numbers for it; a GPU is faster."""
        return self.operations / (_EFFICIENCY * _operations_per_second())


def pass_work(config: MergeConfig, shape: Shape, parts: Parts) -> PassWork | None:
    """Estimate the work of the passes over the base model; None where it is not run.

    For text that experts write, reading it is counted, and writing it is not.
    """
    if not shape.runs_base:
        return None
    base, layers = parts.base, shape.mixture.moe_layers
    last = max(layers)
    prefixes = tuple(layer_prefix(layer) for layer in range(last + 1))
    sizes = {name: math.prod(t.shape) for name, t in base.tensors.items() if name.startswith(prefixes)}
    run = sum(size for name, size in sizes.items() if name not in base.model.ffn(last))
    tokens = _described_tokens(config) + _NEUTRAL_TOKENS * config.method.reads_neutral_text
    unsorted = _text_tokens(config.router.calibration_texts, len(config.experts) * config.router.tokens_per_expert)
    passes = 2 if config.method.labels_texts else 1
    operations = 2.0 * run * (tokens + passes * unsorted) + _READING * run * passes
    if config.method.reads_weights:  # gate and up projections, beside the base's
        changed = [2 * max(expert.model.ffn_widths) * base.model.sizes["hidden"] for expert in parts.experts]
        operations += 2.0 * _READING * len(layers) * sum(changed[: len(config.experts)])
    return PassWork(tokens + unsorted, last + 1, operations)


def _described_tokens(config: MergeConfig) -> int:
    """Estimate the tokens of all prompts and texts of experts, those that they write included."""
    most, tokens = config.router.tokens_per_expert, sum(written_tokens(config.experts[n]) for n in config.writers)
    for expert in (*config.experts, *config.shared_experts):
        prompts = [*expert.positive_prompts, *expert.negative_prompts]
        letters = sum(len(prompt if isinstance(prompt, str) else prompt.said_by(ROLES)) for prompt in prompts)
        tokens += letters // _LETTERS_PER_TOKEN
        tokens += _text_tokens(expert.positive_texts, most) + _text_tokens(expert.negative_texts, most)
    return tokens


def _text_tokens(patterns: Sequence[str], most: int) -> int:
    """Estimate the tokens that are read of texts: so many at most, and fewer of small files."""
    files = matching_files(patterns)
    if any(pattern.startswith(SCHEME) for pattern in patterns) or any(file.suffix == ".parquet" for file in files):
        return most  # of data sets and compressed files, sizes say nothing
    return min(most, sum(map(_bytes, files)) // _BYTES_PER_TOKEN)


def _bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _operations_per_second() -> float:
    """Time a product of float32 matrices on this CPU; the best of some trials counts."""
    states = np.ones((_TRIAL_TOKENS, _TRIAL_SIDE), np.float32)
    matrix = np.ones((_TRIAL_SIDE, _TRIAL_SIDE), np.float32)
    best = math.inf
    for _ in range(_TRIALS):
        start = perf_counter()
        states @ matrix
        best = min(best, perf_counter() - start)
    return 2 * states.size * _TRIAL_SIDE / best

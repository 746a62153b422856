"""Estimate the memory that a merge takes, from its plan."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from moemerge.checkpoint.jobs import CONNECTIONS, MAX_THREADS
from moemerge.checkpoint.memory import held_by_bands
from moemerge.config.schema import Expert, MergeConfig
from moemerge.families.dense import DenseModel, ModelTensors
from moemerge.families.layer_names import layer_prefix
from moemerge.planning.models import Models
from moemerge.planning.output import Output
from moemerge.planning.parts import Parts
from moemerge.planning.shape import Shape
from moemerge.planning.shared_choice import MIXED, TOKENS
from moemerge.routers.prompts import LONGEST_START, NEW_TOKENS, SEQUENCES
from moemerge.sources.reference import Reference
from moemerge.sources.stores import PART_BYTES, PARTS_AT_ONCE

# Resident memory beside the data, measured on Linux with torch 2.13 and transformers 5.23: the program alone, what
# torch with transformers, and what the classes and threads of a pass add to it.
_PROGRAM_BYTES: Final = 70_000_000
_LIBRARIES_BYTES: Final = 300_000_000
_PASS_BYTES: Final = 110_000_000
# The Hub's client, at work in several threads.
_HUB_BYTES: Final = 50_000_000
# s3fs with its libraries.
_STORE_BYTES: Final = 50_000_000
# 8 requests of 8 MiB at a time, each held twice.
_FETCH_BYTES: Final = 170_000_000
# What s3fs sends at a time, held twice, measured with 2 and 4 parts of 8 and 16 MiB.
_UPLOAD_BYTES: Final = 2 * PART_BYTES * PARTS_AT_ONCE
# Bytes that loading a tokenizer takes for each byte of its tokenizer.json.
_TOKENIZER_FACTOR: Final = 14
# A layer holds four rows of the FFN's width in float32 for each of 1024 tokens at a time.
_STATES_BYTES: Final = 1024 * 4 * 4
# Tokens whose logits are in memory at a time, and how often their numbers are held for a loss.
_HEAD_TOKENS: Final = 512
_HEAD_COPIES: Final = 3


def peak_memory_bytes(
    config: MergeConfig, models: Models, shape: Shape, parts: Parts, outputs: Mapping[str, Output], *, to_store: bool
) -> int:
    """Estimate the peak of resident memory in bytes: libraries, one layer for the pass over the prompts, and matrices.

    Matrices are held as a whole where they are transposed, or dequantised from columns. With `to_store`, the client of
    an object store sends the output.
    """
    layer = _largest_layer_bytes(parts.base)
    chooses = config.shared_weights.is_open
    reads_prompts = shape.runs_base or chooses or config.method.reads_text
    on_hub = any(isinstance(source.origin, Reference) for source in models.sources)
    in_store = any(not isinstance(source.origin, Path | Reference) for source in models.sources)
    tokenizer = models.base.folder.folder / "tokenizer.json"
    tokenizer_bytes = tokenizer.stat().st_size if tokenizer.is_file() else 0
    makes_tokenizer = bool(shape.base_files.made(shape.model_type))
    imports_transformers = shape.runs_base or chooses or makes_tokenizer or (reads_prompts and not tokenizer_bytes)
    states = _STATES_BYTES * max(models.base.model.ffn_widths)
    return (
        _PROGRAM_BYTES
        + _HUB_BYTES * on_hub
        + _STORE_BYTES * (in_store or to_store)
        + _FETCH_BYTES * in_store
        + _UPLOAD_BYTES * to_store
        + _matrix_bytes(outputs, CONNECTIONS if on_hub or in_store else MAX_THREADS)
        + _LIBRARIES_BYTES * imports_transformers
        + _TOKENIZER_FACTOR * tokenizer_bytes * (2 if makes_tokenizer else reads_prompts)
        + max(
            (_PASS_BYTES + layer + states + _fit_bytes(config, models, shape)) * shape.runs_base,
            (_PASS_BYTES + 2 * layer + states + _choice_bytes(models)) * chooses,
        )
    )


def _matrix_bytes(outputs: Mapping[str, Output], threads: int) -> int:
    """Estimate the bytes of the matrices that are held as a whole: one for each thread, and one for the pass."""
    held = sorted((held_by_bands(output.bands) for output in outputs.values()), reverse=True)
    return sum(held[: threads + 1])


def _largest_layer_bytes(base: ModelTensors) -> int:
    """Find the bytes of the largest layer in float32, with what is computed with before the layers."""
    sizes = {name: 4 * math.prod(tensor.shape) for name, tensor in base.tensors.items()}
    first = sum(sizes[name] for name, axes in base.model.first.items() if name in sizes and "vocab" not in axes[0])
    prefixes = map(layer_prefix, range(base.model.layers))
    return first + max(sum(size for name, size in sizes.items() if name.startswith(prefix)) for prefix in prefixes)


def _token_bytes(base: DenseModel, states: int) -> int:
    """Estimate what a token takes in a pass that holds so many states of it, and what all layers are given beside."""
    return 4 * (states * base.sizes["hidden"] + base.sizes.get("layer_inputs", 0))


def _choice_bytes(models: Models) -> int:
    """Estimate the bytes that a choice of shared weights adds to a layer: every model's states, and the head."""
    sizes = models.base.model.sizes
    runs = (1 + len(MIXED)) * len(models.experts)
    head = 2 * 4 * sizes["vocab"] * sizes["hidden"] + _HEAD_COPIES * 4 * _HEAD_TOKENS * sizes["vocab"]
    return runs * TOKENS * _token_bytes(models.base.model, 2) + head


def _fit_bytes(config: MergeConfig, models: Models, shape: Shape) -> int:
    """Estimate the bytes that texts add to the pass: states, router inputs, and the matrices of a closed form."""
    hidden = models.base.model.sizes["hidden"]
    described = [*config.experts, *config.shared_experts]
    kinds = sum(bool(texts) for expert in described for texts in (expert.positive_texts, expert.negative_texts))
    kinds += len(config.experts) if config.router.calibration_texts else 0
    written = [written_tokens(config.experts[writer]) for writer in config.writers]
    tokens = kinds * config.router.tokens_per_expert + sum(written)
    # States, router inputs, those that rows are fitted to, a part of them; a matrix in float32 and two in float64.
    even = config.router.load_prior or shape.family.scoring == "sigmoid"
    solves = tokens or config.method.solves_for_hidden or even
    # While an expert writes: its embeddings and head, keys and values of every layer at their widest, and copies of the
    # logits, which are sorted.
    base, vocab = models.base.model, models.base.model.config["vocab_size"]
    writing = 4 * hidden * (2 * vocab + 2 * max(written) * base.layers) + 16 * SEQUENCES * vocab if written else 0
    return max(tokens * _token_bytes(base, 4) + (20 * hidden * hidden if solves else 0), writing)


def written_tokens(expert: Expert) -> int:
    """Estimate the tokens of an expert's sequences, those that it continues included."""
    letters = max(len(prompt) if isinstance(prompt, str) else 4 * LONGEST_START for prompt in expert.positive_prompts)
    return SEQUENCES * (NEW_TOKENS + min(LONGEST_START, letters // 3 + 8))

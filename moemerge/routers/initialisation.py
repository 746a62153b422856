"""How routers get their first weights: one file per method, one pass over the base model for all that need it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.stored import float32_of, stored_bytes
from moemerge.config.schema import MergeConfig
from moemerge.errors import RefusedError, RouterError
from moemerge.families.dense import DenseModel
from moemerge.families.family import Scoring
from moemerge.families.mixture import Mixture
from moemerge.routers.cheap_embed import mean_embeddings
from moemerge.routers.random import DRAWN
from moemerge.routers.report import LayerRouting, RoutingReport, expert_names
from moemerge.routers.rows import Rows, contrast, row_distances

__all__ = ["Routers", "check_base_bits", "init_routers"]


@dataclass(frozen=True)
class Routers:
    """Router weights, and what they do."""

    rows: Mapping[int, bytes]
    """By layer the rows (expert, hidden), as they are stored."""
    shared_gates: Mapping[int, bytes]
    """By layer the gate (1, hidden) of the shared experts, as it is stored; empty where it is not asked for."""
    report: RoutingReport


def init_routers(
    config: MergeConfig, folder: Path, base: DenseModel, tensors: dict[str, TensorInfo], dtype: str, *,
    experts: Sequence[tuple[DenseModel, Mapping[str, TensorInfo]]], mixture: Mixture, scoring: Scoring,
    shared_gate: bool, run_base: bool, seed: int, device: str, progress: Callable[[int, int], None],
    base_bits: Literal[4, 8] | None = None, low_memory: bool = False,
) -> Routers:  # fmt: skip
    """Compute the routers of a merge and the table of what they do with its prompts.

    Args:
        config: the merge.
        folder: the base model's folder.
        base: the base model's config.
        tensors: the base model's tensors.
        dtype: of the merged model; routers are judged as they will be stored.
        experts: the models whose FFNs are chosen between, for methods that read their weights.
        mixture: which layers have routers, and which experts take part in them.
        scoring: how the output family's routers make weights of their logits.
        shared_gate: whether the shared experts have a gate that is made from their prompts.
        run_base: whether the base model reads the prompts, for the routers or for the table.
        seed: of random rows and of the choice of documents, where the config has none.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto`.
        progress: called with the number of layers done and of those to do.
        base_bits: of the base model's Linear weights while it reads the prompts; needs bitsandbytes.
        low_memory: whether not to read ahead.

    Raises:
        RouterError: the tokenizer, the prompts or the device do not serve.
    """
    seed = seed if config.router.seed is None else config.router.seed
    made = _made_without_pass(config, folder, base, tensors, mixture, seed)
    gates: dict[int, bytes] = {}
    routings: list[LayerRouting] = []
    if made is None or run_base:
        # Imports torch and transformers: seconds, and hundreds of megabytes.
        from moemerge.routers.computed import compute_routers

        layers, gates, routings = compute_routers(
            config, folder, base, tensors, dtype, experts=experts, mixture=mixture, scoring=scoring,
            shared_gate=shared_gate, made=made, seed=seed, device=device, progress=progress, base_bits=base_bits,
            low_memory=low_memory,
        )  # fmt: skip
    else:
        layers = {layer: stored_bytes(rows, dtype) for layer, rows in made.items()}
    stored, stored_gates = (float32_of(b"".join(made.values()), dtype) for made in (layers, gates))
    if not (np.isfinite(stored).all() and np.isfinite(stored_gates).all()):
        raise RouterError(
            f"some router weights are not finite numbers in {dtype}: the base model's numbers, or router.scale, are "
            "too large for it. Set `dtype: bfloat16`, lower router.scale, or choose gate_mode random."
        )
    names = expert_names([expert.source_model for expert in config.experts])
    distances = row_distances(
        stored.reshape(len(layers), len(names), -1), [mixture.absent.get(layer, frozenset()) for layer in layers]
    )
    report = RoutingReport(names, config.experts_per_token, tuple(routings), distances)
    return Routers(layers, gates, report)


def _made_without_pass(  # noqa: PLR0917
    config: MergeConfig, folder: Path, base: DenseModel, tensors: dict[str, TensorInfo], mixture: Mixture, seed: int
) -> dict[int, Rows] | None:
    """By layer the rows (expert, hidden), zeros for absent experts, of a method that needs no pass; else None."""
    if config.method.name in DRAWN:
        # As for all layers and experts: which of them take part changes nothing in the others.
        drawn = DRAWN[config.method.name]((base.layers, len(config.experts), base.config["hidden_size"]), seed)
        for layer, absent in mixture.absent.items():
            drawn[layer, sorted(absent)] = 0
        return {layer: drawn[layer] for layer in mixture.moe_layers}
    if config.method.reads_embeddings:
        positive, negative = mean_embeddings(folder, base, tensors, config)
        none: frozenset[int] = frozenset()
        return {layer: contrast(positive, negative, mixture.absent.get(layer, none)) for layer in mixture.moe_layers}
    return None


def check_base_bits(bits: Literal[4, 8] | None) -> None:
    """Refuse a pass in 4 or 8 bits where bitsandbytes is not installed; it is found, not imported.

    Raises:
        RefusedError: it is not.
    """
    if bits and find_spec("bitsandbytes") is None:
        raise RefusedError(
            f"to run the base model in {bits} bits, bitsandbytes is needed: pip install bitsandbytes. "
            "It is seldom worth it: the base model is run layer by layer, so that only one layer is in memory anyway."
        )

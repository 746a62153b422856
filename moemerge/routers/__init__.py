"""How routers get their first weights: one file per way, one pass over the base model for all that need it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.stored import float32_of, stored_bytes
from moemerge.config import MergeConfig
from moemerge.errors import RefusedError, RouterError
from moemerge.formats.dense import DenseModel
from moemerge.routers.cheap_embed import cheap_embed_rows
from moemerge.routers.random import DRAWN
from moemerge.routers.report import LayerRouting, RoutingReport, expert_names
from moemerge.routers.rows import Rows, row_distances

__all__ = ["Routers", "check_base_bits", "init_routers"]


@dataclass(frozen=True)
class Routers:
    """Router weights, and what they do."""

    layers: tuple[bytes, ...]
    """Of each layer the rows (expert, hidden), as they are stored."""
    report: RoutingReport


def init_routers(
    config: MergeConfig, folder: Path, base: DenseModel, tensors: dict[str, StoredTensor], dtype: str, *,
    run_base: bool, seed: int, device: str, progress: Callable[[int, int], None],
    base_bits: Literal[4, 8] | None = None, low_memory: bool = False,
) -> Routers:  # fmt: skip
    """Compute the routers of a merge and the table of what they do with its prompts.

    Args:
        config: the merge.
        folder: the base model's folder.
        base: the base model's config.
        tensors: the base model's tensors.
        dtype: of the merged model; routers are judged as they will be stored.
        run_base: whether the base model reads the prompts, for the routers or for the table.
        seed: of the random ways.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto`.
        progress: called with the number of layers done and the number of all.
        base_bits: of the base model's Linear weights while it reads the prompts; needs bitsandbytes.
        low_memory: whether not to read ahead.

    Raises:
        RouterError: the tokenizer, the prompts or the device do not serve.
    """
    shape = (base.layers, len(config.experts), base.config["hidden_size"])
    made: Rows | None = None
    if config.gate_mode in DRAWN:
        made = DRAWN[config.gate_mode](shape, seed)
    elif config.gate_mode == "cheap_embed":
        made = np.tile(cheap_embed_rows(folder, base, tensors, config.experts), (base.layers, 1, 1))
    routings: list[LayerRouting] = []
    if made is None or run_base:
        # Imports torch and transformers: seconds, and hundreds of megabytes.
        from moemerge.routers.computed import compute_routers

        layers, routings = compute_routers(
            config, folder, base, tensors, dtype, made=made, device=device, progress=progress, base_bits=base_bits,
            low_memory=low_memory,
        )  # fmt: skip
    else:
        layers = [stored_bytes(rows, dtype) for rows in made]
    stored = float32_of(b"".join(layers), dtype).reshape(shape)
    if not np.isfinite(stored).all():
        raise RouterError("some router weights are not finite numbers: the base model's numbers overflow.")
    names = expert_names([expert.source_model for expert in config.experts])
    report = RoutingReport(names, config.experts_per_token, tuple(routings), row_distances(stored))
    return Routers(tuple(layers), report)


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

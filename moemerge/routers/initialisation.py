"""Make the routers of a merge by the config's method, and the table of what they do with its prompts."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.numbers import float32_of, stored_bytes
from moemerge.dtypes import DType
from moemerge.errors import RefusedError, RouterError
from moemerge.progress import Progress
from moemerge.routers.method_lookup import rows_without_pass
from moemerge.routers.report import LayerRouting, RoutingReport
from moemerge.routers.request import PassOptions, RouterRequest
from moemerge.routers.rows import row_distances

__all__ = ["Routers", "check_base_bits", "init_routers"]


@dataclass(frozen=True)
class Routers:
    """Router weights, and the table of what they do."""

    rows: Mapping[int, bytes]
    """Rows (expert, hidden) of each layer, as stored bytes."""
    shared_gates: Mapping[int, bytes]
    """Gate (1, hidden) of the shared experts in each layer, as stored bytes; empty where none is asked for."""
    report: RoutingReport


def init_routers(
    request: RouterRequest,
    options: PassOptions | None = None,
    *,
    seed: int,
    progress: Progress = lambda _task, _done, _total: None,
) -> Routers:
    """Compute the routers of a merge and the table of what they do with its prompts.

    Args:
        request: the mixture, and the models that its routers are made from.
        options: how models are run.
        seed: seed for random rows, the choice of documents and written text, unless the config has one.
        progress: called as experts write text, and as layers are done.

    Raises:
        RefusedError, RouterError: there is no such device; the tokenizer or the prompts cannot be used.
    """
    config, mixture, dtype = request.config, request.mixture, request.dtype
    seed = seed if config.router.seed is None else config.router.seed
    made = None if config.method.runs_base else rows_without_pass(config.method)(request, seed)
    gates: dict[int, bytes] = {}
    routings: list[LayerRouting] = []
    computed_in, kept_texts = "", None
    if made is None or request.runs_base:
        # Imports torch and transformers: seconds, and hundreds of megabytes.
        from moemerge.routers.computed import compute_routers

        found = compute_routers(request, options or PassOptions(), made, seed=seed, progress=progress)
        layers, gates, routings = found.rows, found.shared_gates, found.routings
        computed_in, kept_texts = found.computed_in, found.kept_texts
    else:
        layers = {layer: stored_bytes(rows, dtype) for layer, rows in made.items()}
    stored = _finite(layers, dtype)
    _finite(gates, dtype)
    names = config.expert_names
    distances = row_distances(
        stored.reshape(len(layers), len(names), -1), [mixture.absent.get(layer, frozenset()) for layer in layers]
    )
    report = RoutingReport(
        names,
        config.experts_per_token,
        tuple(routings),
        distances,
        writers=frozenset(config.writers),
        from_prompts=not any(expert.positive_texts for expert in config.experts),
        computed_in=computed_in,
        kept_texts=kept_texts,
    )
    return Routers(layers, gates, report)


def _finite(made: Mapping[int, bytes], dtype: DType) -> NDArray[np.float32]:
    """The rows of all layers as float32, one after another.

    Raises:
        RouterError: some are not finite.
    """
    values = float32_of(b"".join(made.values()), dtype)
    if not np.isfinite(values).all():
        raise RouterError(
            f"some router weights are not finite numbers in {dtype}: the base model's numbers, or router.scale, are "
            "too large for it. Set `dtype: bfloat16`, lower router.scale, or choose gate_mode random."
        )
    return values


def check_base_bits(bits: Literal[4, 8] | None) -> None:
    """Refuse a pass in 4 or 8 bits if bitsandbytes is not installed; it is looked for, not imported.

    Raises:
        RefusedError: bitsandbytes is not installed.
    """
    if bits and find_spec("bitsandbytes") is None:
        raise RefusedError(
            f"to run the base model in {bits} bits, bitsandbytes is needed: pip install bitsandbytes. "
            "It is seldom worth it: the base model is run layer by layer, so that only one layer is in memory anyway."
        )

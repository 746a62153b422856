"""What is seen of a class, and the words that all classes know for the same settings."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from moemerge.families.dense import read_dense
from tests.support.families import DENSE
from tests.support.models import SIZES, logits

CLOSE: Final = 1e-5
SHOWN: Final = 4
EXPERTS: Final = 4
LAYERS: Final = int(SIZES["num_hidden_layers"])
LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)")
OF_FFN: Final = re.compile(
    r"\.(mlp|feed_forward|ffn|block_sparse_moe|shared_mlp|moe)\.|experts?\.|router|(correction|expert)_bias"
)
# Each class reads the keys that it knows.
PLAIN: Final[dict[str, Any]] = {
    "head_dim": 8, "sliding_window": 8, "layer_types": None, "partial_rotary_factor": 1.0, "attention_dropout": 0.0,
}  # fmt: skip
ROUTED: Final[dict[str, Any]] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "decoder_sparse_step"), 1),
    **dict.fromkeys(("routed_scaling_factor", "router_scaling_factor", "route_scale"), 1.0),
    **dict.fromkeys(("norm_topk_prob", "route_norm"), True),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "num_nextn_predict_layers"), 0),
    "mlp_layer_types": ["sparse"] * LAYERS, "mlp_only_layers": [],
}  # fmt: skip
# Other settings to try where the first are not exact, each with its words.
VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "": {},
    "without windows": {"sliding_window": None, "layer_types": ["full_attention"] * LAYERS},
    "with windows in all layers": {"layer_types": ["sliding_attention"] * LAYERS},
}


@dataclass
class Found:
    """What was seen of a class."""

    model_type: str
    kind: str
    """`dense`, `mixture`, or why it was not tried."""
    apart: dict[str, dict[str, float]] = field(default_factory=dict)
    """The largest difference of logits, relative to the largest logit, by dense type and output family."""
    remarks: list[str] = field(default_factory=list)

    @property
    def lines(self) -> Iterator[str]:
        """The report on the class."""
        yield f"{self.model_type}: {self.kind}"
        others = []
        for name, found in self.apart.items():
            exact = [f"{family} {apart:.0e}".lstrip() for family, apart in found.items() if apart <= CLOSE]
            if exact:
                yield f"  exact as {name}: {', '.join(exact)}"
            else:
                others.append((min(found.values()), name))
        if others:
            shown = ", ".join(f"{name} ({apart:.1g})" for apart, name in sorted(others)[:SHOWN])
            yield f"  not exact, though it has the tensors of: {shown}{', and more' if others[SHOWN:] else ''}"
        yield from (f"  {remark}" for remark in self.remarks)

    @property
    def is_exact(self) -> bool:
        """Whether anything that was tried computes the same."""
        return any(apart <= CLOSE for found in self.apart.values() for apart in found.values())


def line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.90}"


def difference(found: Any, expected: torch.Tensor) -> float:
    return float((logits(found) - expected).abs().max() / max(1.0, float(expected.abs().max())))


def nearest(ours: set[str]) -> str:
    """Say which known type has the most tensors beside its FFN in common, and how they differ."""
    best: tuple[int, str, set[str]] = (10**6, "", set())
    for kind, (model_type, sizes) in DENSE.items():
        model = read_dense({**SIZES, "model_type": model_type, **sizes})
        if not isinstance(model, str):
            theirs = beside({*model.tensors(0)})
            best = min(best, (len(ours ^ theirs), kind, theirs), key=lambda one: one[0])
    _, kind, theirs = best
    lacks, more = (", ".join(sorted(names)) or "nothing" for names in (theirs - ours, ours - theirs))
    return f"nearest by what is beside its FFN: {kind}; it lacks {lacks}; it has in addition {more}"


def beside(names: Iterable[str]) -> set[str]:
    """Names within the first layer of the tensors that belong to no FFN."""
    return {match[2] for name in names if not OF_FFN.search(name) and (match := LAYER.match(name)) and match[1] == "0"}


def inside(names: Iterable[str]) -> set[str]:
    """Names within the first layer of the tensors of its FFN."""
    return {match[2] for name in names if OF_FFN.search(name) and (match := LAYER.match(name)) and match[1] == "0"}

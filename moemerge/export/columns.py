"""Sum the squares of what enters the columns of a layer's weights while the layer runs.

Names of modules are those of transformers, which stacks experts since version 5.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch.nn.functional import linear

from moemerge.checkpoint.gguf_contents import GgufContents
from moemerge.errors import RefusedError
from moemerge.export.imatrix import ColumnSquares

# The tensors of a GGUF file that a module's weight becomes, by the module's path within its layer.
_LINEARS: Final[Mapping[str, tuple[str, ...]]] = {
    **{f"self_attn.{one}_proj": (f"attn_{one}",) for one in "qkv"},
    "self_attn.o_proj": ("attn_output",),
    "self_attn.out_proj": ("attn_output",),
    "self_attn.q_a_proj": ("attn_q_a",),
    "self_attn.q_b_proj": ("attn_q_b",),
    "self_attn.kv_a_proj_with_mqa": ("attn_kv_a_mqa",),
    **{f"mlp.{one}_proj": (f"ffn_{one}",) for one in ("gate", "up", "down")},
    **{f"feed_forward.{one}": (f"ffn_{role}",) for one, role in (("w1", "gate"), ("w3", "up"), ("w2", "down"))},
    **{
        f"mlp.{shared}.{one}_proj": (f"ffn_{one}_shexp",)
        for shared in ("shared_experts", "shared_mlp")
        for one in ("gate", "up", "down")
    },
    "conv.in_proj": ("shortconv.in_proj",),
    "conv.out_proj": ("shortconv.out_proj",),
    "shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp"),
    "shared_mlp.output_linear": ("ffn_down_shexp",),
}
_INTO: Final = ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps")
_OUT_OF: Final = ("ffn_down_exps",)
_ONE_EXPERT: Final = re.compile(r".*\bexperts\.(\d+)\.(\w+)")
_OF_ONE: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("w1", "gate_proj"), ("ffn_gate_exps", "ffn_gate_up_exps")),
    **dict.fromkeys(("w3", "up_proj"), ("ffn_up_exps",)),
    **dict.fromkeys(("w2", "down_proj"), _OUT_OF),
}
_STACK_AXES: Final = 3


class ColumnTally:
    """Sums of squares by tensor, for those that a GGUF file holds."""

    def __init__(self, model: GgufContents) -> None:
        self._model = model
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}

    @property
    def tensors(self) -> dict[str, ColumnSquares]:
        """Sums of squares and counts so far, by tensor."""
        return {
            name: ColumnSquares(sums.numpy().astype(np.float32), self._counts[name].numpy())
            for name, sums in self._sums.items()
        }

    @contextmanager
    def watch(self, index: int, layer: Any) -> Iterator[None]:
        """A context in which all tokens that enter a layer's matrices are counted."""
        handles = [
            module.register_forward_pre_hook(partial(hook, index), with_kwargs=True)
            for module, hook in self._hooks(layer)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, layer: Any) -> Iterator[tuple[Any, Any]]:
        for path, module in layer.named_modules():
            if isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
                yield module, self._stacked
            elif isinstance(module, torch.nn.Linear):
                if path in _LINEARS:
                    yield module, partial(self._linear, _LINEARS[path], 0)
                elif (match := _ONE_EXPERT.fullmatch(path)) and match[2] in _OF_ONE:
                    yield module, partial(self._linear, _OF_ONE[match[2]], int(match[1]))
            elif getattr(getattr(module, "weight", None), "ndim", 0) == _STACK_AXES and path.endswith("_linear"):
                yield module, partial(self._divided, _INTO if path.endswith("input_linear") else _OUT_OF)

    def _linear(
        self, names: tuple[str, ...], matrix: int, index: int, _module: Any, given: tuple[Any, ...], _named: Any
    ) -> None:
        self._add(names, index, matrix, given[0])

    def _stacked(self, index: int, module: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Count for experts in one module: the inputs of the down projection are computed again, expert by expert."""
        states, experts = (*given, *named.values())[:2]
        for expert in experts.unique().tolist():
            rows = states[(experts == expert).any(dim=-1)]
            self._add(_INTO, index, expert, rows)
            gate, up = linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
            self._add(_OUT_OF, index, expert, module.act_fn(gate) * up)

    def _divided(self, names: tuple[str, ...], index: int, _module: Any, given: tuple[Any, ...], _named: Any) -> None:
        """Count for a stack that is given the tokens of one expert after the other, and how many each has."""
        for expert, rows in enumerate(given[0].split(given[1], dim=0)):
            self._add(names, index, expert, rows)

    def _add(self, names: tuple[str, ...], index: int, matrix: int, inputs: torch.Tensor) -> None:
        """Count the rows (..., column) of an input.

        Raises:
            RefusedError: the file's tensor has another size.
        """
        rows = inputs.detach().flatten(0, -2).float()
        squares = rows.square().sum(dim=0).cpu().double()
        for name in (f"blk.{index}.{name}.weight" for name in names):
            if name not in self._model.tensors:
                continue
            columns, _, matrices, *_ = (*self._model.tensors[name].sizes, 1, 1)
            if len(squares) != columns or matrix >= matrices:
                raise RefusedError(
                    f"{self._model.path}: {name} is of {matrices} x {columns} columns, but the model's expert {matrix} "
                    f"has {len(squares)}: the file is another model's. Write it again."
                )
            if name not in self._sums:
                self._sums[name] = torch.zeros(matrices, columns, dtype=torch.float64)
                self._counts[name] = torch.zeros(matrices, dtype=torch.int64)
            self._sums[name][matrix] += squares
            self._counts[name][matrix] += len(rows)

"""Output families in GGUF: their keys, and which of a checkpoint's tensors each tensor of the file is made of.

Names are llama.cpp's, as its converter gives them; names within a layer begin with `blk.{layer}.` there and with
`model.layers.{layer}.` in the checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Config = Mapping[str, Any]
"""A checkpoint's `config.json`."""
Value = str | Callable[[Config], Any]
"""A key of `config.json`, or a function that computes the value from it; for None the GGUF key is left out."""


@dataclass(frozen=True)
class Part:
    """The source of a tensor of the file."""

    source: str
    """A tensor of the checkpoint; with `{expert}` in it, a stack of the tensors of all experts."""
    turned: Literal["", "query", "key"] = ""
    """Whose heads the rows belong to, if they are put into pairs of neighbours for rotary positions."""
    half: Literal["", "first", "second"] = ""
    """The half of its rows, or of every expert's in a stack: gate and up projections may be stored as one."""
    needed: bool = True
    """Whether every layer that has its group has it."""
    group: str = ""
    """The kind of layers that has it: such a layer has some tensor of the group; the empty group is in every layer."""
    cut: Literal["", "keys", "values"] = ""
    """The rows of every head: those that make keys of a compressed state, transposed, or those that make values."""
    squeezed: bool = False
    """Whether an axis of one element in the middle is dropped."""


Names = dict[str, Part]


@dataclass(frozen=True)
class GgufFamily:
    """An output family as llama.cpp knows it."""

    architecture: str
    """llama.cpp's name for it, with which its own keys begin."""
    layer: Names
    """Tensors within a layer."""
    whole: Names
    """Tensors outside of the layers, in the order of the file."""
    keys: tuple[tuple[str, Value], ...] = ()
    """Further keys: the method of `gguf.GGUFWriter` that adds one, and its value."""
    replaces: tuple[tuple[str, Value], ...] = ()
    """Keys of `config.json` whose values are replaced before the usual keys are made of them."""
    is_gemma4: bool = False
    """Whether its vocabulary is of Gemma 4's kind: SentencePiece's tokens, and merges of them."""
    is_llama: bool = False
    """Whether its vocabulary is read as Llama's: spaces before texts, and no BOS token of Granite's."""
    named_tokens: tuple[tuple[str, str], ...] = ()
    """Roles of tokens with the tokens that have them by default."""
    knows: frozenset[str] = frozenset()
    """Reasons in `moemerge.export.key_values.ROPES` that do not apply to it."""
    notes: tuple[tuple[Callable[[Config], bool], str], ...] = ()
    """What llama.cpp computes wrongly, but not always; keys of `config.json` are in braces."""
    refuses: tuple[tuple[Callable[[Config], bool], str], ...] = ()
    """What llama.cpp cannot load or computes wrongly, each with the words for the refusal."""


def grouped(group: str, names: Names) -> Names:
    """Assign tensors to a group, for layers of one kind."""
    return {name: replace(part, group=group) for name, part in names.items()}


def optional(source: str) -> Part:
    """A tensor that need not be there."""
    return Part(source, needed=False)


def separate(module: str, names: tuple[str, str, str], suffix: str = "") -> Names:
    """Name the projections of one FFN, or of all experts' if the module has `{expert}`."""
    roles = ("gate", "up", "down")
    return {
        f"ffn_{role}{suffix}.weight": Part(f"{module}.{name}.weight") for role, name in zip(roles, names, strict=True)
    }

"""What an output family is in GGUF: which of a checkpoint's tensors each tensor of the file is made of, and its keys.

Names are llama.cpp's, as its converter gives them; names within a layer begin with `blk.{layer}.` there and with
`model.layers.{layer}.` in the checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Config = Mapping[str, Any]
"""A checkpoint's `config.json`."""
Value = str | Callable[[Config], Any]
"""Of a key: what `config.json` calls it, or what is made of that; where it is None the key is left out."""


@dataclass(frozen=True)
class Part:
    """What a tensor of the file is made of."""

    source: str
    """A tensor of the checkpoint; one with `{expert}` is a stack of those of all experts."""
    turned: Literal["", "query", "key"] = ""
    """Whose heads its rows belong to, if these are put into pairs of neighbours for rotary positions."""
    half: Literal["", "first", "second"] = ""
    """Which rows of it, or of every expert in a stack: gate and up projections may be stored as one."""
    needed: bool = True
    """Whether every layer that has its group has it."""
    group: str = ""
    """What kinds of layers have it: of one group at least one tensor is there, of the empty one in every layer."""
    cut: Literal["", "keys", "values"] = ""
    """Of every head the rows that make keys of a compressed state, transposed, or those that make values."""
    squeezed: bool = False
    """Whether an axis of one element in the middle falls."""


Names = dict[str, Part]


@dataclass(frozen=True)
class GgufFamily:
    """An output family as llama.cpp knows it."""

    architecture: str
    """llama.cpp's name for it, with which its own keys begin."""
    layer: Names
    """Within a layer."""
    whole: Names
    """Outside of the layers; what comes first in the file, first."""
    keys: tuple[tuple[str, Value], ...] = ()
    """Further keys: the method of `gguf.GGUFWriter` that adds one, and its value."""
    replaces: tuple[tuple[str, Value], ...] = ()
    """Keys of `config.json` that stand for something else while the usual keys are made of it."""
    is_gemma4: bool = False
    """Whether its vocabulary is a kind of its own: SentencePiece's tokens, and merges of them."""
    is_llama: bool = False
    """Whether its vocabulary is read as Llama's: spaces before texts, and no BOS token of Granite's."""
    named_tokens: tuple[tuple[str, str], ...] = ()
    """Parts of tokens, and the tokens that have them where nothing says otherwise."""
    knows: frozenset[str] = frozenset()
    """Of the reasons in `moemerge.export.values.ROPES`, those that are none for it."""
    notes: tuple[tuple[Callable[[Config], bool], str], ...] = ()
    """What llama.cpp computes wrongly, but not always; with keys of `config.json` in braces."""
    refuses: tuple[tuple[Callable[[Config], bool], str], ...] = ()
    """What llama.cpp cannot load or computes wrongly, and how to say that it does."""


def grouped(group: str, names: Names) -> Names:
    """The same names, of layers of some kind."""
    return {name: replace(part, group=group) for name, part in names.items()}


def optional(source: str) -> Part:
    """A tensor that need not be there."""
    return Part(source, needed=False)


def separate(module: str, names: tuple[str, str, str], suffix: str = "") -> Names:
    """The projections of one FFN, or where the module has `{expert}` of all experts."""
    roles = ("gate", "up", "down")
    return {
        f"ffn_{role}{suffix}.weight": Part(f"{module}.{name}.weight") for role, name in zip(roles, names, strict=True)
    }

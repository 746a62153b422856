"""Tensor names as transformers gives them, whatever wrapped the model when it was saved."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from moemerge.checkpoint.header import TensorInfo
from moemerge.errors import CheckpointError

Table = dict[str, TensorInfo]
# Prefixes of torch.compile, DistributedDataParallel, FSDP and activation checkpointing, PEFT.
_WRAPPER: Final = re.compile(
    r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^(module|base_model\.model)\."
)
# Names that training loops give the model they hold; they count as such only in front of all tensors.
_HOLDER: Final = re.compile(r"([\w.]+?\.)model\.layers\.\d+\.")
_PARTS: Final = r"(?:layers\.\d+|embed_tokens\w*|per_layer_\w+|\w*norm)\."
_BODY: Final = re.compile(_PARTS)
# A text model inside a multimodal one, as transformers 4 and 5 and released files name it, and its head.
_TEXT: Final = re.compile(rf"(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?={_PARTS})")
_HEAD: Final = re.compile(r"(?:model\.)?(?:language_model\.)?(?=lm_head\.)")
_NEXT_TOKENS: Final = "mtp."


def unwrapped(
    tensors: Table, noted: Callable[[Sequence[str], Table], Table], *, multimodal: bool = False
) -> tuple[Table, Table]:
    """Rename tensors to the names that a causal language model of transformers gives them.

    Prefixes of wrappers are removed, and so is what all tensors have in front of `model.layers`; a body that was saved
    alone gets the prefix `model.` that it has in the whole model. Of a multimodal model only the text model is kept,
    and of any model only what predicts the next token.

    Args:
        tensors: tensors by their names in the files.
        noted: called with notes and the table; returns the table.
        multimodal: whether `config.json` says that the model is a multimodal one.

    Returns:
        The tensors of the text model, and all others.

    Raises:
        CheckpointError: two tensors would have the same name.
    """
    names = {name: name for name in tensors}
    while any(_WRAPPER.search(name) for name in names.values()):
        names = {name: _WRAPPER.sub("", plain) for name, plain in names.items()}
    kept = _text_part(names, multimodal=multimodal)
    others = {plain: tensors[name] for name, plain in names.items() if name not in kept}
    names = kept
    holder = next((match[1] for plain in names.values() if (match := _HOLDER.match(plain))), "")
    if holder and all(plain.startswith(holder) for plain in names.values()):
        names = {name: plain.removeprefix(holder) for name, plain in names.items()}
    bare = not any(plain.startswith("model.") for plain in names.values())
    if bare and any(re.match(r"layers\.\d+\.", plain) for plain in names.values()):
        names = {name: f"model.{plain}" if _BODY.match(plain) else plain for name, plain in names.items()}
    changed = next((name for name, plain in names.items() if name != plain), None)
    if changed is None:
        return {name: tensors[name] for name in names}, others
    if len(set(names.values())) < len(names):
        raise CheckpointError(
            f"{tensors[changed].path}: tensor {changed!r} and another one would both be called {names[changed]!r}."
        )
    renamed = {plain: tensors[name] for name, plain in names.items()}
    if multimodal:
        return renamed, others
    return noted([f"its tensor {changed} is read as {names[changed]}, and others likewise"], renamed), others


def text_name(name: str) -> str | None:
    """The name of a tensor in a text model alone, from its name inside a multimodal one; None for other names."""
    return f"model.{name.removeprefix(match[0])}" if (match := _TEXT.match(name)) else None


def module_of(name: str) -> str:
    """The part of a whole model that a tensor beside the text model belongs to: `model.visual`, `visual`, `mtp`."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "model" else 1])


def _text_part(names: Mapping[str, str], *, multimodal: bool) -> dict[str, str]:
    """Choose the tensors of the text model, by their names in the files, and name them as those of one alone."""
    prefix = next((match[0] for plain in names.values() if (match := _TEXT.match(plain))), "")
    if not prefix and not multimodal:
        return {name: plain for name, plain in names.items() if not plain.startswith(_NEXT_TOKENS)}
    prefix = prefix or "model."
    part = {}
    for name, plain in names.items():
        if plain.startswith(prefix):
            part[name] = f"model.{plain.removeprefix(prefix)}"
        elif head := _HEAD.match(plain):
            part[name] = plain.removeprefix(head[0])
    return part

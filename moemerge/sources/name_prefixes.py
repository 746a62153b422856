"""Tensor names as transformers gives them, whatever wrapped the model when it was saved."""

import re
from collections.abc import Callable, Sequence
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
_BODY: Final = re.compile(r"(layers\.\d+|embed_tokens|\w*norm)\.")


def unwrapped(tensors: Table, noted: Callable[[Sequence[str], Table], Table]) -> Table:
    """Rename tensors to the names that a causal language model of transformers gives them.

    Prefixes of wrappers are removed, and so is what all tensors have in front of `model.layers`; a body that was saved
    alone gets the prefix `model.` that it has in the whole model.

    Args:
        tensors: tensors by their names in the files.
        noted: called with notes and the table; returns the table.

    Raises:
        CheckpointError: two tensors would have the same name.
    """
    names = {name: name for name in tensors}
    while any(_WRAPPER.search(name) for name in names.values()):
        names = {name: _WRAPPER.sub("", plain) for name, plain in names.items()}
    holder = next((match[1] for plain in names.values() if (match := _HOLDER.match(plain))), "")
    if holder and all(plain.startswith(holder) for plain in names.values()):
        names = {name: plain.removeprefix(holder) for name, plain in names.items()}
    bare = not any(plain.startswith("model.") for plain in names.values())
    if bare and any(re.match(r"layers\.\d+\.", plain) for plain in names.values()):
        names = {name: f"model.{plain}" if _BODY.match(plain) else plain for name, plain in names.items()}
    changed = next((name for name, plain in names.items() if name != plain), None)
    if changed is None:
        return tensors
    if len(set(names.values())) < len(names):
        raise CheckpointError(
            f"{tensors[changed].path}: tensor {changed!r} and another one would both be called {names[changed]!r}."
        )
    renamed = {plain: tensors[name] for name, plain in names.items()}
    return noted([f"its tensor {changed} is read as {names[changed]}, and others likewise"], renamed)

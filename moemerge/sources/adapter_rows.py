"""How many rows the embeddings of a model with adapters have: trainers save them whole where tokens were added."""

import re
from collections.abc import Sequence
from typing import Final

from moemerge.checkpoint.header import read_header
from moemerge.sources.bin_files import read_pickle
from moemerge.sources.local import resolve_file
from moemerge.sources.lora import WEIGHTS, Adapter

_EMBEDDINGS: Final = re.compile(
    r"(.*\.)?embed_tokens\.((token_adapter\.)?base_layer\.|modules_to_save\.default\.)?weight"
)


def embedding_rows(adapters: Sequence[Adapter], rows: int) -> int:
    """The rows that embeddings of `rows` have after adapters: those of the last one that holds embeddings.

    Raises:
        CheckpointError: an adapter's file is damaged.
    """
    for adapter in adapters:
        for name in WEIGHTS:
            if (adapter.folder / name).exists():
                path = resolve_file(adapter.folder, name)
                found = read_pickle(path) if name.endswith(".bin") else read_header(path)
                whole = [
                    tensor.shape[0] for key, tensor in found.items() if _EMBEDDINGS.fullmatch(key) and tensor.shape
                ]
                rows = whole[0] if whole else rows
                break
    return rows

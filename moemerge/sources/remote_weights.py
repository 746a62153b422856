"""Models on other machines: which files they consist of, and their tensors, by headers that are read by ranges."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from moemerge.checkpoint.files import RemoteFile
from moemerge.checkpoint.header import TensorInfo, read_header
from moemerge.checkpoint.index import (
    PICKLE_INDEX,
    SAFETENSORS_INDEX,
    SINGLE_PICKLE,
    SINGLE_SAFETENSORS,
    read_tensors,
    read_weight_map,
)
from moemerge.checkpoint.jobs import CONNECTIONS
from moemerge.errors import SourceError
from moemerge.sources.local import find_weights, resolve_file

SMALL_FILES: Final = [
    "config.json", "generation_config.json", SAFETENSORS_INDEX, PICKLE_INDEX, "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "tekken.json", "tiktoken.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.json", "*.jinja", "*processor_config.json", "adapter_config.json",
    "README.md",
]  # fmt: skip
"""Patterns of everything that a merge reads or copies beside weights; tokenizers come in many files."""

TEMPLATES: Final = "additional_chat_templates"
"""Name of the folder with chat templates beside the default one."""


def weight_files(folder: Path) -> list[list[str]]:
    """Groups of files that may hold the weights, in the order in which `choose_weights` chooses.

    Args:
        folder: the folder with the model's small files, the index of its weights among them.
    """
    choices = []
    for single, index in ((SINGLE_SAFETENSORS, SAFETENSORS_INDEX), (SINGLE_PICKLE, PICKLE_INDEX)):
        choices.append([single])
        if (folder / index).exists():
            return [*choices, sorted(set(read_weight_map(resolve_file(folder, index)).values()))]
    return choices


def choose_files(what: str, folder: Path, names: Collection[str]) -> list[str]:
    """The files with the weights of a model on another machine.

    Args:
        what: the model, at the beginning of a message.
        folder: the folder with its small files, the index of its weights among them.
        names: names of the files on the other machine.

    Raises:
        SourceError: some of them are not there.
    """
    choices = weight_files(folder)
    for files in choices:
        if set(names).issuperset(files):
            return files
    indexed = [files for files in choices if files not in ([SINGLE_SAFETENSORS], [SINGLE_PICKLE])]
    lost = [next(name for name in files if name not in names) for files in indexed or choices]
    raise SourceError(f"{what} has no {' and no '.join(lost)}, so it has no complete weights that moemerge can read.")


def tensors_of(
    folder: Path, names: Sequence[str], open_file: Callable[[str], RemoteFile]
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Read the table of a model's tensors from headers by byte ranges, with notes on what is odd.

    Args:
        folder: the folder with the model's small files, the index of its weights among them.
        names: names of the files with the weights.
        open_file: a function from such a name to the file.

    Raises:
        SourceError: a file cannot be reached.
        CheckpointError: index and headers disagree, or a file is damaged.
    """

    def read(file_names: Sequence[str]) -> list[dict[str, TensorInfo]]:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(lambda name: read_header(open_file(name)), file_names))

    index = {SAFETENSORS_INDEX} if (folder / SAFETENSORS_INDEX).exists() else set()
    chosen, read_map = find_weights(folder, {*names} | index)
    return read_tensors(folder, chosen, names, read_map, read)

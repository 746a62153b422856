"""A mixture in one GGUF file, or in the parts of one: it is no source of a merge, but can be looked at."""

from pathlib import Path
from typing import Final

from moemerge.checkpoint.gguf_blocks import read_tensor
from moemerge.checkpoint.gguf_contents import read_contents
from moemerge.checkpoint.header import TensorInfo
from moemerge.file_kinds import Kind, what_is
from moemerge.sources.gguf.choosing import find_ggufs
from moemerge.sources.model_folder import ModelFolder

_KEYS: Final = {
    "block_count": "num_hidden_layers",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}


def open_gguf_mixture(reference: str) -> tuple[ModelFolder, dict[str, TensorInfo]] | None:
    """Open a mixture in GGUF: what it says of itself, with keys of `config.json`, and its tensors by their own names.

    Args:
        reference: a file on this machine; the first of several parts.

    Returns:
        None for anything else: a dense model, a folder, a repository.

    Raises:
        SourceError: the file cannot be read.
        CheckpointError: it is damaged, or a part is not there.
    """
    path = Path(reference)
    if what_is(path) is not Kind.GGUF:
        return None
    files = [read_contents(file) for file in find_ggufs(reference, path)]
    settings, name = files[0].settings, files[0].architecture
    if not settings.get(f"{name}.expert_count"):
        return None
    config = {"model_type": name} | {own: settings.get(f"{name}.{key}") for key, own in _KEYS.items()}
    tensors = {tensor.name: read_tensor(file, tensor) for file in files for tensor in file.tensors.values()}
    return ModelFolder(reference, path, path, config), tensors

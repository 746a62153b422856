"""Find the files of a complete checkpoint in a folder, and nothing else that lies there."""

from pathlib import Path

from moemerge.errors import CheckpointError, RefusedError
from moemerge.planning.tokenizer_files import template_names
from moemerge.sources.local import leads_out
from moemerge.sources.model_folder import Announce, open_merged
from moemerge.sources.remote_weights import TEMPLATES
from moemerge.sources.tensor_tables import read_tensor_table


def checkpoint_files(folder: Path, announce: Announce) -> list[Path]:
    """List weights, `config.json`, index, tokenizer, model card and other files beside them, and chat templates below.

    Hidden files, other folders, and weights that the index does not name are left out, and announced.

    Raises:
        SourceError: there is no such folder, or no checkpoint in it.
        CheckpointError: index, headers and files do not agree, or a link leads out of the folder.
        RefusedError: the weights are not safetensors.
    """
    model = open_merged(folder)
    weights = {tensor.path.name for tensor in read_tensor_table(model, announce, whole=True).values()}
    if pickles := sorted(name for name in weights if not name.endswith(".safetensors")):
        raise RefusedError(f"{folder}: {pickles[0]}: only safetensors are sent. Merge or convert the model first.")
    sent: list[str] = []
    left: list[str] = []
    for path in sorted(model.folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.name == TEMPLATES and path.is_dir():
            sent += template_names(model.folder)
            continue
        strange = path.is_dir() or (path.suffix in {".safetensors", ".bin"} and path.name not in weights)
        (left if strange else sent).append(path.name)
    if left:
        announce(f"{folder}: not sent, since no reader of the model needs it: {', '.join(left)}")
    files = [file for name in sent if (file := model.file(name))]
    for file in files:
        if leads_out(model.folder.resolve(), target := file.resolve()):
            raise CheckpointError(
                f"{file}: is a link to {target}, outside the model's folder. Copy or hard-link the file instead."
            )
    return files


def name_in_repository(path: Path) -> str:
    """The path in a repository of a file of a checkpoint."""
    return f"{TEMPLATES}/{path.name}" if path.parent.name == TEMPLATES else path.name

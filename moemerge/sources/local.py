"""Files of a model's folder, with links followed no further than the cache that the folder belongs to."""

from pathlib import Path

from moemerge.errors import CheckpointError


def resolve_file(folder: Path, name: str) -> Path:
    """The real file behind `folder/name`.

    A snapshot in the Hub's cache is a folder of links into its repository's `blobs`; nothing else may lead outside:
    a link to a private file would be copied into the merged model.

    Raises:
        CheckpointError: the link leads elsewhere.
    """
    path = (folder / name).resolve()
    root = folder.resolve()
    allowed = {root}
    if root.parent.name == "snapshots":
        allowed.add(root.parent.parent / "blobs")
    if not allowed & set(path.parents):
        raise CheckpointError(
            f"{folder / name}: is a link to {path}, outside the model's folder. Copy or hard-link the file instead."
        )
    return path

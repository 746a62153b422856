"""Download the weights of models on the Hub into its cache, where the cache's disk has room for them."""

from collections.abc import Mapping
from pathlib import Path
from shutil import disk_usage

from moemerge.checkpoint.derived import leaves
from moemerge.checkpoint.disk import nearest_folder
from moemerge.checkpoint.files import size_of
from moemerge.checkpoint.header import TensorInfo
from moemerge.sources.model_folder import Announce, ModelFolder
from moemerge.sources.reference import Reference
from moemerge.sources.tensor_tables import read_tensor_tables


def fetch_if_room(
    models: Mapping[str, ModelFolder],
    tables: Mapping[str, dict[str, TensorInfo]],
    *,
    beside: tuple[Path | None, int],
    announce: Announce,
) -> dict[str, dict[str, TensorInfo]]:
    """Download the weights of those models that are on the Hub, if the cache's disk has space for all of them.

    Args:
        models: models by reference.
        tables: tensor tables of the models, by reference.
        beside: a folder, and how many bytes will be written there at the same time.
        announce: called with a line about each step that takes long.

    Returns:
        The tables of the downloaded models, by reference.

    Raises:
        SourceError: the Hub does not give the weights.
        CheckpointError: a model's files are damaged or incomplete.
    """
    files = {
        reference: {leaf.path for tensor in table.values() for leaf in leaves(tensor)}
        for reference, table in tables.items()
        if isinstance(models[reference].origin, Reference)
    }
    remote = {reference: found for reference, found in files.items() if not all(isinstance(f, Path) for f in found)}
    if not remote:
        return {}
    from moemerge.sources.hub import cache_folder

    cache, (folder, written_bytes) = nearest_folder(cache_folder()), beside
    needed = sum(size_of(file) for file in set().union(*remote.values()) if not isinstance(file, Path))
    if folder and nearest_folder(folder).stat().st_dev == cache.stat().st_dev:
        needed += written_bytes
    room = disk_usage(cache).free
    if room < needed:
        announce(
            f"the disk of the Hub's cache has {room / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB would be needed: "
            "weights are streamed from the Hub, as with --stream"
        )
        return {}
    read = read_tensor_tables([models[reference] for reference in remote], announce, dense=True)
    return dict(zip(remote, read, strict=True))

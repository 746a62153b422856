"""Where the main command writes to, and by which processes."""

from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.cli.merge_options import OutputOptions, PushOptions

if TYPE_CHECKING:
    from moemerge.merging.destinations import Destination
    from moemerge.publish.publisher import Publisher


def destination_of(out: Path, output: OutputOptions, push: PushOptions, publisher: "Publisher | None") -> "Destination":
    """The folder that a merge writes, alone or by several processes, or the Hub."""
    from moemerge.merging.destinations import Folder, Hub

    if publisher and push.push_streaming:
        if output.ray is None:
            return Hub(out, publisher)
        from moemerge.merging.shared_hub import SharedHub

        return SharedHub(out, publisher, output.ray, output.workers)
    folder = Folder(out, push.push, publisher.create) if publisher else Folder(out)
    if output.ray is None:
        return folder
    from moemerge.merging.shared_folder import SharedFolder

    return SharedFolder(folder.path, folder.model, folder.ready, output.ray, output.workers)

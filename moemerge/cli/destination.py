"""Where the main command writes to, and by which processes; what a merge that fails leaves there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.cli.merge_options import OutputOptions, PushOptions
from moemerge.errors import BusyError, RefusedError

if TYPE_CHECKING:
    from rich.console import Console

    from moemerge.merging.destinations import Destination
    from moemerge.publish.publisher import Publisher
    from moemerge.publish.store import StoreOutput
    from moemerge.sources.reference import Location


def location_in_store(out: Path, output: OutputOptions, push: PushOptions) -> "Location | None":
    """The place in an object store that a merge is written to, by the name of its output; None for any other output.

    Raises:
        RefusedError: it is an address of another kind, or options are given that belong to other outputs.
    """
    from moemerge.sources.reference import location_of, wrong_address

    if wrong := wrong_address(out):
        raise RefusedError(wrong)
    location = location_of(out)
    given = {
        "--push": push.push, "--push-streaming": push.push_streaming, "--private": push.private,
        "--revision": push.revision, "--create-pr": push.create_pr, "--license": push.license,
        "--type": output.type != "auto", "--llama-cpp": output.llama_cpp,
        "--ray": output.ray, "--workers": output.workers,
    }  # fmt: skip
    if location and (found := [name for name, value in given.items() if value]):
        raise RefusedError(f"{found[0]}: a merge into an object store does not use it. Remove it, or name a folder.")
    return location


@dataclass(frozen=True)
class Target:
    """What the main command writes: a folder, a GGUF file, or a place in an object store."""

    out: Path
    """The folder or file; for a store, the folder beside which the shards are made."""
    store: "StoreOutput | None" = None

    @property
    def place(self) -> "Path | Location":
        """The target as messages name it."""
        return self.store.location if self.store else self.out


def target_of(out: Path, location: "Location | None", announce: Callable[[str], None]) -> Target:
    """Look at a place in an object store, where a merge is written to one.

    Raises:
        RefusedError: it cannot be written to, or a package is needed.
        SourceError, OutputError: the store cannot be reached, or refuses.
    """
    if location is None:
        return Target(out)
    from moemerge.merging.store import scratch_for
    from moemerge.publish.store import StoreOutput

    return Target(scratch_for(location), StoreOutput(location, announce))


def destination_of(
    target: Target, output: OutputOptions, push: PushOptions, publisher: "Publisher | None"
) -> "Destination":
    """The folder that a merge writes, alone or by several processes, or the Hub, or a place in an object store."""
    from moemerge.merging.destinations import Folder, Hub

    out = target.out
    if target.store:
        from moemerge.merging.store import Store

        return Store(out, target.store)
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


@contextmanager
def hint_at_resume(console: "Console", target: Target, *, streaming: bool) -> Iterator[None]:
    """Print how many shards a merge that fails or is interrupted keeps for `--resume`."""
    from moemerge.checkpoint.staging import kept_shards

    store = target.store
    try:
        yield
    except (RefusedError, BusyError):
        raise
    except BaseException as error:
        if kept := store.shards if store else kept_shards(target.out):
            where = "in the store" if store else "on the Hub" if streaming else f"beside {target.out}"
            console.print(
                f"{kept} complete shards are kept {where}: --resume continues from them, a run without it starts over."
            )
        if isinstance(error, KeyboardInterrupt) and not error.args and (left := _left(target, streaming=streaming)):
            raise KeyboardInterrupt(left) from error
        raise


def _left(target: Target, *, streaming: bool) -> str | None:
    """Say what an interrupted merge leaves elsewhere; None if that is nothing new."""
    store = target.store
    if streaming:
        return f"{target.out} is not written; what was sent stays on the Hub"
    if store and (store.shards or store.began):
        command = "the same command with --resume" if store.shards else "the same command"
        return f"nothing takes {store.location} for a model until {command} has ended"
    return None

"""The journal of a change in place: which files leave a model, which come, and how far that is."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal

from moemerge.checkpoint.disk import drafted, flush
from moemerge.errors import CheckpointError

JOURNAL: Final = "journal.json"
DRAFT: Final = f"{JOURNAL}.new"
State = Literal["replacing", "replaced", "undoing", "undone", "committed"]
"""How far a change is: files are moved, or were, and then back again; or the old ones are being removed."""


@dataclass(frozen=True)
class Change:
    """A change of a model's files; each has a stamp, by its path within the model: see `stamps`."""

    state: State
    old: Mapping[str, list[int]]
    """The files that leave."""
    new: Mapping[str, list[int]]
    """The files that come."""
    kept: Mapping[str, list[int]]
    """The files of weights that belong to both models."""

    @classmethod
    def read(cls, work: Path) -> "Change | None":
        """Read the journal in the folder `work`; None where there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            return cls(**json.loads((work / JOURNAL).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{work / JOURNAL}: is damaged ({error}). The files of the model lie beside it."
            ) from error

    def write(self, work: Path, state: State) -> "Change":
        """Write the journal with another state, which is on the disk then; returns what was written."""
        change = replace(self, state=state)
        with drafted(work / JOURNAL) as draft:
            draft.write_text(json.dumps(asdict(change)), encoding="utf-8")
        flush(work)
        return change

    def changed_since(self, model: Path) -> Iterator[str]:
        """Yield files that something else has written since, or that lie where old ones would return to."""
        found = stamps(model, [*self.kept, *self.new])
        yield from (name for name, stamp in self.kept.items() if found.get(name) != stamp)
        yield from (name for name, stamp in self.new.items() if found.get(name, stamp) != stamp)
        yield from (name for name in self.old.keys() - self.new.keys() if os.path.lexists(model / name))


def stamps(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Size in bytes and time of writing, which a rename keeps, of those of the files that are there."""
    found = {name: (folder / name).lstat() for name in names if os.path.lexists(folder / name)}
    return {name: [file.st_size, file.st_mtime_ns] for name, file in found.items()}

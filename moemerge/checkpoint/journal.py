"""The journal of a merge, for `--resume`: one line for each shard whose bytes are on the disk."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moemerge.checkpoint.shards import Shard
from moemerge.errors import RefusedError


class Journal:
    """A file of JSON lines: the fingerprint of the merge, then name, size and header hash of each complete shard.

    A shard that was sent to the Hub and removed here has its SHA-256 too.
    """

    def __init__(self, path: Path) -> None:
        """Use the file `path`, which need not exist yet."""
        self._path = path

    def __len__(self) -> int:
        """The number of complete shards."""
        return max(0, len(self._lines()) - 1)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The fingerprint of the merge; empty where there is none."""
        found = next(iter(self._lines()), {}).get("fingerprint")
        return found if isinstance(found, dict) else {}

    @property
    def text(self) -> str:
        """The journal as it is; empty where there is none."""
        try:
            return self._path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def restore(self, text: str) -> None:
        """Take the journal of a run elsewhere in place of this one."""
        self._path.write_text(text, encoding="utf-8")

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Forget everything and start a new merge."""
        self._path.unlink(missing_ok=True)
        self._append({"fingerprint": fingerprint})

    def record(self, shard: Shard, sha256: str | None = None) -> None:
        """Note a shard whose bytes have been flushed to the disk, or are on the Hub with this hash."""
        self._append(_entry(shard) | ({"sha256": sha256} if sha256 else {}))

    def resume(
        self,
        fingerprint: Mapping[str, Any],
        folder: Path,
        shards: Sequence[Shard],
        on_hub: Mapping[str, tuple[str, int]] | None = None,
    ) -> set[str]:
        """Find the shards that are complete, and remove everything else in `folder`; returns their names.

        Where nothing is complete a new journal is begun.

        Args:
            fingerprint: the fingerprint of the merge.
            folder: the folder that the merge writes to.
            shards: the shards that may be kept.
            on_hub: hash and size of what the Hub has, by name, where shards are sent there one by one.

        Raises:
            RefusedError: the journal belongs to another merge; says what differs.
        """
        first, *entries = self._lines() or [{}]
        changed = list(differences(first.get("fingerprint"), json.loads(json.dumps(fingerprint))))
        if entries and changed:
            raise RefusedError(
                "--resume: the merge that was cut off was not this one; what differs: "
                f"{', '.join(changed[:6])}{' …' if len(changed) > 6 else ''}. "  # noqa: PLR2004
                "Undo the change, or start over without --resume."
            )
        if on_hub is None:
            kept = {s.name: _entry(s) for s in shards if _entry(s) in entries and holds(folder / s.name, s)}
        else:
            sent = [_entry(s) | {"sha256": on_hub[s.name][0]} for s in shards if s.name in on_hub]
            kept = {entry["name"]: entry for entry in sent if entry in entries}
        # A shard that has to be written again must leave the journal first: its size and header are right from the
        # start.
        draft = Journal(self._path.with_name(f"{self._path.name}.new"))
        draft.begin(fingerprint)
        for entry in kept.values():
            draft._append(entry)
        draft._path.replace(self._path)
        _remove_all_but(folder, set(kept))
        return set(kept)

    def remove(self) -> None:
        """Remove the journal: the merge is complete, or given up."""
        self._path.unlink(missing_ok=True)

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> list[dict[str, Any]]:
        """Read every whole line; a last line that was cut off is ignored."""
        found = []
        for line in self.text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not isinstance(entry, dict):
                break
            found.append(entry)
        return found


def _entry(shard: Shard) -> dict[str, Any]:
    return {"name": shard.name, "size": shard.nbytes, "header": hashlib.sha256(shard.header).hexdigest()}


def holds(path: Path, shard: Shard) -> bool:
    """Whether a file has the size and the header of a shard."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == shard.nbytes and file.read(len(shard.header)) == shard.header
    except OSError:
        return False


def _remove_all_but(folder: Path, names: set[str]) -> None:
    """Remove all that an interrupted merge left beside its complete shards: the base may have fewer files now."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Yield the addresses at which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{where}[{index}]")
    elif old != new:
        yield where

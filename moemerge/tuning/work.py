"""The folder beside a model that is being tuned: what a run that is cut off leaves for `--resume`."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from moemerge.checkpoint.disk import flush
from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.journal import differences
from moemerge.checkpoint.staging import beside, locked
from moemerge.errors import RefusedError
from moemerge.evaluation.figures import Estimate
from moemerge.tuning.settings import Held, Settings
from moemerge.tuning.writing import replace_files

_PURPOSE: Final = "moemerge-tune"


@dataclass
class State:
    """A tuning after some steps."""

    step: int
    best_step: int
    unimproved: int
    """Judgements in a row that found nothing better."""
    seconds: float
    before: Held
    best: Held
    rows: dict[int, torch.Tensor]
    best_rows: dict[int, torch.Tensor]
    optimiser: dict[str, Any]


class Work:
    """`.OUT.moemerge-tune` beside OUT."""

    def __init__(self, model: Path) -> None:
        """Use the folder of this model; nothing is written yet."""
        self._model = model.resolve()
        self.folder = beside(self._model, _PURPOSE)
        self.draft, self.ready = self.folder / "draft", self.folder / "ready"
        self._state = self.folder / "state.pt"

    @contextmanager
    def held(self, *, main: bool) -> Iterator[None]:
        """Keep others away; afterwards the folder is removed, unless there is something to resume.

        Raises:
            BusyError: another process tunes the same model.
            OutputError: the folder cannot be written.
        """
        if not main:
            yield
            return
        with locked(self.folder, self._model, "tuning"):
            try:
                yield
            finally:
                if not (self._state.exists() or self.ready.exists() or any(self.folder.glob("phatgoose-*"))):
                    shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self) -> None:
        """Do what is left of an earlier run that was cut off while it replaced files."""
        replace_files(self.ready, self._model)
        self.remove()

    def begin(self, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder, and forget what is in it unless it is resumed.

        Raises:
            RefusedError: what was cut off was another tuning; says what differs.
        """
        given = json.loads(json.dumps(fingerprint))
        path = self.folder / "fingerprint.json"
        if not resume or not path.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            path.write_text(json.dumps(given), encoding="utf-8")
        changed = list(differences(json.loads(path.read_text(encoding="utf-8")), given))
        if changed:
            raise RefusedError(
                f"--resume: the tuning that was cut off was not this one; what differs: {', '.join(changed[:6])}. "
                "Undo the change, or start over without --resume."
            )

    def save(self, state: State) -> None:
        """Write the state; it appears whole."""
        draft = self._state.with_suffix(".new")
        torch.save({**vars(state), "before": asdict(state.before), "best": asdict(state.best)}, draft)
        flush(draft)
        draft.replace(self._state)

    def load(self) -> State | None:
        """The state that was saved last, if there is one."""
        if not self._state.exists():
            return None
        stored = torch.load(self._state, weights_only=True)
        return State(**{**stored, "before": _held(stored["before"]), "best": _held(stored["best"])})

    def remove(self) -> None:
        """Everything is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _held(stored: Mapping[str, Any]) -> Held:
    losses = {name: Estimate(**found) for name, found in stored["losses"].items()}
    return Held(losses, stored["mean_loss"], stored["accuracy"])


def fingerprint(
    settings: Settings, documents: Mapping[str, list[str]], gates: Mapping[int, StoredTensor], processes: int,
    precision: str,
) -> dict[str, Any]:  # fmt: skip
    """What has to be the same for a tuning to go on."""
    shards = {Path(str(tensor.path)) for tensor in gates.values()}
    return {
        "options": asdict(settings),
        "data": {name: hashlib.sha256("\0".join(texts).encode()).hexdigest() for name, texts in documents.items()},
        "model": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(shards)},
        "processes": processes,
        "precision": precision,
    }  # fmt: skip

"""The folder beside a model that is being tuned: what a run that was cut off leaves for `--resume`."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moemerge.checkpoint.disk import drafted, flush
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.journal import differences
from moemerge.checkpoint.output_folder import TUNE, beside
from moemerge.checkpoint.staging import locked
from moemerge.errors import OutputError, RefusedError
from moemerge.evaluation.figures import Estimate
from moemerge.tuning.settings import HeldOutScores
from moemerge.tuning.writing import CARD, patch_shards, stamp


@dataclass
class State:
    """The state of a tuning after some steps."""

    step: int
    best_step: int
    without_gain: int
    """Consecutive judgements that found nothing better."""
    seconds: float
    before: HeldOutScores
    best: HeldOutScores
    values: dict[str, torch.Tensor]
    """The trained tensors now, by name."""
    best_values: dict[str, torch.Tensor]
    optimiser: dict[str, Any]
    note: str = ""
    """Why the tuning ended early, or why its last judgement was refused, if that is worth knowing."""

    def judge(self, found: HeldOutScores, values: dict[str, torch.Tensor]) -> None:
        """Keep the tensors of this step as the best if the mean is lower than ever, and no domain's got worse."""
        lower = found.mean_loss < self.best.mean_loss
        worsened = found.worsened(self.before) if lower else []
        if lower and not worsened:
            self.best_step, self.best, self.best_values, self.without_gain, self.note = self.step, found, values, 0, ""
            return
        self.without_gain += 1
        if worsened:
            self.note = (
                f"after step {self.step} the mean loss was lower, but {', '.join(worsened)}: that state was not kept"
            )


class WorkFolder:
    """The folder `.OUT.moemerge-tune` beside OUT, which is the model or its tuned copy."""

    def __init__(self, model: Path, out: Path) -> None:
        """Use the folder beside `out`; nothing is written yet."""
        self._model, self._out = model.resolve(), out.resolve()
        self.folder = beside(self._out, TUNE)
        self._ready, self._state = self.folder / "ready", self.folder / "state.pt"
        self.in_use = False
        """Whether this run has begun a tuning here."""
        self._fingerprint, self._replaced = self.folder / "fingerprint.json", self.folder / "replaced.json"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes away; afterwards the folder is removed, unless there is something to resume.

        Raises:
            BusyError: another process tunes to the same place.
            OutputError: the folder cannot be written.
        """
        with locked(self.folder, self._out, "tuning"):
            try:
                yield
            finally:
                if not self.resumable:
                    self.remove()

    @property
    def resumable(self) -> bool:
        """Whether predictions or a state were kept, so that there is work to resume."""
        found = {path.name for path in self.folder.glob("*") if not path.name.endswith(".new")}
        return bool(found - {self._fingerprint.name})

    @property
    def begun(self) -> bool:
        """Whether there is a tuning that may be resumed."""
        return self._fingerprint.exists()

    @property
    def unfinished(self) -> bool:
        """Whether an earlier run was cut off while it replaced files."""
        return self._ready.is_dir()

    def begin(self, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder, and remove what is in it unless it is resumed.

        Raises:
            RefusedError: the tuning that was cut off was another one; says what differs.
        """
        given = json.dumps(fingerprint)
        if not resume:
            self.remove()
            self.folder.mkdir()
            with drafted(self._fingerprint) as draft:
                draft.write_text(given, encoding="utf-8")
        elif changed := list(differences(json.loads(self._fingerprint.read_text("utf-8")), json.loads(given))):
            raise RefusedError(
                f"--resume: the tuning that was cut off was not this one; what differs: {', '.join(changed[:6])}. "
                "Undo the change, or start over without --resume."
            )
        self.in_use = True

    def save(self, state: State) -> None:
        """Write the state; the file appears whole."""
        with drafted(self._state) as draft:
            torch.save({**vars(state), "before": asdict(state.before), "best": asdict(state.best)}, draft)

    def load(self) -> State | None:
        """Load the state that was saved last onto the CPU; None if there is none."""
        if not self._state.exists():
            return None
        stored = torch.load(self._state, map_location="cpu", weights_only=True)
        return State(**{**stored, "before": _scores(stored["before"]), "best": _scores(stored["best"])})

    def replace(self, tensors: Mapping[str, TensorInfo], values: Mapping[str, bytes], card: str | None) -> None:
        """Give tensors of the model other values: the new files are written here first, then moved.

        Raises:
            KeyboardInterrupt: says what is left to do, if the moves were interrupted.
            OutputError: says what is left to do, if the system refused a move.
        """
        draft = self.folder / "draft"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        patch_shards(self._model, tensors, values, draft)
        if card is not None:
            (draft / CARD).write_text(card, encoding="utf-8")
            flush(draft / CARD)
        flush(draft)
        stamps = {path.name: [stamp(self._model / path.name), stamp(path)] for path in draft.iterdir()}
        with drafted(self._replaced) as record:
            record.write_text(json.dumps(stamps), encoding="utf-8")
        draft.rename(self._ready)
        flush(self.folder)
        left = "the next `moemerge tune` on it replaces the others"
        try:
            self.finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"some files of {self._model} are replaced; {left}") from None
        except OSError as error:
            raise OutputError(f"{self._model}: not all files could be replaced ({error.strerror}); {left}.") from error

    def finish(self) -> bool:
        """Move the finished files into the model, one at a time; after a crash the same call does what is left.

        Between two renames some layers are tuned and others not: any such mixture is a model that loads. If the
        model is neither the one before nor the one after, nothing is moved, and the result is False.
        """
        record = json.loads(self._replaced.read_text(encoding="utf-8")) if self._replaced.exists() else {}
        if not record or any(stamp(self._model / name) not in stamps for name, stamps in record.items()):
            self.remove()
            return False
        for path in sorted(self._ready.iterdir(), key=lambda path: (path.name == CARD, path.name)):
            path.replace(self._model / path.name)
        flush(self._model)
        self._fingerprint.unlink(missing_ok=True)
        self._ready.rmdir()
        flush(self.folder)
        self.remove()
        return True

    def remove(self) -> None:
        """Remove the folder, since everything is done, or nothing is begun."""
        self._fingerprint.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _scores(stored: Mapping[str, Any]) -> HeldOutScores:
    losses = {name: Estimate(**found) for name, found in stored["losses"].items()}
    return HeldOutScores(**{**stored, "losses": losses})

"""A tuning from the model's folder to its new gates: what `moemerge.tuning.tune` does once data are read."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moemerge.card import with_section
from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.staging import check_target
from moemerge.dtypes import NAMED
from moemerge.errors import RefusedError
from moemerge.evaluation.runnable import MixtureModel, open_mixture
from moemerge.tuning.batches import Batches
from moemerge.tuning.experts import open_expert, teach
from moemerge.tuning.judging import Judge
from moemerge.tuning.phatgoose import check_family, train_gates
from moemerge.tuning.processes import open_accelerator, weight_dtype
from moemerge.tuning.settings import Settings, Tuned, card_section
from moemerge.tuning.stacking import stack
from moemerge.tuning.student import Student
from moemerge.tuning.training import Training
from moemerge.tuning.whole import TOKENS_AT_ONCE, check_memory
from moemerge.tuning.work import State, Work, fingerprint
from moemerge.tuning.writing import check_room, gate_tensors, replace_files, stage_replacement, write_copy

Documents = Mapping[str, Sequence[str]]


def run(
    folder: Path | str, training: Documents, held_out: Documents, settings: Settings, *, copy: Path | None,
    device: str, resume: bool, progress: Callable[[str, int, int], None], announce: Callable[[str], None],
) -> Tuned | None:  # fmt: skip
    """See `moemerge.tuning.tune`."""
    mixture = open_mixture(folder)
    gates = gate_tensors(mixture)
    if mixture.experts_per_token == 1:
        raise RefusedError(
            f"{folder}: one expert takes each token, with a weight of 1 whatever the gates are: its loss has no slope "
            "to follow. Merge with experts_per_token: 2, tune, and set it to 1 in config.json."
        )
    if copy is not None:
        check_target(copy, [mixture.folder.resolve()], overwrite=False)
    check_room(gates, copy or mixture.folder)
    accelerator = open_accelerator(device)
    if not accelerator.is_main_process:
        progress, announce = (lambda _name, _done, _total: None), (lambda _: None)
    tuning = Tuning(mixture, gates, settings, accelerator, Work(mixture.folder), progress, announce)
    try:
        with tuning.work.held(main=accelerator.is_main_process):
            return tuning.run(training, held_out, copy, resume=resume)
    except KeyboardInterrupt:
        if tuning.work.folder.exists():
            announce("what was done so far is kept: the same command with --resume goes on")
        raise


@dataclass
class Tuning:
    """One call of `tune`."""

    mixture: MixtureModel
    gates: Mapping[int, StoredTensor]
    settings: Settings
    accelerator: Any
    work: Work
    progress: Callable[[str, int, int], None]
    announce: Callable[[str], None]

    def run(self, training: Documents, held_out: Documents, copy: Path | None, *, resume: bool) -> Tuned | None:
        """Train, judge, and write what is better."""
        main = self.accelerator.is_main_process
        if self._finish_earlier() and resume:
            return None
        device = self.accelerator.device
        batches = Batches.cut(self.mixture, training, held_out, self.settings)
        self._check(batches)
        local = self.accelerator.num_processes if device.type == "cpu" else 1
        tokens = min(self.settings.tokens_per_step, TOKENS_AT_ONCE)
        need = check_memory(self.mixture.runnable, device, weight_dtype(self.accelerator), tokens, local)
        self.announce(f"{self.mixture.folder}: {need}")
        if main:
            documents = {name: [*training[name], *held_out[name]] for name in training}
            how = (self.accelerator.num_processes, self.accelerator.mixed_precision)
            self.work.begin(fingerprint(self.settings, documents, self.gates, *how), resume=resume)
        self.accelerator.wait_for_everyone()
        if self.settings.method == "phatgoose":
            state = self._stack_gates(training, held_out, batches)
        else:
            state = self._train_gates(batches)
        found = self._found(state, batches, copy)
        if main:
            if found.improved:
                self._write(found, state, copy)
            self.work.remove()
        self.accelerator.wait_for_everyone()
        return found

    def _finish_earlier(self) -> bool:
        """Move the files that an earlier run had only to move; whether there were any."""
        unfinished = self.work.ready.is_dir()
        self.accelerator.wait_for_everyone()
        if unfinished and self.accelerator.is_main_process:
            self.work.finish()
            self.announce("an earlier tuning had been cut off while its files were moved: it is complete now")
        self.accelerator.wait_for_everyone()
        return unfinished

    def _check(self, batches: Batches) -> None:
        """Refuse what cannot be done, before what an earlier run has left is forgotten."""
        texts, processes = batches.training, self.accelerator.num_processes
        if processes > batches.windows_per_step:
            raise RefusedError(
                f"{processes} processes share {batches.windows_per_step} windows of a step: raise --tokens-per-step, "
                "or start fewer processes."
            )
        if self.settings.method == "phatgoose":
            without = [name for name in self.mixture.experts if name not in texts.domains]
            if without:
                raise RefusedError(
                    f"--method phatgoose: every expert's gate is trained on its own text, and {without[0]} has none: "
                    f"add --data {without[0]}=PATH."
                )
            if processes > 1:
                raise RefusedError("--method phatgoose: runs in one process. Start it without accelerate launch.")
        elif self.settings.distil and None in texts.expert:
            raise RefusedError(
                f"--data {texts.domains[texts.expert.index(None)]}=: is no expert's name, so it has no teacher; "
                f"experts: {', '.join(self.mixture.experts)}. Call the domain like its expert, or give --no-distil."
            )

    def _train_gates(self, batches: Batches) -> State:
        teachers = {}
        if self.settings.distil:
            teachers = teach(self.mixture, batches, self.work, self.accelerator, self.progress, self.announce)
        student, judge = self._load(batches)
        steps = Training(
            student, batches, judge, teachers, self.settings, self.accelerator, self.work,
            partial(self.progress, "steps"), self.announce,
        )  # fmt: skip
        return steps.run()

    def _stack_gates(self, training: Documents, held_out: Documents, batches: Batches) -> State:
        needs = "--method phatgoose needs the base and the dense experts"
        base = open_expert(self.mixture, None, needs, self.announce)
        check_family(self.mixture, base)
        experts = [
            open_expert(self.mixture, number, needs, self.announce) for number in range(len(self.mixture.experts))
        ]
        own = [
            Batches.cut(self.mixture, {name: training[name]}, {name: held_out[name]}, self.settings)
            for name in self.mixture.experts
        ]
        begun = time.perf_counter()
        gates = train_gates(
            self.mixture, base, experts, own, self.settings, self.accelerator, self.work, self.progress
        )  # fmt: skip
        seconds = (time.perf_counter() - begun) / len(own)
        student, judge = self._load(batches)
        before, rows = judge.judge(), student.rows()
        state = State(self.settings.steps, 0, 0, seconds, before, before, rows, rows, {})
        student.place({layer: new.to(student.device) for layer, new in stack(student, gates, batches.training).items()})
        after = judge.judge()
        self.announce(f"held-out loss {after.mean_loss:.4f} (at the start {before.mean_loss:.4f})")
        if after.mean_loss < before.mean_loss:
            state = replace(state, best=after, best_step=self.settings.steps, best_rows=student.rows())
        return state

    def _load(self, batches: Batches) -> tuple[Student, Judge]:
        student = Student.load(
            self.mixture, self.accelerator.device, weight_dtype(self.accelerator), partial(self.progress, "load")
        )
        return student, Judge(student, batches.held_out, self._dtypes(), self.accelerator)

    def _dtypes(self) -> dict[int, torch.dtype]:
        return {layer: getattr(torch, NAMED[tensor.dtype]) for layer, tensor in self.gates.items()}

    def _found(self, state: State, batches: Batches, copy: Path | None) -> Tuned:
        improved = state.best_step > 0
        texts = batches.held_out
        counts = {name: texts.of(place) for place, name in enumerate(texts.domains)}
        notes = [] if improved else ["nothing was better on held-out text than the routers that were there"]
        return Tuned(
            str(copy if copy and improved else self.mixture.folder), self.settings.method, improved, state.best_step,
            state.step, state.before, state.best,
            {n: sum(sum(texts.windows[place].scored) for place in mine) for n, mine in counts.items()},
            {n: len({texts.windows[place].document for place in mine}) for n, mine in counts.items()},
            state.seconds / max(state.step, 1), tuple(notes),
        )  # fmt: skip

    def _write(self, found: Tuned, state: State, copy: Path | None) -> None:
        dtypes = self._dtypes()
        rows = {
            layer: new.to(dtypes[layer]).contiguous().view(torch.uint8).numpy().tobytes()
            for layer, new in state.best_rows.items()
        }
        model, card = self.mixture.folder.resolve(), self.mixture.folder / "README.md"
        text = with_section(card.read_text(encoding="utf-8"), "tuning", card_section(found)) if card.is_file() else None
        if copy is not None:
            write_copy(model, self.gates, rows, text, copy)
            return
        stage_replacement(model, self.gates, rows, text, self.work.draft, self.work.ready)
        replace_files(self.work.ready, model)

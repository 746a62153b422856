"""Run a tuning, from the model's folder to what is written there, once `moemerge.tuning.tuner.tune` has read data."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from moemerge.checkpoint.output_folder import check_target
from moemerge.errors import OutputError, RefusedError
from moemerge.evaluation.figures import FEWEST_DOCUMENTS, difference
from moemerge.evaluation.runnable import MixtureModel, open_mixture
from moemerge.families.stored_mixture import per_token_key
from moemerge.model_card.card import read_card, with_section, with_trained_norms, without_section
from moemerge.passes.device import free_memory, memory_watched
from moemerge.passes.tokens import count_scored
from moemerge.progress import Progress
from moemerge.tuning.batches import Batches
from moemerge.tuning.context import TuningContext
from moemerge.tuning.judging import as_stored
from moemerge.tuning.phatgoose import open_sources, stack_gates
from moemerge.tuning.processes import Processes, open_processes
from moemerge.tuning.resume_folder import State, WorkFolder
from moemerge.tuning.settings import Documents, Settings, SplitDocuments, TuningResult, card_section
from moemerge.tuning.teachers import open_teachers
from moemerge.tuning.training import train
from moemerge.tuning.whole_model import plan_memory
from moemerge.tuning.writing import CARD, check_room, check_writable, shard_stamps, trained_tensors, write_copy


def run(
    folder: Path | str,
    documents: SplitDocuments,
    settings: Settings,
    *,
    copy: Path | None,
    device: str,
    resume: bool,
    progress: Progress,
    announce: Callable[[str], None],
) -> TuningResult | None:
    """Tune the model on documents; arguments, results and errors are those of `moemerge.tuning.tuner.tune`."""
    mixture, processes = open_mixture(folder), open_processes(device, settings.compute_dtype)
    if not processes.first:
        progress, announce = (lambda _task, _done, _total: None), (lambda _: None)
    if copy is None:
        check_writable(mixture.folder)
    else:
        check_target(copy, [mixture.folder.resolve()], offered=False)
        if WorkFolder(mixture.folder, mixture.folder).unfinished:
            raise RefusedError(
                f"{folder}: an earlier tuning of it was cut off while its files were moved. End that first, by "
                "`moemerge tune` with --resume and without --out."
            )
    work = WorkFolder(mixture.folder, copy or mixture.folder)
    advice = "tuning. Give fewer --tokens-per-step, or another --device; --resume goes on"
    try:
        with work.held() if processes.first else nullcontext(), memory_watched(advice):
            if copy is None and _finish_earlier(work, processes, announce) and resume:
                return None
            _check(mixture, settings, copy)
            local = processes.count if processes.device.type == "cpu" else 1
            free = free_memory(processes.device)
            least = None if free is None else processes.least(free)
            memory = plan_memory(mixture.runnable, processes.device, processes.dtype, least, local)
            context = TuningContext(mixture, settings, processes, memory, work, progress, announce)
            return _run(context, documents, copy, resume=resume and work.begun)
    except KeyboardInterrupt:
        if work.in_use and work.resumable and not work.unfinished:
            announce("what was done so far is kept: the same command with --resume goes on")
        raise


def _finish_earlier(work: WorkFolder, processes: Processes, announce: Callable[[str], None]) -> bool:
    """Move the files that an earlier run had only left to move; returns whether that was done."""
    unfinished, moved = work.unfinished, torch.zeros(1)
    processes.wait()
    if unfinished and processes.first:
        cut_off = "an earlier tuning had been cut off while its files were moved"
        if work.finish():
            moved += 1
            announce(f"{cut_off}: it is complete now")
        else:
            announce(f"{cut_off}, and the model was written anew since: what was left of it is removed")
    return bool(processes.sum(moved))


def _check(mixture: MixtureModel, settings: Settings, copy: Path | None) -> None:
    """Refuse what cannot be done, before what an earlier run has left is removed."""
    trained = trained_tensors(mixture, settings.train)
    if (mixture.folder / CARD).is_file():
        read_card(mixture.folder)
    if mixture.experts_per_token == 1:
        raise RefusedError(
            f"{mixture.folder}: one expert takes each token, with a weight of 1 whatever the gates are: its loss has "
            "no slope to follow. Merge with experts_per_token: 2, tune, and set "
            f"{per_token_key(mixture.family)} to 1 in config.json."
        )
    check_room(mixture, trained, copy)


def _run(context: TuningContext, documents: SplitDocuments, copy: Path | None, *, resume: bool) -> TuningResult:
    mixture, settings, processes = context.mixture, context.settings, context.processes
    batches = Batches.cut(mixture, documents, settings)
    _check_domains(context, batches)
    phatgoose = settings.method == "phatgoose"
    sources = open_sources(context) if phatgoose else []
    teachers = {}
    if processes.first and settings.distil and not phatgoose:
        teachers = open_teachers(context, batches, resume=resume)
    context.announce(
        f"{mixture.folder}: {context.memory.needs}{f', in {processes.count} processes' if processes.count > 1 else ''}"
    )
    shards = shard_stamps(trained_tensors(mixture, settings.train))
    if processes.first:
        texts = {name: [*training, *documents.held_out[name]] for name, training in documents.training.items()}
        if context.work.resumable and not resume:
            context.announce("what an earlier tuning had kept is removed: this one starts over, without --resume")
        context.work.begin(_fingerprint(context, texts, shards), resume=resume)
    processes.wait()
    state = stack_gates(context, sources, documents, batches) if phatgoose else train(context, batches, teachers)
    found = _result(context, state, batches, documents.sources, copy)
    if processes.first:
        if found.improved:
            _write(context, found, state, shards, copy)
        context.work.remove()
    processes.wait()
    return found


def _check_domains(context: TuningContext, batches: Batches) -> None:
    experts, texts = context.mixture.experts, batches.training
    without = [name for name in experts if name not in texts.domains]
    if context.settings.method == "phatgoose":
        if without:
            raise RefusedError(
                f"--method phatgoose: every expert's gate is trained on its own text, and {without[0]} has none: "
                f"add --data {without[0]}=PATH."
            )
        if context.processes.count > 1:
            raise RefusedError("--method phatgoose: runs in one process. Start it without accelerate launch.")
    elif context.settings.distil and None in texts.expert:
        raise RefusedError(
            f"--data {texts.domains[texts.expert.index(None)]}=: is not an expert's name, so it has no teacher; "
            f"experts: {', '.join(experts)}. Call the domain like its expert, or leave out --distil."
        )
    if without and not context.settings.allow_missing_domains:
        raise RefusedError(
            f"--data: there is no text for {', '.join(without)}. Gates that learn from the others' text alone send "
            f"tokens away from what has none: add {' '.join(f'--data {name}=PATH' for name in without)}, or accept "
            "that with --allow-missing-domains."
        )
    for domain, name in enumerate(batches.held_out.domains):
        documents = len({batches.held_out.windows[place].document for place in batches.held_out.of(domain)})
        if documents < FEWEST_DOCUMENTS:
            raise RefusedError(
                f"--data {name}=: {documents} of the documents that are held out have a token to predict, and "
                f"{FEWEST_DOCUMENTS} are needed to judge by. Give more documents, or longer ones."
            )


def _fingerprint(context: TuningContext, documents: Documents, shards: Mapping[str, list[int]]) -> dict[str, Any]:
    """The settings and files that have to be the same for a tuning to be resumed."""
    return {
        "options": asdict(context.settings),
        "experts": list(context.mixture.experts),
        "order of --data": list(documents),
        "data": {
            name: hashlib.sha256("\0".join(map(str, texts)).encode()).hexdigest() for name, texts in documents.items()
        },
        "model": shards,
        "processes": context.processes.count,
        "precision": str(context.processes.dtype),
        "precision of teachers": str(context.teaching.dtype),
    }


def _result(
    context: TuningContext, state: State, batches: Batches, sources: tuple[str, ...], copy: Path | None
) -> TuningResult:
    texts = batches.held_out
    windows = {name: [texts.windows[place] for place in texts.of(domain)] for domain, name in enumerate(texts.domains)}
    gain = difference(state.before.sums, state.best.sums)
    improved = gain.low is not None and gain.low > 0
    notes = [state.note] if state.note else []
    if not state.best_step:
        notes.append("nothing was better on held-out text than the routers that were there")
    elif not improved:
        notes.append("the gain may be chance, for its interval reaches down to 0: more documents make it narrower")
    notes += [f"{copy}: not written"] if copy and not improved else []
    found = TuningResult(
        str(copy if copy and improved else context.mixture.folder),
        context.settings.method,
        context.settings.train,
        improved,
        state.best_step,
        state.step,
        state.before,
        state.best,
        gain,
        state.best.gains(state.before),
        tuple(name for name in context.mixture.experts if name not in texts.domains),
        {name: count_scored(mine) for name, mine in windows.items()},
        {name: len({window.document for window in mine}) for name, mine in windows.items()},
        sources,
        state.seconds / max(state.step, 1),
        tuple(notes),
    )
    return replace(found, notes=(*notes, *found.harm, *sources))


def _write(
    context: TuningContext, found: TuningResult, state: State, shards: dict[str, list[int]], copy: Path | None
) -> None:
    mixture = context.mixture
    model, tensors = mixture.folder.resolve(), trained_tensors(mixture, context.settings.train)
    if shard_stamps(tensors) != shards:
        raise OutputError(
            f"{mixture.folder}: its files were written anew while it was tuned, so this tuning is not for it. Tune it "
            "again."
        )
    values = {
        name: new.contiguous().view(torch.uint8).numpy().tobytes()
        for name, new in as_stored(mixture, state.best_values).items()
    }
    card = _card(mixture, found)
    if copy is None:
        context.work.replace(tensors, values, card)
    else:
        write_copy(model, tensors, values, card, copy)


def _card(mixture: MixtureModel, found: TuningResult) -> str | None:
    """The model card with the tuning, without an evaluation of the routers before; None if there is no card."""
    if not (mixture.folder / CARD).is_file():
        return None
    text = without_section(read_card(mixture.folder), "evaluation")
    if found.train == "gates,norms":
        text = with_trained_norms(text)
    return with_section(text, "tuning", card_section(found))

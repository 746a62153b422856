"""The merge itself, told once: plan, routers, bytes, and the files around them.

Not `merge.py`: importing a module of that name would hide the function `moemerge.merge`.
"""

import json
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypedDict

from moemerge.card import write_card
from moemerge.card_metadata import licence_of
from moemerge.checkpoint.copy import copy_file
from moemerge.checkpoint.index import SAFETENSORS_INDEX
from moemerge.checkpoint.jobs import CONNECTIONS, MAX_THREADS
from moemerge.checkpoint.journal import Journal
from moemerge.checkpoint.pieces import Band, Piece
from moemerge.checkpoint.shards import Shard
from moemerge.checkpoint.staging import journal_of, left_bytes, staged
from moemerge.checkpoint.target import Replaceable, check_limits, check_scratch, check_space, check_target
from moemerge.checkpoint.writer import ShardWriter
from moemerge.config import CONFIG_COPY
from moemerge.dtypes import STORED
from moemerge.errors import CheckpointError, RefusedError
from moemerge.overwriting import replaceable_files
from moemerge.plan import Computed, MergePlan
from moemerge.routers import Routers, check_base_bits, init_routers
from moemerge.tokenizer_proof import prove_tokenizer

if TYPE_CHECKING:
    from moemerge.publish import Publisher
    from moemerge.routers.report import RoutingReport

# Of the stage: what is read from the Hub more than once.
_SOURCES: Final = ".sources"
Stage = Literal["routers", "weights"]
Progress = Callable[[Stage, int, int], None]
"""Called with the stage, what is done and all there is: layers for routers, bytes for weights.

Weights are written while routers are computed: reports of the two stages alternate, from one thread at a time.
"""


def merge(
    plan: MergePlan,
    out: Path | str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    low_memory: bool = False,
    seed: int = 0,
    device: str = "auto",
    base_bits: Literal[4, 8] | None = None,
    licence: str | None = None,
    name: str | None = None,
    progress: Progress = lambda _stage, _done, _total: None,
    warn: Callable[[str], None] = lambda _: None,
) -> "RoutingReport":
    """Carry out a plan: the folder `out` is complete when this returns, and untouched when it raises.

    What was cut off after its first complete shard is kept beside `out` for a run with `resume`.

    Args:
        plan: from `plan_merge`.
        out: the folder to write.
        overwrite: replace a checkpoint that `out` holds.
        resume: keep the complete shards of the same merge, cut off before; without any, begin.
        low_memory: one copying thread, small chunks, and neither sources nor output left in the page cache.
        seed: of random routers and of `noise_scale`.
        device: where the base model's layers are run for the routers: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        base_bits: hold the base model's Linear weights in so many bits for the routers, by bitsandbytes.
        licence: of the merged model, for its card; else what the cards of its sources agree on, if they do.
        name: of the merged model, for its card; else that of the folder.
        progress: called as the work goes on.
        warn: called with a line about the tokenizer, where it is not just copied, or could not be proved.

    Returns:
        What the routers do with the prompts.

    Raises:
        RefusedError: `out` would lose something, another merge than this was cut off, bitsandbytes is needed and not
            installed, or the output's tokenizer would not give the base's ids.
        OutputError: the disk is full or cannot be written.
        RouterError: the routers cannot be computed.
        CheckpointError: a source is not what its header said.
    """
    out = Path(out)
    plan.check_sources("since the plan was made")
    work = _Work(plan, seed=seed, device=device, base_bits=base_bits, low_memory=low_memory, licence=licence, warn=warn)
    check_output(plan, out, overwrite=overwrite, made_bytes=work.made_bytes)
    with (
        staged(out, plan.folders, **_replacing(plan, overwrite=overwrite), resume=resume) as folder,
        work.sources_kept_in(folder),
    ):
        journal = journal_of(folder)
        kept = journal.resume(plan.fingerprint(seed), folder, plan.shards_without_routers)
        tally = _Tally(progress, plan, kept)
        with work.writer(folder, plan.shards, tally, kept=kept, completed=journal.record) as writer:
            writer.add({name: o.origin for name, o in plan.outputs.items() if not isinstance(o.origin, Computed)})

            def layer_done(done: int, total: int) -> None:
                writer.check()
                tally.routers(done, total)

            routers = work.init_routers(layer_done)
            writer.add(work.router_bands(routers))
            work.write_other_files(folder, name or out.resolve().name, routers.report)
        with _forgetting(journal):
            plan.check_sources("while it was read")
        work.write_config(folder)
    return routers.report


def merge_to_hub(
    plan: MergePlan,
    scratch: Path | str,
    publisher: "Publisher",
    *,
    overwrite: bool = False,
    resume: bool = False,
    low_memory: bool = False,
    seed: int = 0,
    device: str = "auto",
    base_bits: Literal[4, 8] | None = None,
    licence: str | None = None,
    progress: Progress = lambda _stage, _done, _total: None,
    warn: Callable[[str], None] = lambda _: None,
) -> "RoutingReport":
    """Carry out a plan shard by shard: each is sent to the Hub when it is complete, then removed from the disk.

    Never are there more than two of them. Routers come first, the index, `config.json` and the model card last. What
    was cut off is kept on the Hub, and beside `scratch` a list of it, for a run with `resume`.

    Args:
        plan: from `plan_merge`.
        scratch: a folder that need not exist; shards are made beside it, and nothing is left there.
        publisher: where they go; opened.
        overwrite: replace a model that the repository holds.
        resume: keep the shards of the same merge that the Hub has.
        low_memory: see `merge`.
        seed: see `merge`.
        device: see `merge`.
        base_bits: see `merge`.
        licence: see `merge`.
        progress: called as the work goes on.
        warn: see `merge`.

    Returns:
        What the routers do with the prompts.

    Raises:
        PublishError: the Hub does not take something.
        RefusedError: the repository would lose something; and see `merge`.
        OutputError: see `merge`.
        RouterError: see `merge`.
        CheckpointError: see `merge`.
    """
    scratch = Path(scratch)
    plan.check_sources("since the plan was made")
    work = _Work(plan, seed=seed, device=device, base_bits=base_bits, low_memory=low_memory, licence=licence, warn=warn)
    check_streaming(plan, scratch)
    with (
        staged(scratch, plan.folders, resume=resume, temporary=True) as folder,
        work.sources_kept_in(folder),
    ):
        publisher.check_streaming(overwrite=overwrite)
        journal = journal_of(folder)
        fingerprint = plan.fingerprint(seed) | {"destination": publisher.repo}
        kept = journal.resume(fingerprint, folder, plan.shards_without_routers, publisher.held())
        tally = _Tally(progress, plan, kept)
        routers = work.init_routers(tally.routers)
        made = work.router_bands(routers)
        bands = {name: made.get(name, output.bands) for name, output in plan.outputs.items()}

        def send(shard: Shard) -> None:
            journal.record(shard, publisher.send(folder / shard.name))
            (folder / shard.name).unlink()

        publisher.begin_streaming()
        complete: list[Shard] = []
        for shard in plan.shards:
            if shard.name not in kept:
                with work.writer(folder, [shard], tally) as writer:
                    writer.add(bands)
                    if complete:
                        send(complete.pop())
                complete.append(shard)
        send(complete.pop())
        work.write_other_files(folder, publisher.repo, routers.report)
        with _forgetting(journal):
            plan.check_sources("while it was read")
        work.write_config(folder)
        publisher.finish(folder)
        return routers.report


def check_output(plan: MergePlan, out: Path | str, *, overwrite: bool = False, made_bytes: int = 0) -> None:
    """Refuse a folder that `merge` could not write, or would take something from; nothing is left on the disk.

    Args:
        plan: the merge.
        out: the folder.
        overwrite: see `merge`.
        made_bytes: of files that are made beside those that the plan counts.

    Raises:
        RefusedError: see `merge`.
        OutputError: see `merge`.
    """
    out = Path(out)
    check_target(out, plan.folders, **_replacing(plan, overwrite=overwrite))
    check_space(out, plan.output_bytes + made_bytes - plan.shared_bytes + plan.kept_bytes, left=left_bytes(out))
    check_limits(out, largest=max(shard.nbytes for shard in plan.shards), memory=plan.peak_memory_bytes)


def check_streaming(plan: MergePlan, scratch: Path | str) -> None:
    """Refuse a folder beside which `merge_to_hub` could not write two shards; nothing is left on the disk.

    Raises:
        RefusedError: see `merge_to_hub`.
        OutputError: see `merge_to_hub`.
    """
    scratch = Path(scratch)
    check_scratch(scratch, plan.folders)
    two_shards = sorted(shard.nbytes for shard in plan.shards)[-2:]
    check_space(scratch, plan.kept_bytes + sum(two_shards), left=left_bytes(scratch))
    check_limits(scratch, largest=two_shards[-1], memory=plan.peak_memory_bytes)


@contextmanager
def _forgetting(journal: Journal) -> Iterator[None]:
    """Where this fails, complete shards are of no use to a later run either."""
    try:
        yield
    except CheckpointError:
        journal.remove()
        raise


class _Replacing(TypedDict, total=False):
    inputs: Collection[Path]
    replaceable: Replaceable


def _replacing(plan: MergePlan, *, overwrite: bool) -> _Replacing:
    """What may be replaced, and what may not be in the way of it."""
    if not overwrite:
        return {}
    return {"inputs": plan.inputs, "replaceable": partial(replaceable_files, written=plan.file_names)}


class _Work:
    """The parts of a merge."""

    def __init__(
        self, plan: MergePlan, *, seed: int, device: str, base_bits: Literal[4, 8] | None, low_memory: bool,
        licence: str | None, warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        check_base_bits(base_bits)
        if plan.runs_base and device not in {"auto", "cpu"}:
            from moemerge.passes.device import find_device  # before anything is copied

            find_device(device)
        self._tokenizer = plan.tokenizer or prove_tokenizer(
            plan.base_files, plan.output_config, in_process=plan.runs_base
        )
        for note in self._tokenizer.notes:
            warn(note)
        self._plan, self._seed, self._device = plan, seed, device
        self._base_bits, self._low_memory, self._licence = base_bits, low_memory, licence

    @property
    def made_bytes(self) -> int:
        """Size of what is made of the base's tokenizer."""
        return sum(map(len, self._tokenizer.files.values()))

    @contextmanager
    def sources_kept_in(self, folder: Path) -> Iterator[None]:
        """Have what is read more than once from other machines kept there, and remove it at the end."""
        shutil.rmtree(folder / _SOURCES, ignore_errors=True)  # of a run that was killed
        self._plan.keep_reread(folder / _SOURCES)
        try:
            yield
        finally:
            shutil.rmtree(folder / _SOURCES, ignore_errors=True)

    def writer(
        self, folder: Path, shards: Sequence[Shard], tally: "_Tally", *, kept: Collection[str] = (),
        completed: Callable[[Shard], None] = lambda _: None,
    ) -> ShardWriter:  # fmt: skip
        """What writes shards."""
        return ShardWriter(
            folder,
            shards,
            tally.weights,
            seed=self._seed,
            kept=kept,
            completed=completed,
            reserve=not self._plan.shared_bytes,
            low_memory=self._low_memory,
            threads=1 if self._low_memory else CONNECTIONS if self._plan.remote_bytes else MAX_THREADS,
        )

    def init_routers(self, progress: Callable[[int, int], None]) -> Routers:
        """Compute them."""
        plan = self._plan
        return init_routers(
            plan.config, plan.base_folder, plan.base, plan.base_tensors, plan.dtype, experts=plan.experts,
            mixture=plan.mixture, scoring=plan.family.scoring,
            shared_gate=any(computed.kind == "shared gate" for computed in plan.computed.values()),
            run_base=plan.runs_base, seed=self._seed, device=self._device, base_bits=self._base_bits,
            low_memory=self._low_memory, progress=progress,
        )  # fmt: skip

    def router_bands(self, routers: Routers) -> dict[str, tuple[Band, ...]]:
        """The tensors that were computed."""
        made = {"router": routers.rows, "shared gate": routers.shared_gates}
        dtype = STORED[self._plan.dtype]
        return {
            name: ((Piece(made[tensor.kind][tensor.layer], dtype),),) for name, tensor in self._plan.computed.items()
        }

    def write_other_files(self, folder: Path, name: str, report: "RoutingReport") -> None:
        """All but weights and `config.json`; `name` is the model's."""
        for file_name, path in self._plan.copied_files.items():
            (folder / file_name).parent.mkdir(exist_ok=True)
            copy_file(path, folder / file_name)
        for file_name, content in self._tokenizer.files.items():
            (folder / file_name).write_bytes(content)
        if (index := self._plan.index) is not None:
            (folder / SAFETENSORS_INDEX).write_text(index, encoding="utf-8")
        (folder / CONFIG_COPY).write_text(self._plan.config.text, encoding="utf-8")
        licence = self._licence
        with suppress(RefusedError):  # only who publishes the model has to say
            licence = licence or licence_of(self._plan.sources)
        write_card(folder, name, self._plan, report, licence, notes=self._tokenizer.notes)

    def write_config(self, folder: Path) -> None:
        """What makes a folder a model."""
        (folder / "config.json").write_text(json.dumps(self._plan.output_config, indent=2) + "\n", encoding="utf-8")


class _Tally:
    """Sums up what two stages report at the same time."""

    def __init__(self, progress: Progress, plan: MergePlan, kept: set[str]) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._total = plan.tensor_bytes
        self._done = sum(shard.nbytes - len(shard.header) for shard in plan.shards if shard.name in kept)
        self.weights(0)

    def weights(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._progress("weights", self._done, self._total)

    def routers(self, done: int, total: int) -> None:
        with self._lock:
            self._progress("routers", done, total)

"""The work of a merge, whatever its output: writers of tensors, the routers, and the files around them."""

import json
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moemerge.checkpoint.index import SAFETENSORS_INDEX
from moemerge.checkpoint.jobs import CONNECTIONS, MAX_THREADS
from moemerge.checkpoint.pieces import Band, Piece
from moemerge.checkpoint.shards import Shard
from moemerge.checkpoint.writer import ShardWriter
from moemerge.config.config_copy import text_for
from moemerge.config.schema import CONFIG_COPY
from moemerge.dtypes import HEADER_DTYPES
from moemerge.errors import RefusedError
from moemerge.merging.options import MergeOptions
from moemerge.model_card.card import write_card, write_metadata_card
from moemerge.model_card.metadata import licence_of
from moemerge.planning.plan import MergePlan
from moemerge.planning.shared_choice import SharedChoice, settle
from moemerge.planning.tokenizer_proof import prove_tokenizer
from moemerge.progress import Progress, Task
from moemerge.routers.initialisation import Routers, check_base_bits, init_routers
from moemerge.routers.kept_folder import check_keeps

if TYPE_CHECKING:
    from moemerge.routers.report import RoutingReport

# Of the stage: what is read from the Hub more than once.
_SOURCES: Final = ".sources"
# Of those sources: the tokenizer that texts are read with, where it is not the base's.
_TOKENIZER: Final = "tokenizer"


class Work:
    """The work of one merge, in the steps that folders, the Hub and GGUF files share."""

    def __init__(
        self, plan: MergePlan, options: MergeOptions, warn: Callable[[str], None], *, to_folder: bool = True
    ) -> None:
        """Check the device and the tokenizer before anything is written.

        Args:
            plan: the plan to carry out.
            options: the options of the merge.
            warn: called with a line about a tokenizer that is not just copied, or could not be proved.
            to_folder: whether the tokenizer's files are written; else only doubts about it are worth a line.

        Raises:
            RefusedError: bitsandbytes is not installed, or the output's tokenizer would not give the base's ids; or the
                shared weights have to be chosen by weights that are left elsewhere; or there are no router inputs to
                keep; or there is no such device.
        """
        check_base_bits(options.base_bits)
        if options.kept_states:
            check_keeps(plan.config.method, runs_base=plan.runs_base)
        if plan.is_open and plan.remote_bytes:
            raise RefusedError(
                "shared_weights: auto reads all models once more to choose, but weights are left on the Hub, or in a "
                "store. Name base, average or ties; or have them on this machine: from the Hub without --stream and "
                "with room in its cache, from a store by a copy."
            )
        if (plan.runs_base or plan.is_open) and options.device not in {"auto", "cpu"}:
            from moemerge.passes.device import find_devices  # before anything is copied

            find_devices(options.device)
        self._tokenizer = plan.tokenizer or prove_tokenizer(
            plan.base_files, plan.output_config, in_process=plan.runs_base
        )
        for note in self._tokenizer.notes if to_folder else self._tokenizer.doubts:
            warn(note)
        self.plan, self.options = plan, options
        self._sources: Path | None = None

    def choose(self, known: Mapping[str, Any] | None, progress: Progress, announce: Callable[[str], None]) -> MergePlan:
        """Choose the shared weights, which the config leaves to the merge; returns the plan of the choice.

        Args:
            known: the choice of a run that was cut off, if this one resumes it.
            progress: called as the work goes on.
            announce: called with a line about the choice, and one for each note on it.
        """
        if known:
            choice = SharedChoice(**known)
        else:
            from moemerge.evaluation.shared_weights import choose  # imports torch and transformers
            from moemerge.passes.compute_dtype import find_compute

            options, shapes = self.options, self.plan.parts.base.layer_shapes
            compute = find_compute(options.device, options.compute_dtype, shapes)
            choice = choose(self.plan, compute, partial(progress, Task("shared weights")), self._tokenizer_folder())
        notes, self.plan = self.plan.notes, settle(self.plan, choice)
        for note in self.plan.notes:
            if note not in notes:
                announce(f"note: {note}")
        return self.plan

    @property
    def made_bytes(self) -> int:
        """Size in bytes of the files that are made of the base's tokenizer."""
        return sum(map(len, self._tokenizer.files.values()))

    @contextmanager
    def sources_kept_in(self, folder: Path) -> Iterator[None]:
        """A context that keeps what is read more than once from other machines in `folder` until its end."""
        shutil.rmtree(folder / _SOURCES, ignore_errors=True)  # of a run that was killed
        for tensor in self.plan.origins.reread:
            tensor.keep(folder / _SOURCES)
        self._sources = folder / _SOURCES
        try:
            yield
        finally:
            shutil.rmtree(folder / _SOURCES, ignore_errors=True)

    def writer(
        self,
        folder: Path,
        shards: Sequence[Shard],
        tally: "Tally",
        *,
        kept: Collection[str] = (),
        completed: Callable[[Shard], None] = lambda _: None,
    ) -> ShardWriter:
        """Open a writer of shards.

        Args:
            folder: the folder that holds the shards.
            shards: the shards to write.
            tally: counts the bytes that are written.
            kept: names of shards that are complete already.
            completed: called with each shard when it is complete.
        """
        missing = [shard for shard in shards if shard.name not in kept]
        return self.make_writer(folder, missing, tally.weights, completed=completed)

    @property
    def make_writer(self) -> partial[ShardWriter]:
        """A function that makes a writer of a folder, shards and a report, also in another process."""
        return partial(
            ShardWriter,
            seed=self.options.seed,
            reserve=not self.plan.shared_bytes,
            low_memory=self.options.low_memory,
            threads=1 if self.options.low_memory else CONNECTIONS if self.plan.remote_bytes else MAX_THREADS,
        )

    def init_routers(self, tally: "Tally", check: Callable[[], None] = lambda: None) -> Routers:
        """Compute the routers; `check` is called when a layer has run, and may raise."""

        def checked(task: Task, done: int, total: int) -> None:
            check()
            tally.others(task, done, total)

        request = replace(self.plan.router_request, folder=self._tokenizer_folder())
        return init_routers(request, self.options, seed=self.options.seed, progress=checked)

    def init_routers_beside(self, writer: ShardWriter, tally: "Tally") -> Routers:
        """Compute the routers while a writer is at work; an error of the writer is raised after the current layer."""
        return self.init_routers(tally, writer.check)

    def _tokenizer_folder(self) -> Path:
        """The folder of the tokenizer that texts are read with: the base's, or one of the output's within the stage."""
        if self.plan.shape.vocabulary is None or self._sources is None:
            return self.plan.base_folder
        folder = self._sources / _TOKENIZER
        if not folder.is_dir():
            folder.mkdir(parents=True)
            self.write_base_files(folder)
            self.write_config(folder)
        return folder

    def write_base_files(self, folder: Path) -> None:
        """Copy the base's files beside its weights, and write those that are made of its tokenizer."""
        self.plan.base_files.write(folder, self._tokenizer.files)

    def write_other_files(self, folder: Path, name: str, final: Path | None, report: "RoutingReport") -> None:
        """Write all files but weights and `config.json`.

        Args:
            folder: the folder to write them into.
            name: the model's name in its card.
            final: the folder that they will be in, from which paths in the config's copy count; None for the Hub.
            report: the routing report.
        """
        self.write_base_files(folder)
        if (index := self.plan.layout.index) is not None:
            (folder / SAFETENSORS_INDEX).write_text(index, encoding="utf-8")
        text = text_for(self.plan.config, final)
        (folder / CONFIG_COPY).write_text(text, encoding="utf-8")
        write_card(folder, name, self.plan, report, self._known_licence(), text=text, notes=self._tokenizer.notes)

    def describe(self, folder: Path) -> None:
        """Write the files that describe the model into a new folder: no weights, a card without figures."""
        folder.mkdir(parents=True)
        self.write_base_files(folder)
        write_metadata_card(folder, self.plan, self._known_licence())
        self.write_config(folder)

    def _known_licence(self) -> str | None:
        licence = self.options.licence
        with suppress(RefusedError):  # only who publishes the model has to say
            licence = licence or licence_of(self.plan.sources)
        return licence

    def write_config(self, folder: Path) -> None:
        """Write `config.json`, which makes the folder a model."""
        (folder / "config.json").write_text(json.dumps(self.plan.output_config, indent=2) + "\n", encoding="utf-8")


def router_bands(plan: MergePlan, routers: Routers) -> dict[str, tuple[Band, ...]]:
    """Make the output's tensors of computed routers and shared gates, by name."""
    made = {"router": routers.rows, "shared gate": routers.shared_gates}
    dtype = HEADER_DTYPES[plan.dtype]
    return {name: ((Piece(made[tensor.kind][tensor.layer], dtype),),) for name, tensor in plan.computed.items()}


class Tally:
    """Adds up the progress of two tasks, routers and weights, which report from different threads."""

    def __init__(self, progress: Progress, shards: Sequence[Shard], kept: Collection[str] = ()) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._total = sum(shard.tensor_bytes for shard in shards)
        self._done = sum(shard.tensor_bytes for shard in shards if shard.name in kept)
        self.weights(0)

    def weights(self, nbytes: int) -> None:
        """Report that `nbytes` more bytes are written."""
        with self._lock:
            self._done += nbytes
            self._progress(Task("weights"), self._done, self._total)

    def others(self, task: Task, done: int, total: int) -> None:
        """Report how far another task is."""
        with self._lock:
            self._progress(task, done, total)

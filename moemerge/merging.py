"""The merge itself, told once: plan, routers, bytes, and the files around them.

Not `merge.py`: importing a module of that name would hide the function `moemerge.merge`.
"""

import json
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moemerge.card import licence_of, write_card
from moemerge.checkpoint.index import SAFETENSORS_INDEX
from moemerge.checkpoint.pieces import Piece
from moemerge.checkpoint.staging import check_space, journal_of, staged
from moemerge.checkpoint.writer import ShardWriter
from moemerge.config import CONFIG_COPY
from moemerge.dtypes import STORED
from moemerge.errors import RefusedError
from moemerge.plan import Computed, MergePlan
from moemerge.routers import check_base_bits, init_routers

if TYPE_CHECKING:
    from moemerge.routers.report import RoutingReport

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
    progress: Progress = lambda _stage, _done, _total: None,
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
        progress: called as the work goes on.

    Returns:
        What the routers do with the prompts.

    Raises:
        RefusedError: `out` would lose something, another merge than this was cut off, or bitsandbytes is needed and not
            installed.
        OutputError: the disk is full or cannot be written.
        RouterError: the routers cannot be computed.
        CheckpointError: a source is not what its header said.
    """
    out = Path(out)
    check_base_bits(base_bits)
    if plan.runs_base and device not in {"auto", "cpu"}:
        from moemerge.routers.computed import find_device  # before anything is copied

        find_device(device)
    with staged(out, [source.folder for source in plan.sources], overwrite=overwrite, resume=resume) as folder:
        check_space(out, plan.output_bytes - plan.shared_bytes)
        journal = journal_of(folder)
        kept = journal.resume(plan.fingerprint(seed), folder, plan.shards_without_routers)
        tally = _Tally(progress, plan, kept)
        with ShardWriter(
            folder,
            plan.shards,
            tally.weights,
            seed=seed,
            kept=kept,
            completed=journal.record,
            reserve=not plan.shared_bytes,
            low_memory=low_memory,
        ) as writer:
            writer.add({name: o.origin for name, o in plan.outputs.items() if not isinstance(o.origin, Computed)})

            def layer_done(done: int, total: int) -> None:
                writer.check()
                tally.routers(done, total)

            computed = {name: o.origin for name, o in plan.outputs.items() if isinstance(o.origin, Computed)}
            routers = init_routers(
                plan.config, plan.base_folder, plan.base, plan.base_tensors, plan.dtype, experts=plan.experts,
                mixture=plan.mixture,
                scoring=plan.family.scoring, shared_gate=any(c.kind == "shared gate" for c in computed.values()),
                run_base=plan.runs_base, seed=seed, device=device, base_bits=base_bits, low_memory=low_memory,
                progress=layer_done,
            )  # fmt: skip
            made = {"router": routers.rows, "shared gate": routers.shared_gates}
            writer.add({
                name: ((Piece(made[tensor.kind][tensor.layer], STORED[plan.dtype]),),)
                for name, tensor in computed.items()
            })  # fmt: skip
            for path in plan.copied_files:
                shutil.copyfile(path, folder / path.name)
            if (index := plan.index) is not None:
                (folder / SAFETENSORS_INDEX).write_text(index, encoding="utf-8")
            (folder / CONFIG_COPY).write_text(plan.config.text, encoding="utf-8")
            licence = None
            with suppress(RefusedError):  # only who publishes the model has to say
                licence = licence_of(plan)
            write_card(folder, out.resolve().name, plan, routers.report, licence)
        (folder / "config.json").write_text(json.dumps(plan.output_config, indent=2) + "\n", encoding="utf-8")
    return routers.report


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

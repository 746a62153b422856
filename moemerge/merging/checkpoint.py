"""The merge itself, told once: plan, routers, bytes, and the files around them.

Not `merge.py`: importing a module of that name would hide the function `moemerge.merge`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moemerge.checkpoint.journal import Journal
from moemerge.checkpoint.shards import Shard
from moemerge.checkpoint.staging import journal_of, staged
from moemerge.errors import CheckpointError
from moemerge.merging.output_checks import check_output, check_streaming, replacing
from moemerge.merging.work import Progress, Tally, Work
from moemerge.planning.output import Computed
from moemerge.planning.plan import MergePlan

if TYPE_CHECKING:
    from moemerge.publish.publisher import Publisher
    from moemerge.routers.report import RoutingReport


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
    ready: Callable[[], None] = lambda: None,
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
        ready: called when nothing is left to refuse, before the work begins; may raise.
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
    plan.origins.check("since the plan was made")
    work = Work(plan, seed=seed, device=device, base_bits=base_bits, low_memory=low_memory, licence=licence, warn=warn)
    check_output(plan, out, overwrite=overwrite, made_bytes=work.made_bytes)
    with (
        staged(out, plan.folders, **replacing(plan, overwrite=overwrite), resume=resume) as folder,
        work.sources_kept_in(folder),
    ):
        journal = journal_of(folder)
        kept = journal.resume(plan.fingerprint(seed), folder, plan.shards_without_routers)
        ready()
        tally = Tally(progress, plan.shards, kept)
        with work.writer(folder, plan.shards, tally, kept=kept, completed=journal.record) as writer:
            writer.add({name: o.origin for name, o in plan.outputs.items() if not isinstance(o.origin, Computed)})
            routers = work.init_routers_beside(writer, tally)
            writer.add(work.router_bands(routers))
            work.write_other_files(folder, name or out.resolve().name, routers.report)
        with _forgetting(journal):
            plan.origins.check("while it was read")
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
        publisher: where they go; opened. What is missing there is created when nothing is left to refuse.
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
    plan.origins.check("since the plan was made")
    work = Work(plan, seed=seed, device=device, base_bits=base_bits, low_memory=low_memory, licence=licence, warn=warn)
    check_streaming(plan, scratch)
    with (
        staged(scratch, plan.folders, resume=resume, temporary=True) as folder,
        work.sources_kept_in(folder),
    ):
        publisher.check_streaming(overwrite=overwrite)
        journal = journal_of(folder)
        fingerprint = plan.fingerprint(seed) | {"destination": publisher.repo}
        kept = journal.resume(fingerprint, folder, plan.shards_without_routers, publisher.held())
        publisher.create()
        tally = Tally(progress, plan.shards, kept)
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
            plan.origins.check("while it was read")
        work.write_config(folder)
        publisher.finish(folder)
        return routers.report


@contextmanager
def _forgetting(journal: Journal) -> Iterator[None]:
    """Where this fails, complete shards are of no use to a later run either."""
    try:
        yield
    except CheckpointError:
        journal.remove()
        raise

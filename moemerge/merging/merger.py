"""The merge itself: routers, bytes, and the files around them.

Not `merge.py`: importing a module of that name would hide the function `moemerge.merge`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.checkpoint.journal import Journal
from moemerge.checkpoint.staging import journal_of
from moemerge.errors import CheckpointError, RefusedError
from moemerge.merging.destinations import Destination, Folder, Unfinished
from moemerge.merging.merge_work import Tally, Work
from moemerge.merging.options import MergeOptions
from moemerge.planning.fingerprint import CHOSEN, plan_fingerprint
from moemerge.planning.plan import MergePlan
from moemerge.progress import Progress
from moemerge.sources.reference import location_of, wrong_address

if TYPE_CHECKING:
    from moemerge.routers.report import RoutingReport


def merge(
    plan: MergePlan,
    destination: Destination | Path | str,
    options: MergeOptions = MergeOptions(),
    *,
    progress: Progress = lambda _task, _done, _total: None,
    warn: Callable[[str], None] = lambda _: None,
    announce: Callable[[str], None] = lambda _: None,
) -> "RoutingReport":
    """Carry out a plan: the output is complete when this returns, and no reader takes it for a model when it raises.

    Args:
        plan: the plan, from `plan_merge`.
        destination: a `Folder`, its path, the address of a folder in an object store, or the `Hub`.
        options: the options of the merge.
        progress: called as the work goes on; see `Progress`.
        warn: called with a line about the tokenizer, where it is not just copied, or could not be proved.
        announce: called with a line about the shared weights, where the merge chooses them.

    Returns:
        The routing report: which expert takes which of the prompts' tokens.

    Raises:
        RefusedError: something would be lost, another merge than this was cut off, bitsandbytes is needed and not
            installed, or the output's tokenizer would not give the base's ids.
        OutputError: the disk is full or cannot be written.
        RouterError: the routers cannot be computed.
        CheckpointError: a source is not what its header said.
        PublishError, SourceError: the Hub does not take something; an object store cannot be reached.
    """
    to = destination if isinstance(destination, Destination) else _destination(destination, announce)
    plan.origins.check("since the plan was made")
    work = Work(plan, options, warn)
    to.check(plan, options, work.made_bytes)
    with to.staged(plan, options) as folder, work.sources_kept_in(folder):
        journal, held = journal_of(folder), to.held(options)  # a journal without shards may be of any merge
        known = journal.fingerprint.get(CHOSEN) if options.resume and len(journal) else None
        if plan.is_open:
            plan = work.choose(known, progress, announce)
            to.check(plan, options, work.made_bytes)  # unlike the base's, mixed weights share no blocks with sources
        fingerprint = {**plan_fingerprint(plan, options.seed), **to.identity}
        kept = journal.resume(fingerprint, folder, plan.shards_without_routers, held)
        to.begin()
        report = to.write(work, Unfinished(folder, journal, kept, Tally(progress, plan.shards, kept)))
        work.write_other_files(folder, to.name, to.final, report)
        with _forgetting(journal):
            plan.origins.check("while it was read")
        work.write_config(folder)
        to.finish(folder)
    return report


def _destination(place: Path | str, announce: Callable[[str], None]) -> Destination:
    """The folder, or the place in an object store, that a text names.

    Raises:
        RefusedError: it is an address of another kind.
    """
    if wrong := wrong_address(place):
        raise RefusedError(wrong)
    if location := location_of(place):
        from moemerge.merging.store import Store, scratch_for  # imports the Hub's client
        from moemerge.publish.store import StoreOutput

        return Store(scratch_for(location), StoreOutput(location, announce))
    return Folder(Path(place))


@contextmanager
def _forgetting(journal: Journal) -> Iterator[None]:
    """A context that removes the journal on a CheckpointError: then complete shards are of no use to a later run."""
    try:
        yield
    except CheckpointError:
        journal.remove()
        raise

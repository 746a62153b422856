"""`moemerge edit`: a mixture with other experts."""

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.checkpoint.disk import shown_bytes as size
from moemerge.checkpoint.in_place import commit, recover, undo, undoable_bytes
from moemerge.cli.console import announcer, console_session, end_dry_run, print_json, stdout, stoppable
from moemerge.cli.edit_options import EditOutputOptions, ExpertOptions, InPlaceOptions, RunningOptions
from moemerge.cli.gguf_output import is_gguf
from moemerge.cli.grouping import grouped
from moemerge.cli.merge_options import OutputOptions, PushOptions, ReadingOptions, RouterOptions
from moemerge.cli.options import CacheDir, ResultOptions, VerboseOptions
from moemerge.cli.streams import say
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from rich.console import Console

    from moemerge.checkpoint.changed_shards import ChangedShards
    from moemerge.config.schema import MergeConfig
    from moemerge.editing.plan import EditPlan
    from moemerge.families.stored_mixture import StoredMixture
    from moemerge.planning.options import PlanOptions
    from moemerge.sources.model_folder import ModelFolder


@grouped
def edit_mixture(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A mixture's folder, or a Hub repository.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The folder to write; it must be empty or absent.", show_default=False),
    ] = None,
    *,
    experts: ExpertOptions,
    output: EditOutputOptions,
    in_place: InPlaceOptions,
    running: RunningOptions,
    cache_dir: CacheDir = None,
    messages: ResultOptions,
) -> None:
    """Change the experts of a mixture.

    Some are left out, added, replaced or put into another order. Those that stay keep their weights and router rows,
    byte for byte. The same can be written as a config, which is printed, and kept beside the result.

    Examples:
        moemerge edit out smaller --drop math
        moemerge edit out more --add sql=user/sql-7b --text sql=sql.txt
        moemerge edit mistralai/Mixtral-8x7B-v0.1 four --keep 0,3,5,7 --dry-run
        moemerge edit out --in-place --replace math=user/math-7b-v2
        moemerge edit out --undo
    """
    quiet = messages.quiet
    with console_session(
        quiet=quiet, verbose=0, debug=messages.debug, cache_dir=cache_dir, keeps_output=True
    ) as console:
        if in_place.undo or in_place.commit:
            others = experts != ExpertOptions() or output != EditOutputOptions() or messages.json
            _end_edit(Path(model), out, in_place, others=others, quiet=quiet)
            return
        if (out is None) != in_place.in_place:
            raise RefusedError(
                "OUT, the folder to write, is missing: name it, or change MODEL itself with --in-place."
                if out is None
                else f"{out}: --in-place changes MODEL itself, so no OUT is written. Leave one of the two out."
            )
        if out is None and not output.dry_run:
            recover(Path(model))
        config, opened = _config_of(model, experts, announcer(console, quiet=quiet))
        if in_place.in_place and experts == ExpertOptions():
            raise RefusedError(f"{model}: nothing says what to change. `moemerge edit --help` lists what can be.")
        _carry_out(console, config, out, Run(output, running, opened), messages)


def _end_edit(model: Path, out: Path | None, in_place: InPlaceOptions, *, others: bool, quiet: bool) -> None:
    """Undo the last edit in place, or make it final.

    Raises:
        RefusedError: something else is asked for beside it, or there is no such edit.
    """
    word = "--undo" if in_place.undo else "--commit"
    if out or in_place.in_place or (in_place.undo and in_place.commit) or others:
        raise RefusedError(f"{word}: stands alone, after MODEL: `moemerge edit {model} {word}`.")
    if not model.is_dir():
        raise RefusedError(f"{model}: there is no such folder.")
    kept = undoable_bytes(model)
    (undo if in_place.undo else commit)(model)
    if not quiet:
        freed = "" if in_place.undo else f"; {size(kept)} of what it replaced are gone"
        say(f"{model}: {'is what it was before its last edit' if in_place.undo else f'its last edit is final{freed}'}")


@dataclass(frozen=True)
class Run:
    """How an edit is carried out."""

    output: EditOutputOptions
    running: RunningOptions
    opened: "tuple[ModelFolder, StoredMixture] | None" = None
    """The mixture, where it was opened to write the config."""


def write_from_config(
    console: "Console",
    config: "MergeConfig",
    out: Path,
    *,
    output: OutputOptions,
    reading: ReadingOptions,
    push: PushOptions,
    routers: RouterOptions,
    messages: VerboseOptions,
) -> None:
    """Carry out an edit that a config file describes, with the options of a merge.

    Raises:
        RefusedError: an option is given that an edit does not have.
    """
    _check_options(out, output, reading, push, routers=routers)
    own = EditOutputOptions(output.max_shard_size, output.overwrite, output.dry_run)
    run = Run(own, RunningOptions(routers.device, routers.compute_dtype, routers.seed))
    _carry_out(console, config, out, run, ResultOptions(messages.json, messages.quiet, messages.debug))


def _check_options(
    out: Path, output: OutputOptions, reading: ReadingOptions, push: PushOptions, *, routers: RouterOptions
) -> None:
    """Refuse options of a merge of dense models that an edit does not have.

    Raises:
        RefusedError: names the first of them, and what to do.
    """
    options = {
        "--push": push.push is not None,
        "--push-streaming": push.push_streaming,
        "--resume": output.resume,
        "--ray": output.ray is not None,
        "--workers": output.workers is not None,
        "--routing-table": reading.routing_table,
        "--low-memory": reading.low_memory,
        "--keep-states": routers.keep_states is not None,
        "--share-text": routers.share_text,
        "--load-in-4bit": routers.load_in_4bit,
        "--load-in-8bit": routers.load_in_8bit,
    }
    if given := [name for name, is_given in options.items() if is_given]:
        raise RefusedError(
            f"{given[0]}: base_model is a mixture, so this config describes an edit, which has no such option. Write "
            "into a folder; `moemerge push` sends it."
        )
    if is_gguf(out):
        raise RefusedError(
            f"{out}: base_model is a mixture, so this config describes an edit, which is written into a folder. Then "
            "`moemerge gguf` makes a file of it."
        )


def _config_of(
    model: str, experts: ExpertOptions, announce: Callable[[str], None]
) -> "tuple[MergeConfig, tuple[ModelFolder, StoredMixture]]":
    """Write the config of an edit that the command line describes; returns it with the mixture, opened."""
    from moemerge.config.loading import load_config
    from moemerge.config.yaml_text import write_yaml
    from moemerge.editing.changes import edit_document
    from moemerge.sources.stored_mixtures import kept_config, read_mixture

    changes = experts.changes()
    folder, mixture = read_mixture(model, announce)
    document = edit_document(mixture, model, changes, kept_config(folder, announce))
    config = load_config(document, allow_identical_experts=True)
    config.was_read_from(write_yaml(document))
    return config, (folder, mixture)


def plan_of(
    console: "Console",
    config: "MergeConfig",
    options: "PlanOptions",
    *,
    quiet: bool,
    opened: "tuple[ModelFolder, StoredMixture] | None" = None,
) -> "EditPlan":
    """Plan an edit, and print its notes and warnings."""
    from moemerge.editing.planner import plan_edit

    announce = announcer(console, quiet=quiet)
    plan = plan_edit(config, options, announce=announce, opened=opened)
    for note in plan.notes:
        announce(f"note: {note}")
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow")
    return plan


def print_or_dump_edit(plan: "EditPlan", changed: "ChangedShards | None" = None, *, json: bool) -> None:
    """Print the plan of an edit, as text or as JSON; `changed` are the shards of one in place."""
    from moemerge.cli.edit_report import edit_facts, print_edit

    if json:
        print_json(edit_facts(plan, changed))
    else:
        print_edit(stdout(), plan, changed)


def _carry_out(console: "Console", config: "MergeConfig", out: Path | None, run: Run, messages: ResultOptions) -> None:
    """Plan an edit, write it unless that is only tried, and print what was written."""
    from moemerge.cli.edit_report import edit_facts, print_added
    from moemerge.cli.plan_request import shard_bytes
    from moemerge.cli.progress import clock, show_progress
    from moemerge.editing.editor import EditOptions, edit
    from moemerge.editing.in_place import changed_shards, notes_in_place
    from moemerge.editing.planned_model import check_model
    from moemerge.planning.options import PlanOptions

    start, running, max_bytes = time.monotonic(), run.running, shard_bytes(run.output.max_shard_size)
    plan = plan_of(console, config, PlanOptions(max_bytes, out), quiet=messages.quiet, opened=run.opened)
    if run.opened and not (messages.quiet or messages.json):
        say(config.written)  # what the command line asks for, as a config
    changed = None if out else changed_shards(plan, max_bytes)
    added = () if out else notes_in_place(plan)
    for note in added:
        announcer(console, quiet=messages.quiet)(f"note: {note}")
    plan = replace(plan, notes=(*plan.notes, *added))
    if run.output.dry_run:
        if out:
            check_model(plan, out, overwrite=run.output.overwrite)
        print_or_dump_edit(plan, changed, json=messages.json)
        end_dry_run(out or plan.folder.reference, quiet=messages.quiet, json=messages.json)
        return
    facts = edit_facts(plan, changed) if messages.json else {}  # of the files as they are before the edit
    options = EditOptions(
        run.output.overwrite, running.seed, running.device, running.compute_dtype, max_shard_bytes=max_bytes
    )
    with show_progress(console, quiet=messages.quiet) as progress:
        report = edit(plan, out, options, changed=changed, progress=stoppable(progress))
    if messages.json:
        routing = {"routing": [asdict(one) for one in report]}
        print_json(facts | routing | {"out": str(out or plan.folder.folder)})
    elif not messages.quiet:
        print_or_dump_edit(plan, changed, json=False)
        print_added(stdout(), report)
        nbytes = changed.needed_bytes if changed else plan.output_bytes - plan.shared_bytes
        say(f"{out or plan.folder.reference}: done, {size(nbytes)} written in {clock(time.monotonic() - start)}")
        _print_next(plan.folder.reference, out)


def _print_next(model: str, out: Path | None) -> None:
    """Print what to do after an edit."""
    before = shlex.quote(model)
    if out:
        say(f"Next: moemerge eval {before} {shlex.quote(str(out))} --data NAME=PATH")
    else:
        say(f"Next: moemerge edit {before} --undo      go back")
        say(f"      moemerge edit {before} --commit    remove what was replaced")

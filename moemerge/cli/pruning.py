"""`moemerge prune`: a mixture with fewer experts."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer

from moemerge.checkpoint.disk import shown_bytes as size
from moemerge.cli.console import announcer, console_session, end_dry_run, print_json, stdout, stoppable
from moemerge.cli.edit_options import EditOutputOptions
from moemerge.cli.evaluation import by_name
from moemerge.cli.grouping import grouped
from moemerge.cli.options import (
    ROLES_OF_CHATS,
    CacheDir,
    ChatRoles,
    ComputeIn,
    Devices,
    Ray,
    ResultOptions,
    Workers,
    check_processes,
    named_roles,
)
from moemerge.cli.streams import say

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from moemerge.editing.plan import EditPlan
    from moemerge.editing.pruning.choice import PruneRequest
    from moemerge.editing.pruning.judging import Judged
    from moemerge.editing.pruning.pruner import Decision
    from moemerge.evaluation.settings import EvaluationSettings
    from moemerge.families.stored_mixture import StoredMixture
    from moemerge.planning.options import PlanOptions
    from moemerge.progress import Progress
    from moemerge.sources.model_folder import ModelFolder


@dataclass(frozen=True)
class ChoiceOptions:
    """Options for which experts stay."""

    heading: ClassVar[str] = "Experts that stay"

    keep: Annotated[int, typer.Option(metavar="N", min=2, help="Experts that each layer keeps.", show_default=False)]
    by: Annotated[
        Literal["saliency", "frequency", "weight", "router"],
        typer.Option(
            metavar="saliency|frequency|weight|router",
            help="What they are chosen by: REAP's saliency (mean weight times length of the output), the share of "
            "tokens that choose them, their mean weight there, or the length of their router rows.",
        ),
    ] = "saliency"
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Let each layer keep the experts that are best there.")
    ] = False
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="Average each dropped expert into the kept one whose output is most like its own, by how often each "
            "is chosen.",
        ),
    ] = False

    def request(self) -> "PruneRequest":
        """What is asked for."""
        from moemerge.editing.pruning.choice import PruneRequest

        return PruneRequest(self.keep, self.by, self.by_layer, self.merge)


@dataclass(frozen=True)
class TextOptions:
    """Options for how the text is read."""

    heading: ClassVar[str] = "Measuring"

    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens of each NAME to choose by, and as many to judge by.")
    ] = 8192
    window: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens that a model sees at a time.")] = 512
    chat_roles: ChatRoles = ROLES_OF_CHATS
    device: Devices = "auto"
    compute_dtype: ComputeIn = "auto"
    ray: Ray = None
    workers: Workers = None

    def settings(self) -> "EvaluationSettings":
        """The settings of a pass over the text."""
        from moemerge.evaluation.settings import EvaluationSettings

        check_processes(self.ray, self.workers, self.device)
        return EvaluationSettings(
            tokens=self.max_tokens,
            window=self.window,
            roles=named_roles(self.chat_roles),
            device=self.device,
            compute_dtype=self.compute_dtype,
            ray=self.ray,
            workers=self.workers,
        )


@grouped
def prune_mixture(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A mixture's folder.", show_default=False)],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write; it must be empty or absent.", show_default=False)
    ],
    *,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=PATH",
            show_default=False,
            help="Text or chats that the mixture is for, as eval takes them: every second document chooses, the others "
            "judge.",
        ),
    ],
    choice: ChoiceOptions,
    text: TextOptions,
    output: EditOutputOptions,
    cache_dir: CacheDir = None,
    messages: ResultOptions,
) -> None:
    """Leave out the experts of a mixture that matter least on some text.

    Of experts with equal weights all but one go first, and the one that stays takes over what the router gave the
    others. A table says what each layer loses, and losses on text before and after say what that costs.

    Examples:
        moemerge prune out half --keep 4 --data code=code.txt --data math=math.txt
        moemerge prune out half --keep 4 --data code=code.txt --merge --dry-run
    """
    with console_session(
        quiet=messages.quiet, verbose=0, debug=messages.debug, cache_dir=cache_dir, keeps_output=True
    ) as console:
        from moemerge.cli.pruning_report import print_pruning, pruning_facts

        start = time.monotonic()
        found, plan, losses = _carry_out(console, model, out, data, Run(choice, text, output, messages.quiet))
        if messages.json:
            print_json(pruning_facts(found, losses) | ({} if output.dry_run else {"out": str(out)}))
        else:
            print_pruning(stdout(), found, losses)
        for note in () if messages.quiet else found.pruning.notes:
            console.print(f"note: {note}", style="yellow")
        if output.dry_run:
            end_dry_run(out, quiet=messages.quiet, json=messages.json)
        elif not (messages.json or messages.quiet):
            from moemerge.cli.progress import clock

            say(f"{out}: done, {size(plan.output_bytes)} in {clock(time.monotonic() - start)}")


@dataclass(frozen=True)
class Run:
    """How a mixture is pruned."""

    choice: ChoiceOptions
    text: TextOptions
    output: EditOutputOptions
    quiet: bool


def _carry_out(
    console: "Console", model: Path, out: Path, data: list[str], run: Run
) -> "tuple[Decision, EditPlan, Judged]":
    """Decide what stays, write it unless that is only tried, and judge it."""
    from moemerge.cli.plan_request import shard_bytes
    from moemerge.cli.progress import show_work
    from moemerge.evaluation.evaluator import read_domains
    from moemerge.planning.options import PlanOptions

    named, settings = by_name(data), run.text.settings()
    options = PlanOptions(shard_bytes(run.output.max_shard_size), out)
    opened = _open_checked(model, out, options, run)
    documents = read_domains(named)
    from moemerge.editing.preview import preview  # torch is imported from here on
    from moemerge.editing.pruning.judging import judge, split_documents
    from moemerge.editing.pruning.pruner import decide
    from moemerge.evaluation.runnable import open_mixture

    chosen, judged, unseen = split_documents(documents)
    with show_work(console, quiet=run.quiet) as shown:
        progress = stoppable(shown)
        found = decide(model, chosen, run.choice.request(), settings, progress, announcer(console, quiet=run.quiet))
        plan = _plan(opened, found, options, announcer(console, quiet=run.quiet))
        if not run.output.dry_run:
            _write(plan, out, found, run.output, progress)
        after = preview(found.mixture, plan, found.rows) if run.output.dry_run else open_mixture(out)
        return found, plan, judge(found.mixture, after, judged, settings, progress, unseen=unseen)


def _open_checked(model: Path, out: Path, options: "PlanOptions", run: Run) -> "tuple[ModelFolder, StoredMixture]":
    """Open the mixture; refuse what could not be written before it is run, by a plan that keeps the first experts."""
    from moemerge.config.loading import parse_config
    from moemerge.config.yaml_text import write_yaml
    from moemerge.editing.changes import Changes, edit_document
    from moemerge.editing.planned_model import check_model
    from moemerge.editing.planner import plan_edit
    from moemerge.editing.pruning.choice import check_keep, most_per_token
    from moemerge.sources.model_folder import open_merged
    from moemerge.sources.stored_mixtures import read_stored_mixture

    folder = replace(open_merged(model), reference=str(model))
    mixture, keep = read_stored_mixture(folder, lambda _: None), run.choice.keep
    check_keep(keep, mixture.experts, mixture.choosing)
    per_token = most_per_token(mixture.experts_per_token, keep, mixture.choosing)
    changes = Changes(keep=mixture.names[:keep], experts_per_token=per_token)
    document = edit_document(mixture, folder.reference, changes)
    config = parse_config(write_yaml(document), "the pruned mixture", allow_identical_experts=True)
    plan = plan_edit(config, options, opened=(folder, mixture))
    if not run.output.dry_run:
        check_model(plan, out, overwrite=run.output.overwrite)
    return folder, mixture


def _plan(
    opened: "tuple[ModelFolder, StoredMixture]",
    found: "Decision",
    options: "PlanOptions",
    announce: "Callable[[str], None]",
) -> "EditPlan":
    """Plan the pruned mixture."""
    from moemerge.editing.pruning.pruned_plan import plan_pruning
    from moemerge.sources.stored_mixtures import kept_config

    return plan_pruning(
        opened,
        found.pruning,
        kept_config(opened[0], announce),
        options,
        new_routers=bool(found.rows),
        announce=announce,
    )


def _write(plan: "EditPlan", out: Path, found: "Decision", output: EditOutputOptions, progress: "Progress") -> None:
    from moemerge.editing.preview import router_bands
    from moemerge.editing.writing import write_edit

    write_edit(plan, out, lambda: router_bands(plan, found.rows), overwrite=output.overwrite, progress=progress)

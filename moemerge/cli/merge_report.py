"""What a merge says at its end: what its routers are worth, size and time, and what to do next."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from moemerge.checkpoint.disk import shown_bytes as size
from moemerge.cli.console import stdout
from moemerge.cli.options import VerboseOptions
from moemerge.cli.progress import clock
from moemerge.cli.streams import say

if TYPE_CHECKING:
    from moemerge.planning.plan import MergePlan
    from moemerge.publish.publisher import Publisher
    from moemerge.routers.report import RoutingReport
    from moemerge.sources.reference import Location

_SHOWN_NAMES: Final = 2


def merge_facts(plan: "MergePlan", report: "RoutingReport", out: object, url: str | None) -> dict[str, Any]:
    """Give what `--json` prints of a merge; `routing` is None if no text says how the routers choose."""
    routing = {
        "chance": report.chance,
        "first_choice_chance": report.chance / plan.config.experts_per_token,
        "hit_rate": report.hit_rate,
        "top1_accuracy": report.top1_accuracy,
        "load": report.load,
        "held_out": report.held_out,
    }
    return {
        "out": str(out) if out else None,
        "url": url,
        "family": plan.model_type,
        "dtype": plan.dtype,
        "gate_mode": plan.config.method.name,
        "experts": report.experts,
        "experts_per_token": plan.config.experts_per_token,
        "total_parameters": plan.total_parameters,
        "active_parameters": plan.active_parameters,
        "output_bytes": plan.output_bytes,
        "routing": routing if report.layers else None,
        "notes": plan.notes,
        "warnings": [*plan.warnings, *report.warnings()],
    }


def print_report(
    console: Console,
    out: object,
    plan: "MergePlan",
    report: "RoutingReport",
    messages: VerboseOptions,
    *,
    kept_states: Path | None,
) -> None:
    """Print what is known of the routers, and warnings; `kept_states` is the folder with kept router inputs."""
    from moemerge.cli.render import print_routing

    quiet = messages.quiet or messages.json
    if not quiet:
        print_routing(stdout(), report, by_layer=messages.verbose > 0)
        if report.kept_texts:
            _print_kept(console, kept_states, *report.kept_texts)
    for warning in report.warnings():
        console.print(f"warning: {warning}", style="yellow")
    if not quiet and plan.config.method.reads == {"weights"} and not report.layers:
        console.print(
            "note: no text says what the experts are for, so nothing is known of how these routers choose; "
            f"`moemerge eval {out} --data NAME=PATH` measures it"
        )


def _print_kept(console: Console, folder: Path | None, kept: int, texts: int) -> None:
    """Print how much of the text the base model did not read, since an earlier merge had kept what it makes of it."""
    console.print(
        f"kept states: {kept} of {texts} groups of text were read from {folder}, {texts - kept} are new there. An "
        "expert's positive text is a group, its negative text another, and text for no expert, such as "
        "router.calibration_texts or moemerge's own sample, one more"
    )


def print_done(place: "Path | Location", plan: "MergePlan", seconds: float) -> None:
    """Print size and time of a merge, and the next commands for a folder or an object store."""
    nbytes = place.stat().st_size if isinstance(place, Path) and place.is_file() else plan.output_bytes
    say(f"{place}: done, {size(nbytes)} in {clock(seconds)}")
    quoted = shlex.quote(str(place))
    if not isinstance(place, Path):
        say(f"Next: moemerge verify {quoted}")
    elif place.is_dir():
        names = plan.config.expert_names
        texts = " ".join(f"--data {shlex.quote(name)}=PATH" for name in names[:_SHOWN_NAMES])
        texts += " ..." if len(names) > _SHOWN_NAMES else ""
        say(f'Next: moemerge generate {quoted} "Once upon a time" --experts')
        say(f"      moemerge eval {quoted} {texts} --baselines")


@contextmanager
def interrupts_after_success(
    console: Console, out: object, publisher: "Publisher | None", *, streaming: bool
) -> Iterator[None]:
    """Report an interrupt while results are shown as what it is: the merge itself is complete by then."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError) as error:
        if publisher and not streaming:
            raise KeyboardInterrupt(f"{out} is complete, and not pushed") from error
        where = publisher.url if publisher else out
        console.print(f"warning: {where}: is complete; not all of its report is shown", style="yellow")

"""`moemerge init`: a merge config begun from the names of models."""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from moemerge.cli.console import announcer, console_session
from moemerge.cli.grouping import grouped
from moemerge.cli.options import CacheDir, MessageOptions
from moemerge.cli.streams import say
from moemerge.errors import OutputError, RefusedError

if TYPE_CHECKING:
    from rich.console import Console

    from moemerge.drafting.draft import Draft, DraftExpert

_STDOUT: Final = "-"
Base = Annotated[
    str,
    typer.Argument(
        metavar="BASE", help="The model that the experts were trained from: a folder or user/name.", show_default=False
    ),
]
Experts = Annotated[
    list[str],
    typer.Argument(metavar="EXPERT", help="Two fine-tunes or more; model+adapter for a LoRA.", show_default=False),
]
Output = Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The config to write; - prints it.")]
Domains = Annotated[
    list[str],
    typer.Option(
        "--domain",
        metavar="NAME=DOMAIN",
        help="What an expert is for, such as code, math or french, which gives it prompts; none for no prompts.",
        show_default=False,
    ),
]
Prompts = Annotated[
    list[str],
    typer.Option(
        "--prompts",
        metavar="NAME=TEXT",
        help="A prompt that an expert should answer, instead of its domain's; give it again for more.",
        show_default=False,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(metavar="K", help="Experts per token.", show_default="1 of two, else 2"),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Take what is proposed, without questions on a terminal.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it is there.")]


@dataclass(frozen=True)
class DescribingOptions:
    """Options for what the experts are for."""

    domain: Domains = field(default_factory=list)
    prompts: Prompts = field(default_factory=list)
    top_k: TopK = None


@grouped
def begin_config(
    base: Base,
    experts: Experts,
    *,
    output: Output = "merge.yaml",
    describing: DescribingOptions,
    yes: Yes = False,
    overwrite: Overwrite = False,
    cache_dir: CacheDir = None,
    messages: MessageOptions,
) -> None:
    """Begin a merge config from the names of models.

    Opens the models, of which headers and a few rows are read, and proposes names, prompts and settings. On a terminal
    it asks what flags do not say.

    Examples:
        moemerge init user/base user/math user/code
        moemerge init base code french --domain code=code --yes -o merge.yaml
    """
    quiet, domain, prompts, top_k = messages.quiet, describing.domain, describing.prompts, describing.top_k
    with console_session(quiet=quiet, verbose=0, debug=messages.debug, cache_dir=cache_dir) as console:
        from moemerge.drafting.config_text import config_text
        from moemerge.drafting.draft import draft_merge

        _check_target(output, overwrite=overwrite)
        _check_experts(experts)
        change = _changes(experts, domain, prompts, top_k)
        draft = change(draft_merge(base, experts, announcer(console, quiet=quiet)))
        if not quiet:
            _print_draft(console, draft)
        for warning in draft.warnings:
            console.print(f"warning: {warning}", style="yellow")
        if not yes and sys.stdin.isatty():
            from moemerge.cli.asking import ask

            named = {name for name, _ in _pairs("--domain", domain) + _pairs("--prompts", prompts)}
            draft = ask(console, draft, answered=named, asks_top_k=top_k is None)
        if draft.undescribed:
            _print_undescribed(console, draft, quiet=quiet)
        folder = Path(output).parent
        if folder.resolve() != Path.cwd():
            draft = _moved(draft, folder)
        text = config_text(draft, "FILE" if output == _STDOUT else shlex.quote(Path(output).name))
        _check_text(text, folder)
        _write(console, output, text, quiet=quiet)


def _check_target(output: str, *, overwrite: bool) -> None:
    """Refuse a file that could not be written, before anything is opened."""
    target = Path(output)
    if output == _STDOUT:
        return
    if target.is_dir():
        raise RefusedError(f"{output}: is a folder. Name the file to write, such as {target / 'merge.yaml'}.")
    if target.exists() and not overwrite:
        raise RefusedError(f"{output}: is there already. Name another file with -o, or pass --overwrite.")
    if not target.parent.is_dir():
        raise RefusedError(
            f"{output}: there is no folder {target.parent}. Make it first, or name another file with -o."
        )


def _check_experts(experts: Sequence[str]) -> None:
    if len(experts) == 1:
        raise RefusedError(f"{experts[0]}: is one expert, and a mixture needs two or more: moemerge init BASE A B.")
    if len(set(experts)) == 1:
        raise RefusedError(f"{experts[0]}: is every expert, so nothing would be mixed. Name different models.")


def _changes(
    experts: Sequence[str], domains: Sequence[str], prompts: Sequence[str], top_k: int | None
) -> "Callable[[Draft], Draft]":
    """Read the flags that change what is proposed; returns the change.

    Raises:
        RefusedError: a flag names no expert, no domain or no prompt, or more experts per token than there are.
    """
    from moemerge.config.expert_names import expert_names

    names = expert_names(experts)
    numbers = {reference: number for number, reference in enumerate(experts)}
    numbers |= {name: number for number, name in enumerate(names)}
    chosen: dict[int, str | None] = {}
    written: dict[int, list[str]] = {}
    for name, value in _pairs("--domain", domains):
        chosen[_number("--domain", name, numbers, names)] = _domain(value)
    for name, value in _pairs("--prompts", prompts):
        written.setdefault(_number("--prompts", name, numbers, names), []).append(value)
    if top_k is not None and not 1 <= top_k <= len(experts):
        raise RefusedError(f"--top-k: {top_k} of {len(experts)} experts is not possible. Choose 1 to {len(experts)}.")

    def change(draft: "Draft") -> "Draft":
        changed = list(draft.experts)
        for number, domain in chosen.items():
            changed[number] = changed[number].of_domain(domain, "given by --domain")
        for number, texts in written.items():
            changed[number] = replace(changed[number], prompts=tuple(texts))
        return replace(draft, experts=tuple(changed), experts_per_token=top_k or draft.experts_per_token)

    return change


def _domain(name: str) -> str | None:
    from moemerge.drafting.domains import domain_named

    try:
        return domain_named(name)
    except ValueError as error:
        raise RefusedError(f"--domain: {error}") from error


def _pairs(flag: str, given: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in given:
        name, sign, value = text.partition("=")
        if not (name and sign and value.strip()):
            raise RefusedError(f"{flag}: expected NAME=..., as in {flag} code=..., found {text[:60]!r}.")
        pairs.append((name, value))
    return pairs


def _number(flag: str, name: str, numbers: dict[str, int], names: Sequence[str]) -> int:
    if name not in numbers:
        raise RefusedError(f"{flag}: {name[:60]!r} is not one of the experts: {', '.join(names)}.")
    return numbers[name]


def _print_draft(console: "Console", draft: "Draft") -> None:
    """Print what is proposed for each expert, and what speaks for another base."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("expert", "domain", "why", "from the base"):
        table.add_column(heading)
    for expert in draft.experts:
        why = expert.reason or ("" if expert.domain else "its name and card do not say")
        table.add_row(expert.name, expert.domain or "none", why, _shown_distance(expert))
    console.print(table, soft_wrap=False)
    for remark in draft.remarks:
        console.print(f"note: {remark}")


def _print_undescribed(console: "Console", draft: "Draft", *, quiet: bool) -> None:
    """Say how routers are made where not every expert has prompts of its own."""
    names = ", ".join(expert.name for expert in draft.undescribed)
    missing = f"no prompts that only it should answer are known for {names}"
    if draft.is_random:
        console.print(
            f"warning: {missing}, and where an expert is the base itself, or no fine-tune of it, the weights alone "
            "make no routers: they are random for now. Write prompts for every expert, and remove gate_mode",
            style="yellow",
        )
    else:
        announcer(console, quiet=quiet)(
            f"note: {missing}, so all prompts are comments, and the weights alone make the routers"
        )


def _shown_distance(expert: "DraftExpert") -> str:
    if expert.distance is None:
        return "is the base"
    return f"{expert.distance.mean:.1%}" if expert.distance.by_layer else "not known"


def _moved(draft: "Draft", folder: Path) -> "Draft":
    """Make relative folders count from the folder that the config will lie in."""
    from moemerge.config.local_paths import paths_from

    document = {"base_model": draft.base, "experts": [{"source_model": expert.reference} for expert in draft.experts]}
    moved = paths_from(document, folder)
    experts = (
        replace(expert, reference=keys["source_model"])
        for expert, keys in zip(draft.experts, moved["experts"], strict=True)
    )
    return replace(draft, base=moved["base_model"], experts=tuple(experts))


def _check_text(text: str, folder: Path) -> None:
    """Load and plan what will be written into a folder."""
    from moemerge.config.loading import parse_config
    from moemerge.planning.options import PlanOptions
    from moemerge.planning.planner import plan_merge

    plan_merge(parse_config(text, folder=folder), PlanOptions(weights="stream"))


def _write(console: "Console", output: str, text: str, *, quiet: bool) -> None:
    """Write the config, the schema beside it, and say how to go on."""
    from moemerge.drafting.config_text import SCHEMA_FILE

    announce = announcer(console, quiet=quiet)
    if output == _STDOUT:
        say(text.removesuffix("\n"))
        announce(f"Next, with what is printed in FILE, and `moemerge schema > {SCHEMA_FILE}` beside it for editors:")
    else:
        try:
            Path(output).write_text(text, encoding="utf-8")
            beside = _write_schema(Path(output).parent / SCHEMA_FILE)
        except OSError as error:
            raise OutputError(f"{error.filename}: cannot be written: {error.strerror}.") from error
        announce(f"{output}: written{beside}. Next:")
    shown = "FILE" if output == _STDOUT else shlex.quote(output)
    announce(f"  moemerge plan {shown}")
    announce(f"  moemerge {shown} merged/")


def _write_schema(path: Path) -> str:
    """Write the JSON Schema of configs, unless there is a file of this name; returns what to say of it."""
    from importlib.resources import files

    schema = (files("moemerge.config") / "schema.json").read_bytes()
    if not path.exists():
        path.write_bytes(schema)
        return f", and beside it {path.name}, by which editors check it"
    return "" if path.read_bytes() == schema else f"; the {path.name} beside it is another version's, and kept"

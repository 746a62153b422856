"""`moemerge init`: a merge config begun from the names of models."""

from collections.abc import Sequence
from typing import Annotated

import typer

from moemerge.cli.console import announcer, console_session
from moemerge.cli.draft_file import check_target, checked_text, write_draft
from moemerge.cli.draft_flags import DescribingOptions, changes_of
from moemerge.cli.draft_report import print_draft, print_undescribed
from moemerge.cli.grouping import grouped
from moemerge.cli.options import CacheDir, MessageOptions
from moemerge.cli.standard_input import is_terminal
from moemerge.errors import RefusedError

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
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Take what is proposed, without questions on a terminal.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it is there.")]


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
    quiet = messages.quiet
    with console_session(quiet=quiet, verbose=0, debug=messages.debug, cache_dir=cache_dir) as console:
        from moemerge.drafting.draft import draft_merge

        check_target(output, overwrite=overwrite)
        _check_experts(experts)
        change = changes_of(experts, describing)
        draft = change(draft_merge(base, experts, announcer(console, quiet=quiet)))
        if not quiet:
            print_draft(console, draft)
        for warning in draft.warnings:
            console.print(f"warning: {warning}", style="yellow")
        if not yes and is_terminal():
            from moemerge.cli.asking import ask

            draft = ask(console, draft, answered=describing.described, asks_top_k=describing.top_k is None)
        if draft.undescribed:
            print_undescribed(console, draft, quiet=quiet)
        write_draft(console, output, checked_text(draft, output), quiet=quiet)


def _check_experts(experts: Sequence[str]) -> None:
    if len(experts) == 1:
        raise RefusedError(f"{experts[0]}: is one expert, and a mixture needs two or more: moemerge init BASE A B.")
    if len(set(experts)) == 1:
        raise RefusedError(f"{experts[0]}: is every expert, so nothing would be mixed. Name different models.")

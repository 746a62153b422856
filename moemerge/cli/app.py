"""The commands. Whatever is slow to import is imported by the command that needs it."""

import sys
from collections.abc import Callable
from typing import Annotated, Final

import typer

from moemerge.cli.analysis import analyze_model
from moemerge.cli.beginning import begin_config
from moemerge.cli.checking import inspect_model, verify_model
from moemerge.cli.densifying import densify_mixture
from moemerge.cli.editing import edit_mixture
from moemerge.cli.evaluation import evaluate
from moemerge.cli.extracting import extract_expert
from moemerge.cli.families import list_families
from moemerge.cli.gguf import write_file
from moemerge.cli.help_pages import MERGE, Command, Commands
from moemerge.cli.legacy import translate
from moemerge.cli.merging import merge_models
from moemerge.cli.mistakes import explain_usage, relative_address, unknown_command
from moemerge.cli.planning import show_plan
from moemerge.cli.pruning import prune_mixture
from moemerge.cli.publishing import push
from moemerge.cli.repairing import repair_model
from moemerge.cli.routes import show_routes
from moemerge.cli.schema import print_schema
from moemerge.cli.searching import search_recipes
from moemerge.cli.speaking import chat, generate
from moemerge.cli.streams import Guarded, guarded_streams, say
from moemerge.cli.tuning import tune_routers
from moemerge.cli.upcycling import upcycle_model
from moemerge.cli.usage_errors import UsageError

_COMMANDS: Final[dict[str, dict[str, Callable[..., None]]]] = {
    "Make a mixture": {
        "init": begin_config, "plan": show_plan, "merge": merge_models, "upcycle": upcycle_model,
        "search": search_recipes, "families": list_families, "schema": print_schema,
    },
    "Judge it": {
        "inspect": inspect_model, "verify": verify_model, "eval": evaluate, "routes": show_routes,
        "analyze": analyze_model,
    },
    "Taste it": {"generate": generate, "chat": chat},
    "Change it, and pass it on": {
        "edit": edit_mixture, "prune": prune_mixture, "extract": extract_expert, "densify": densify_mixture,
        "tune": tune_routers, "repair": repair_model, "gguf": write_file, "push": push,
    },
}  # fmt: skip
"""The functions of the commands, by name, under the headings of the help page."""
_NEED_NOTHING: Final = {"families", "schema"}
# The result of these is a model.
_WRITES_ELSEWHERE: Final = {MERGE, "upcycle", "edit", "prune", "extract", "densify", "tune", "gguf", "repair", "push"}
_EPILOG: Final = """\
`moemerge CONFIG OUT` is `moemerge merge CONFIG OUT`. Command lines of mergekit-moe work as they are; its flags are
translated, or named as not needed. A config that is called like a command is written with its path:
moemerge ./plan out/

Exit codes: 0 done, 1 failed, 2 the config or the command has to change, 130 interrupted.
"""


def _show_version(*, show: bool) -> None:
    if show:
        from importlib.metadata import version

        say(f"moemerge {version('moemerge')}")
        raise typer.Exit


def _about(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=lambda value: _show_version(show=value)
        ),
    ] = False,
) -> None:
    """Build mixtures of experts from dense models that were fine-tuned from one base: `moemerge CONFIG OUT`."""


def command_line() -> typer.Typer:
    """Make the program that `main` runs: all commands, under their headings."""
    app = typer.Typer(
        cls=Commands,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        no_args_is_help=True,
        epilog=_EPILOG,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_about)
    for heading, commands in _COMMANDS.items():
        for name, command in commands.items():
            app.command(name, cls=Command, rich_help_panel=heading, no_args_is_help=name not in _NEED_NOTHING)(command)
    return app


def main() -> None:
    """The entry point: a first word that names a command is that command, anything else is a merge."""
    arguments = sys.argv[1:]
    names = [name for commands in _COMMANDS.values() for name in commands]
    word = next((word for word in arguments[:1] if word in names), MERGE)
    with guarded_streams() as (out, _):
        code = 0
        try:
            if problem := relative_address(arguments) or unknown_command(arguments, names):
                say(f"error: {problem}", error=True)
                sys.exit(2)
            _run(arguments if word != MERGE else _translated(arguments))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        out.flush()
        code = code or _stdout_exit_code(out, word)
    sys.exit(code)


def _translated(arguments: list[str]) -> list[str]:
    """Translate flags of mergekit-moe, and say which are not needed."""
    translated, notes = translate(arguments)
    for note in () if {"-q", "--quiet"} & {*translated} else notes:
        say(f"note: {note}", error=True)
    return translated


def _run(arguments: list[str]) -> None:
    try:
        code = command_line()(args=arguments, prog_name="moemerge", standalone_mode=False)
    except UsageError as error:
        if not (message := explain_usage(error)):  # a help page
            error.show()
            sys.exit(error.exit_code)
        say(f"error: {message}", error=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _stdout_exit_code(out: Guarded, word: str) -> int:
    """Give the exit code of a command that succeeded: 0, or 1 if standard output did not take its whole result."""
    if out.failure is None:
        return 0
    if word in _WRITES_ELSEWHERE:
        say(f"warning: standard output did not take all of the output ({out.why}); the work is done", error=True)
        return 0
    if not isinstance(out.failure, BrokenPipeError):  # as when a pager was left
        say(f"error: the result cannot be written to standard output: {out.why}.", error=True)
    return 1

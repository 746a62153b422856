"""`moemerge generate` and `moemerge chat`: try a model."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from moemerge.checkpoint.files import interrupted
from moemerge.cli.console import console_session, print_json
from moemerge.cli.dialogue import Dialogue, GenerationOptions
from moemerge.cli.grouping import grouped
from moemerge.cli.mistakes import check_order
from moemerge.cli.options import MessageOptions, ResultOptions, check_text
from moemerge.cli.standard_input import STANDARD_INPUT, decoded, read_standard_input
from moemerge.cli.streams import say
from moemerge.errors import MoemergeError, RefusedError

if TYPE_CHECKING:
    from moemerge.generation.answers import Answer

Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="The folder of a merged model, or of a dense one.", show_default=False)
]
_COMMANDS: Final = {"/reset": "starts over", "/experts": "shows who wrote the last answer", "/exit": "ends"}


@grouped
def generate(
    out: Out,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to answer or continue; - reads stdin.", show_default=False)
    ],
    *,
    options: GenerationOptions,
    messages: ResultOptions,
) -> None:
    """Let a model answer a prompt, its tokens coloured by expert.

    It answers by its chat template if it has one; without one, it continues the text.

    Examples:
        moemerge generate out "Once upon a time" --experts
        cat question.txt | moemerge generate out - --json
    """
    with console_session(quiet=messages.quiet, verbose=0, debug=messages.debug) as console:
        check_order(out, prompt, shlex.join(["moemerge", "generate", prompt, str(out)]))
        text = read_standard_input().removesuffix("\n") if prompt == STANDARD_INPUT else prompt
        if not text:
            raise RefusedError("the prompt is empty. Give a text to answer or to continue.")
        check_text("the prompt", text)
        dialogue = Dialogue(console, out, options, quiet=messages.quiet)
        if messages.json:
            print_json(_facts(text, dialogue.ask(text, lambda _token: None)))
            return
        dialogue.print_answer(text)


@grouped
def chat(
    out: Out,
    *,
    options: GenerationOptions,
    web: Annotated[
        bool, typer.Option("--web", help="Open a page to chat on, with coloured tokens and shares by layer.")
    ] = False,
    messages: MessageOptions,
) -> None:
    """Chat with a model, on a terminal or on a page.

    Where standard input is no terminal, each of its lines is a turn.

    Examples:
        moemerge chat out --experts
        moemerge chat out --web
    """
    with console_session(quiet=messages.quiet, verbose=0, debug=messages.debug) as console:
        if web:
            from moemerge.cli.chat_page import check_gradio

            check_gradio()
        dialogue = Dialogue(console, out, options, quiet=messages.quiet)
        if web:
            dialogue.serve()
            return
        if _is_terminal() and not messages.quiet:
            console.print("  ".join(f"{name} {does}" for name, does in _COMMANDS.items()), style="dim")
        for line in _lines():
            command = line.strip()
            if command == "/exit":
                break
            if command == "/reset":
                dialogue.turns.clear()
            elif command == "/experts":
                dialogue.show_experts()
            elif command.startswith("/") and command[1:].isalpha():
                console.print(f"{command}: there is no such command; known: {', '.join(_COMMANDS)}.")
            elif command:
                _turn(console, dialogue, line)


def _turn(console: Console, dialogue: Dialogue, line: str) -> None:
    """Answer a line; on a terminal neither a refusal nor Ctrl-C ends the chat."""
    try:
        dialogue.print_answer(line)
    except (MoemergeError, KeyboardInterrupt) as error:
        if not _is_terminal():
            raise
        interrupted.clear()
        if isinstance(error, MoemergeError):
            console.print(f"error: {error}")


def _is_terminal() -> bool:
    """Whether somebody types; standard input may also be closed."""
    return bool(sys.stdin) and sys.stdin.isatty()


def _lines() -> Iterator[str]:
    """Yield the lines of standard input; on a terminal, with a prompt and a history.

    Raises:
        RefusedError: they are not UTF-8.
        KeyboardInterrupt: Ctrl-C was pressed where a line begins.
    """
    if not _is_terminal():
        while raw := sys.stdin.buffer.readline() if sys.stdin else b"":
            yield decoded(raw).rstrip("\r\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401  gives input() its editing
    while True:
        try:
            line = input("> ")
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("")
            raise KeyboardInterrupt("the chat ends here") from None
        yield line


def _facts(prompt: str, answer: "Answer") -> dict[str, object]:
    facts: dict[str, object] = {"prompt": prompt, "text": answer.text, "tokens": answer.tokens, "is_cut": answer.is_cut}
    if answer.routes is None:
        return facts
    routes, (traced,) = answer.routes, answer.routes.texts
    return facts | {
        "experts": routes.experts,
        "layers": routes.layers,
        "token_experts": routes.majority(traced).tolist(),
        "shares": routes.shares(traced).tolist(),
        "shares_by_layer": [routes.shares(traced, index).tolist() for index in range(len(routes.layers))],
    }

"""A conversation with a model, whose answers are printed as they come and coloured by the experts of their tokens."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.columns import Columns
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from moemerge.checkpoint.files import interrupted
from moemerge.cli.colours import has_colours, legend
from moemerge.cli.console import stdout, stoppable
from moemerge.cli.options import ComputeIn, Device, check_text
from moemerge.cli.streams import say
from moemerge.errors import RefusedError
from moemerge.evaluation.routes.palette import style_of
from moemerge.printable import printable
from moemerge.progress import Task

if TYPE_CHECKING:
    from moemerge.evaluation.routes.traced import Routes
    from moemerge.generation.answers import Answer, Sampling, Token
    from moemerge.generation.generator import TextGenerator


@dataclass(frozen=True)
class GenerationOptions:
    """Options for what a model is asked, how its tokens are chosen, and where it is run."""

    experts: Annotated[
        bool, typer.Option("--experts", help="Colour tokens by expert, and show each expert's share of them.")
    ] = False
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message of the chat.", show_default=False)
    ] = None
    raw: Annotated[bool, typer.Option("--raw", help="Continue the plain text, without the model's chat template.")] = (
        False
    )
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the most likely token each time, 1 draws as the model says.")
    ] = 0.0
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the most likely tokens of this share.")] = 1.0
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0
    device: Device = "auto"
    compute_dtype: ComputeIn = "auto"

    @property
    def sampling(self) -> "Sampling":
        """How tokens are chosen."""
        from moemerge.passes.generating import Sampling

        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.seed)


class Dialogue:
    """A model, and the turns of a conversation with it."""

    def __init__(self, console: Console, out: Path, options: GenerationOptions, *, quiet: bool) -> None:
        self._console, self._options, self._quiet, self._out = console, options, quiet, stdout()
        self.turns: list[tuple[str, str]] = []
        self._last: Answer | None = None
        check_text("--system", options.system or "")
        self._sampling = options.sampling  # what cannot be used is refused before the model is loaded
        from moemerge.passes.chats import has_chat_template

        self._plain = options.raw or not has_chat_template(out)
        if self._plain and options.system and out.is_dir():
            why = "--raw uses none" if options.raw else f"{out} has none"
            raise RefusedError(f"--system: needs a chat template, and {why}. Write it into the prompt.")
        self._generator = _load(console, out, options, quiet=quiet)
        if options.experts and not self._generator.experts:
            console.print(f"note: {out} is a dense model, and has no experts to show", style="yellow")

    def ask(self, line: str, on_token: "Callable[[Token], None]") -> "Answer":
        """Answer a line, after the turns before it."""
        check_text("the prompt", line)
        parts: list[str] = []
        is_whole = False

        def take(token: "Token") -> None:
            if interrupted.is_set():
                raise KeyboardInterrupt
            parts.append(token.text)
            on_token(token)
            if getattr(sys.stdout, "failure", None):  # nobody reads on, as after `| head`
                raise typer.Exit

        try:
            self._last = self._answer(self.turns, line, take)
            is_whole = True
        finally:
            if is_whole or parts:
                self.turns.append((line, "".join(parts)))
        return self._last

    def _answer(
        self,
        turns: Sequence[tuple[str, str]],
        asked: str,
        on_token: "Callable[[Token], None]",
        over: str = "/reset forgets the turns before.",
    ) -> "Answer":
        from moemerge.generation.answers import prompt_of

        prompt = prompt_of(turns, asked, system=self._options.system, plain=self._plain)
        shorter = over if turns else "Shorten it."
        return self._generator.generate(prompt, self._sampling, on_token, shorter=shorter)

    def serve(self) -> None:
        """Open a page to chat on, until Ctrl-C.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        from moemerge.cli.chat_page import open_page

        ask = partial(self._answer, over="Clear the chat to begin again.")
        address, close = open_page(self._generator, ask)
        say(f"{address} shows the chat in a browser; Ctrl-C ends it.")
        try:
            interrupted.wait()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the page is closed") from None
        finally:
            close()

    def print_answer(self, line: str) -> None:
        """Print the answer to a line as it comes, and what experts wrote it."""
        started = time.monotonic()
        coloured = self._options.experts and has_colours(self._out)
        ends_line = True

        def show(token: "Token") -> None:
            nonlocal ends_line
            _print_token(self._out, token, coloured=coloured)
            ends_line = token.text.endswith("\n") if token.text else ends_line

        try:
            answer = self.ask(line, show)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the answer ends here") from None
        finally:
            if not ends_line:
                self._out.print()
        if self._options.experts and answer.routes:
            print_shares(self._out, answer.routes)
        if not self._quiet:
            rate = len(answer.tokens) / max(time.monotonic() - started, 1e-9)
            end = "; cut by --max-new-tokens or the context" if answer.is_cut else ""
            told = f"{len(answer.tokens)} tokens, {rate:.1f} per second in {self._generator.computes}{end}"
            self._console.print(told, style="dim")

    def show_experts(self) -> None:
        """Print the last answer in its experts' colours, and their shares."""
        if not (self._last and self._last.routes):
            why = "there is no answer yet" if self._generator.experts else "a dense model has no experts"
            self._console.print(f"/experts: {why}.")
            return
        routes, (traced,) = self._last.routes, self._last.routes.texts
        if has_colours(self._out):
            line = Text()
            for token, expert in zip(traced.tokens, routes.majority(traced).tolist(), strict=True):
                line.append(printable(token), style_of(expert))
            self._out.print(line)
        print_shares(self._out, routes)


def _load(console: Console, out: Path, options: GenerationOptions, *, quiet: bool) -> "TextGenerator":
    from moemerge.cli.progress import show_steps
    from moemerge.generation.answers import open_generator

    with show_steps(console, quiet=quiet) as progress:
        report = stoppable(progress)
        return open_generator(
            out,
            device=options.device,
            compute_dtype=options.compute_dtype,
            progress=lambda done, of: report(Task("load", str(out)), done, of),
        )


def _print_token(console: Console, token: "Token", *, coloured: bool) -> None:
    style = style_of(token.expert) if coloured and token.expert is not None else ""
    # As it is: a Text would turn tabs into spaces.
    console.print(Segments([Segment(printable(token.text), Style.parse(style))]), end="")


def print_shares(console: Console, routes: "Routes") -> None:
    """Print each expert's share of an answer: a legend of the colours, or without them a table."""
    (traced,) = routes.texts
    shares = routes.shares(traced).tolist()
    what = f"First choices of {len(traced.tokens)} tokens in {len(routes.layers)} layers:"
    console.print(what)
    if has_colours(console):
        console.print(Columns(legend(routes.experts, shares), padding=(0, 2)))
        return
    table = Table("expert", "share", box=None, header_style="")
    table.columns[1].justify = "right"
    for name, share in zip(routes.experts, shares, strict=True):
        table.add_row(name, f"{share:.1%}")
    console.print(table)

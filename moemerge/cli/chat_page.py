"""A page on this machine to chat with a model: the only module that imports gradio."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Final

from moemerge.errors import MoemergeError
from moemerge.evaluation.routes.palette import page_colour
from moemerge.packages import importing

if TYPE_CHECKING:
    from moemerge.generation.answers import Answer, Token
    from moemerge.generation.generator import TextGenerator

Ask = Callable[[Sequence[tuple[str, str]], str, "Callable[[Token], None]"], "Answer"]
"""A function from the turns before, what is asked now, and a function that takes each token, to the answer."""
_FONTS: Final = ("system-ui", "sans-serif")
_MONOSPACE: Final = ("ui-monospace", "monospace")


def check_gradio() -> None:
    """Refuse where gradio is not installed, or lacks something.

    Raises:
        RefusedError: says how to install it.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before it is imported
    with importing("gradio", "--web: gradio is needed: pip install 'gradio>=6.31'."):
        import gradio  # noqa: F401


def open_page(generator: "TextGenerator", ask: Ask) -> tuple[str, Callable[[], None]]:
    """Serve the page to this machine alone; nothing of it comes from elsewhere.

    Returns:
        Its address, and a function that closes it.
    """
    import gradio

    with gradio.Blocks(title=f"Chat with {Path(generator.name).name}", fill_width=True) as page:
        turns = gradio.State([])
        with gradio.Row():
            with gradio.Column(scale=3):
                shown = gradio.Chatbot(
                    label=Path(generator.name).name, height="60vh", feedback_options=None, buttons=["copy"]
                )
                asked = gradio.Textbox(show_label=False, placeholder="Ask something", submit_btn=True, autofocus=True)
            with gradio.Column(scale=2, visible=bool(generator.experts)):
                coloured = gradio.HighlightedText(
                    label="The last answer, by expert",
                    color_map={name: page_colour(expert) for expert, name in enumerate(generator.experts)},
                    combine_adjacent=True,
                    show_legend=True,
                    show_inline_category=False,
                )
                shares = gradio.Dataframe(
                    label="Share of tokens by first choice", headers=["layer", *generator.experts], interactive=False
                )

        def answered(turns: list[tuple[str, str]], question: str) -> Iterator[tuple[Any, ...]]:
            kept = gradio.skip()
            yield _messages([*turns, (question, "")]), "", kept, [], []
            # What is typed meanwhile stays.
            for text, spans, answer in _pieces(generator, lambda on_token: ask(turns, question, on_token)):
                now = [*turns, (question, text)]
                yield _messages(now), kept, now, spans, _shares(answer) if answer else kept

        shown.clear(lambda: ([], [], []), None, [turns, coloured, shares])
        asked.submit(answered, [turns, asked], [shown, asked, turns, coloured, shares], concurrency_limit=1)
    fonts = gradio.themes.Default(font=_FONTS, font_mono=_MONOSPACE)
    _, address, _ = page.launch(
        server_name="127.0.0.1", share=False, ssr_mode=False, prevent_thread_lock=True, quiet=True, footer_links=[],
        theme=fonts,
    )  # fmt: skip
    return address, lambda: page.close(verbose=False)


def _pieces(
    generator: "TextGenerator", ask: "Callable[[Callable[[Token], None]], Answer]"
) -> "Iterator[tuple[str, list[tuple[str, str | None]], Answer | None]]":
    """Yield the text so far, its tokens with the names of their experts, and, at last, the answer."""
    import gradio

    from moemerge.generation.answers import Answer, Token

    arrived: SimpleQueue[Token | Answer | Exception] = SimpleQueue()
    left = Event()

    def take(token: "Token") -> None:
        if left.is_set():
            raise MoemergeError("the page was left")
        arrived.put(token)

    def work() -> None:
        try:
            arrived.put(ask(take))
        except Exception as error:  # noqa: BLE001  it is raised below
            arrived.put(error)

    worker = Thread(target=work, daemon=True)
    worker.start()
    text: str = ""
    spans: list[tuple[str, str | None]] = []
    try:
        while not isinstance(found := arrived.get(), Answer):
            if not isinstance(found, Token):
                raise gradio.Error(str(found), print_exception=not isinstance(found, MoemergeError)) from found
            text += found.text
            spans.append((found.text, None if found.expert is None else generator.experts[found.expert]))
            yield text, spans, None
        yield text, spans, found
    finally:
        left.set()
        worker.join()


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def _shares(answer: "Answer") -> list[list[str]]:
    """Rows of the table: all layers, then each."""
    if not answer.routes:
        return []
    routes, (traced,) = answer.routes, answer.routes.texts
    rows = [("all", None), *((str(layer), index) for index, layer in enumerate(routes.layers))]
    return [[name, *(f"{share:.0%}" for share in routes.shares(traced, index))] for name, index in rows]

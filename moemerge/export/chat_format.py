"""Find how a chat template writes turns by rendering it, and write the same as a Go template for Ollama.

What stands around each role's messages is read off a few renderings of a chat template. A format is accepted only if
it gives what the template gives for longer chats too. As a program (`python -m moemerge.export.chat_format`) it reads a
template and tokens as JSON from stdin, and writes the format as JSON, since rendering a template may never end.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from moemerge.export.chat_template import Messages, Render, renderer

_SYSTEM: Final = ("system", "Qsystem0Q")
_FIRST: Final = ("user", "Quser1Q")
_ANSWER: Final = ("assistant", "Qanswer1Q")
_SECOND: Final = ("user", "Quser2Q")
_LONG: Final = ("user", "Two\n\nparagraphs, {braces} and <tags>.")
_CHATS: Final[tuple[Messages, ...]] = (
    (_FIRST,),
    (_LONG,),
    (_FIRST, _ANSWER, _SECOND),
    (_FIRST, _ANSWER, _LONG, ("assistant", "Yes: 1, 2."), _SECOND),
)
_WITHOUT_SYSTEM: Final = ("", "\n\n")
_SECONDS: Final = 30
_MEMORY_BYTES: Final = 2_000_000_000


@dataclass(frozen=True)
class ChatFormat:
    """The text around messages, and the place of a system message."""

    opening: str
    """The beginning of a chat without a system message."""
    system: tuple[str, str]
    """The text before and after a system message."""
    place: Literal["own turn", "first question", "last question"]
    """Where the system message is placed."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    """The text before the answer that is asked for."""
    knows_system: bool = True
    """Whether the chat template takes system messages at all."""

    def render(self, messages: Messages) -> str:
        """Write the text of a chat that asks for an answer, as `go_template` does."""
        system = "\n\n".join(content for role, content in messages if role == "system")
        system_text = "".join((self.system[0], system, self.system[1])) if system else ""
        parts = [] if system else [self.opening]
        questions = [index for index, (role, _) in enumerate(messages) if role == "user"]
        at = {"own turn": None, "first question": questions[0], "last question": len(messages) - 1}[self.place]
        for index, (role, content) in enumerate(messages):
            if role == "user":
                parts += [self.user[0], system_text if index == at else "", content, self.user[1]]
            elif role == "assistant":
                parts += [self.assistant[0], content, self.assistant[1]]
            elif self.place == "own turn":
                parts += [self.system[0], content, self.system[1]]
        return "".join((*parts, self.answer))

    def go_template(self) -> str:
        """Write the format as a template for Ollama.

        Ollama gives all system messages as one text `.System`, and `.Messages`, in which consecutive messages of one
        role are one (https://github.com/ollama/ollama/blob/main/docs/template.md).
        """
        parts = []
        if self.opening:
            parts.append(f"{{{{ if not .System }}}}{_literal(self.opening)}{{{{ end }}}}")
        own, system, after = "", "", ""
        if self.place == "own turn":
            own = f'{{{{ if eq .Role "system" }}}}{_around(self.system, ".Content")}{{{{ else if eq .Role "user" }}}}'
        else:
            own = '{{ if eq .Role "user" }}'
            system = _around(self.system, "$.System")
        if self.place == "first question":
            parts.append("{{ $told := not .System }}")
            system, after = f"{{{{ if not $told }}}}{system}{{{{ end }}}}", "{{ $told = true }}"
        elif self.place == "last question":
            system = f"{{{{ if and $.System (eq (len (slice $.Messages $index)) 1) }}}}{system}{{{{ end }}}}"
        parts += [
            "{{ range $index, $_ := .Messages }}" if self.place == "last question" else "{{ range .Messages }}",
            own, _literal(self.user[0]), system, "{{ .Content }}", after, _literal(self.user[1]),
            '{{ else if eq .Role "assistant" }}', _around(self.assistant, ".Content"), "{{ end }}{{ end }}",
            _literal(self.answer),
        ]  # fmt: skip
        return "".join(parts)


def _literal(text: str) -> str:
    return text.replace("{", '{{ "{" }}')


def _around(both: tuple[str, str], name: str) -> str:
    return f"{_literal(both[0])}{{{{ {name} }}}}{_literal(both[1])}"


def read_format(template: str, tokens: Mapping[str, str], bos: str = "", eos: str = "") -> ChatFormat | None:
    """Find the format of an untrusted template in a child process, in bounded time and memory; see `find_format`.

    Args:
        template: the chat template, in Jinja.
        tokens: texts of special tokens that the template may use, by name.
        bos: see `find_format`.
        eos: see `find_format`.
    """
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)  # noqa: PTH100  links stay as they are
    given = json.dumps({"template": template, "tokens": dict(tokens), "bos": bos, "eos": eos})
    try:
        done = subprocess.run(  # noqa: S603  this program itself
            [sys.executable, "-m", __name__],
            env=os.environ | {"PYTHONPATH": paths},
            input=given.encode(),
            capture_output=True,
            timeout=_SECONDS,
            check=True,
        )
        found: dict[str, Any] | None = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError):
        return None
    if found is None:
        return None
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return ChatFormat(**fields)


def find_format(render: Render, bos: str = "", eos: str = "") -> ChatFormat | None:
    """Find the format that gives what a chat template gives; None if there is none.

    Args:
        render: a function that renders the chat template.
        bos: a text that a runtime puts in front, so that the format begins after it.
        eos: a text that some templates put at the end of a chat in which no answer is asked for.
    """

    def rendered(*messages: tuple[str, str], ask: bool = True) -> str:
        return render(messages, ask=ask)

    try:
        plain = _without_system(rendered, bos, eos)
    except Exception:  # noqa: BLE001  each template raises in its own way, or lacks a message
        return None
    expected = {chat: rendered(*chat).removeprefix(bos) for chat in _CHATS}
    if any(plain.render(chat) != text for chat, text in expected.items()):
        return None
    try:
        with_system = {chat: rendered(_SYSTEM, *chat).removeprefix(bos) for chat in _CHATS}
    except Exception:  # noqa: BLE001  `System role not supported`
        return replace(plain, system=_WITHOUT_SYSTEM, place="first question", knows_system=False)
    for found in _with_system(plain, with_system[(_FIRST,)]):
        if all(found.render((_SYSTEM, *chat)) == text for chat, text in with_system.items()):
            return found
    return None


def _without_system(render: Render, bos: str, eos: str) -> ChatFormat:
    """Find the text around questions and answers.

    Raises:
        ValueError: a message is left out, or a longer chat does not begin as a shorter one.
    """
    head, tail = _cut(render(_FIRST), _FIRST)
    _, between, between_too, _ = _cut(render(_FIRST, _ANSWER, _SECOND), _FIRST, _ANSWER, _SECOND)
    _, after_question = _cut(render(_FIRST, ask=False), _FIRST)
    _, _, after_answer = _cut(render(_FIRST, _ANSWER, ask=False), _FIRST, _ANSWER)
    if eos and not tail.startswith(after_question):
        after_question = after_question.removesuffix(eos)
    if eos and not between_too.startswith(after_answer):
        after_answer = after_answer.removesuffix(eos)
    answer, before_answer = _behind(tail, after_question), _behind(between, after_question)
    before_question = _behind(between_too, after_answer)
    head = head.removeprefix(bos)
    if bos and before_question.startswith(bos) and not head.endswith(before_question):
        # Llama 2 begins each question with a BOS; the first one is put there by the runtime.
        before_question, after_answer = before_question.removeprefix(bos), after_answer + bos
    opening = head.removesuffix(before_question)
    if not head.endswith(before_question):
        raise ValueError("the first question begins otherwise than the second")
    return ChatFormat(
        opening, _WITHOUT_SYSTEM, "own turn", (before_question, after_question), (before_answer, after_answer), answer
    )


def _with_system(plain: ChatFormat, text: str) -> Iterator[ChatFormat]:
    """Yield formats that reproduce a rendered chat of a system message and one question."""
    before, between, _ = _cut(text, _SYSTEM, _FIRST)
    begin = plain.user[0]
    if between.endswith(begin):
        yield replace(plain, system=(before, between.removesuffix(begin)))
    if before.startswith(begin):
        folded = replace(plain, system=(before.removeprefix(begin), between), place="first question")
        yield folded
        yield replace(folded, place="last question")


def _cut(text: str, *messages: tuple[str, str]) -> list[str]:
    """Cut out the texts before, between and after messages, each of which is there once.

    Raises:
        ValueError: a message is missing.
    """
    parts = []
    for _, content in messages:
        if text.count(content) != 1:
            raise ValueError(f"{content} is there {text.count(content)} times")
        part, _, text = text.partition(content)
        parts.append(part)
    return [*parts, text]


def _behind(text: str, begin: str) -> str:
    if not text.startswith(begin):
        raise ValueError(f"{text!r} does not begin with {begin!r}")
    return text.removeprefix(begin)


def _main() -> None:
    with suppress(ImportError, ValueError, OSError):  # no Unix; a lower limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    given = json.load(sys.stdin)
    found = find_format(renderer(given["template"], given["tokens"]), given["bos"], given["eos"])
    sys.stdout.write(json.dumps(found and asdict(found)))


if __name__ == "__main__":
    _main()

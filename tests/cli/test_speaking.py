"""`moemerge generate` and `moemerge chat` in pipes and on a terminal."""

import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from moemerge.cli import main
from moemerge.generation.answers import Sampling, open_generator, prompt_of
from moemerge.printable import printable
from tests.support.chats import CHATML, chat_mixture, chat_tokenizer
from tests.support.models import load, make_model

ROOT = Path(__file__).parents[2]
SAMPLING = Sampling(8)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A mixture whose base has no chat template."""
    return chat_mixture(tmp_path_factory.mktemp("speaking"), None)


@pytest.fixture(scope="module")
def generator(out):
    return open_generator(out, device="cpu")


@pytest.fixture
def templated(out):
    """The same mixture with a chat template."""
    (out / "chat_template.jinja").write_text(CHATML)
    yield out
    (out / "chat_template.jinja").unlink()


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs the command line in this process, with standard input."""

    def run_here(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moemerge", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run_here


def answer_of(generator, text, turns=(), *, plain=True):
    return generator.generate(prompt_of(turns, text, system=None, plain=plain), SAMPLING)


def table_of(answer) -> str:
    shares = answer.routes.shares(answer.routes.texts[0])
    rows = "".join(f" {name:6}  {share:5.1%} \n" for name, share in zip(answer.routes.experts, shares, strict=True))
    return f"First choices of {len(answer.tokens)} tokens in 3 layers:\n expert  share \n{rows}"


def test_a_base_model_continues_the_text_of_the_prompt_or_of_standard_input(out, generator, here):
    expected = printable(answer_of(generator, "The fox").text)
    for prompt in ("The fox", "-"):
        found = here("generate", out, prompt, "--max-new-tokens", 8, "--quiet", stdin=b"The fox\n")
        assert found == (0, f"{expected}\n", "")


def test_a_models_setting_that_cannot_be_used_is_a_damaged_file(out, here, tmp_path):
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / "generation_config.json").write_text('{"repetition_penalty": 0}')
    assert here("generate", copy, "The fox", "--quiet") == (
        1,
        "",
        f"error: {copy}/generation_config.json: repetition_penalty: expected a number from 0.01 to 100, found 0. "
        "Correct it, or take it out.\n",
    )


def test_what_it_took_is_told_on_standard_error(out, here):
    code, _, told = here("generate", out, "The fox", "--max-new-tokens", 8)
    assert code == 0
    assert told.startswith("8 tokens, ")
    assert told.endswith(" per second in float32 on cpu; cut by --max-new-tokens or the context\n")


def test_a_template_is_used_unless_the_prompt_is_raw(templated, here):
    generator = open_generator(templated, device="cpu")
    asked = ("generate", templated, "The fox", "--max-new-tokens", 8, "--quiet")
    assert here(*asked)[1] == f"{printable(answer_of(generator, 'The fox', plain=False).text)}\n"
    assert here(*asked, "--raw")[1] == f"{printable(answer_of(generator, 'The fox').text)}\n"
    prompt = prompt_of([], "The fox", system="code", plain=False)
    assert here(*asked, "--system", "code")[1] == f"{printable(generator.generate(prompt, SAMPLING).text)}\n"
    assert here(*asked, "--system", "code", "--raw") == (
        2,
        "",
        "error: --system: needs a chat template, and --raw uses none. Write it into the prompt.\n",
    )


def test_without_colours_the_experts_are_a_table(out, generator, here, monkeypatch):
    answer = answer_of(generator, "The fox")
    asked = ("generate", out, "The fox", "--max-new-tokens", 8, "--quiet", "--experts")
    assert here(*asked) == (0, f"{printable(answer.text)}\n{table_of(answer)}", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert here(*asked) == (0, f"{printable(answer.text)}\n{table_of(answer)}", "")


def test_tokens_have_the_colours_of_the_legend(out, generator, here, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    answer = answer_of(generator, "The fox")
    colours = {"fox": "94", "code": "33", "chat": "32"}
    (traced,) = answer.routes.texts
    tokens = "".join(
        f"\x1b[{colours[answer.routes.experts[expert]]}m{printable(token)}\x1b[0m" if token else ""
        for token, expert in zip(answer.tokens, answer.routes.majority(traced).tolist(), strict=True)
    )
    code, shown, _ = here("generate", out, "The fox", "--max-new-tokens", 8, "--quiet", "--experts")
    assert code == 0
    assert shown.startswith(tokens)
    for name, share in zip(answer.routes.experts, answer.routes.shares(traced), strict=True):
        assert f"\x1b[{colours[name]}m{name} {share:.1%}\x1b[0m" in shown


def test_json_has_text_tokens_and_shares(out, generator, here):
    answer = answer_of(generator, "The fox")
    code, shown, _ = here("generate", out, "The fox", "--max-new-tokens", 8, "--json")
    (traced,) = answer.routes.texts
    assert code == 0
    assert json.loads(shown) == {
        "prompt": "The fox",
        "text": answer.text,
        "tokens": list(answer.tokens),
        "is_cut": True,
        "experts": ["fox", "code", "chat"],
        "layers": [0, 1, 2],
        "token_experts": answer.routes.majority(traced).tolist(),
        "shares": answer.routes.shares(traced).tolist(),
        "shares_by_layer": [answer.routes.shares(traced, layer).tolist() for layer in range(3)],
    }


def test_a_dense_model_is_said_to_have_no_experts(out, here):
    dense = out.parent / "base"
    code, shown, told = here("generate", dense, "The fox", "--max-new-tokens", 8, "--quiet", "--experts")
    assert (code, shown) == (0, f"{printable(answer_of(open_generator(dense, device='cpu'), 'The fox').text)}\n")
    assert told == f"note: {dense} is a dense model, and has no experts to show\n"
    assert json.loads(here("generate", dense, "The fox", "--json")[1]).keys() == {"prompt", "text", "tokens", "is_cut"}


@pytest.mark.parametrize(
    ("arguments", "stdin", "told"),
    [
        (["generate", "OUT", ""], b"", (2, "the prompt is empty. Give a text to answer or to continue.")),
        (["generate", "OUT", "-"], b"", (2, "the prompt is empty. Give a text to answer or to continue.")),
        (["generate", "OUT", "-"], b"\xff", (2, "standard input: is not text in UTF-8.")),
        (["generate", "OUT", "hi \udcff"], b"", (2, "the prompt holds bytes that are not UTF-8. Write it in UTF-8.")),
        (["generate", "OUT", "a", "--raw", "--system", "\udcff"], b"", (2, "--system holds bytes that are not UTF-8. Write it in UTF-8.")),
        (["generate", "OUT", "a", "--temperature", "1e-45"], b"", (2, "temperature: expected 0, which takes the most likely token, or a number from 1e-06, found 1e-45.")),
        (["chat", "OUT", "--seed", "99999999999999999999999"], b"", (2, "seed: expected a whole number from 0 to 18446744073709551615, found 99999999999999999999999.")),
        (["chat", "OUT"], b"\xff\n", (2, "standard input: is not text in UTF-8.")),
        (["generate", "OUT/no", "a"], b"", (2, "OUT/no: there is no such folder. Name the folder that holds the merged model.")),
        (["chat", "OUT/config.json"], b"", (2, "OUT/config.json: is one file of a model. Name its folder, OUT.")),
        (["generate", "OUT", "a", "--system", "b"], b"", (2, "--system: needs a chat template, and OUT has none. Write it into the prompt.")),
    ],
)  # fmt: skip
def test_a_refusal_is_one_sentence(out, here, arguments, stdin, told):
    status, message = told
    named = [argument.replace("OUT", str(out)) for argument in arguments]
    assert here(*named, stdin=stdin) == (status, "", f"error: {message.replace('OUT', str(out))}\n")


def test_the_next_step_of_a_refusal_is_one_of_the_command(templated, here, tmp_path, monkeypatch):
    copy = shutil.copytree(templated, tmp_path / "copy")
    template = copy / "chat_template.jinja"
    template.write_text("{{ raise_exception('no ' + messages[0].role) }}")
    said = f"error: prompt: the chat template of {copy} refuses it: no"
    assert here("generate", copy, "a", "-q") == (2, "", f"{said} user. Continue plain text, with --raw.\n")
    step = "Leave --system out, or continue plain text, with --raw."
    assert here("generate", copy, "a", "-q", "--system", "b") == (2, "", f"{said} system. {step}\n")
    template.write_text("")
    assert here("generate", copy, "The fox", "-q") == here("generate", copy, "The fox", "-q", "--raw")
    for file in (template, copy / "tokenizer.json", copy / "tokenizer_config.json"):
        file.unlink()
    code, _, told = here("generate", copy, "a", "-q")
    assert code == 1
    assert told.startswith(f"error: {copy}: the model's tokenizer cannot be used (")
    assert told.endswith("). Text needs it: add the tokenizer's files.\n")


def test_a_wrong_name_is_not_taken_for_one_of_the_hub(tmp_path, here, monkeypatch):
    """The command would refuse what the cache holds."""
    (tmp_path / "hub" / "models--user--name").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    told = "error: user/nam: there is no such folder. Name the folder that holds the merged model.\n"
    assert here("chat", "user/nam") == (2, "", told)


def test_refusals_import_neither_torch_nor_transformers(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    code = (
        "import sys; sys.argv[1:] = ['chat', 'a.gguf']\nfrom moemerge.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 2\n"
        "assert not {'torch', 'transformers', 'gradio'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout, found.stderr) == (
        0,
        "",
        "error: a.gguf: is a GGUF file, which llama.cpp runs. Name the folder that it was written from.\n",
    )


def test_in_a_pipe_each_line_is_a_turn_after_those_before(templated, here):
    generator = open_generator(templated, device="cpu")
    first = answer_of(generator, "The fox", plain=False)
    second = answer_of(generator, "code", [("The fox", first.text)], plain=False)
    again = answer_of(generator, "code", plain=False)
    assert second.text != again.text
    found = here(
        "chat", templated, "--max-new-tokens", 8, "--quiet",
        stdin=b"/experts\nThe fox\n\ncode\n/experts\n/reset\n/bogus\ncode\n/exit\nThe fox\n",
    )  # fmt: skip
    assert found == (
        0,
        f"{printable(first.text)}\n{printable(second.text)}\n{table_of(second)}{printable(again.text)}\n",
        "/experts: there is no answer yet.\n/bogus: there is no such command; known: /reset, /experts, /exit.\n",
    )


def test_commands_may_have_spaces_around_them(out, generator, here):
    answer = answer_of(generator, "The fox")
    found = here(
        "chat", out, "--max-new-tokens", 8, "--quiet", stdin=b"The fox\n /reset \n/bogus \nThe fox\n/exit \nno"
    )
    known = "known: /reset, /experts, /exit"
    assert found == (0, f"{printable(answer.text)}\n" * 2, f"/bogus: there is no such command; {known}.\n")


def test_a_turn_is_remembered_even_if_its_answer_is_empty(out, here, tmp_path):
    copy = shutil.copytree(out, tmp_path / "copy")
    ids = torch.tensor([chat_tokenizer(None)("The fox")["input_ids"]])
    first = int(load(out)(ids).logits[0, -1].argmax())
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
    second = answer_of(open_generator(copy, device="cpu"), "code", [("The fox", "")])
    assert second.text != answer_of(open_generator(copy, device="cpu"), "code").text
    found = here("chat", copy, "--max-new-tokens", 8, "--quiet", stdin=b"The fox\ncode")
    assert found[:2] == (0, f"{printable(second.text)}\n")


def test_a_full_context_names_the_step_that_empties_it(out, here):
    code, _, told = here("chat", out, "--quiet", "--max-new-tokens", 8, stdin=b"The fox\n" + b"fox " * 200)
    assert code == 2
    assert told.startswith("error: the prompt has ")
    assert told.endswith(f" tokens, and {out} reads 128. /reset forgets the turns before.\n")


class Left:
    """Standard output whose reader took one token and left."""

    encoding = "utf-8"

    def __init__(self):
        self.taken = 0

    def write(self, text):
        if self.taken:
            raise BrokenPipeError(32, "Broken pipe")
        self.taken += bool(text)
        return len(text)

    def flush(self): ...

    def isatty(self):
        return False

    def fileno(self):
        raise OSError


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_an_answer_ends_when_nobody_reads_on(out, monkeypatch, capsys, command):
    """What it took would be told at the end."""
    monkeypatch.setattr(sys, "stdout", Left())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The fox\ncode\n"), "utf-8"))
    monkeypatch.setattr(sys, "argv", ["moemerge", command, str(out), *(["The fox"] if command == "generate" else [])])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert capsys.readouterr().err == ""


def test_without_a_template_a_chat_goes_on_with_the_text(out, generator, here):
    first = answer_of(generator, "The fox")
    second = answer_of(generator, "code", [("The fox", first.text)])
    found = here("chat", out, "--max-new-tokens", 8, "--quiet", stdin=b"The fox\ncode")
    assert found == (0, f"{printable(first.text)}\n{printable(second.text)}\n", "")


LAUNCH = "import os; os.close(os.open(os.ttyname(0), os.O_RDWR)); from moemerge.cli import main; main()"


class Terminal:
    """A command on a terminal of its own, which Ctrl-C reaches."""

    def __init__(self, *arguments: object) -> None:
        self._own, theirs = pty.openpty()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "400"}
        command = [sys.executable, "-c", LAUNCH, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self.shown = ""

    def wait_for(self, text: str) -> None:
        """Read until a text is shown; what is shown before it is forgotten."""
        while text not in self.shown:
            assert self._read(), self.shown
        self.shown = self.shown.partition(text)[2]

    def type(self, text: bytes) -> None:
        os.write(self._own, text)

    def interrupt(self) -> None:
        """Press Ctrl-C until the command ends; readline misses one between its prompt and its wait for input."""
        for _ in range(8):
            self.type(b"\x03")
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
                return

    def end(self) -> tuple[int, str]:
        """Read to the end; gives the exit code, too."""
        while self._read():
            pass
        return self.process.wait(60), self.shown.replace("\r\n", "\n")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)

    def _read(self) -> bool:
        try:
            ready = select.select([self._own], [], [], 120)[0]
            found = os.read(self._own, 4096) if ready else b""
        except OSError:  # Linux's end of a terminal
            return False
        self.shown += found.decode(errors="replace")
        return bool(found)


@pytest.fixture
def terminal(out):
    opened: list[Terminal] = []

    def open_terminal(*arguments: object) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


def test_on_a_terminal_a_refusal_does_not_end_the_chat(out, terminal):
    chat = terminal("chat", out, "--max-new-tokens", 8)
    chat.wait_for("/reset starts over  /experts shows who wrote the last answer  /exit ends")
    chat.wait_for("> ")
    chat.type(b"fox " * 200 + b"\n")
    chat.wait_for(f"error: the prompt has 203 tokens, and {out} reads 128. Shorten it.")
    chat.wait_for("> ")
    chat.type(b"The fox\n")
    chat.wait_for("8 tokens, ")
    chat.wait_for("> ")
    chat.type(b"\x04")
    assert chat.end() == (0, "\n")


def test_ctrl_c_ends_a_long_answer_and_then_the_chat(tmp_path, terminal):
    model = make_model(tmp_path / "long", vocab_size=404, max_position_embeddings=10**5)
    chat_tokenizer(None).save_pretrained(model)
    chat = terminal("chat", model, "--max-new-tokens", 10**5, "--seed", 3, "--temperature", 2)
    chat.wait_for("> ")
    chat.type(b"The fox\n")
    chat.wait_for("The fox\r\n")
    chat.wait_for(" ")
    chat.type(b"\x03")
    chat.wait_for("\r\n> ")
    assert "tokens, " not in chat.shown
    chat.interrupt()
    code, shown = chat.end()
    assert (code, shown.replace("^C", "")) == (130, "\ninterrupted: the chat ends here\n")

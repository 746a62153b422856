"""Modelfiles: chat templates as Ollama's Go templates, stops and settings; Ollama itself is played by a script."""

import json
import os
from pathlib import Path

import gguf
import pytest

from moemerge.errors import OutputError, RefusedError
from moemerge.export import chat_format
from moemerge.export.chat_format import find_format, read_format
from moemerge.export.chat_template import read_chat_template, renderer
from moemerge.export.ollama import check_name, create, write_modelfile

_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for m in rest %}" + _ALTERNATE + "{% if loop.index0 == 0 and system %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}{% else %}{% set content = m.content %}"
    "{% endif %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}" + _ALTERNATE + "{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL3 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
    "m.content | trim + '<|eot_id|>' %}{{ bos_token + content if loop.first else content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + _ALTERNATE + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + "
    "'\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
GRANITE = (
    "{% if messages[0].role != 'system' %}{{ '<|start_of_role|>system<|end_of_role|>You are Granite.<|end_of_text|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + "
    "'<|end_of_text|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{% generation %}{{ {'user': 'Q{', 'assistant': 'A{', 'system': 'S{'}[m.role] }}"
    "{{ m.content }}{% endgeneration %}{{ '}\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'A{' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML, "llama 2": LLAMA2, "mistral": MISTRAL, "mistral 3": MISTRAL3, "llama 3": LLAMA3, "gemma": GEMMA,
    "phi-3": PHI3, "zephyr": ZEPHYR, "granite": GRANITE, "plain": PLAIN,
}  # fmt: skip
_USER, _END = '{{ if eq .Role "user" }}', "{{ end }}{{ end }}"
_ASSISTANT = '{{ else if eq .Role "assistant" }}'
# Each has been run by Go's text/template, over the chats below and others.
GO = {
    "chatml": '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
    '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
    + _ASSISTANT + "<|im_start|>assistant\n{{ .Content }}<|im_end|>\n" + _END + "<|im_start|>assistant\n",
    "llama 2": "{{ $told := not .System }}{{ range .Messages }}" + _USER
    + "[INST] {{ if not $told }}<<SYS>>\n{{ $.System }}\n<</SYS>>\n\n{{ end }}{{ .Content }}{{ $told = true }} [/INST]"
    + _ASSISTANT + " {{ .Content }} </s><s>" + _END,
    "mistral 3": "{{ range $index, $_ := .Messages }}" + _USER
    + "[INST] {{ if and $.System (eq (len (slice $.Messages $index)) 1) }}{{ $.System }}\n\n{{ end }}{{ .Content }}"
    + "[/INST]" + _ASSISTANT + " {{ .Content }}</s>" + _END,
    "granite": "{{ if not .System }}<|start_of_role|>system<|end_of_role|>You are Granite.<|end_of_text|>\n{{ end }}"
    '{{ range .Messages }}{{ if eq .Role "system" }}<|start_of_role|>system<|end_of_role|>{{ .Content }}'
    '<|end_of_text|>\n{{ else if eq .Role "user" }}<|start_of_role|>user<|end_of_role|>{{ .Content }}'
    "<|end_of_text|>\n" + _ASSISTANT + "<|start_of_role|>assistant<|end_of_role|>{{ .Content }}<|end_of_text|>\n"
    + _END + "<|start_of_role|>assistant<|end_of_role|>",
    "plain": '{{ range .Messages }}{{ if eq .Role "system" }}S{{ "{" }}{{ .Content }}}\n'
    '{{ else if eq .Role "user" }}Q{{ "{" }}{{ .Content }}}\n' + _ASSISTANT + 'A{{ "{" }}{{ .Content }}}\n'
    + _END + 'A{{ "{" }}',
}  # fmt: skip
QUESTION, ANSWER, SECOND = ("user", "Why?"), ("assistant", "Because {it} is."), ("user", "Two\n\nlines <b>")
SYSTEM = ("system", "Be brief.")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_is_told_in_go(name):
    render = renderer(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    found = find_format(render, "<s>", "</s>")
    chats = [(QUESTION,), (SECOND,), (QUESTION, ANSWER, SECOND), (SECOND, ANSWER, SECOND, ANSWER, QUESTION)]
    for chat in chats:
        assert found.render(chat) == render(chat, ask=True).removeprefix("<s>")
    assert found.knows_system == (name not in {"mistral", "gemma"})
    for chat in chats if found.knows_system else []:
        assert found.render((SYSTEM, *chat)) == render((SYSTEM, *chat), ask=True).removeprefix("<s>")
    if name in GO:
        assert found.go_template() == GO[name]


def test_a_system_message_that_the_template_does_not_take_stands_before_the_first_question():
    found = find_format(renderer(GEMMA, {"bos_token": "<bos>"}), "<bos>")
    assert found.render((SYSTEM, QUESTION, ANSWER, SECOND)) == (
        "<start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\nBecause {it} is.<end_of_turn>\n"
        "<start_of_turn>user\nTwo\n\nlines <b><end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}",
        "{{ messages[-1].content }}",
        "{{ messages[0].content | upper }}",
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content }} and again {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.role }}{{ m.content | replace('\n', ' ') }}\n{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_no_format_is_made_up(template):
    assert find_format(renderer(template, {})) is None


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m.role.__class__.__mro__ }}{% endfor %}", "{{ messages.append(1) }}"]
)
def test_a_template_stays_in_its_sandbox(template):
    with pytest.raises(Exception, match="unsafe"):
        renderer(template, {})([("user", "a")])


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model's small files."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "chat_template": "unread"})
    )
    added = [(0, "<s>"), (1, "<|im_start|>"), (2, "<|im_end|>"), (3, "<|endoftext|>")]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": i, "content": c} for i, c in added]}))
    (folder / "generation_config.json").write_text(
        json.dumps(
            {"eos_token_id": [2, 3], "temperature": 0.6, "top_p": 0.95, "top_k": True, "repetition_penalty": 1.1}
        )
    )
    return folder


def write(path: Path, **settings) -> Path:
    """A GGUF file without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in settings.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_string)(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_modelfile_holds_what_ollama_needs(folder, tmp_path):
    model = write(tmp_path / "my mix.gguf", add_bos_token=False)
    found = write_modelfile(folder, model, tmp_path / "Modelfile")
    assert found.notes == ()
    assert (tmp_path / "Modelfile").read_text() == (
        "FROM ./my mix.gguf\n"
        f'TEMPLATE """{GO["chatml"]}"""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "<|endoftext|>"\n'
        'PARAMETER stop "<|im_start|>"\n'
        "PARAMETER temperature 0.6\n"
        "PARAMETER top_p 0.95\n"
        "PARAMETER repeat_penalty 1.1\n"
    )
    (tmp_path / "b").mkdir()
    write_modelfile(folder, model, tmp_path / "b" / "Modelfile")
    assert (tmp_path / "b" / "Modelfile").read_text().startswith(f"FROM {model}\n")


def test_stops_of_a_format_without_special_tokens_are_its_words(folder, tmp_path):
    (folder / "chat_template.jinja").write_text(MISTRAL3)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "generation_config.json").unlink()
    found = write_modelfile(folder, write(tmp_path / "m.gguf", model="llama"), tmp_path / "Modelfile")
    assert found.stops == ("</s>", "[INST]")


@pytest.mark.parametrize(
    ("settings", "with_bos"),
    [
        ({"model": "llama"}, False),
        ({"model": "gpt2", "pre": "llama-bpe"}, False),
        ({"model": "gpt2", "pre": "qwen2"}, True),
        ({"model": "llama", "add_bos_token": False}, True),
        ({"model": "gpt2", "pre": "qwen2", "add_bos_token": True}, False),
        ({"model": "gemma4", "pre": "gemma4", "add_bos_token": False}, False),
    ],
)
def test_the_bos_is_written_where_llama_cpp_does_not_put_it(folder, tmp_path, settings, with_bos):
    (folder / "chat_template.jinja").write_text(LLAMA3)
    found = write_modelfile(folder, write(tmp_path / "m.gguf", **settings), tmp_path / "Modelfile")
    assert ("<s>" in found.template) == with_bos


@pytest.mark.parametrize(
    ("template", "note"),
    [
        (None, "TEMPLATE is left out: the model has no chat template; Ollama gives it each text as it is"),
        (
            "{{ messages | length }}",
            "TEMPLATE is left out: what the chat template writes is not a plain sequence of turns. Ollama may know the "
            "template by itself; `ollama show --template` says which it took",
        ),
        (
            CHATML.replace("<|im_end|>", '"""'),
            'TEMPLATE is left out: the chat template holds """, which a Modelfile cannot',
        ),
        (
            CHATML.replace("<|im_end|>", "\u00a0"),
            "TEMPLATE is left out: the chat template holds '\\xa0', which a Modelfile cannot",
        ),
        (GEMMA, "the chat template takes no system message: TEMPLATE puts one in front of the first question"),
        (
            CHATML + "{% set today = strftime_now('%d') %}",
            "the chat template may write today's date: where it does, TEMPLATE has the day it was made on",
        ),
        (
            "{% for %}",
            "TEMPLATE is left out: what the chat template writes is not a plain sequence of turns. Ollama may "
            "know the template by itself; `ollama show --template` says which it took",
        ),
    ],
)
def test_what_a_modelfile_lacks_is_said(folder, tmp_path, template, note):
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    found = write_modelfile(folder, write(tmp_path / "m.gguf", add_bos_token=True), tmp_path / "Modelfile")
    assert found.notes == (note,)
    assert bool(found.template) == ("left out" not in note) == ("TEMPLATE" in (tmp_path / "Modelfile").read_text())


@pytest.mark.parametrize(
    "template",
    ["{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "{{ 'a' * 9999999999 }}"],
)
def test_a_template_that_does_not_end_is_given_up(monkeypatch, template):
    monkeypatch.setattr(chat_format, "_SECONDS", 2)
    assert read_format(template + CHATML, {}) is None


def test_a_format_read_in_a_child_is_the_same():
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert read_format(LLAMA2, tokens, "<s>", "</s>") == find_format(renderer(LLAMA2, tokens), "<s>", "</s>")


def test_a_file_whose_name_a_modelfile_cannot_hold_is_refused(folder, tmp_path):
    model = write(tmp_path / "a\nb.gguf")
    with pytest.raises(RefusedError) as caught:
        write_modelfile(folder, model, tmp_path / "Modelfile")
    assert str(caught.value) == f"{model}: its name holds signs that a Modelfile cannot. Choose another name."


def test_a_chat_template_is_found_where_transformers_finds_it(folder):
    assert read_chat_template(folder) == CHATML
    (folder / "chat_template.jinja").unlink()
    assert read_chat_template(folder) == "unread"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "a processor's"}))
    assert read_chat_template(folder) == "unread"
    (folder / "chat_template.json").unlink()
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_chat_template(folder) == "d"
    (folder / "tokenizer_config.json").write_text("{}")
    assert read_chat_template(folder) == ""
    # Where llama.cpp's converter finds it, so that a GGUF file has it.
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "j"}))
    assert read_chat_template(folder) == "j"


def test_a_modelfile_that_cannot_be_written_is_named(folder, tmp_path):
    with pytest.raises(OutputError) as caught:
        write_modelfile(folder, write(tmp_path / "m.gguf"), tmp_path / "none" / "Modelfile")
    assert str(caught.value) == f"{tmp_path / 'none' / 'Modelfile'}: cannot be written: No such file or directory."


def _play_ollama(folder: Path, monkeypatch, lines: str) -> None:
    program = folder / "ollama"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >"{folder}/arguments"\n{lines}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_ollama_is_run_where_it_is(tmp_path, monkeypatch):
    _play_ollama(tmp_path, monkeypatch, "exit 0")
    assert create("mix:q4", tmp_path / "Modelfile") == "ollama run mix:q4"
    expected = ["create", "mix:q4", "-f", str(tmp_path / "Modelfile")]
    assert (tmp_path / "arguments").read_text().splitlines() == expected


def test_what_ollama_says_when_it_fails_is_passed_on(tmp_path, monkeypatch):
    _play_ollama(tmp_path, monkeypatch, "echo Error: could not connect to ollama server. >&2; exit 1")
    with pytest.raises(OutputError) as caught:
        create("mix", Path("Modelfile"))
    assert str(caught.value) == (
        "ollama create mix -f Modelfile: Error: could not connect to ollama server. Is `ollama serve` running? The file "
        "is complete; run the command again."
    )
    _play_ollama(tmp_path, monkeypatch, "exit 3")
    with pytest.raises(OutputError, match="^ollama create mix -f Modelfile: it ends with code 3. Is "):
        create("mix", Path("Modelfile"))


def test_without_ollama_the_command_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert create("mix", Path("Modelfile")) == (
        "ollama is not on the PATH; where it is: ollama create mix -f Modelfile && ollama run mix"
    )


@pytest.mark.parametrize("name", ["", "-f", "a b", "a/b/c/d", "a:b:c", "../a", "a\n"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(RefusedError) as caught:
        check_name(name)
    assert str(caught.value).endswith("such as my-mixture, user/my-mixture or my-mixture:q4.")
    check_name("user/my-mixture:q4_K_M")

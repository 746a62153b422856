"""Mistakes that people make on the command line and in a config: what each is told, in whole, and the exit code."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from moemerge.cli import main
from tests.support.models import write_config

BEGIN = "`moemerge init BASE EXPERT...` writes a merge config."
EXPECTED = "where a merge config is expected: a YAML file, which `moemerge init BASE EXPERT...` writes."
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n"
TIES = "merge_method: ties\nbase_model: base\nmodels:\n  - model: fox\n"
MERGEKIT_YAML = (
    "is a config of mergekit-yaml, which makes one dense model of several. moemerge puts their FFNs side by side as "
    "experts: `moemerge init BASE EXPERT...` writes a merge config from their names."
)
RECIPE = (
    "recipe.yaml: is a recipe, which leaves experts_per_token open. `moemerge search recipe.yaml --data NAME=PATH` tries "
    "what they may be, and writes the config of the best one."
)


@pytest.fixture(scope="module")
def place(tmp_path_factory, llamas) -> Path:
    """A folder as a user has it: models, a config, and files that are given in place of one by mistake."""
    folder = tmp_path_factory.mktemp("mistakes")
    for model in llamas:
        (folder / model.name).symlink_to(model)
    write_config(folder / "merge.yaml", "base", ["fox", "code"])
    write_config(folder / "recipe.yaml", "base", ["fox", "code"], experts_per_token=[1, 2])
    texts = {
        "empty.yaml": "",
        "comment.yaml": "# nothing yet\n",
        "pointer.yaml": POINTER,
        "ties.yaml": TIES,
        "slices.yaml": "slices:\n  - sources:\n      - model: fox\n",
        "compose.yaml": "version: 3\nservices: {}\n",
        "names.yaml": "- base\n- fox\n",
        "model.gguf": "GGUF\x03\0\0\0",
        "page.gguf": "<html>",
        "notes.txt": "\n<|document|>\n".join(f"note {number}" for number in range(20)),
        "script.sh": "#!/bin/sh\nmoemerge merge.yaml out\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "latin.yaml").write_bytes("base_model: ä\n".encode("latin-1"))
    (folder / "wide.yaml").write_bytes("base_model: base\n".encode("utf-16"))
    for name in ("nothing", "configs", "adapter", "pointers"):
        (folder / name).mkdir()
    shutil.copy(folder / "merge.yaml", folder / "configs")
    (folder / "adapter/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "acme/base"})
    )
    shutil.copytree(folder / "fox", folder / "pointers", dirs_exist_ok=True)
    (folder / "pointers/model.safetensors").write_text(POINTER)
    write_config(folder / "pointed.yaml", "base", ["pointers", "code"])
    return folder


@pytest.fixture
def told(place, monkeypatch, capsys):
    """Runs a command line in that folder; gives the exit code and what is printed on standard error."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))

    def tell(line: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert printed.out == ""
        return end.value.code, printed.err

    return tell


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("moemerge out/ merge.yaml", "out: is not the config, merge.yaml is. Write `moemerge merge.yaml out`."),
        ("moemerge merge out merge.yaml", "out: is not the config, merge.yaml is. Write `moemerge merge.yaml out`."),
        ("moemerge model.gguf merge.yaml", "model.gguf: is not the config, merge.yaml is. Write `moemerge merge.yaml model.gguf`."),
        ("moemerge verify merge.yaml --against base", "base: is not the config, merge.yaml is. Write `moemerge verify base --against merge.yaml`."),
        ("moemerge pln merge.yaml", "pln: there is no such config and no such command. Did you mean plan?"),
        ("moemerge version", "version: there is no such config and no such command. Did you mean --version?"),
        ("moemerge frobnicate", "frobnicate: there is no such config and no such command. `moemerge --help` lists the commands."),
        ("moemerge frobnicate out", "frobnicate: there is no such config and no such command. `moemerge --help` lists the commands."),
        ("moemerge merge base fox", "base: is a model's folder, where a merge config is expected: a YAML file, which `moemerge init base fox` writes."),
        ("moemerge base fox code", "base: is a model's folder, where a merge config is expected: a YAML file, which `moemerge init base fox code` writes."),
        ("moemerge base out", "base: is a model's folder, where a merge config is expected: a YAML file, which `moemerge init base EXPERT...` writes."),
        ("moemerge acme/base out", "acme/base: is a model's name, where a merge config is expected: a YAML file, which `moemerge init acme/base EXPERT...` writes."),
        ("moemerge plan acme/base@main", "acme/base@main: is a model's name, where a merge config is expected: a YAML file, which `moemerge init acme/base@main EXPERT...` writes."),
        ("moemerge acme/base acme/math acme/code", "acme/base: is a model's name, where a merge config is expected: a YAML file, which `moemerge init acme/base acme/math acme/code` writes."),
        ("moemerge merg.yaml out", "merg.yaml: there is no such file. Did you mean merge.yaml?"),
        ("moemerge configs/merge.yml out", "configs/merge.yml: there is no such file. Did you mean configs/merge.yaml?"),
        ("moemerge plan nowhere/a.yaml", "nowhere/a.yaml: there is no such file, and no folder nowhere."),
        ("moemerge plan nothing/a.yaml", f"nothing/a.yaml: there is no such file. {BEGIN}"),
        ("moemerge merge.yaml", "OUT, the folder to write, is missing. Write `moemerge merge.yaml out`, or `moemerge plan merge.yaml` to see what would be written."),
        ("moemerge merge.yaml out --workers 2", "--workers: needs --ray. Add `--ray local` for processes on this machine."),
        ("moemerge merge.yaml out more", "more: more arguments than `moemerge merge` takes. See `moemerge merge --help`."),
        ("moemerge verify base", "base: has no moemerge_config.yaml. Name the config that it was merged from with --against."),
        ("moemerge mergekit-moe merge.yaml out", "mergekit-moe: moemerge stands in its place. Leave the word out: `moemerge merge.yaml out`."),
        ("moemerge merge.yaml base", "base: is one of the models that are read. Choose another output folder."),
        ("moemerge merge.yaml fox --dry-run", "fox: is one of the models that are read. Choose another output folder."),
        ("moemerge push user/name base", "user/name: is not the model's folder, base is. Write `moemerge push base user/name`."),
        ("moemerge generate 'The fox' base", "The fox: is not the model's folder, base is. Write `moemerge generate base 'The fox'`."),
        ("moemerge push base name", "name: is not a repository's name. Write user/name, or organisation/name."),
        ("moemerge eval base code=a.txt", "code=a.txt: a text to judge by is an option. Write `--data code=a.txt`."),
        ("moemerge eval base", "Missing option '--data'. See `moemerge eval --help`."),
        ("moemerge families qwen9", "qwen9: no output family repeats models of the type 'qwen9'. Did you mean qwen3?"),
        ("moemerge families Qwen9", "Qwen9: no output family repeats models of the type 'qwen9'. Did you mean qwen3?"),
        ("moemerge families rwkv", "rwkv: no output family repeats models of the type 'rwkv'. `moemerge families` lists all."),
        ("moemerge families falcon", "falcon: no output family repeats models of the type 'falcon': its FFN has no gate."),
        ("moemerge configs out", "configs: is a folder, where a merge config is expected. Did you mean configs/merge.yaml?"),
        ("moemerge plan .", ".: is a folder, where a merge config is expected. Name one of its files, such as binary.yaml."),
        ("moemerge nothing out", f"nothing: is a folder, {EXPECTED}"),
        ("moemerge plan adapter", f"adapter: is a LoRA adapter's folder, {EXPECTED}"),
        ("moemerge empty.yaml out", f"empty.yaml: is empty. {BEGIN}"),
        ("moemerge comment.yaml out", f"comment.yaml: holds no keys. {BEGIN}"),
        ("moemerge binary.yaml out", f"binary.yaml: is not a text file, {EXPECTED}"),
        ("moemerge latin.yaml out", "latin.yaml: is not text in UTF-8. Save it in UTF-8."),
        ("moemerge wide.yaml out", "wide.yaml: is text in UTF-16. Save it in UTF-8."),
        ("moemerge pointer.yaml out", "pointer.yaml: is a git-lfs pointer in place of the file. Run `git lfs pull` in its folder."),
        ("moemerge model.gguf out", f"model.gguf: is a GGUF file, {EXPECTED}"),
        ("moemerge base/model.safetensors out", f"base/model.safetensors: is a file of weights, {EXPECTED}"),
        ("moemerge base/config.json out", f"base/config.json: is a model's config.json, {EXPECTED}"),
        ("moemerge adapter/adapter_config.json out", f"adapter/adapter_config.json: is an adapter's adapter_config.json, {EXPECTED}"),
        ("moemerge script.sh out", f"script.sh: is a program, {EXPECTED}"),
        ("moemerge ties.yaml out", f"ties.yaml: {MERGEKIT_YAML}"),
        ("moemerge plan slices.yaml", f"slices.yaml: {MERGEKIT_YAML}"),
        ("moemerge compose.yaml out", f"compose.yaml: has none of the keys of a merge config, such as base_model and experts. {BEGIN}"),
        ("moemerge plan recipe.yaml", RECIPE),
        ("moemerge recipe.yaml out", RECIPE),
        ("moemerge names.yaml out", "names.yaml: expected keys such as base_model and experts, found ['base', 'fox']. `moemerge init BASE EXPERT...` writes a merge config."),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line(told, line, message):
    code, printed = told(line)
    assert code == 2
    assert printed == f"error: {message}\n"
    assert not Path("out").exists()


def test_ray_is_asked_for_before_anything_is_read(told, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert told("moemerge merge.yaml out --ray auto") == (
        2,
        "error: --ray: ray is needed: pip install 'moemerge[ray]'.\n",
    )


def test_a_package_that_lacks_another_one_is_not_said_to_be_missing(told, monkeypatch, tmp_path):
    (tmp_path / "ray.py").write_text("import what_ray_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert told("moemerge merge.yaml out --ray auto") == (
        2,
        "error: ray is installed, but cannot be imported (No module named 'what_ray_needs'). Install what is missing, or "
        "ray again.\n",
    )


LONG = "a" * 300


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"moemerge {LONG} out", f"{LONG}: there is no such config and no such command. `moemerge --help` lists the commands."),
        (f"moemerge plan {LONG}", f"{LONG}: there is no such config and no such command. `moemerge --help` lists the commands."),
        (f"moemerge merge base {LONG}", "base: is a model's folder, where a merge config is expected: a YAML file, which `moemerge init base EXPERT...` writes."),
        (f"moemerge base fox/{LONG}", f"base: is a model's folder, where a merge config is expected: a YAML file, which `moemerge init base fox/{LONG}` writes."),
        (f"moemerge plan {LONG}/c.yaml", f"{LONG}/c.yaml: there is no such file, and no folder {LONG}."),
        (f"moemerge init base fox code -o no/{LONG}", f"no/{LONG}: there is no folder no. Make it first, or name another file with -o."),
    ],
    ids=["merge", "plan", "out", "expert", "folder", "init"],
)  # fmt: skip
def test_a_name_that_no_file_can_have_is_one_that_is_not_there(told, line, message):
    assert told(line) == (2, f"error: {message}\n")


@pytest.mark.parametrize("model", [LONG, f"fox+{LONG}", f"{LONG}@main"])
def test_a_model_s_name_that_no_file_can_have(told, model):
    code, printed = told(f"moemerge inspect {model}")
    looked_up = model.rpartition("+")[2]
    assert (code, printed) == (2, f"error: {looked_up}: cannot be looked up: File name too long.\n")


def test_the_current_folder_may_be_gone(tmp_path, told, place, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert told(f"moemerge plan {place}/merge.yaml") == (
        1,
        "error: the current folder is gone. Change into another one.\n",
    )


def config(tmp_path: Path, text: str) -> str:
    (tmp_path / "c.yaml").write_text(text)
    return str(tmp_path / "c.yaml")


ONE = "experts:\n  - source_model: fox\n"
CONFIG = f"base_model: base\n{ONE}  - source_model: code\n"
INDENTED = (
    "its indentation fits none of the lines above: items of one list, and keys of one expert, begin at the same column"
)
NO_BREAK = "U+00A0 (no-break space) stands where YAML expects a space. Write a space in its place"


@pytest.mark.parametrize(
    ("text", "spot"),
    [
        ("base_model: base\nexperts:\n\t- source_model: fox\n", (3, 0, "is indented with a tab. Write spaces in its place")),
        (f"base_model:base\n{ONE}", (1, 11, "a space is missing after the colon: write `base_model: ...`")),
        (f"{CONFIG}    positive_prompts:[a]\n  - source_model: chat\n", (5, 21, "a space is missing after the colon: write `positive_prompts: ...`")),
        (f"base_model base\n{ONE}", (1, 10, "a colon is missing after base_model: write `base_model: ...`")),
        ("base_model: base\nexperts\n  - source_model: fox\n", (2, 7, "a colon is missing after experts: write `experts: ...`")),
        (f"base_model = base\n{ONE}", (1, 11, "a key ends in a colon and a space: write `base_model: ...`")),
        ("base_model: base\nexperts:\n  -source_model: fox\n   name: fox\n", (3, 3, "a space is missing after the dash")),
        (f'base_model: "base\n{ONE}', (1, 12, "the quote that opens here is not closed")),
        (f'{CONFIG}    positive_prompts: ["a]\n  - source_model: chat\n    positive_prompts: ["b"]\n', (5, 23, "the quote that opens here is not closed in its line")),
        (f"{CONFIG}    positive_prompts:\n      - 'it's'\n", (6, 12, "text goes on after the quote that ends it; an apostrophe within single quotes is written twice")),
        (f'base_model: "base" model\n{ONE}', (1, 19, "text goes on after the quote that ends it")),
        (f'base_model: "C:\\models"\n{ONE}', (1, 15, "in double quotes, a backslash begins an escape: write two, or single quotes in place of double ones")),
        (f"{CONFIG}    positive_prompts: [a, b\n  - source_model: chat\n", (5, 22, "the [ that opens here is not closed")),
        (f"router: {{scale: 1\n{CONFIG}", (1, 8, "the { that opens here is not closed")),
        (f"{CONFIG}    positive_prompts: ['a' 'b']\n", (5, 27, "a comma is missing before this")),
        ('{"base_model": "base"\n "experts": []}\n', (2, 1, "a comma is missing before this")),
        ('{"base_model": "base", "experts": [{"source_model": "fox"},}\n', (1, 59, "a value is missing before this, or a comma is one too many")),
        (f"{CONFIG}    positive_prompts: [a}}\n", (5, 24, "[ is closed by }")),
        (f'{CONFIG}    positive_prompts: "a"]\n', (5, 25, "] closes nothing: there is no bracket that it belongs to")),
        (f"{CONFIG}    positive_prompts: [a],\n", (5, 25, "a comma separates values within brackets only. Remove it")),
        (f"{CONFIG}    positive_prompts: [a #1]\n", (5, 25, "# begins a comment here. Put a text that holds it in quotes")),
        (f"{CONFIG}   name: code\n", (5, 3, INDENTED)),
        (f"{CONFIG}      name: code\n", (5, 6, INDENTED)),
        (f"{CONFIG} - source_model: chat\n", (5, 1, INDENTED)),
        (f" base_model: base\n{ONE}", (2, 0, INDENTED)),
        (f"{CONFIG}    positive_prompts:\n      - Question: what: why\n", (6, 22, "a text with a colon and a space in it has to stand in quotes")),
        (f"{CONFIG}    positive_prompts:\n      - *bold* words\n", (6, 8, "a text that begins with * has to stand in quotes")),
        (f"base_model: @base\n{ONE}", (1, 12, "a text that begins with @ has to stand in quotes")),
        (f"base_model: !base x\n{ONE}", (1, 12, "a text that begins with ! has to stand in quotes")),
        (f"base_model: base\n---\n{ONE}", (2, 0, "a second document begins here, and a config is one. Remove this line")),
        (f"base_model: | base\n{ONE}", (1, 14, "the text of a block begins in the line after | or >")),
        (f"```yaml\n{CONFIG}```\n", (1, 0, "is Markdown. Delete the lines that begin with ```")),
        (f"{CONFIG}  ```\n", (5, 2, "is Markdown. Delete the lines that begin with ```")),
        (f"~~~\n{CONFIG}~~~\n", (1, 0, "is Markdown. Delete the lines that begin with ~~~")),
        (f'yaml_config = """\n{CONFIG}"""\n', (1, 14, 'is Python. Keep only the YAML between the quotes """')),
        (f"NAME = 'mix'\n\nconfig = f'''{CONFIG}'''\n", (3, 10, "is Python. Keep only the YAML between the quotes '''")),
        (f'{CONFIG}"""\n', (5, 0, 'is Python. Keep only the YAML between the quotes """')),
        (f"%%writefile merge.yaml\n{CONFIG}", (1, 0, "is a command of a notebook, %%writefile. Delete this line")),
        (f'{ONE}    positive_prompts:\n      - |\n        ```\n        x = """\n  source_model: code\n', (7, 2, INDENTED)),
        (f"{CONFIG}    name: b\n  -\xa0source_model: chat\n    name: c\n", (6, 3, NO_BREAK)),
        (f"base_model:\xa0base\n{ONE}", (1, 11, NO_BREAK)),
        (f"{CONFIG}  \xa0\xa0name: b\n", (5, 2, NO_BREAK)),
        (f"{CONFIG}    name: b\n  -\u200bsource_model: chat\n", (6, 3, NO_BREAK.replace("U+00A0 (no-break", "U+200B (zero width"))),
        (f"base_model: base\x07\n{ONE}", (1, 16, "holds \\x07, a control character. Remove it")),
    ],
)  # fmt: skip
def test_wrong_syntax_is_shown_with_a_caret_below(told, tmp_path, text, spot):
    path = config(tmp_path, text)
    line, column, problem = spot
    shown = text.split("\n")[line - 1].replace("\t", " ").replace("\x07", "\\x07")
    assert told(f"moemerge plan {path}") == (
        2,
        f"error: {path}: not valid YAML:\n  - line {line}: {problem}.\n      {line} | {shown}\n        | {' ' * column}^\n",
    )


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (f"base_model: base\n{CONFIG}", ["line 1: base_model: is written twice, in lines 1 and 2. Remove one"]),
        (f"{CONFIG}    name: a\n    name: b\n", ["line 5: experts[1].name: is written twice, in lines 5 and 6. Remove one"]),
        (f"{CONFIG}router: {{scale: 1, scale: 2}}\n", ["line 5: router.scale: is written twice. Remove one"]),
        (f"base_model: base\n{ONE}  - source_model:code\n", ["line 4: experts[1]: expected keys with values, found 'source_model:code'; a space is missing after the colon"]),
        ("base_model: base\nexperts:\n  -source_model: fox\n", ["line 2: experts: expected a list, in which a line with `- ` begins each item, found {'-source_model': 'fox'}; a space is missing after the dash"]),
        ("base_model: base\nexperts:\n  source_model: fox\n", ["line 2: experts: expected a list, in which a line with `- ` begins each item, found {'source_model': 'fox'}"]),
    ],
)  # fmt: skip
def test_what_is_yaml_and_cannot_be_meant(told, tmp_path, text, problems):
    path = config(tmp_path, text)
    listed = "".join(f"  - {problem}\n" for problem in problems)
    assert told(f"moemerge plan {path}") == (2, f"error: {path}: {len(problems)} problem:\n{listed}")


def test_all_wrong_names_are_told_at_once_with_the_nearest(told, place):
    """Folders beside the one that is meant and the Hub's cache are looked at, and no name is asked for on the Hub."""
    (place / "hub/models--acme--math").mkdir(parents=True, exist_ok=True)
    (place / "runs/checkpoint-5").mkdir(parents=True, exist_ok=True)
    shutil.copy(place / "fox/config.json", place / "runs/checkpoint-5")
    (place / "quantised").mkdir(exist_ok=True)
    for name in ("fox.q4_k_m", "fox.q8_0"):
        (place / f"quantised/{name}.gguf").touch()
    experts = ["./foxx", "runs", "adapter", "quantised", "base/config.json", "/nowhere/code"]
    write_config(place / "wrong.yaml", "./../acme/mth", experts, prompts=False)
    text = (place / "wrong.yaml").read_text().splitlines()
    lines = {name: text.index(f"- source_model: {name}") + 1 for name in experts}
    no = "there is no such folder, and it cannot be a Hub repository (user/name)."
    assert told("moemerge plan wrong.yaml") == (
        2,
        "error: wrong.yaml: 7 problems:\n"
        f"  - line 1: base_model: ./../acme/mth: {no} Did you mean acme/math?\n"
        f"  - line {lines['./foxx']}: experts[0].source_model: ./foxx: {no} Did you mean fox?\n"
        f"  - line {lines['runs']}: experts[1].source_model: runs: has no config.json, so it is not a model that moemerge can read. Did you mean runs/checkpoint-5?\n"
        f"  - line {lines['adapter']}: experts[2].source_model: adapter: is a LoRA adapter, not a model. Write it after its base model: acme/base+adapter.\n"
        f"  - line {lines['quantised']}: experts[3].source_model: quantised: holds 2 GGUF files. Name one of them: fox.q4_k_m.gguf, fox.q8_0.gguf.\n"
        f"  - line {lines['base/config.json']}: experts[4].source_model: base/config.json: is one file of a model. Name its folder, base.\n"
        f"  - line {lines['/nowhere/code']}: experts[5].source_model: /nowhere/code: {no} Did you mean code?\n",
    )


def test_a_pointer_in_place_of_weights(told, place):
    file = place / "pointers/model.safetensors"
    line = (place / "pointed.yaml").read_text().splitlines().index("  source_model: pointers") + 1
    assert told("moemerge plan pointed.yaml") == (
        1,
        "error: pointed.yaml: 1 problem:\n"
        f"  - line {line}: experts[0].source_model: {file}: is a git-lfs pointer in place of the file. Run `git lfs pull` in "
        f"{file.parent}.\n",
    )


def test_models_that_are_not_whole_have_their_lines(told, place, llamas):
    """They are failures: neither the config nor the command has to change."""
    for name in ("half", "cut"):
        shutil.copytree(llamas[1], place / name)
    (place / "half/model.safetensors").rename(place / "half/model-00001-of-00002.safetensors")
    (place / "cut/config.json").write_text("{")
    write_config(place / "half.yaml", "base", ["half", "code"], prompts=False)
    write_config(place / "both.yaml", "cut", ["none at all", "code"], prompts=False)
    assert told("moemerge plan half.yaml") == (
        1,
        "error: half.yaml: 1 problem:\n"
        "  - line 3: experts[0].source_model: half: shard model-00002-of-00002.safetensors is not there (1 of 2). Download the "
        "model again.\n",
    )
    assert told("moemerge plan both.yaml") == (
        1,
        "error: both.yaml: 2 problems:\n"
        f"  - line 1: base_model: {place / 'cut/config.json'}: is not valid JSON: Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1).\n"
        "  - line 3: experts[0].source_model: none at all: there is no such folder, and it cannot be a Hub repository "
        "(user/name).\n",
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("merge.yaml", "is a config, not a model. Merge it with `moemerge merge.yaml OUT`, then name OUT."),
        ("model.gguf", "is a GGUF file, which llama.cpp runs. Name the folder that it was written from."),
        ("pointer.yaml", "is a git-lfs pointer in place of the file. Run `git lfs pull` in its folder."),
        ("base/config.json", "is one file of a model. Name its folder, base."),
        ("base/model.safetensors", "is a file of weights. Name its folder, base."),
        ("script.sh", "is a program. Name the folder that holds the merged model."),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        "verify OUT --against merge.yaml",
        "repair OUT",
        "push OUT user/name",
        "eval OUT --data a=notes.txt",
        "tune OUT --data a=notes.txt",
        "routes OUT --text a",
        "generate OUT a",
        "chat OUT",
        "gguf OUT a.gguf",
    ],
)
def test_a_file_in_place_of_a_merged_model_is_called_the_same_by_every_command(told, command, given, message):
    code, printed = told(f"moemerge {command.replace('OUT', given)}")
    if command.startswith("gguf") and given == "merge.yaml":
        message = "is a config, not a model. Merge it with `moemerge merge.yaml a.gguf`."
    assert (code, printed) == (2, f"error: {given}: {message}\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("merge.yaml", "is a config. Name the folder that holds the model's config.json."),
        ("page.gguf", "is no GGUF file: it begins with b'<htm', not with b'GGUF'. Download it again."),
        ("base/config.json", "is one file of a model. Name its folder, base."),
        ("base/model.safetensors", "is a file of weights. Name its folder, base."),
    ],
)
@pytest.mark.parametrize("command", ["inspect MODEL", "init MODEL fox code -o -", "families MODEL"])
def test_a_file_in_place_of_a_model_is_called_the_same_by_every_command(told, command, given, message):
    assert told(f"moemerge {command.replace('MODEL', given)}") == (2, f"error: {given}: {message}\n")


def test_a_file_that_is_not_there_is_not_looked_up_as_a_repository(told):
    assert told("moemerge inspect none.gguf") == (2, "error: none.gguf: there is no such file.\n")


def test_a_model_of_the_hubs_cache_is_not_proposed_for_a_merged_folder(told, place):
    (place / "hub/models--acme--code").mkdir(parents=True, exist_ok=True)
    assert told("moemerge routes acme/cod --text a") == (
        2,
        "error: acme/cod: there is no such folder. Did you mean code?\n",
    )


def test_the_folder_of_a_merged_model_that_is_misspelt(told):
    assert told("moemerge routes bse --text a") == (2, "error: bse: there is no such folder. Did you mean base?\n")

"""`moemerge init`, as users meet it: what it writes loads and plans, and it never asks where nobody can answer."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from moemerge import load_config, plan_merge
from moemerge.cli import main
from moemerge.config.json_schema import config_schema
from moemerge.drafting.config_text import SCHEMA_FILE
from moemerge.drafting.domains import all_domains
from tests.sources.test_lora import make_adapter
from tests.support.models import make_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """The current folder, with a base and three fine-tunes."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "fox", "code", "math")):
        make_model(tmp_path / name, seed, tuned_from=0 if seed else None)
    return tmp_path


@pytest.fixture
def init(monkeypatch, capsys):
    """Runs `moemerge init` in this process; answers make standard input a terminal."""

    def run(*arguments: object, answers: str | None = None) -> tuple[int, str, str]:
        given = io.StringIO(answers or "")
        given.isatty = lambda: answers is not None
        monkeypatch.setattr(sys, "stdin", given)
        monkeypatch.setattr(sys, "argv", ["moemerge", "init", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def written(path: Path) -> dict[str, object]:
    """The config in a file, which loads, plans and is valid under the schema that it names."""
    first = path.read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema={SCHEMA_FILE}"
    document = yaml.safe_load(path.read_text())
    Draft202012Validator(config_schema()).validate(document)
    plan_merge(load_config(path))
    return document


def test_a_config_is_written_with_its_schema_and_the_next_two_commands(models, init):
    code, out, err = init("base", "code", "math")
    assert (code, out) == (0, "")
    head, *lines = [line.rstrip() for line in err.splitlines()]
    assert head.split() == ["expert", "domain", "why", "from", "the", "base"]
    assert [line.split()[:-1] for line in lines[:2]] == [
        [name, name, "its", "name", "is", name] for name in ("code", "math")
    ]
    assert lines[2:] == [
        "merge.yaml: written, and beside it moemerge.schema.json, by which editors check it. Next:",
        "  moemerge plan merge.yaml",
        "  moemerge merge.yaml merged/",
    ]
    document = written(models / "merge.yaml")
    assert {key: value for key, value in document.items() if key != "experts"} == {
        "base_model": "base",
        "dtype": "float32",
        "experts_per_token": 1,
        "shared_weights": "average",
    }
    assert document["experts"] == [
        {"source_model": name, "name": name, "positive_prompts": list(all_domains()[name].prompts)}
        for name in ("code", "math")
    ]
    assert (models / SCHEMA_FILE).read_bytes() == (ROOT / "moemerge" / "config" / "schema.json").read_bytes()


def test_nothing_slow_is_imported(models):
    code = (
        "import sys\nfrom moemerge.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in (["init", "base", "fox", "code"], ["schema"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *command],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_a_file_that_is_there_is_kept_unless_overwrite_is_given(models, init):
    (models / "merge.yaml").write_text("mine")
    (models / SCHEMA_FILE).write_text("mine, too")
    code, _, err = init("base", "code", "math")
    assert (code, err) == (2, "error: merge.yaml: is there already. Name another file with -o, or pass --overwrite.\n")
    assert (models / "merge.yaml").read_text() == "mine"
    code, _, err = init("base", "code", "math", "--overwrite")
    said = "merge.yaml: written; the moemerge.schema.json beside it is another version's, and kept. Next:"
    assert (code, err.splitlines()[-3]) == (0, said)
    assert written(models / "merge.yaml")["base_model"] == "base"
    assert (models / SCHEMA_FILE).read_text() == "mine, too"
    (models / SCHEMA_FILE).unlink()
    for said in (", and beside it moemerge.schema.json, by which editors check it. Next:", ". Next:"):
        _, _, err = init("base", "code", "math", "--overwrite")
        assert err.splitlines()[-3] == f"merge.yaml: written{said}"


def test_it_is_printed_for_a_pipe(models, init):
    code, out, err = init("base", "code", "math", "-o", "-", "-q")
    assert (code, err) == (0, "")
    (models / "piped.yaml").write_text(out)
    assert written(models / "piped.yaml")["base_model"] == "base"
    assert not (models / SCHEMA_FILE).exists()
    _, again, err = init("base", "code", "math", "-o", "-")
    assert again == out
    assert err.splitlines()[-3:] == [
        "Next, with what is printed in FILE, and `moemerge schema > moemerge.schema.json` beside it for editors:",
        "  moemerge plan FILE",
        "  moemerge FILE merged/",
    ]


def test_folders_count_from_the_config_s_folder(models, init, monkeypatch):
    (models / "sub dir").mkdir()
    code, _, err = init("base", "code", models / "math", "-o", "sub dir/my merge.yaml")
    assert (code, err.splitlines()[-2:]) == (
        0,
        ["  moemerge plan 'sub dir/my merge.yaml'", "  moemerge 'sub dir/my merge.yaml' merged/"],
    )
    monkeypatch.chdir("/")
    document = written(models / "sub dir" / "my merge.yaml")
    assert document["base_model"] == "../base"
    assert [expert["source_model"] for expert in document["experts"]] == ["../code", str(models / "math")]


def test_flags_say_what_experts_are_for(models, init):
    code, _, err = init(
        "base", "fox", "code", "math", "--domain", "fox=Law", "--prompts", "math=1 + 1 = ?", "--prompts", "math=a=b", "--top-k", 3
    )  # fmt: skip
    assert code == 0, err
    document = written(models / "merge.yaml")
    assert document["experts_per_token"] == 3
    prompts = [expert["positive_prompts"] for expert in document["experts"]]
    assert prompts == [list(all_domains()["law"].prompts), list(all_domains()["code"].prompts), ["1 + 1 = ?", "a=b"]]
    assert "# domain law (given by --domain)\n" in (models / "merge.yaml").read_text()


def test_an_expert_of_no_domain_leaves_the_routers_to_the_weights(models, init):
    code, _, err = init("base", "fox", "code", "math", "--domain", "code=none")
    assert code == 0
    assert (
        "note: no prompts that only it should answer are known for fox, code, so all prompts are comments, and the "
        "weights alone make the routers\n" in err
    )
    assert [set(expert) for expert in written(models / "merge.yaml")["experts"]] == [{"source_model", "name"}] * 3


def test_where_weights_make_no_routers_random_ones_are_written_with_a_warning(models, init):
    code, out, err = init("base", "base", "fox", "-q")
    assert (code, out) == (0, "")
    assert err == (
        "warning: no prompts that only it should answer are known for fox, and where an expert is the base itself, or no "
        "fine-tune of it, the weights alone make no routers: they are random for now. Write prompts for every expert, and "
        "remove gate_mode\n"
    )
    assert written(models / "merge.yaml")["gate_mode"] == "random"


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_adapters_are_experts(models, init):
    make_adapter(models / "french-lora", models / "base", 1)
    code, _, err = init("base", "base+french-lora", "code")
    assert code == 0, err
    first = written(models / "merge.yaml")["experts"][0]
    assert (first["source_model"], first["name"]) == ("base+french-lora", "french-lora")
    assert first["positive_prompts"] == list(all_domains()["french"].prompts)


def test_on_a_terminal_it_asks(models, init):
    answers = "animals\n?\nHelp\nlist\nlawn\nlaw\na=b\nanimals\n\n\n\nnone\n0\n2\n"
    code, out, err = init("base", "fox", "code", "math", answers=answers)
    assert (code, out) == (0, "")
    for said in (
        "Enter takes what stands in parentheses; ? lists the domains.\n",
        "Name (fox): Domain of animals (none): assistant, code, python,",
        "'lawn' is not a domain. Did you mean law?\n",
        "expected a name without commas, equals signs and line breaks, and no space at its ends\n",
        "another expert has this name\n",
        "Experts per token, 1 to 3 (2): a number from 1 to 3, please\n",
    ):
        assert said in err
    assert err.count("assistant, code, python,") == 3  # for ?, help and list
    document = written(models / "merge.yaml")
    assert [expert["name"] for expert in document["experts"]] == ["animals", "code", "math"]
    text = (models / "merge.yaml").read_text()
    assert "# domain law\n" in text
    assert "# domain math" not in text
    assert document["experts_per_token"] == 2


def test_what_flags_say_is_not_asked(models, init):
    code, _, err = init("base", "code", "math", "--domain", "code=sql", "--top-k", "2", answers="\n\n\n")
    assert code == 0
    assert "Domain of math (math): " in err
    assert "Domain of code" not in err
    assert "Experts per token" not in err
    code, _, err = init("base", "code", "math", "--yes", "--overwrite", answers="")
    assert (code, "Name" in err) == (0, False)


def test_an_end_of_the_answers_writes_nothing(models, init):
    code, _, err = init("base", "code", "math", answers="\n")
    assert (code, err.splitlines()[-1].rpartition("interrupted: ")[2]) == (130, "nothing was written")
    assert not (models / "merge.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "code"], "code: is one expert, and a mixture needs two or more: moemerge init BASE A B."),
        (["base", "code", "code"], "code: is every expert, so nothing would be mixed. Name different models."),
        (["base", "code", "nothing here"], "nothing here: there is no such folder, and it cannot be a Hub repository (user/name)."),
        (["base", "code", "math", "-o", "code"], "code: is a folder. Name the file to write, such as code/merge.yaml."),
        (["base", "code", "math", "-o", "no/x.yaml"],
         "no/x.yaml: there is no folder no. Make it first, or name another file with -o."),
        (["base", "code", "math", "--domain", "coder=sql"], "--domain: 'coder' is not one of the experts: code, math."),
        (["base", "code", "math", "--domain", "code=sqll"], "--domain: 'sqll' is not a domain. Did you mean sql?"),
        (["base", "code", "math", "--domain", "code"], "--domain: expected NAME=..., as in --domain code=..., found 'code'."),
        (["base", "code", "math", "--prompts", "code= "], "--prompts: expected NAME=..., as in --prompts code=..., found 'code= '."),
        (["base", "code", "math", "--top-k", "3"], "--top-k: 3 of 2 experts is not possible. Choose 1 to 2."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_told_in_a_sentence_and_nothing_is_written(models, init, arguments, message):
    before = sorted(models.iterdir())
    code, out, err = init(*arguments)
    assert (code, out, err) == (2, "", f"error: {message}\n")
    assert sorted(models.iterdir()) == before


def test_a_folder_in_the_schema_s_place_is_refused_before_anything_is_opened(models, init):
    (models / SCHEMA_FILE).mkdir()
    assert init("nothing here", "code", "math") == (
        2,
        "",
        "error: moemerge.schema.json: is a folder, where the schema is written that editors check the config by. Rename "
        "it, or name a file in another folder with -o.\n",
    )
    assert not (models / "merge.yaml").exists()


def test_a_folder_with_a_long_name_is_an_expert(models, init):
    (models / "code").rename(models / f"code-{'x' * 80}")
    code, _, err = init("base", f"code-{'x' * 80}", "math", "-q")
    assert (code, err) == (0, "")
    assert written(models / "merge.yaml")["experts"][0]["name"] == f"code-{'x' * 55}"


def test_nobody_is_asked_on_a_closed_input(models, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "argv", ["moemerge", "init", "base", "code", "math", "-q"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert written(models / "merge.yaml")["base_model"] == "base"


def test_models_of_the_hub_are_opened_by_headers_and_cards(world, machine):
    done = machine.moemerge("init", "acme/base", "acme/fox", "acme/code@main", "acme/chat", "-o", "m.yaml")
    assert done.code == 0, done.err
    document = yaml.safe_load((machine.folder / "m.yaml").read_text())
    assert [expert["name"] for expert in document["experts"]] == ["fox", "code", "chat"]
    assert document["experts"][1]["source_model"] == "acme/code@main"
    assert not list(machine.cache.rglob("*.safetensors"))
    assert machine.moemerge("plan", "m.yaml").code == 0

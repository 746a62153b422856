"""The JSON Schema of a config: what is published is made from the types, and it accepts all that the loader accepts."""

import json
import random
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from moemerge.chats import MOST_MESSAGES
from moemerge.config.json_schema import config_schema, published_schema
from moemerge.config.loading import load_config
from moemerge.config.schema import Expert, MergeConfig, RouterSettings, SharedWeights
from moemerge.errors import ConfigError
from tests.support.fuzz import damaged

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
VALIDATOR = Draft202012Validator(config_schema())
PLAIN = {
    "base_model": "base",
    "experts": [
        {"source_model": "a", "positive_prompts": ["one"], "noise_scale": 0.1},
        {"source_model": "b", "positive_prompts": ["two"]},
    ],
}


def loads(document: object) -> bool:
    try:
        load_config(document)
    except ConfigError:
        return False
    return True


def test_the_published_schema_is_the_one_that_the_types_give():
    """If it is not, `make schema` writes it again."""
    published = (ROOT / "moemerge" / "config" / "schema.json").read_text()
    assert published == json.dumps(config_schema(), indent=2) + "\n"
    assert published == published_schema()


def test_it_is_a_json_schema_with_every_key_described():
    Draft202012Validator.check_schema(config_schema())
    definitions = config_schema()["$defs"]
    for part in (config_schema(), *(definitions[name] for name in ("RoutedExpert", "Expert", "RouterSettings"))):
        for key, described in part["properties"].items():
            assert described["description"].endswith("."), key
    for model in (MergeConfig, Expert, RouterSettings, SharedWeights):
        assert all(field.description for field in model.model_fields.values())


def test_the_command_prints_the_file_whatever_the_types_would_give_today(monkeypatch, capsys):
    from moemerge.cli import main

    monkeypatch.setattr("moemerge.config.json_schema.config_schema", dict)
    monkeypatch.setattr("sys.argv", ["moemerge", "schema"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in {0, None}
    assert capsys.readouterr().out == (ROOT / "moemerge" / "config" / "schema.json").read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_names_the_schema_and_is_valid_under_it(path):
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text())
    assert (path.parent / named[1]).resolve() == ROOT / "moemerge" / "config" / "schema.json"
    assert not list(VALIDATOR.iter_errors(yaml.safe_load(path.read_text())))


def shown_configs() -> list[tuple[str, object]]:
    """The YAML of the documentation; parts of a config are completed, an expert's keys in an expert."""
    found = []
    for page in PAGES:
        if page.name == "search.md":  # recipes, which tests/config/test_recipe.py reads
            continue
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            document = yaml.safe_load(block)
            if isinstance(document, dict) and document.keys() <= Expert.model_fields.keys():
                document = {"experts": [{**PLAIN["experts"][0], **document}, PLAIN["experts"][1]]}
            if isinstance(document, dict) and document.keys() <= MergeConfig.model_fields.keys():
                found.append((page.name, PLAIN | document))
    return found


def test_the_configs_of_the_documentation_are_valid():
    shown = shown_configs()
    assert {"README.md", "recipes.md", "routers.md"} <= {name for name, _ in shown}
    assert [(name, error.message) for name, document in shown for error in VALIDATOR.iter_errors(document)] == []


def chat(*messages: object, **keys: object) -> dict[str, object]:
    return {"messages": [*messages], **keys}


USER = {"role": "user", "content": "Hello"}
VALUES = {
    "dtype": ["bf16", "fp16", "fp32", "half", "float", "float32", "torch.bfloat16", "torch.half", None],
    "gate_mode": ["auto", "ridge", "hidden_avg", "hidden_last", "random"],
    "engine": ["vllm", "vLLM", "llama.cpp", "LLAMA_CPP", "llama.cpp-converter", "mlx-lm", "mlxlm", "converter", None],
    "moe_layers": ["all", "second-half", 8, "8", "8-", "8-15", [0, 3]],
    "shared_weights": ["average", "auto", {"method": "ties", "density": "0.4", "weights": [1, "2e-1"]}, {}, None],
    "router": [{"lambda": "1e-2", "scale": 2}, {"load_prior": [1, "1.5"]}, {"chat_prompts": "auto"}, {"chat_prompts": True},
               {"chat_roles": "user"}, {"chat_roles": ["system", "tool"]}, {"calibration": "generate"}, {"seed": 3}, {}, None],
    "shared_experts": [None, [], [{"source_model": "c", "residual_scale": 0.5}]],
    "architecture": [None, "mixtral"],
    "fold_norms": [True],
    "experts_per_token": [1],
}  # fmt: skip
OF_EXPERTS = {
    "positive_prompts": ["one text", chat(USER), [chat(USER), "text"], [{"prompt": "a", "completion": "b"}],
                         [{"prompt": [USER], "completion": "b"}], [{"instruction": "a", "output": "b", "input": None}],
                         [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
                         [chat({"role": "user", "content": [{"type": "text", "text": "a", "more": 1}]}, prompt=5)]],
    "negative_prompts": ["x", None, []],
    "positive_texts": ["a.txt", ["a.txt", "hf://datasets/user/name"], None],
    "name": ["Programs in C", None],
    "noise_scale": [0, 0.5, "1e-2", " .5 ", "1_000", "+1.", "1E+2", None],
    "residual_scale": [-1, "-0.5"],
    "layers": ["second-half", "2-", [1]],
}  # fmt: skip


@pytest.mark.parametrize(
    "document",
    [PLAIN | {key: value} for key, values in VALUES.items() for value in values]
    + [{**PLAIN, "experts": [{**PLAIN["experts"][0], key: value}, PLAIN["experts"][1]]}
       for key, values in OF_EXPERTS.items() for value in values],
    ids=str,
)  # fmt: skip
def test_every_spelling_that_the_loader_takes_is_valid(document):
    assert loads(document)
    assert [error.message for error in VALIDATOR.iter_errors(document)] == []


@pytest.mark.parametrize(
    "change",
    [
        {"base_model": ""}, {"base_model": 3}, {"experts": PLAIN["experts"][:1]}, {"experts": {}}, {"gate_mod": "ridge"},
        {"gate_mode": "ridgee"}, {"gate_mode": None}, {"dtype": "int8"}, {"dtype": "torch.torch.half"}, {"engine": "vlm"},
        {"moe_layers": "first"}, {"moe_layers": []}, {"moe_layers": -1}, {"moe_layers": True}, {"fold_norms": "yes"},
        {"experts_per_token": 0}, {"experts_per_token": "2"}, {"shared_weights": "mean"}, {"shared_weights": {"density": 2}},
        {"router": {"lambda": 0}}, {"router": {"scale": True}}, {"router": {"scale": "big"}}, {"router": {"chat_prompts": 1}},
        {"router": {"chat_roles": []}}, {"router": {"chat_roles": "bot"}}, {"router": {"load_prior": [1e9, 1]}}, {"router": []},
        *(
            {"experts": [{**PLAIN["experts"][0], **expert}, PLAIN["experts"][1]]}
            for expert in (
                {"positive_promps": ["x"]}, {"positive_prompts": [3]}, {"positive_prompts": ""}, {"noise_scale": -1},
                {"positive_prompts": [{}]}, {"positive_prompts": [chat()]}, {"positive_prompts": [chat(USER, mesages=1)]},
                {"positive_prompts": [chat(*[USER] * (MOST_MESSAGES + 1))]}, {"positive_texts": [""]},
                {"positive_prompts": [chat({"role": "bot", "content": "x"})]}, {"layers": "3-x"}, {"source_model": None},
                {"name": "a=b"}, {"name": " a"}, {"name": "n" * 61}, {"name": ""}, {"name": 3},
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_schema_refuses_the_loader_refuses(change):
    document = PLAIN | change
    assert list(VALIDATOR.iter_errors(document))
    assert not loads(document)


def test_of_damaged_configs_none_loads_that_is_not_valid():
    rng, accepted, refused = random.Random(0), 0, 0
    whole = PLAIN | {
        "dtype": "bf16", "moe_layers": "2-", "engine": "vllm", "shared_weights": {"method": "ties", "density": 0.4},
        "router": {"lambda": 0.1, "load_prior": [1, 1], "chat_roles": ["user"]}, "shared_experts": [{"source_model": "c"}],
    }  # fmt: skip
    assert loads(whole)
    for _ in range(1500):
        document = damaged(rng, whole)
        if not isinstance(document, dict) or len(repr(document)) > 10_000:
            continue
        if loads(document):
            accepted += 1
            assert not list(VALIDATOR.iter_errors(document)), document
        elif not VALIDATOR.is_valid(document):
            refused += 1
    assert accepted > 50
    assert refused > 200

"""The YAML: what is accepted, and the whole message where it is not."""

import json
import time
from pathlib import Path

import pytest
import yaml

from moemerge import load_config
from moemerge.config.layer_choice import read_layers
from moemerge.config.loading import parse_config
from moemerge.config.schema import MergeConfig, RoutedExpert, RouterSettings
from moemerge.errors import ConfigError

PLAIN = """\
base_model: base
experts:
  - source_model: a
    positive_prompts: ["one"]
  - source_model: b
    positive_prompts: ["two"]
"""


def problems(text: str, **keys) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "c.yaml", **keys)
    return list(caught.value.problems)


def test_defaults():
    config = parse_config(PLAIN)
    assert (config.gate_mode, config.dtype, config.experts_per_token) == ("auto", None, 2)
    assert (config.architecture, config.shared_experts) == (None, [])


def test_every_key_of_mergekit_moe_is_accepted():
    config = parse_config(
        "base_model: base@main\ngate_mode: cheap_embed\ndtype: bfloat16\nexperts_per_token: 1\narchitecture: mixtral\n"
        "shared_experts:\n- {source_model: s, positive_prompts: [x], residual_scale: 0.1}\n"
        "experts:\n- {source_model: a, positive_prompts: [x], negative_prompts: [y], noise_scale: 0.1, residual_scale: 1}\n"
        "- {source_model: b, positive_prompts: [z], negative_prompts: null}\n"
    )
    assert config.experts[0].negative_prompts == ["y"]
    assert config.experts[1].negative_prompts == []
    assert config.shared_experts[0].residual_scale == 0.1


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("fp32", "float32"),
        ("float16", "float16"),
        ("torch.bfloat16", "bfloat16"),
    ],
)
def test_dtype_spellings(spelling, dtype):
    assert parse_config(PLAIN + f"dtype: {spelling}\n").dtype == dtype


DATA = "base_model: base\nexperts: [{source_model: a%s}, {source_model: b%s}]\n"


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        (PLAIN, {"weights", "prompts", "texts"}),
        (DATA % (", positive_texts: a.txt", ", positive_prompts: b"), {"weights", "prompts", "texts"}),
        (DATA % ("", "") + "router: {calibration_texts: c.txt}\n", {"weights", "unsorted texts"}),
        (DATA % ("", ""), {"weights"}),
    ],
)
def test_auto_reads_what_there_is(text, reads):
    for given in (text, text + "gate_mode: combined\n"):
        method = parse_config(given).method
        assert (method.name, method.reads) == ("combined", reads)
    assert parse_config(PLAIN + "gate_mode: hidden\n").method.name == "hidden"


def test_an_expert_that_nothing_is_said_of_beside_others_is_named():
    text = DATA % (", positive_texts: a.txt", "")
    reason = (
        "has neither positive_prompts nor positive_texts, though others have: give it some, or none to any expert, "
        "and the weights alone make the routers"
    )
    assert problems(text) == [f"line 2: experts[1]: {reason}"]
    reason = "gate_mode ridge needs positive_prompts or positive_texts: what should be routed to this expert"
    assert problems(text + "gate_mode: ridge\n") == [f"line 2: experts[1]: {reason}"]


def test_settings_that_would_do_nothing_are_refused():
    assert problems(PLAIN + "gate_mode: hidden\nrouter: {lambda: 0.1, load_prior: [1, 2, 3], tokens: 5}\n") == [
        "line 8: router.lambda: gate_mode hidden does not use it; combined, ridge, logistic, delta_bootstrap do",
        "line 8: router.load_prior: names 3 shares, but there are 2 experts",
        "line 8: router.tokens: unknown key, did you mean tokens_per_expert?",
    ]
    assert problems(DATA % ("", "") + "gate_mode: delta_bootstrap\n") == [
        "line 3: gate_mode: delta_bootstrap needs router.calibration_texts: files of text of all kinds that the "
        "experts are for"
    ]


def test_texts_that_nothing_would_read_are_refused():
    assert problems(PLAIN + "router: {calibration_texts: c.txt}\n") == [
        "line 7: router.calibration_texts: gate_mode combined uses them for a load_prior alone, which is missing; "
        "without prompts and texts, routers are made from them"
    ]
    parse_config(PLAIN + "router: {calibration_texts: c.txt, load_prior: [1, 2]}\n")
    text = PLAIN.replace('["one"]', '["one"]\n    positive_texts: a.txt')
    assert problems(text + "gate_mode: mergekit_hidden\n") == [
        "line 5: experts[0].positive_texts: gate_mode mergekit_hidden reads prompts alone; ridge reads texts too"
    ]
    reason = "negative text says what differs from positive text, but there is none"
    assert problems(DATA % (", negative_prompts: [x]", "")) == [f"line 2: experts[0]: {reason}"]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("[]", "router: expected keys with values, found []"),
        ("{lambda: true}", "router.lambda: expected a number, found True"),
        ("{scale: big}", "router.scale: expected a number, found 'big'"),
        ("{load_prior: [1, x]}", "router.load_prior[1]: expected a number, found 'x'"),
    ],
)
def test_router_settings_of_another_kind_are_named(value, problem):
    assert problems(PLAIN + f"router: {value}\n") == [f"line 7: {problem}"]
    assert parse_config(PLAIN + "router:\n").router.tokens_per_expert == 4096
    assert parse_config(PLAIN + "router: {lambda: 1e-2}\n").router.lambda_ == 0.01  # a text in YAML 1.1


def test_router_settings_come_back_from_the_text_of_a_config():
    config = parse_config(PLAIN + "router: {lambda: 0.5, scale: 2}\n")
    assert (config.router.lambda_, config.router.scale, config.router.tokens_per_expert) == (0.5, 2.0, 4096)
    again = parse_config(MergeConfig.model_validate(config.model_dump(by_alias=True)).text)
    assert again.model_dump() == config.model_dump()


def test_a_single_prompt_needs_no_list():
    assert parse_config(PLAIN.replace('["one"]', "one")).experts[0].positive_prompts == ["one"]


@pytest.mark.parametrize("mode", ["hidden_avg", "hidden_last"])
def test_other_names_of_hidden(mode):
    assert parse_config(PLAIN + f"gate_mode: {mode}\n").gate_mode == "hidden"


@pytest.mark.parametrize("mode", ["hidden_avg", "hidden_last"])
def test_other_names_of_hidden_need_the_same(mode):
    reason = "gate_mode hidden needs positive_prompts or positive_texts: what should be routed to this expert"
    assert problems(DATA % ("", ", positive_prompts: b") + f"gate_mode: {mode}\n") == [f"line 2: experts[0]: {reason}"]
    assert parse_config(PLAIN + f"gate_mode: {mode}\nrouter: {{scale: 2}}\n").router.scale == 2


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_random_routers_need_no_prompts(mode):
    text = f"base_model: base\ngate_mode: {mode}\nexperts: [{{source_model: a}}, {{source_model: b}}]\n"
    assert not parse_config(text).has_descriptions


def test_all_problems_come_at_once_each_with_line_and_address():
    text = """\
base_modell: base
gate_mode: hiden
dtype: int8
experts_per_token: 4
experts:
  - source_model: a
    positive_promps: ["one"]
  - source_model: b
    positive_prompts: ["two", "", 3]
    noise_scale: -1
"""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "c.yaml")
    assert str(caught.value) == (
        "c.yaml: 9 problems:\n"
        "  - line 1: base_model: is missing\n"
        "  - line 1: base_modell: unknown key, did you mean base_model?\n"
        "  - line 2: gate_mode: expected auto, hidden, mergekit_hidden, combined, ridge, logistic, delta, delta_bootstrap, cheap_embed, random or uniform_random, found 'hiden'; did you mean hidden?\n"
        "  - line 3: dtype: expected float32, float16 or bfloat16, found 'int8'\n"
        "  - line 4: experts_per_token: each token is to go to 4 experts, but there are only 2: name more experts or lower "
        "experts_per_token\n"
        "  - line 7: experts[0].positive_promps: unknown key, did you mean positive_prompts?\n"
        "  - line 9: experts[1].positive_prompts[1]: the prompt is empty\n"
        "  - line 9: experts[1].positive_prompts[2]: expected text, found 3; write it in quotes\n"
        "  - line 10: experts[1].noise_scale: expected a number of 0 or more, found -1"
    )


def test_empty_prompts_are_refused_where_prompts_make_the_router():
    assert problems(PLAIN.replace('["one"]', "[]") + "gate_mode: cheap_embed\n") == [
        "line 4: experts[0].positive_prompts: gate_mode cheap_embed needs positive_prompts: text that should be routed to this expert"
    ]


def test_blank_prompts_are_refused_in_every_mode():
    assert problems(PLAIN.replace('"one"', '" "') + "gate_mode: random\n") == [
        "line 4: experts[0].positive_prompts[0]: the prompt is empty"
    ]


def test_prompts_of_shared_experts_are_checked_but_may_be_missing():
    shared = (
        "shared_experts:\n- source_model: s\n- {source_model: t, positive_prompts: [x], negative_prompts: [y, ' ']}\n"
    )
    assert problems(PLAIN + shared) == [
        f"line {PLAIN.count(chr(10)) + 3}: shared_experts[1].negative_prompts[1]: the prompt is empty"
    ]
    assert parse_config(PLAIN + shared.replace("' '", "z")).computes_shared_gate


def test_the_order_of_prompts_does_not_make_them_different():
    assert len(problems(PLAIN.replace('["one"]', "[a, b]").replace('["two"]', "[b, a]"))) == 1


def test_a_yaml_bomb_is_refused_at_once():
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(ConfigError, match="line 6: stands for more than 50000 values once its aliases are written out"):
        parse_config("\n".join([*lines, "base_model: *a9", "experts: *a9"]), "c.yaml")


BOMB = "a0: &a0 [x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 20))
HALF = '"party \\ud83c"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: 2024-13-45\n", "a value does not fit its tag: ValueError: month must be in 1..12"),
        ("base_model: !!int ''\n", "a value does not fit its tag: IndexError: string index out of range"),
        ('base_model: !!bool "x"\n', "a value does not fit its tag: KeyError: 'x'"),
        ("base_model: !!timestamp x\n", "a value does not fit its tag: AttributeError: "),
        ("[" * 500_000, "nest"),  # libyaml has a limit of its own in some versions
        ("[" * 60 + "]" * 60, "line 1: is nested more than 50 deep"),
        ("- x\n" * 120_000, "line 99999: holds too many values"),
        ("base_model: &a [*a]\n", "line 1: holds itself, by an alias"),
        (BOMB + "base_model: *a19\n", "stands for more than 50000 values once its aliases are written out"),
        (MERGES + "base_model: *a19\n", "stands for more than 50000 values once its aliases are written out"),
        (f"base_model: {'x' * 2_000_000}\n", "has 2000013 characters; at most 1000000 are read"),
        (f"base_model: {HALF}\nx: {'x' * 300_000}\n", "at most 120000 are read"),
        (f"experts_per_token: 0x{'f' * 5000}\n", "line 1: a number has 5002 characters; at most 400 are read"),
        (f"base_model: x\nx: 1{':59' * 300_000}\n", "line 2: a number has 900001 characters; at most 400 are read"),
    ],
)
def test_what_the_yaml_library_trips_over_is_refused_at_once(text, message):
    start = time.process_time()
    with pytest.raises(ConfigError, match="c.yaml: not valid YAML:") as caught:
        parse_config(text, "c.yaml")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 4000
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (PLAIN + "".join(f"k{n}: 1\n" for n in range(24_000)), 24_000),
        pytest.param(PLAIN + "".join(f"{n}: 1\n" for n in range(16_000)), 16_000, marks=pytest.mark.slow),
        (PLAIN + f"x: {HALF}\n" + "".join(f"k{n}: 1\n" for n in range(9_000)), 9_002),
        ("base_model: a\nexperts:\n" + "- {}\n" * 24_000, 24_000),
        pytest.param(
            "base_model: a\nexperts:\n- {source_model: b}\n- source_model: c\n  positive_prompts:\n"
            + "  - 5\n" * 40_000,
            40_001,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_of_many_problems_the_first_are_told_at_once(text, count):
    start = time.process_time()
    with pytest.raises(ConfigError, match=f"c.yaml: {count} problems:\n  - line ") as caught:
        parse_config(text, "c.yaml")
    assert caught.value.problems[-1] == f"and {count - 100} more"
    assert time.process_time() - start < 3


@pytest.mark.parametrize("key", ["positive_prompts", "positive_texts", "base_model", "experts", "router"])
def test_values_without_an_end_get_a_short_message(key):
    values = ", ".join(["'" + "x" * 400 + "'"] * 100)
    text = PLAIN.replace("source_model: a\n", f"source_model: a\n    {key}: {{a: [{values}]}}\n")
    for broken in (
        text,
        PLAIN + f"{'k' * 90_000}: [{values}]\n",
        PLAIN.replace("base_model: base", f"base_model: [{values}]"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config(broken, "c.yaml")
        assert len(str(caught.value)) < 4000


def test_letters_in_two_halves_are_joined_and_lone_ones_named_by_line():
    config = parse_config(PLAIN.replace('"one"', '"party \\ud83c\\udf89", "sea"'))
    assert config.experts[0].positive_prompts == ["party \U0001f389", "sea"]
    text = PLAIN.replace('"one"', f"sea, {HALF}").replace("base_model: base", 'base_model: "\\udc80"')
    assert problems(text) == [
        "line 1: base_model: holds half of a letter, a lone surrogate",
        "line 4: experts[0].positive_prompts[1]: holds half of a letter, a lone surrogate",
    ]


def test_keys_that_are_no_text_are_named():
    assert problems(PLAIN + "1: x\n") == ["line 7: 1: is not the name of a key: expected text"]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("noise_scale", "1.0e+39", "expected a number below 3.4e+38: values are computed in float32, which holds no larger one, found 1e+39"),
        ("residual_scale", "-1.0e+39", "expected a number below 3.4e+38: values are computed in float32, which holds no larger one, found -1e+39"),
        ("residual_scale", "1.0e-60", "expected 0 or a number above 1.2e-38: values are computed in float32, which holds no smaller one, found 1e-60"),
        ("noise_scale", ".nan", "expected a finite number, found nan"),
        ("residual_scale", "true", "expected a number, found True"),
    ],
)  # fmt: skip
def test_numbers_that_float32_does_not_hold_are_refused(key, value, problem):
    text = PLAIN.replace("source_model: a\n", f"source_model: a\n    {key}: {value}\n")
    assert problems(text) == [f"line 4: experts[0].{key}: {problem}"]
    assert problems(PLAIN + f"router: {{scale: {value}}}\n")[0].startswith("line 7: router.scale: ")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("router: {scale: 1.0e-7}", "router.scale: expected a number of 1e-06 or more, found 1e-07"),
        ("router: {scale: 1.0e+7}", "router.scale: expected a number of 1000000 or less, found 10000000.0"),
        ("router: {load_prior: [1.0e-7, 1]}", "router.load_prior[0]: expected a number of 1e-06 or more, found 1e-07"),
        ("router: {load_prior: [1, 1.0e+7]}", "router.load_prior[1]: expected a number of 1000000 or less, found 10000000.0"),
        ("shared_weights: {method: ties, density: 2}", "shared_weights.density: expected a number of 1 or less, found 2"),
        ("router: {scale: [1]}", "router.scale: expected a number, found [1]"),
        ("router: {lambda: 0}", "router.lambda: expected a number above 0, found 0"),
        ("router: {seed: -1}", "router.seed: expected a whole number of 0 or more, found -1"),
        ("experts_per_token: 0", "experts_per_token: expected a whole number of 1 or more, found 0"),
        ("experts_per_token: two", "experts_per_token: expected a whole number, found 'two'"),
        ("experts_per_token: 1.5", "experts_per_token: expected a whole number, found 1.5"),
        ("fold_norms: 3", "fold_norms: expected true or false, found 3"),
        ("architecture: ''", "architecture: expected text, found ''"),
        ("router: {chat_roles: []}", "router.chat_roles: expected a list that is not empty, found []"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_or_beyond_its_bounds_is_refused(keys, problem):
    assert f"line 7: {problem}" in problems(PLAIN + keys + "\n")


@pytest.mark.parametrize("key", ["compute_dtype", "compute-dtype", "device"])
def test_an_option_of_the_command_line_is_told_from_a_key(key):
    option = f"--{key.replace('_', '-')}"
    assert problems(PLAIN + f"{key}: x\n") == [
        f"line 7: {key}: unknown key; on the command line it is the option {option}"
    ]


@pytest.mark.parametrize(("value", "found"), [("[auto]", "['auto']"), ("true", "True"), ("1", "1")])
def test_what_is_no_method_of_sharing_weights_is_explained(value, found):
    assert problems(PLAIN + f"shared_weights: {value}\n") == [
        "line 7: shared_weights: expected one of base, average, ties, dare, auto; or keys such as method: ties, "
        f"density: 0.5, found {found}"
    ]


EXPERTS = [{"source_model": "a", "positive_prompts": ["one"]}, {"source_model": "b", "positive_prompts": "two"}]


def test_a_config_made_in_python_is_that_of_the_text():
    text = parse_config(PLAIN + "gate_mode: ridge\nrouter: {lambda: 0.5}\n")
    keys = {"base_model": "base", "experts": EXPERTS, "gate_mode": "ridge", "router": {"lambda": 0.5}}
    for made in (
        MergeConfig(**keys),
        load_config(keys),
        MergeConfig(**{**keys, "router": RouterSettings(**{"lambda": 0.5})}),
    ):
        assert made.model_dump() == text.model_dump()
        assert parse_config(made.text).model_dump() == text.model_dump()
    again = MergeConfig(**text.model_dump(by_alias=True))
    assert again.model_dump() == text.model_dump()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"experts": [{"source_model": "a"}, {"source_model": "b"}]},
         "experts[0]: gate_mode ridge needs positive_prompts or positive_texts"),
        ({"experts": [RoutedExpert(source_model="a", positive_prompts=["x"]), RoutedExpert(source_model="b")]},
         "experts[1]: gate_mode ridge needs positive_prompts or positive_texts"),
        ({"experts": [EXPERTS[0], EXPERTS[0] | {"positive_prompts": ["y"]}]}, "experts: every expert is the same model"),
        ({"experts": EXPERTS[:1]}, "experts: a mixture needs at least 2 experts, found 1"),
        ({"gate_mod": 1}, "gate_mod: unknown key, did you mean gate_mode?"),
        ({"base_model": 5}, "base_model: expected text, found 5"),
        ({"experts_per_token": 3}, "experts_per_token: each token is to go to 3 experts"),
    ],
)  # fmt: skip
def test_a_config_made_in_python_is_checked_like_a_file(change, problem):
    keys = {"base_model": "base", "experts": EXPERTS, "gate_mode": "ridge"} | change
    for make in (lambda: MergeConfig(**keys), lambda: load_config(keys)):
        with pytest.raises(ConfigError) as caught:
            make()
        assert str(caught.value).startswith(f"config: {len(caught.value.problems)} problem")
        assert any(found.startswith(problem) for found in caught.value.problems)


def test_a_config_made_in_python_may_give_its_lists_one_by_one():
    made = MergeConfig(base_model="base", experts=(expert for expert in EXPERTS), gate_mode="ridge")
    assert [expert.source_model for expert in made.experts] == ["a", "b"]
    assert parse_config(made.text).model_dump() == made.model_dump()


def test_a_config_made_in_python_that_holds_itself_is_refused():
    ring: list[object] = []
    ring.append(ring)
    with pytest.raises(ConfigError, match="config: is nested more than 50 deep"):
        MergeConfig(base_model="base", experts=ring)


def test_half_letters_of_a_config_made_in_python_are_joined_or_named():
    made = MergeConfig(base_model="\ud83d\ude42", experts=EXPERTS)
    assert made.base_model == "\U0001f642"
    with pytest.raises(ConfigError, match="base_model: holds half of a letter, a lone surrogate"):
        MergeConfig(base_model="\ud83d", experts=EXPERTS)


@pytest.mark.parametrize("text", [PLAIN, json.dumps({"base_model": "base", "experts": EXPERTS})])
def test_a_config_may_be_given_as_text(text):
    """Lines, or one line in braces; whatever begins with a brace as a `Path` is a file's name."""
    config = load_config(text)
    assert config.model_dump() == parse_config(text).model_dump()
    assert (config.text, config.file) == (text, None)
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(Path(text))


def test_what_is_wrong_in_a_text_is_told_with_its_line():
    with pytest.raises(ConfigError) as caught:
        load_config(PLAIN + "gate_mode: bogus\n")
    assert str(caught.value).startswith(
        f"config: 1 problem:\n  - line {len(PLAIN.splitlines()) + 1}: gate_mode: expected auto, "
    )


@pytest.mark.parametrize("source", [None, 1, b"x", [], 1.5])
def test_what_is_neither_a_path_nor_keys_is_refused(source):
    with pytest.raises(ConfigError, match="expected a path, or keys with values, found"):
        load_config(source)


@pytest.mark.parametrize(
    "keys",
    [
        {"experts_per_token": 10**5000},
        {"moe_layers": [10**5000]},
        {"shared_weights": {"method": "dare", "seed": -(10**5000)}},
        {"router": {"scale": 10**5000}},
        {"x": 10**5000},
    ],
)
def test_integers_that_cannot_be_written_are_refused_in_python_too(keys):
    with pytest.raises(ConfigError, match="holds an integer beyond all floats"):
        MergeConfig(base_model="base", experts=EXPERTS, **keys)


def test_identical_experts_are_allowed_in_python_too():
    twice = {"base_model": "base", "experts": [EXPERTS[0], EXPERTS[0] | {"positive_prompts": ["y"]}]}
    config = load_config(twice, allow_identical_experts=True)
    assert config.rechecked() is config
    assert config.model_copy(update={"experts_per_token": 1}).rechecked().experts_per_token == 1
    with pytest.raises(ConfigError, match="each token is to go to 5 experts"):
        config.model_copy(update={"experts_per_token": 5}).rechecked()


def test_a_changed_config_is_still_of_its_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"base_model": "base", "experts": EXPERTS}))
    assert load_config(path).model_copy(update={"dtype": "float16"}).rechecked().file == path


def test_too_few_experts():
    one = 'base_model: base\nexperts_per_token: 1\nexperts:\n- {source_model: a, positive_prompts: ["x"]}\n'
    assert problems(one) == ["line 3: experts: a mixture needs at least 2 experts, found 1"]


def test_identical_prompts_are_refused():
    assert problems(PLAIN.replace('"two"', '"one"')) == [
        "line 2: experts: all experts have the same prompts, so nothing tells the router which to choose. "
        "Give each expert prompts that only it should answer"
    ]


@pytest.mark.parametrize("other", ["a", "./a", "a/"])
def test_identical_experts_are_refused_unless_allowed(other):
    text = PLAIN.replace("source_model: b", f"source_model: {other}")
    assert problems(text) == [
        "line 2: experts: every expert is the same model, so the result computes what that model does at a higher cost. "
        "Name different models, or, to train the result further, pass --allow-identical-experts"
    ]
    assert parse_config(text, allow_identical_experts=True).experts[1].source_model == other


MERGED = """base_model: base
experts:
- &common
  source_model: a
  noise_scale: 0.1
- <<: *common
  source_model: b
"""


def test_a_key_that_is_taken_over_may_be_written_again():
    config = parse_config(MERGED)
    assert [expert.source_model for expert in config.experts] == ["a", "b"]
    assert [expert.noise_scale for expert in config.experts] == [0.1, 0.1]
    assert parse_config(MERGED.replace("*common", "[*common, *common]")).experts == config.experts


def test_lines_of_keys_that_are_taken_over():
    """A key's own line where it is written again, else that of the key that is taken over."""
    assert problems(MERGED.replace("source_model: b", "source_model: 7")) == [
        "line 7: experts[1].source_model: expected text, found 7"
    ]
    assert problems(MERGED.replace("0.1", "x")) == [
        f"line 5: experts[{number}].noise_scale: expected a number, found 'x'" for number in range(2)
    ]
    assert problems(MERGED + "  source_model: c\n") == [
        "line 7: experts[1].source_model: is written twice, in lines 7 and 8. Remove one"
    ]


def test_keys_written_twice_are_refused():
    assert problems(PLAIN + "base_model: other\n") == [
        "line 1: base_model: is written twice, in lines 1 and 7. Remove one"
    ]
    assert problems(PLAIN.replace("source_model: a\n", "source_model: a\n    source_model: c\n")) == [
        "line 3: experts[0].source_model: is written twice, in lines 3 and 4. Remove one"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml: holds no keys. `moemerge init BASE EXPERT...` writes a merge config."),
        ("- a\n", "c.yaml: expected keys such as base_model and experts, found ['a']"),
        ("base_model: [\n", "c.yaml: not valid YAML:"),
        ("experts: 3\nbase_model: a\n", "c.yaml: 1 problem:"),
    ],
)
def test_what_is_no_config_is_said_so(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "c.yaml")
    assert str(caught.value).startswith(message)


def test_a_missing_file_is_one_message(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "no.yaml")
    assert str(caught.value) == f"{tmp_path / 'no.yaml'}: there is no such file."


def test_the_text_is_kept_for_the_copy_beside_the_model():
    assert parse_config(PLAIN + "# a comment\n").text == PLAIN + "# a comment\n"


def test_a_name_with_a_null_byte_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: .*null"):
        load_config(tmp_path / "a\0b.yaml")


@pytest.mark.parametrize(
    ("written", "read"), [(8, [8]), ([3, 1], [3, 1]), ("second-half", "second-half"), ("8-", "8-")]
)
def test_layers_are_written_in_several_ways(written, read):
    assert read_layers(written) == read


@pytest.mark.parametrize("written", [-1, True, [], [1, "2"], [-1], "first", None, 1.5])
def test_layers_in_no_such_way_are_refused(written):
    with pytest.raises(
        ValueError,
        match="^expected all, second-half, a layer such as 8, a range such as 8- or 8-15, or a list of layers$",
    ):
        read_layers(written)


def test_a_gate_mode_that_is_no_text_is_refused():
    (problem,) = problems(PLAIN + "gate_mode: 3\n")
    assert "gate_mode" in problem

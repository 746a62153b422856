"""Names of experts: given ones, and those made of the names of models."""

import pytest

from moemerge import ConfigError, load_config
from moemerge.config.expert_names import checked_name, expert_names

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["/a/b/fox", "code/", "./math"], ("fox", "code", "math")),
        (["user/fox@main", "user/owl-7b@refs-1"], ("fox", "owl-7b")),
        (["runs/math/checkpoint-500", "runs/code/checkpoint-20"], ("math", "code")),
        ([f"~/hub/models--acme--fox-7b/snapshots/{COMMIT}", "owl"], ("fox-7b", "owl")),
        (["acme/fox+runs/poems", "acme/fox"], ("poems", "fox")),
        (["acme/fox", "other/fox", "owl"], ("acme-fox", "other-fox", "owl")),
        (["x/one/final", "x/two/final"], ("one-final", "two-final")),
        (["fox", "FOX", "owl"], ("fox-0", "FOX-1", "owl")),
        (["fox", "fox"], ("fox-0", "fox-1")),
        (["my model, v=2", "owl"], ("my-model-v-2", "owl")),
        (["..", "owl"], ("..", "owl")),
        (["u/m@main", "u/m@dev"], ("m-main", "m-dev")),
        (["hf/x@a/b", "hf/y@refs/pr/1"], ("x", "y")),
        (["hf/x@a/b", "hf/x@refs/pr/1", "g/x"], ("x-a-b", "x-refs-pr-1", "g-x")),
        (["x/checkpoint-1", "x/checkpoint-2"], ("x-checkpoint-1", "x-checkpoint-2")),
        (["a/x/checkpoint-1", "b/x/checkpoint-2"], ("a-x", "b-x")),
        (["u/m", "u/m@dev"], ("m", "m-dev")),
        (["/runs/fox@2", "checkpoint-3"], ("fox@2", "checkpoint-3")),
        (["b+u/m@main", "b+u/m@dev"], ("m-main", "m-dev")),
        ([f"models--u--m/snapshots/{commit * 40}" for commit in "ab"], ("m-aaaaaaa", "m-bbbbbbb")),
        (["x" * 300, "owl"], ("x" * 60, "owl")),
        (["out/mix#math", "acme/mix@main#code"], ("math", "code")),
        (["out/mix#0", "out/mix#1", "out/mix#shared"], ("mix-0", "mix-1", "shared")),
        (["one#math", "two#math", "two#math+runs/poems"], ("one-math", "two-math", "poems")),
        (["fox#", "#owl"], ("fox#", "#owl")),
        (["x" * 300, f"{'x' * 300}@dev", "x" * 301], (f"{'x' * 58}-0", f"{'x' * 56}-dev", f"{'x' * 58}-2")),
        (["a\x07b\u200b", "\udcff", "=,"], ("a-b", "model-1", "model-2")),
    ],
)
def test_a_name_is_the_part_of_the_model_s_name_that_says_something(models, names):
    assert expert_names(models) == names
    assert [checked_name(name) for name in names] == [*names]


def test_given_names_are_kept_and_others_keep_out_of_their_way():
    assert expert_names(["fox", "a/owl", "b/owl"], [None, "owl", None]) == ("fox", "owl", "b-owl")
    assert expert_names(["fox", "fox", "fox"], [None, "fox-0", None]) == ("fox-1", "fox-0", "fox-2")


def config(*names):
    return {"base_model": "b", "experts": [{"source_model": f"m{n}", "name": name} for n, name in enumerate(names)]}


def test_a_config_names_its_experts():
    assert load_config(config("code", None)).expert_names == ("code", "m1")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("Code", "code"), "experts[1].name: is another expert's name, too"),
        (
            ("a=b", "c"),
            "experts[0].name: expected a name without commas, equals signs and line breaks, and no space at its ends, "
            "found 'a=b'",
        ),
        (("x" * 61, "c"), f"experts[0].name: expected at most 60 characters, found '{'x' * 27}...{'x' * 28}'"),
        ((7, "c"), "experts[0].name: expected text, found 7"),
    ],
)
def test_a_wrong_name_is_refused(names, message):
    with pytest.raises(ConfigError) as error:
        load_config(config(*names))
    assert error.value.problems == (message,)

"""Recipes: what may be open in them, what is made of them, and that every option is checked with its place."""

import random
import re
from pathlib import Path

import pytest
import yaml

from moemerge.config.recipe import load_recipe
from moemerge.config.recipe_points import Choice, Range
from moemerge.errors import ConfigError

PLAIN = """
base_model: base
gate_mode: ridge
experts:
- {source_model: code, positive_prompts: [def main, return]}
- {source_model: chat, positive_prompts: Hello.}
- {source_model: math, positive_prompts: '1 + 1'}
"""


def load(folder, text):
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(folder / "recipe.yaml")


def problems(folder, text):
    with pytest.raises(ConfigError) as refused:
        load(folder, text)
    assert refused.value.exit_code == 2
    return str(refused.value).replace(str(folder), "").splitlines()


def drawn(recipe, seed):
    """A document of values that are drawn at random."""
    rng = random.Random(seed)
    return recipe.make(
        lambda point: (
            rng.uniform(point.low, point.high) if isinstance(point, Range) else rng.randrange(len(point.options))
        )
    )


def test_choices_ranges_and_optional_experts_become_plain_configs(tmp_path):
    recipe = load(
        tmp_path,
        """
        base_model: base
        gate_mode: [hidden, ridge]
        experts_per_token: {range: [1, 2]}
        moe_layers: {choices: [all, [1, 2]]}
        shared_weights: [base, {method: [average, ties], weights: [1, {range: [1, 2]}, 4], density: [0.2, 0.5]}]
        router: {scale: [1, {log: [1e-1, 10]}], lambda: {log: [0.01, 1]}}
        experts:
        - {source_model: code, positive_prompts: [def main, return]}
        - {source_model: chat, positive_prompts: Hello., optional: true, residual_scale: {range: [0.5, 2]}}
        - {source_model: math, positive_prompts: '1 + 1', residual_scale: [1, 2]}
        """,
    )
    first = recipe.first()
    assert first.document["experts"][0]["positive_prompts"] == ["def main", "return"]
    assert first.values == {
        "gate_mode": "hidden",
        "experts_per_token": "1",
        "moe_layers": "all",
        "shared_weights": "base",
        "router.scale": "1",
        "router.lambda": "0.01",
        "experts[1]": "yes",
        "experts[2].residual_scale": "1",
    }
    assert first.document["router"] == {"scale": 1}  # hidden has no lambda
    shared = set()
    for seed in range(200):
        made = drawn(recipe, seed)
        config = recipe.config(made)
        assert yaml.safe_load(config.text) == made.document
        assert (config.router.lambda_ is not None) == (config.gate_mode == "ridge")
        assert 0.1 <= config.router.scale <= 10
        left_out = made.values["experts[1]"] == "no"
        assert [expert.source_model for expert in config.experts] == ["code", *["chat"][left_out:], "math"]
        weights = config.shared_weights.weights
        assert weights is None or ([weights[0], weights[-1]], len(weights)) == ([1, 4], len(config.experts))
        shared.add((config.shared_weights.method, config.shared_weights.density))
    assert shared == {("base", 0.5), ("average", 0.5), ("ties", 0.2), ("ties", 0.5)}


def test_every_option_is_checked_at_its_place(tmp_path):
    assert problems(
        tmp_path,
        """base_model: base
tokenizer: [base, union]
gate_mode: [ridge, rigde]
experts_per_token: [1, 4]
fold_norms: [true, maybe]
shared_weights: [base, {method: ties, density: [0.5, 2]}, auto]
router:
  scale: {log: [0.5, 1e9]}
experts:
- {source_model: code, positive_prompts: a}
- {source_model: chat, positive_prompts: b, residual_scale: {range: [0, 1e39]}}
- {source_model: math, optional: true, positive_prompts: {choices: [c, [4]]}}
keep_vision: true
""",
    ) == [
        "/recipe.yaml: 10 problems:",
        "  - line 2: tokenizer[1]: a search reads text with the base model's tokenizer, since losses of other tokens do not "
        "compare. Leave it out here, and set it in the config that is found",
        "  - line 3: gate_mode[1]: expected auto, hidden, mergekit_hidden, combined, ridge, logistic, delta, "
        "delta_bootstrap, cheap_embed, random or uniform_random, found 'rigde'; did you mean ridge?",
        "  - line 4: experts_per_token[1]: each token is to go to 4 experts, but there are only 3: name more experts or "
        "lower experts_per_token",
        "  - line 5: fold_norms[1]: expected true or false, found 'maybe'",
        "  - line 6: shared_weights[1].density[1]: expected a number of 1 or less, found 2",
        "  - line 6: shared_weights[2]: auto is chosen by losses when a merge begins; a search tries methods itself: "
        "[base, average, ties]",
        "  - line 8: router.scale: expected a number of 1000000 or less, found 1000000000.0",
        "  - line 11: experts[1].residual_scale: expected a number below 3.4e+38: values are computed in float32, which "
        "holds no larger one, found 1e+39",
        "  - line 12: experts[2].positive_prompts.choices[1][0]: expected text, found 4; write it in quotes",
        "  - line 13: keep_vision: a search runs the text model alone. Leave it out here, and set it in the config that is found",
    ]


def test_what_is_open_has_to_be_written_as_such(tmp_path):
    assert problems(
        tmp_path,
        """base_model: base
gate_mode: []
experts_per_token: {range: [1, 2.5]}
fold_norms: [[true], false]
router:
  scale: {log: [0, 1]}
  lambda: {range: [1]}
  seed: {choices: 3}
experts:
- {source_model: code, positive_prompts: a, optional: maybe}
- {source_model: chat, positive_prompts: b, residual_scale: {range: [0, 1], log: true}}
""",
    ) == [
        "/recipe.yaml: 8 problems:",
        "  - line 2: gate_mode: expected a list of values to choose from, found []",
        "  - line 3: experts_per_token.range: expected two whole numbers, the smaller one first, found [1, 2.5]",
        "  - line 4: fold_norms[0]: is a choice within a choice: write one list",
        "  - line 6: router.scale.log: expected two numbers above 0, the smaller one first, found [0, 1]",
        "  - line 7: router.lambda.range: expected two numbers, the smaller one first, found [1]",
        "  - line 8: router.seed.choices: expected a list of values to choose from, found 3",
        "  - line 10: experts[0].optional: expected true or false, found 'maybe'",
        "  - line 11: experts[1].residual_scale: log stands by itself, found range beside it",
    ]


def test_the_recipe_of_the_documentation_is_right(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "search.md").read_text()
    recipe = load(tmp_path, re.search(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1])
    assert recipe.config(drawn(recipe, 0)).base_model == "models/base"


def test_a_plain_config_has_nothing_to_search(tmp_path):
    assert problems(tmp_path, PLAIN) == [
        "/recipe.yaml: nothing is open in it, so there is nothing to search. Write choices or ranges, such as "
        "`experts_per_token: [1, 2]` or `router: {scale: {log: [0.5, 4]}}`; `moemerge merge` merges it as it is.",
    ]


def test_a_value_that_does_not_go_with_another_open_one_is_no_problem(tmp_path):
    recipe = load(tmp_path, PLAIN.replace("'1 + 1'", "'1 + 1', optional: true") + "experts_per_token: [3, 2]\n")
    assert [isinstance(point, Choice) for point in recipe.first().asked] == [True, True]
    fixed = PLAIN.replace("'1 + 1'", "'1 + 1', optional: true") + "experts_per_token: 3\n"
    assert problems(tmp_path, fixed) == [
        "/recipe.yaml: 1 problem:",
        "  - line 8: experts_per_token: each token is to go to 3 experts, but there are only 2: name more experts or lower "
        "experts_per_token",
    ]
    unused = PLAIN.replace("gate_mode: ridge", "gate_mode: [ridge, hidden]") + "router: {lambda: 0.1}\n"
    assert problems(tmp_path, unused) == [
        "/recipe.yaml: 1 problem:",
        "  - line 8: router.lambda: gate_mode hidden does not use it; combined, ridge, logistic, delta_bootstrap do",
    ]

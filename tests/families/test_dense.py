"""What a `config.json` of each dense family may say without harm: read, refused with a text, or never reached."""

import json
from typing import Any

import pytest

from moemerge.families.dense import DENSE_FAMILIES, DenseModel, read_dense
from moemerge.families.mixture_shape import Mixture
from moemerge.families.selection import MOE_FAMILIES
from tests.support.families import DENSE
from tests.support.models import SIZES

NONSENSE: tuple[Any, ...] = (
    None, True, 0, -1, 1, 3, 0.5, float("nan"), float("inf"), 10**30, 10**400, "x", "", [], [{}], [[]], [1, 0], ["x", None, 2], {},
    {"a": {}}, {"0": {"head_dim": 4}}, {"rope_type": "yarn"}, {"rope_theta": "x"}, {"type": []},
)  # fmt: skip


def plain(model_type: str) -> dict[str, Any]:
    sizes = next(sizes for kind, sizes in DENSE.values() if kind == model_type)
    return {**SIZES, "model_type": model_type, **sizes}


def use(model: DenseModel) -> None:
    """Everything that a plan asks of a model before it reads tensors."""
    width = model.sizes["ffn"]
    mixture = Mixture(model.layers, width, (width, width), (), 2, tuple(range(model.layers)), {})
    assert all(model.shape(axes) for layer in range(model.layers) for axes in model.tensors(layer).values())
    assert model.class_keys
    for family in MOE_FAMILIES.values():
        if not family.refusals(model, mixture):
            json.dumps(family.config(model, mixture, "bfloat16"))


@pytest.mark.parametrize("model_type", DENSE_FAMILIES)
def test_values_that_make_no_sense_are_refused_with_a_text(model_type):
    config = plain(model_type)
    assert isinstance(read_dense(config), DenseModel)
    more = ("rope_scaling", "rope_parameters", "head_dim", "partial_rotary_factor", "per_layer_config", "text_config")
    for key in {*config, *DENSE_FAMILIES[model_type].defaults, *DENSE_FAMILIES[model_type].aliases, *more}:
        for value in NONSENSE:
            model = read_dense({**config, key: value})
            if isinstance(model, DenseModel):
                use(model)
            else:
                assert isinstance(model, str)
                assert model


@pytest.mark.parametrize("model_type", DENSE_FAMILIES)
def test_a_null_says_as_little_as_an_absent_key(model_type):
    config = plain(model_type)
    for key, default in DENSE_FAMILIES[model_type].defaults.items():
        if default is not None and not key.endswith(("token_id", "sliding_window", "_heads", "head_dim", "multiplier")):
            absent = read_dense({name: value for name, value in config.items() if name != key})
            null = read_dense({**config, key: None})
            assert (null if isinstance(null, str) else null.config) == (
                absent if isinstance(absent, str) else absent.config
            ), key

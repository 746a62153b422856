"""Every pair of a dense and an MoE family against two oracles, in plain torch and in transformers' dense classes."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moemerge import load_config, merge, plan_merge
from moemerge.errors import IncompatibleError
from moemerge.formats import MOE_FAMILIES, Mixture
from moemerge.formats.dense import DENSE_FAMILIES, read_dense
from tests.families import DENSE, mixtures, reference
from tests.models import SIZES, assert_close, load, logits, make_model, write_config

IS_V4 = transformers.__version__.startswith("4.")
EXPERTS = 4
# Shared experts without neurons, where a family has to have one.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")


def fitting(name: str) -> list[str]:
    """The output families that hold models of this kind."""
    model_type, sizes = DENSE[name]
    base = read_dense({**SIZES, "model_type": model_type, **sizes})
    assert not isinstance(base, str), base
    width = base.sizes["ffn"]
    plain = Mixture(base.layers, width, (width,) * EXPERTS, (), 2, tuple(range(base.layers)), {})
    return [moe for moe, family in MOE_FAMILIES.items() if not family.refusals(base, plain)]


PAIRS = [(name, moe) for name in DENSE for moe in fitting(name)]


def readable(moe: str) -> bool:
    return moe in transformers.AutoConfig.for_model.__globals__["CONFIG_MAPPING"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A base and experts of a kind, made once."""
    made: dict[str, list[Path]] = {}

    def of(name: str) -> list[Path]:
        if name not in made:
            model_type, sizes = DENSE[name]
            if not readable(model_type):
                pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
            folder = tmp_path_factory.mktemp("dense")
            made[name] = [make_model(folder / str(seed), seed, model_type, **sizes) for seed in range(EXPERTS + 3)]
        return made[name]

    return of


def merged(folder: Path, base: Path, experts: list[Path], **keys):
    path = write_config(folder / "merge.yaml", base, experts, prompts=False, **keys)
    plan = plan_merge(load_config(path, allow_identical_experts=True))
    merge(plan, folder / "out")
    return plan, folder / "out"


@pytest.mark.parametrize(("name", "moe"), PAIRS)
def test_identical_experts_compute_what_the_dense_model_computes(tmp_path, dense, name, moe):
    if not readable(moe):
        pytest.skip(f"transformers {transformers.__version__} does not know {moe}")
    base = dense(name)[0]
    _, out = merged(tmp_path, base, [base] * 3, architecture=moe)
    assert_close(logits(load(out)), logits(load(base)))


@pytest.mark.parametrize(("name", "moe"), PAIRS)
@pytest.mark.parametrize("k", [1, 2])
def test_different_experts_compute_their_mixture(tmp_path, dense, name, moe, k):
    if not readable(moe):
        pytest.skip(f"transformers {transformers.__version__} does not know {moe}")
    base, *experts = dense(name)[: EXPERTS + 1]
    plan, out = merged(tmp_path, base, experts, architecture=moe, experts_per_token=k)
    expected = reference(plan, out)
    assert_close(logits(load(out)), logits(expected))
    assert all((mixture.chosen > 0).sum() > 1 for mixture in mixtures(expected))

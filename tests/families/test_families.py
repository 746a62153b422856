"""Every pair of a dense and an MoE family against two oracles, in plain torch and in transformers' dense classes."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moemerge import load_config, merge, plan_merge
from moemerge.checks.inspection import inspect_checkpoint
from moemerge.checks.verification import verify_merge
from moemerge.families.dense import DENSE_FAMILIES, read_dense
from moemerge.families.mixture_shape import Mixture
from moemerge.families.overview import family_rows
from moemerge.families.selection import MOE_FAMILIES
from tests.support.families import DENSE, mixtures, reference, wrong_in_v4
from tests.support.models import SIZES, assert_close, load, load_weights, logits, make_model, save_weights, write_config

IS_V4 = transformers.__version__.startswith("4.")
EXPERTS = 4


def pairs(names=DENSE, moe_layers=(0, 1, 2), shared=0, absent=None) -> list[tuple[str, str]]:
    """Kinds of dense models, each with an output family that holds such a mixture of them."""
    found = []
    for name in names:
        model_type, sizes = DENSE[name]
        base = read_dense({**SIZES, "model_type": model_type, **sizes})
        assert not isinstance(base, str), base
        width = base.sizes["ffn"]
        mixture = Mixture(base.layers, width, (width,) * EXPERTS, (width,) * shared, 2, moe_layers, absent or {})
        found += [(name, moe) for moe, family in MOE_FAMILIES.items() if not family.refusals(base, mixture)]
    return found


PAIRS = pairs()
PLAINEST = list({model_type: name for name, (model_type, _) in reversed(DENSE.items())}.values())


def parts(found: list[tuple[str, str]]) -> list:
    """Pairs as parameters: of each kind the family that a merge gets by itself, and each other family once.

    The others are run by `make test-families`.
    """
    chosen = set(dict(reversed(found)).items())
    others = {moe: name for name, moe in reversed(found) if moe not in {family for _, family in chosen}}
    chosen |= {(name, moe) for moe, name in others.items()}
    return [pytest.param(*pair, marks=() if pair in chosen else pytest.mark.slow) for pair in found]


def readable(name: str, moe: str) -> None:
    """Skip what this transformers does not know, or is known to compute wrongly."""
    model_type, sizes = DENSE[name]
    for known in (model_type, moe):
        if known not in CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} does not know {known}")
    base = read_dense({**SIZES, "model_type": model_type, **sizes})
    if IS_V4 and (words := wrong_in_v4(base, moe)):
        pytest.skip(f"transformers {transformers.__version__} {words}")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A base and experts of a kind, made once."""
    made: dict[str, list[Path]] = {}

    def of(name: str) -> list[Path]:
        if name not in made:
            model_type, sizes = DENSE[name]
            folder = tmp_path_factory.mktemp("dense")
            made[name] = [make_model(folder / str(seed), seed, model_type, **sizes) for seed in range(EXPERTS + 3)]
        return made[name]

    return of


def merged(folder: Path, base: Path, experts: list[Path], **keys):
    path = write_config(folder / "merge.yaml", base, experts, prompts=False, **keys)
    plan = plan_merge(load_config(path, allow_identical_experts=True))
    merge(plan, folder / "out")
    return plan, folder / "out"


def test_every_pair_of_the_table_is_tested():
    rows = [row for row in family_rows() if row.family in MOE_FAMILIES]
    told = {(model_type, row.family) for row in rows for model_type in row.takes}
    tested = {(DENSE[name][0], moe) for name, moe in PAIRS}
    assert told <= tested
    assert len({model_type for model_type, _ in told}) == len(DENSE_FAMILIES) == 26
    assert len({moe for _, moe in told}) == len(MOE_FAMILIES) == 22


def test_norms_add_no_number_to_their_weights_that_the_dense_models_norms_do_not():
    for name, moe in PAIRS:
        assert MOE_FAMILIES[moe].norm_offset in {0.0, DENSE_FAMILIES[DENSE[name][0]].norm_offset}


@pytest.mark.parametrize(("name", "moe"), parts(PAIRS))
def test_identical_experts_compute_what_the_dense_model_computes(tmp_path, dense, name, moe):
    readable(name, moe)
    base = dense(name)[0]
    _, out = merged(tmp_path, base, [base] * 3, architecture=moe)
    assert_close(logits(load(out)), logits(load(base)))


@pytest.mark.parametrize(("name", "moe"), parts(PAIRS))
@pytest.mark.parametrize("k", [1, 2])
def test_different_experts_compute_their_mixture(tmp_path, dense, name, moe, k):
    readable(name, moe)
    base, *experts = dense(name)[: EXPERTS + 1]
    plan, out = merged(tmp_path, base, experts, architecture=moe, experts_per_token=k)
    expected = reference(plan, out)
    assert_close(logits(load(out)), logits(expected))
    assert all((mixture.chosen > 0).sum() > 1 for mixture in mixtures(expected))


@pytest.mark.parametrize(("name", "moe"), parts(pairs(PLAINEST, shared=1)))
def test_shared_experts_share_one_ffn_with_the_routed(tmp_path, dense, name, moe):
    readable(name, moe)
    base = dense(name)[0]
    _, out = merged(tmp_path, base, [base] * 3, architecture=moe, shared_experts=[{"source_model": str(base)}])
    assert_close(logits(load(out)), logits(load(base)))


@pytest.mark.parametrize(("name", "moe"), parts(pairs(PLAINEST, shared=2)))
def test_two_shared_experts_are_added_to_the_mixture(tmp_path, dense, name, moe):
    readable(name, moe)
    base, *experts = dense(name)[: EXPERTS + 1]
    others = dense(name)[EXPERTS + 1 :]
    asked = [{"source_model": str(others[0]), "residual_scale": 0.7}, {"source_model": str(others[1])}]
    plan, out = merged(tmp_path, base, experts, architecture=moe, shared_experts=asked)
    halved = 2 if plan.family.shared and plan.family.shared.gate else 1
    expected = reference(plan, out, routed_scale=2 / 3, shared_scales=(0.7 * halved, halved / 3))
    assert_close(logits(load(out)), logits(expected))


@pytest.mark.parametrize(("name", "moe"), parts(pairs(PLAINEST, moe_layers=(1, 2))))
def test_the_first_layers_can_stay_dense(tmp_path, dense, name, moe):
    readable(name, moe)
    base, *experts = dense(name)[: EXPERTS + 1]
    plan, out = merged(tmp_path, base, experts, architecture=moe, moe_layers="1-")
    assert_close(logits(load(out)), logits(reference(plan, out)))


@pytest.mark.parametrize(("name", "moe"), parts(pairs(PLAINEST, moe_layers=(1,))))
def test_any_layers_can_stay_dense(tmp_path, dense, name, moe):
    readable(name, moe)
    base, *experts = dense(name)[: EXPERTS + 1]
    plan, out = merged(tmp_path, base, experts, architecture=moe, moe_layers=[1])
    assert_close(logits(load(out)), logits(reference(plan, out)))


@pytest.mark.parametrize(("name", "moe"), parts(pairs(PLAINEST, absent={0: frozenset({1, 3})})))
def test_experts_that_are_switched_off_in_a_layer_are_never_chosen_there(tmp_path, dense, name, moe):
    readable(name, moe)
    base, *experts = dense(name)[: EXPERTS + 1]
    path = write_config(tmp_path / "merge.yaml", base, experts, prompts=False, architecture=moe)
    path.write_text(
        path.read_text().replace(f"- source_model: {experts[1]}", f"- layers: 1-\n  source_model: {experts[1]}")
    )
    path.write_text(
        path.read_text().replace(f"- source_model: {experts[3]}", f"- layers: [1, 2]\n  source_model: {experts[3]}")
    )
    plan = plan_merge(load_config(path))
    assert plan.mixture.absent == {0: frozenset({1, 3})}
    assert any("of the output are zeros: of experts" in note for note in plan.notes)
    merge(plan, tmp_path / "out")
    expected = reference(plan, tmp_path / "out")
    assert_close(logits(load(tmp_path / "out")), logits(expected))
    first, second, _ = mixtures(expected)
    assert first.chosen[[1, 3]].sum() == 0
    assert (second.chosen > 0).sum() > 1


@pytest.mark.parametrize(
    ("name", "moe"), parts([pair for pair in pairs(PLAINEST) if pair[0] not in {"lfm2", "gemma4_text"}])
)
def test_narrower_experts_are_padded_exactly(tmp_path, dense, name, moe):
    readable(name, moe)
    base, first, *_ = dense(name)
    model_type, sizes = DENSE[name]
    width = "shared_intermediate_size" if name == "granitemoehybrid" else "intermediate_size"
    narrow = make_model(tmp_path / "narrow", 9, model_type, **sizes | {width: 24})
    plan, out = merged(tmp_path, base, [first, narrow], architecture=moe)
    assert_close(logits(load(out)), logits(reference(plan, out)))


@pytest.mark.parametrize(("name", "moe"), parts(pairs(PLAINEST)))
def test_what_was_merged_is_saved_and_loaded_again_and_generates_as_the_dense_model(tmp_path, dense, name, moe):
    readable(name, moe)
    base = dense(name)[0]
    _, out = merged(tmp_path, base, [base] * 3, architecture=moe)
    model = load(out)
    prompt = torch.tensor([[1, 20, 30, 40]])
    keys = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **keys), load(base).generate(prompt, **keys))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize(("name", "moe"), parts(pairs(PLAINEST)))
def test_verify_finds_every_byte_and_inspect_every_expert(tmp_path, dense, name, moe):
    readable(name, moe)
    base, *experts = dense(name)[:4]
    shared = [{"source_model": str(experts[0])}] if (name, moe) in pairs([name], shared=1) else []
    plan, out = merged(tmp_path, base, experts, architecture=moe, dtype="bf16", shared_experts=shared)
    found = verify_merge(plan, out)
    assert not found.differences
    assert found.copied + found.converted + found.routers == len(plan.outputs)
    inspected = inspect_checkpoint(str(out))
    assert (inspected.experts, inspected.experts_per_token, inspected.warnings) == (3, 2, ())
    assert inspected.total_parameters == plan.total_parameters
    assert inspected.active_parameters == plan.active_parameters


@pytest.mark.parametrize(("name", "moe"), parts(pairs(PLAINEST)))
def test_a_change_of_one_tensor_is_noticed(tmp_path, dense, name, moe):
    """The oracle has to see an expert whose parts, or a router whose rows, are not where they belong."""
    readable(name, moe)
    base, *experts = dense(name)[: EXPERTS + 1]
    plan, out = merged(tmp_path, base, experts, architecture=moe)
    expected = logits(reference(plan, out))
    tensors = load_weights(out)
    changed = [name for name, output in plan.outputs.items() if output.is_expert]
    for other in (changed[0], changed[len(changed) // 2], changed[-1]):
        save_weights(out, tensors | {other: tensors[other].flip(0)})
        with pytest.raises(AssertionError):
            assert_close(logits(load(out)), expected)
    save_weights(out, tensors)
    assert_close(logits(load(out)), expected)

"""Routers where not every layer has one, where experts are absent, of sigmoids, and the gate of shared experts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from moemerge import load_config, merge, plan_merge
from moemerge.families.mixture_shape import Mixture
from moemerge.passes.compute_dtype import Compute
from moemerge.planning.options import PlanOptions
from moemerge.routers.diagnostics import route_layer
from moemerge.routers.initialisation import init_routers
from moemerge.routers.pass_inputs import PassRequest, RouterInputs
from moemerge.routers.prompts import SHARED, encode_prompts
from moemerge.routers.report import LayerRouting, RoutingReport
from moemerge.routers.rows import contrast
from moemerge.routers.scoring import fit_scale, lowering, nearest_scale, top_weights
from moemerge.routers.streamed_pass import capture_router_inputs
from tests.support.models import load_weights, make_model, router_inputs, write_config

CPU = Compute(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A base and four others of a model type, made once; tests must not change them."""
    made: dict[str, list[Path]] = {}

    def of(model_type: str) -> list[Path]:
        if model_type not in made:
            root = tmp_path_factory.mktemp(model_type)
            made[model_type] = [make_model(root / str(seed), seed, model_type) for seed in range(5)]
        return made[model_type]

    return of


def plan_of(tmp_path: Path, folders: list[Path], expert_keys=(), routing_table=False, **keys):
    path = write_config(tmp_path / "merge.yaml", folders[0], folders[1:4], **keys)
    document = yaml.safe_load(path.read_text())
    for expert, more in zip(document["experts"], expert_keys, strict=False):
        expert.update(more)
    path.write_text(yaml.safe_dump(document))
    return plan_merge(load_config(path), PlanOptions(routing_table=routing_table))


def routers(plan):
    return init_routers(plan.router_request, seed=0, progress=lambda *_: None)


def rows_of(plan, data: bytes) -> torch.Tensor:
    """(expert, hidden), or (1, hidden) of a gate."""
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, plan.dtype)).view(-1, plan.base.sizes["hidden"])


def inputs_of(plan) -> dict[int, RouterInputs]:
    prompts = encode_prompts(plan.base_folder, plan.config, 128, 0, shared_gate=True)
    request = PassRequest(plan.parts.base, plan.mixture, plan.family.scoring, prompts, CPU)
    return {inputs.layer: replace(inputs, states=inputs.states.clone()) for inputs in capture_router_inputs(request)}


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed", "random", "uniform_random"])
def test_layers_without_a_router_change_nothing_in_the_others(tmp_path, kinds, mode):
    whole = routers(plan_of(tmp_path, kinds("qwen3"), gate_mode=mode))
    plan = plan_of(tmp_path, kinds("qwen3"), gate_mode=mode, moe_layers=[0, 2])
    part = routers(plan)
    assert list(whole.rows) == [0, 1, 2]
    assert part.rows == {layer: whole.rows[layer] for layer in (0, 2)}
    assert [row.layer for row in part.report.layers] == ([0, 2] if mode == "hidden" else [])
    report = merge(plan, tmp_path / "out")
    assert report == part.report
    written = load_weights(tmp_path / "out")
    for layer, data in part.rows.items():
        assert torch.equal(written[f"model.layers.{layer}.mlp.gate.weight"], rows_of(plan, data))
    assert "model.layers.1.mlp.gate.weight" not in written


def test_progress_counts_the_layers_of_the_pass(tmp_path, kinds):
    told = []
    plan = plan_of(tmp_path, kinds("qwen3"), moe_layers=[0, 1])
    merge(
        plan,
        tmp_path / "out",
        progress=lambda task, done, of: told.append((done, of)) if task.stage == "routers" else 0,
    )
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed", "random"])
def test_an_absent_expert_has_zeros_and_is_never_chosen(tmp_path, kinds, mode):
    keys = {"gate_mode": mode, "architecture": "glm4_moe", "routing_table": True}
    whole = routers(plan_of(tmp_path, kinds("llama"), **keys))
    plan = plan_of(tmp_path, kinds("llama"), [{}, {"layers": [0, 2]}], **keys)
    made = routers(plan)
    assert not rows_of(plan, made.rows[1])[1].any()
    assert rows_of(plan, made.rows[1])[[0, 2]].any(dim=1).all()
    assert {layer for layer in range(3) if made.rows[layer] == whole.rows[layer]} == {0, 2}
    if mode == "random":
        assert torch.equal(rows_of(plan, made.rows[1])[[0, 2]], rows_of(plan, whole.rows[1])[[0, 2]])
    table = made.report.layers[1]
    assert (table.hit_rate[1], table.top1_accuracy[1], table.load[1]) == (None, None, None)
    # Two are left, and two are chosen.
    assert (table.hit_rate[0], table.hit_rate[2]) == (1.0, 1.0)
    assert table.load[0] == pytest.approx(1.0)
    assert table.shown[1] == "-"
    others = [made.report.layers[layer].hit_rate[1] for layer in (0, 2)]
    assert made.report.hit_rate[1] == pytest.approx(sum(others) / 2)
    assert made.report.chance == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    merge(plan, tmp_path / "out")
    assert "| 1 | 100% | - | 100% |" in (tmp_path / "out" / "README.md").read_text()


def test_an_expert_that_is_absent_is_compared_with_no_other():
    positive = torch.eye(3).numpy()
    rows = contrast(positive, positive * float("nan"), frozenset({1}))
    assert torch.equal(torch.from_numpy(rows), torch.tensor([[1.0, 0.0, -1.0], [0.0] * 3, [-1.0, 0.0, 1.0]]) / 2**0.5)


def test_means_count_only_the_layers_of_an_expert():
    layers = (
        LayerRouting(3, (0.5, None), (0.2, None), (0.4, None), 0.9),
        LayerRouting(4, (0.7, None), (0.4, None), (0.6, None), 0.9),
    )
    report = RoutingReport(("fox", "code"), 1, layers, {})
    assert report.hit_rate == (pytest.approx(0.6), 0.0)
    assert report.warnings()[-1].startswith("expert code is almost never chosen")


def test_sigmoids_are_weighed_by_their_sum():
    logits = torch.tensor([[2.0, -1.0, 0.5], [-200.0, -200.0, -200.0]])
    weights, chosen = top_weights(logits, 2, "sigmoid")
    scores = 1 / (1 + torch.exp(-logits[0]))
    assert chosen[0].tolist() == [0, 2]
    assert torch.allclose(weights[0], scores[[0, 2]] / (scores[0] + scores[2]))
    assert weights.isfinite().all()


def domains(experts: int, tokens: int = 100) -> torch.Tensor:
    """States (expert, token, hidden) with a direction that all share, one of each expert, and noise."""
    generator = torch.Generator().manual_seed(0)
    common, own, noise = (
        torch.randn(*shape, 256, generator=generator) for shape in ((), (experts, 1), (experts, tokens))
    )
    return 0.7 * common + 0.3 * own + 0.6 * noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("experts", "per_token"), [(2, 2), (4, 2), (8, 2), (8, 4)])
def test_lowered_sigmoids_weigh_as_a_softmax_does(dtype, experts, per_token):
    states = domains(experts)
    means = states.mean(dim=1).numpy()
    rows = torch.from_numpy(contrast(means, means * float("nan")))
    flat = states.flatten(0, 1)
    rows *= fit_scale(rows, flat, per_token)
    lowered = (rows - lowering(flat)).to(dtype).float()
    expected, right = top_weights(flat @ rows.T, per_token, "softmax")
    weights, chosen = top_weights(flat @ lowered.T, per_token, "sigmoid")
    assert float((chosen[:, 0] == right[:, 0]).float().mean()) > 0.99
    assert float(weights[:, 0].mean()) == pytest.approx(float(expected[:, 0].mean()), abs=0.02)
    # As they are, they come less near, or only by saturating.
    logits = (flat @ rows.T).topk(per_token, dim=1).values
    plain = nearest_scale(lambda scale: float(top_weights(logits * scale, per_token, "sigmoid")[0][:, 0].mean()))
    assert plain > 1.5 or experts == 8


def test_sigmoids_at_first_tokens_stay_above_what_llamacpp_clamps():
    """It takes a sum of chosen sigmoids below 6.1e-5 for 6.1e-5; first tokens are far out, and count in no mean."""
    flat = domains(4).flatten(0, 1)
    sink = 1.5 * flat.mean(dim=0) + 2 * torch.randn(256, generator=torch.Generator().manual_seed(1))
    beginnings = sink + domains(4, 8).flatten(0, 1)
    seen, others = beginnings[:16], beginnings[16:]

    def smallest(lowered: torch.Tensor) -> float:
        return float((-(others @ lowered)).sigmoid().min()) * 2

    assert smallest(lowering(torch.cat([flat, seen]))) > 6.1e-5
    assert smallest(lowering(flat)) < 6.1e-5


@pytest.mark.parametrize(("model_type", "moe"), [("llama", "glm4_moe"), ("qwen3", "dots1"), ("llama", "mixtral")])
def test_first_choices_have_their_weight_in_every_family(tmp_path, kinds, model_type, moe):
    plan = plan_of(tmp_path, kinds(model_type), architecture=moe, dtype="bfloat16")
    made = routers(plan)
    # Random embeddings share no direction, so that layer 0's sigmoids are not lowered evenly.
    assert min(row.top_weight for row in made.report.layers) > 0.8
    assert made.report.layers[2].top_weight == pytest.approx(0.9, abs=0.01)
    assert not made.report.warnings()


def test_what_no_scale_reaches_is_approached_with_the_smallest():
    assert nearest_scale(lambda scale: min(scale, 0.6)) == pytest.approx(0.6, rel=0.01)
    assert nearest_scale(lambda scale: scale / (1 + scale)) == pytest.approx(9, rel=0.02)
    assert nearest_scale(lambda scale: scale * 2.7 ** (-scale)) == pytest.approx(1, rel=0.1)


SHARED_PROMPTS = ["return the item", "0 1 2 3 4 5"]


@pytest.mark.parametrize("negative", [[], ["The lazy fox", "Le chat danse"]])
def test_the_gate_of_shared_experts_tells_their_prompts_from_others(tmp_path, kinds, negative):
    folders = kinds("qwen2")
    shared = {"source_model": str(folders[4]), "positive_prompts": SHARED_PROMPTS, "negative_prompts": negative}
    keys = {"architecture": "qwen2_moe", "moe_layers": [0, 2]}
    plan = plan_of(tmp_path, folders, shared_experts=[shared], **keys)
    made = routers(plan)
    assert list(made.shared_gates) == [0, 2]
    for layer, inputs in inputs_of(plan).items():
        is_shared = inputs.expert == SHARED
        towards = inputs.states[is_shared & inputs.positive]
        away = inputs.states[is_shared & ~inputs.positive] if negative else inputs.states[~is_shared]
        expected = torch.nn.functional.normalize(towards.mean(0), dim=0) - torch.nn.functional.normalize(
            away.mean(0), dim=0
        )
        gate = rows_of(plan, made.shared_gates[layer])
        assert float(torch.cosine_similarity(gate[0], expected, dim=0)) == pytest.approx(1, abs=1e-5)
        scales = torch.logspace(-3, 3, 200)
        reachable = min((towards @ gate.T * scales).sigmoid().mean(dim=0), key=lambda weight: abs(weight - 0.9))
        assert abs(float((towards @ gate.T).sigmoid().mean()) - 0.9) <= abs(reachable - 0.9) + 0.005
        assert float((away @ gate.T).sigmoid().mean()) < 0.5
    # Their prompts are no expert's: routers and table are as without them.
    plain = plan_of(
        tmp_path, folders, shared_experts=[shared | {"positive_prompts": [], "negative_prompts": []}], **keys
    )
    without = routers(plain)
    assert not without.shared_gates
    for layer, data in without.rows.items():
        assert torch.allclose(rows_of(plan, made.rows[layer]), rows_of(plan, data), rtol=1e-4, atol=1e-5)
    assert made.report.hit_rate == pytest.approx(without.report.hit_rate)
    assert made.report.load == pytest.approx(without.report.load)
    merge(plan, tmp_path / "out")
    written = load_weights(tmp_path / "out")
    assert torch.equal(written["model.layers.2.mlp.shared_expert_gate.weight"], rows_of(plan, made.shared_gates[2]))
    assert not any(name.startswith("model.layers.1.mlp.shared") for name in written)


def test_the_table_knows_neither_absent_experts_nor_shared_ones():
    states = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
    inputs = router_inputs(states, [0, 1, SHARED], [True, True, True])
    mixture = Mixture(1, 8, (8,) * 3, (), 1, (0,), {0: frozenset({2})})
    request = PassRequest(None, mixture, "sigmoid", (), CPU)
    found = route_layer(torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]), inputs, request)
    assert found == LayerRouting(0, (1.0, 1.0, None), (1.0, 1.0, None), found.load, 1.0)
    assert found.load[2] is None

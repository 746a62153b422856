"""What is made of the models' own tensors: shared weights mixed, norms folded into FFNs."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint import derived
from moemerge.checkpoint.header import read_header
from moemerge.cli import main
from moemerge.config.loading import parse_config
from moemerge.errors import CheckpointError, ConfigError, IncompatibleError
from moemerge.families.dense import read_dense
from moemerge.merging.options import MergeOptions
from moemerge.planning.fingerprint import plan_fingerprint
from tests.families.test_families import PAIRS, PLAINEST, readable
from tests.support.families import DENSE, stored
from tests.support.machine import SINGLE
from tests.support.models import assert_close, edit_json, load, load_weights, logits, make_model, write_config

SHARED = ("self_attn", "layernorm", "embed_tokens", "lm_head", "model.norm")


def merged(folder, models, **keys):
    """Tensors of the merged model, and its folder."""
    config = write_config(folder / "c.yaml", models[0], models[1:], prompts=False, **keys)
    merge(plan_merge(load_config(config, allow_identical_experts=True)), folder / "out")
    return load_weights(folder / "out"), folder / "out"


def shared(name):
    return any(part in name for part in SHARED)


def test_the_average_is_the_mean_of_the_experts(tmp_path, llamas):
    found, _ = merged(tmp_path, llamas, shared_weights="average")
    experts = [load_file(path / SINGLE) for path in llamas[1:]]
    names = [name for name in experts[0] if shared(name)]
    assert len(names) > 15
    for name in names:
        mean = sum(expert[name] for expert in experts) / 3
        torch.testing.assert_close(found[name], mean, rtol=1e-6, atol=1e-7)
    ffn = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    assert torch.equal(found[ffn], experts[2]["model.layers.1.mlp.gate_proj.weight"])


def test_weights_are_relative_to_their_sum(tmp_path, llamas):
    found, _ = merged(tmp_path, llamas, shared_weights={"method": "average", "weights": [3, 1, 4]})
    experts = [load_file(path / SINGLE) for path in llamas[1:]]
    name = "model.layers.0.self_attn.q_proj.weight"
    mean = sum(w * expert[name] for w, expert in zip((3, 1, 4), experts, strict=True)) / 8
    torch.testing.assert_close(found[name], mean, rtol=1e-6, atol=1e-7)


def reference_ties(base, experts, density, weights):
    changes = torch.stack([expert - base for expert in experts])
    for change in changes:
        kept = round(density * change.numel())
        smallest = change.abs().flatten().sort(descending=True).values[kept - 1]
        change[change.abs() < smallest] = 0
    weights = torch.tensor(weights).reshape(-1, *[1] * base.dim()) / sum(weights)
    elected = (changes * weights).sum(0).sign()
    agrees = (changes.sign() == elected) & (changes != 0)
    total = (changes * weights * agrees).sum(0)
    return base + torch.where(agrees.any(0), total / (weights * agrees).sum(0), torch.zeros(()))


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_keeps_the_largest_changes_of_the_weightier_sign(tmp_path, llamas, density, monkeypatch):
    monkeypatch.setattr(derived, "CHUNK_ELEMENTS", 100)
    weights = [1.0, 2.0, 1.5]
    found, _ = merged(tmp_path, llamas, shared_weights={"method": "ties", "density": density, "weights": weights})
    base, *experts = [load_file(path / SINGLE) for path in llamas]
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.2.input_layernorm.weight", "lm_head.weight"):
        expected = reference_ties(base[name], [expert[name] for expert in experts], density, weights)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["average", "ties", "dare"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_hidden_by_what_is_mixed(tmp_path, llamas, method, number):
    broken = Path(shutil.copytree(llamas[1], tmp_path / "broken"))
    tensors = load_file(broken / SINGLE)
    tensors["model.norm.weight"][5] = number
    save_file(tensors, broken / SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of .*broken.* holds 1 number .* at \[5\]"):
        merged(
            tmp_path,
            [llamas[0], broken, llamas[2]],
            shared_weights={"method": method, "density": 0.9} if method != "average" else "average",
        )


def test_dare_drops_changes_at_random_and_scales_the_others(tmp_path, llamas):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    settings = {"method": "dare", "density": 0.3, "weights": [1, 1, 2]}
    found, _ = merged(tmp_path / "a", llamas, shared_weights=settings)
    again, _ = merged(tmp_path / "b", llamas, shared_weights=settings | {"seed": 1})
    base, *experts = [load_file(path / SINGLE) for path in llamas]
    name = "model.embed_tokens.weight"
    changes = [expert[name] - base[name] for expert in experts]
    options = [
        base[name] + sum(w * c for w, c, kept in zip((0.25, 0.25, 0.5), changes, bits, strict=True) if kept) / 0.3
        for bits in np.ndindex(2, 2, 2)
    ]
    distance = torch.stack([(found[name] - option).abs() for option in options])
    assert distance.min(0).values.max() < 1e-5
    choice = distance.argmin(0)
    share = sum((choice >> bit & 1).float().mean() for bit in range(3)) / 3
    assert share == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(found[name], again[name])


def test_the_same_bytes_come_in_any_pieces(tmp_path, llamas, monkeypatch):
    """Readers ask for rows, for halves of fused tensors, and from the middle."""
    monkeypatch.setattr(derived, "CHUNK_ELEMENTS", 64)
    config = write_config(
        tmp_path / "c.yaml",
        llamas[0],
        llamas[1:],
        prompts=False,
        dtype="bfloat16",
        shared_weights={"method": "dare", "density": 0.5},
    )
    tensor = plan_merge(load_config(config)).parts.base.tensors["model.embed_tokens.weight"]
    whole = derived.read_values(tensor)
    for first, count in ((0, 1), (3, 5), (159, 1), (7, 100)):
        assert np.array_equal(derived.read_values(tensor.rows(first, count)), whole[first : first + count])


def test_routers_are_made_from_the_mixed_weights(tmp_path, llamas):
    """The pass over mixed weights gives the routers that a base with these weights gives."""
    (tmp_path / "mixed").mkdir()
    base, *experts = [load_file(path / SINGLE) for path in llamas]
    mixed = {n: sum(e[n] for e in experts) / 3 if shared(n) else t for n, t in base.items()}
    made = make_model(tmp_path / "base")
    save_file(mixed, made / SINGLE, {"format": "pt"})
    keys = {"gate_mode": "ridge"}
    config = write_config(tmp_path / "a.yaml", llamas[0], llamas[1:], shared_weights="average", **keys)
    merge(plan_merge(load_config(config)), tmp_path / "out")
    config = write_config(tmp_path / "b.yaml", made, llamas[1:], **keys)
    merge(plan_merge(load_config(config)), tmp_path / "expected")
    found, expected = (load_weights(tmp_path / name) for name in ("out", "expected"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_another_vocabulary_keeps_the_embeddings_of_the_base(tmp_path, llamas):
    other = make_model(tmp_path / "other", 7, vocab_size=170)
    config = write_config(tmp_path / "c.yaml", llamas[0], [llamas[1], other], prompts=False, shared_weights="average")
    plan = plan_merge(load_config(config))
    assert [note for note in plan.notes if note.startswith("shared_weights")] == [
        f"shared_weights: {name} is the base model's: experts[1] {other} has another vocabulary, or none of its own"
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    ]
    assert plan.outputs["model.embed_tokens.weight"].copied_from.path == llamas[0] / SINGLE


def test_attention_that_computes_otherwise_is_not_mixed(tmp_path, llamas):
    other = make_model(tmp_path / "other", 7)
    edit_json(other / "config.json", rope_theta=5.0, rope_parameters=None)
    config = write_config(tmp_path / "c.yaml", llamas[0], [llamas[1], other], prompts=False, shared_weights="average")
    assert unmixed(config) == [
        f"experts[1] {other}: rope is {{'rope_theta': 5.0, 'rope_type': 'default', 'partial_rotary_factor': 1.0}}, but the base "
        "model's is {'rope_theta': 10000.0, 'rope_type': 'default', 'partial_rotary_factor': 1.0}, so their attention cannot "
        "be mixed"
    ]


def unmixed(config: Path) -> list[str]:
    """Why attention is not mixed."""
    with pytest.raises(IncompatibleError) as caught:
        plan_merge(load_config(config))
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "shared_weights: average is not possible with these models. Write `shared_weights: base`, which takes the base "
        "model's attention and norms, or leave out the experts that are named:"
    )
    return [line.removeprefix("  - ") for line in lines[1:]]


def test_many_tensors_without_a_partner_are_one_problem(tmp_path, llamas):
    """Of an expert without some, one that stores them as integers, and one with more than the base."""
    gone, whole = (Path(shutil.copytree(llamas[1], tmp_path / name)) for name in ("gone", "whole"))
    tensors = load_file(gone / SINGLE)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "q_proj" not in name}, gone / SINGLE, {"format": "pt"}
    )
    integers = {name: tensor.to(torch.int8) if "q_proj" in name else tensor for name, tensor in tensors.items()}
    save_file(integers, whole / SINGLE, {"format": "pt"})
    shape = "[32, 32] in float32, float16 or bfloat16, as the base model has (and 2 more)"
    config = write_config(tmp_path / "c.yaml", llamas[0], [gone, whole], prompts=False, shared_weights="average")
    assert unmixed(config) == [
        f"experts[0] {gone}: has no tensor model.layers.0.self_attn.q_proj.weight of shape {shape}. The same holds for "
        f"experts[1] {whole}"
    ]
    base, more = (
        make_model(tmp_path / f"lfm2{biases}", 0, "lfm2", conv_bias=biases, **DENSE["lfm2"][1])
        for biases in (False, True)
    )
    config = write_config(tmp_path / "c.yaml", base, [more, more], prompts=False, shared_weights="average")
    with pytest.raises(IncompatibleError, match="has no place in the base model's attention"):
        plan_merge(load_config(config, allow_identical_experts=True))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"no_rope_layers": [1, 1, 0]},
            "layer_rope_theta is 10000.0 in layers 0-1, 0 in layer 2, but the base model's is 10000.0 in layer 0, 0 in layer "
            "1, 10000.0 in layer 2",
        ),
        ({"head_dim": 16}, "head_dim is 16, but the base model's is 8"),
    ],
)
def test_settings_by_layer_are_told_by_runs(tmp_path, keys, told):
    own = {"rope_theta": 10000.0, "no_rope_layers": [1, 0, 1], "head_dim": 8}
    base = make_model(tmp_path / "base", 0, "smollm3", **own)
    expert = make_model(tmp_path / "expert", 1, "smollm3", **own | keys)
    config = write_config(tmp_path / "c.yaml", base, [base, expert], prompts=False, shared_weights="average")
    assert unmixed(config) == [f"experts[1] {expert}: {told}, so their attention cannot be mixed"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("mean", "line 5: shared_weights.method: expected base, average, ties, dare or auto, found 'mean'"),
        ({"method": "average", "density": 0.5}, "line 6: shared_weights.density: method average does not use it"),
        ({"method": "auto", "density": 0.5}, "line 6: shared_weights.density: method auto does not use it"),
        ({"method": "ties", "weights": [1, 2]}, "line 6: shared_weights.weights: are 2, but there are 3 experts"),
        ({"method": "ties", "densty": 1}, "line 6: shared_weights.densty: unknown key, did you mean density?"),
    ],
)
def test_settings_are_checked(settings, problem):
    document = {
        "base_model": "b",
        "gate_mode": "random",
        "experts": [{"source_model": name} for name in "xyz"],
        "shared_weights": settings,
    }
    with pytest.raises(ConfigError) as caught:
        parse_config(yaml.safe_dump(document, sort_keys=False))
    assert problem.partition(": ")[2] in str(caught.value)


@pytest.mark.parametrize("name", PLAINEST)
def test_norms_are_folded_in_every_family(tmp_path, name):
    """Experts that compute what the base does, with other norms and FFNs that make up for it, fold into the base's."""
    model_type, keys = DENSE[name]
    moe = next(moe for dense, moe in PAIRS if dense == name)
    readable(name, moe)
    base = make_model(tmp_path / "base", 0, model_type, **keys)
    dense = read_dense(json.loads((base / "config.json").read_text()))
    config = write_config(
        tmp_path / "c.yaml",
        base,
        [tmp_path / "one", tmp_path / "two"],
        prompts=False,
        fold_norms=True,
        architecture=moe,
    )
    if dense.family.ffn_norm is None:
        for expert in ("one", "two"):
            make_model(tmp_path / expert, 1, model_type, **keys)
        with pytest.raises(IncompatibleError, match=f"in a {model_type} no norm comes before the FFN"):
            plan_merge(load_config(config))
        return
    for seed, expert in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        tensors = stored(make_model(tmp_path / expert, 0, model_type, **keys))
        for layer in range(dense.layers):
            ratio = 0.5 + torch.rand(dense.sizes["hidden"], generator=generator)
            prefix, offset = f"model.layers.{layer}.", dense.family.norm_offset
            norm = prefix + dense.family.ffn_norm
            tensors[norm] = (tensors[norm] + offset) * ratio - offset
            read_from_it = {dense.family.ffn[role].name for role in ("gate", "up")}
            if dense.family.ffn_norm == "input_layernorm.weight":
                read_from_it |= {f"self_attn.{part}_proj.weight" for part in "qkv"}
            for reader in read_from_it:
                tensors[prefix + reader] = tensors[prefix + reader] / ratio
        save_file(tensors, tmp_path / expert / SINGLE, {"format": "pt"})
        assert_close(logits(load(tmp_path / expert)), logits(load(base)))
    merge(plan_merge(load_config(config)), tmp_path / "out")
    assert_close(logits(load(tmp_path / "out")), logits(load(base)))


def test_folding_is_exact(tmp_path, llamas):
    """All experts are the base with other norms before their FFNs: with folded norms the mixture is such an expert."""
    tensors = load_file(llamas[0] / SINGLE)
    generator = torch.Generator().manual_seed(3)
    expert = make_model(tmp_path / "expert")
    for name in tensors:
        if "post_attention" in name:
            tensors[name] = tensors[name] * (0.5 + torch.rand(tensors[name].shape, generator=generator))
    save_file(tensors, expert / SINGLE, {"format": "pt"})
    twin = make_model(tmp_path / "twin")
    save_file(tensors, twin / SINGLE, {"format": "pt"})
    config = write_config(tmp_path / "c.yaml", llamas[0], [expert, twin], prompts=False, fold_norms=True)
    merge(plan_merge(load_config(config)), tmp_path / "out")
    assert_close(logits(load(tmp_path / "out")), logits(load(expert)))
    plain = write_config(tmp_path / "d.yaml", llamas[0], [expert, twin], prompts=False)
    merge(plan_merge(load_config(plain)), tmp_path / "plain")
    assert (logits(load(tmp_path / "plain")) - logits(load(expert))).abs().max() > 0.1


def test_equal_norms_leave_the_bytes_alone(tmp_path, llamas):
    config = write_config(tmp_path / "c.yaml", llamas[0], [llamas[0], llamas[1]], prompts=False, fold_norms=True)
    outputs = plan_merge(load_config(config)).outputs
    assert outputs["model.layers.0.block_sparse_moe.experts.0.w1.weight"].copied_from
    assert outputs["model.layers.0.block_sparse_moe.experts.1.w1.weight"].copied_from is None
    assert outputs["model.layers.0.block_sparse_moe.experts.1.w2.weight"].copied_from


def test_a_norm_near_zero_cannot_be_undone(tmp_path, llamas):
    base = make_model(tmp_path / "base")
    tensors = load_file(base / SINGLE)
    tensors["model.layers.1.post_attention_layernorm.weight"][4:6] = 0
    save_file(tensors, base / SINGLE, {"format": "pt"})
    config = write_config(tmp_path / "c.yaml", base, llamas[1:], prompts=False, fold_norms=True)
    with pytest.raises(IncompatibleError) as caught:
        plan_merge(load_config(config))
    assert str(caught.value).splitlines()[1] == (
        f"  - fold_norms: experts[0] {llamas[1]}: 2 of 32 weights of layer 1's shared norm are near zero beside its own: the expert "
        "needs what that norm removes. Leave out fold_norms"
    )


@pytest.mark.parametrize("shared", ["base", "average"])
def test_routers_of_what_was_trained_look_behind_folded_norms(tmp_path, llamas, shared):
    """Fine-tunes whose norms differ where the shared one is near zero are still fine-tunes."""
    models = [Path(shutil.copytree(llama, tmp_path / llama.name)) for llama in llamas[:3]]
    for number, model in enumerate(models):
        tensors = load_file(model / SINGLE)
        tensors["model.layers.1.post_attention_layernorm.weight"][3] = (0.001, 1.0, 1.0)[number]
        save_file(tensors, model / SINGLE, {"format": "pt"})
    plain, folded = (
        plan_merge(load_config(write_config(tmp_path / "c.yaml", models[0], models[1:], prompts=False, gate_mode="delta",
                                            fold_norms=fold, shared_weights=shared)))
        for fold in (False, True)
    )  # fmt: skip
    rows = []
    for plan in (plain, folded):
        merge(plan, tmp_path / "out", MergeOptions(overwrite=True))
        rows.append(load_weights(tmp_path / "out")["model.layers.1.block_sparse_moe.gate.weight"])
    assert torch.nn.functional.cosine_similarity(*rows).min() > 0.99


def test_a_norm_that_is_not_finite_is_named(tmp_path, llamas):
    broken = Path(shutil.copytree(llamas[1], tmp_path / "broken"))
    tensors = load_file(broken / SINGLE)
    tensors["model.layers.1.post_attention_layernorm.weight"][7] = math.nan
    save_file(tensors, broken / SINGLE, {"format": "pt"})
    config = write_config(tmp_path / "c.yaml", llamas[0], [broken, llamas[2]], prompts=False, fold_norms=True)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.post_attention_layernorm\.weight of .* at \[7\], so no norm"
    ):
        plan_merge(load_config(config))


def test_what_is_mixed_is_verified_too(tmp_path, llamas, capsys, monkeypatch):
    from moemerge.checks.verification import verify_merge

    config = write_config(
        tmp_path / "c.yaml",
        llamas[0],
        llamas[1:],
        prompts=False,
        fold_norms=True,
        shared_weights="ties",
        dtype="bfloat16",
    )
    plan = plan_merge(load_config(config))
    merge(plan, tmp_path / "out")
    found = verify_merge(plan, tmp_path / "out")
    assert found.differences == ()
    shard = tmp_path / "out" / "model-00001-of-00002.safetensors"
    header = read_header(shard)
    with shard.open("r+b") as file:
        file.seek(header["model.layers.0.self_attn.q_proj.weight"].start)
        file.write(b"!!")
    assert [d.what for d in verify_merge(plan, tmp_path / "out").differences] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]


def test_plan_advises_what_measured_better(tmp_path, llamas, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["moemerge", "plan", str(write_config(tmp_path / "c.yaml", llamas[0], llamas[1:]))])
    with pytest.raises(SystemExit):
        main()
    advice = (
        "advice: attention and norms are the base model's alone; with `shared_weights: average` they are the experts' mean, "
        "which measured better for fine-tunes of one model; `shared_weights: auto` tries it on the experts' texts "
        "(docs/quality.md)"
    )
    assert advice in " ".join(capsys.readouterr().out.split())
    config = write_config(tmp_path / "d.yaml", llamas[0], llamas[1:], prompts=False, shared_weights="average")
    assert plan_merge(load_config(config)).advice == ()
    alone = write_config(tmp_path / "e.yaml", llamas[0], [llamas[0]] * 2, prompts=False)
    assert plan_merge(load_config(alone, allow_identical_experts=True)).advice == ()


@pytest.mark.parametrize(
    ("keys", "advised"),
    [
        ({"gate_mode": "auto"}, True),
        ({"gate_mode": "auto", "experts_per_token": 1}, False),
        ({"gate_mode": "auto", "experts_per_token": 3}, False),
        ({"gate_mode": "ridge"}, False),  # not measured
        ({"gate_mode": "auto", "prompts": False}, False),
    ],
)
def test_one_expert_per_token_is_advised_where_it_measured_as_well(tmp_path, llamas, keys, advised):
    plan = plan_merge(load_config(write_config(tmp_path / "c.yaml", llamas[0], llamas[1:], **keys)))
    advice = (
        "experts_per_token: 1 halves what a token computes in experts, and was within 0.002 nats per token of 2 with "
        "four fine-tunes of a model of 135 million parameters: compare both by `moemerge eval` (docs/routers.md)"
    )
    assert (advice in plan.advice) == advised


def test_models_that_compute_otherwise_are_not_mixed(tmp_path):
    base = make_model(tmp_path / "base", 0, "granite", attention_multiplier=0.2)
    other = make_model(tmp_path / "other", 1, "granite", attention_multiplier=0.7)
    config = write_config(tmp_path / "c.yaml", base, [other, base], prompts=False, shared_weights="average")
    with pytest.raises(IncompatibleError, match=r"attention_multiplier is 0.7, but the base model's is 0.2"):
        plan_merge(load_config(config))


def test_equal_models_average_to_themselves(tmp_path, llamas):
    found, _ = merged(tmp_path, [llamas[0], llamas[1], llamas[1]], shared_weights="average")
    expert = load_file(llamas[1] / SINGLE)
    assert all(torch.equal(found[name], tensor) for name, tensor in expert.items() if shared(name))


def test_another_recipe_is_another_merge(tmp_path, llamas):
    prints = []
    for seed in (0, 1):
        settings = {"method": "dare", "density": 0.5, "seed": seed}
        config = write_config(tmp_path / "c.yaml", llamas[0], llamas[1:], prompts=False, shared_weights=settings)
        prints.append(plan_fingerprint(plan_merge(load_config(config)), 0)["what is computed of the sources"])
    assert prints[0] != prints[1]


def test_rows_in_another_order_are_another_merge(tmp_path):
    base, *experts = (make_model(tmp_path / str(n), n, "glm", head_dim=8) for n in range(3))
    prints = []
    for part in (0.5, 0.25):
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": part}
        edit_json(base / "config.json", rope_parameters=rope)
        config = write_config(tmp_path / "c.yaml", base, experts, prompts=False)
        prints.append(plan_fingerprint(plan_merge(load_config(config)), 0))
    assert [key for key in prints[0] if prints[0][key] != prints[1][key]] == ["what is computed of the sources"]

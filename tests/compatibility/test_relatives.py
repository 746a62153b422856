"""Experts whose own attention is another than the base's: their FFNs move, and nothing else of them."""

from pathlib import Path

import pytest
import torch
import transformers

from moemerge import load_config, merge, plan_merge
from moemerge.errors import IncompatibleError
from tests.support.families import DENSE, HYBRID, MUP, mixtures, reference
from tests.support.models import (
    assert_close,
    load,
    load_weights,
    logits,
    make_model,
    save_weights,
    write_config,
)

BIASES = "biases of queries, keys and values"
KEPT = "not used of it, since the base model's own is kept:"
RELATIVES = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 500.0, "attention_bias": True},
    "qwen3": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 0.5},
    "ernie4_5": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 12},
    "lfm2": DENSE["lfm2"][1],
    "granitemoehybrid": {**MUP, **HYBRID},
    "youtu": DENSE["youtu"][1],
}
BASES = {"qwen2": {}, "lfm2": DENSE["lfm2"][1], "youtu": DENSE["youtu"][1]}


def plan_of(tmp_path: Path, base: Path, experts: list[Path], **keys):
    return plan_merge(load_config(write_config(tmp_path / "c.yaml", base, experts, prompts=False, **keys)))


def problems(tmp_path: Path, base: Path, experts: list[Path], **keys) -> list[str]:
    with pytest.raises(IncompatibleError) as caught:
        plan_of(tmp_path, base, experts, **keys)
    return [problem.replace(str(tmp_path), "") for problem in caught.value.problems]


def known(*kinds: str) -> list[str]:
    return [kind for kind in kinds if kind in transformers.CONFIG_MAPPING]


@pytest.mark.parametrize("kind", BASES)
def test_ffns_of_relatives_compute_in_the_base_what_they_did(tmp_path, kind):
    """Against the base's own attention and the experts' own FFN modules, by a router in plain torch."""
    if not known(kind):
        pytest.skip(f"transformers {transformers.__version__} does not know {kind}")
    base = make_model(tmp_path / "base", 0, kind, **BASES[kind])
    experts = [make_model(tmp_path / name, 1, name, **RELATIVES[name]) for name in known(*RELATIVES)]
    plan = plan_of(tmp_path, base, experts)
    merge(plan, tmp_path / "out")
    expected = reference(plan, tmp_path / "out")
    assert_close(logits(load(tmp_path / "out")), logits(expected))
    assert all((mixture.chosen > 0).all() for mixture in mixtures(expected))
    told = [warning.partition(":")[0] for warning in plan.warnings if "it is hardly a fine-tune" in warning]
    assert told == [f"experts[{number}] {expert}" for number, expert in enumerate(experts)]


def relative(folder: Path, base: Path, kind: str, **keys) -> Path:
    """A model of another kind whose FFNs are a fine-tune's of the base's."""
    make_model(folder, 5, kind, **keys)
    own, theirs = load_weights(folder), load_weights(base)
    for name in own:
        if ".mlp." in name:
            own[name] = theirs[name] + 0.02 * theirs[name].std() * torch.randn(theirs[name].shape)
    save_weights(folder, own)
    return folder


def test_what_is_left_out_of_a_relatives_attention_is_told_in_a_note(tmp_path):
    base = make_model(tmp_path / "base", 0, "qwen2")
    llama = relative(tmp_path / "llama", base, "llama", rms_norm_eps=1e-6, **RELATIVES["llama"])
    qwen3 = relative(tmp_path / "qwen3", base, "qwen3", **RELATIVES["qwen3"])
    plan = plan_of(tmp_path, base, [llama, qwen3], experts_per_token=1)
    assert plan.warnings == ()
    assert [note for note in plan.notes if KEPT in note] == [
        f"experts[0] {llama}: {KEPT} 2 heads of 16, 1 of keys and values (base: 4 heads of 8, 2 of keys and values); biases "
        "of the attention's output (base: none); rotary positions, rope_theta 500.0 (base: 10000.0)",
        f"experts[1] {qwen3}: {KEPT} 4 heads of 16, 2 of keys and values (base: 4 heads of 8, 2 of keys and values); its "
        f"lack of {BIASES}; norms of queries and keys (base: none); layers that attend differently (base: none); "
        "sliding window 8 (base: none)",
    ]
    assert plan.advice == ()


def test_of_a_stranger_only_attention_is_told(tmp_path):
    base = make_model(tmp_path / "base", 0, "qwen2")
    stranger, other = (make_model(tmp_path / str(n), n, "llama", max_position_embeddings=512) for n in (3, 4))
    experts = [stranger, other, relative(tmp_path / "b", base, "qwen2")]
    plan = plan_of(tmp_path, base, experts, experts_per_token=1)
    assert [note for note in plan.notes if KEPT in note] == [
        f"experts[0] {stranger}: {KEPT} its lack of {BIASES}. The same holds for experts[1] {other}"
    ]
    assert [warning.partition(" by ")[0] for warning in plan.warnings] == [
        f"experts[{number}] {one}: its FFNs differ from the base's" for number, one in enumerate((stranger, other))
    ]
    assert not [note for note in plan.notes if "better base" in note]


TAKES = "normalises what its FFNs take"


@pytest.mark.parametrize(
    ("kind", "around"),
    [
        ("olmo2", "normalises what its FFNs give, and not what they take"),
        ("cohere2", "has attention and FFNs side by side, behind one LayerNorm"),
        ("gemma4_text", f"{TAKES} and what they give"),
        ("qwen3_5_text", f"{TAKES}, by norms that add 1 to their weights"),
    ],
)
def test_ffns_that_stand_elsewhere_are_no_experts(tmp_path, kind, around):
    if not known(kind):
        pytest.skip(f"transformers {transformers.__version__} does not know {kind}")
    base = make_model(tmp_path / "base")
    keys = DENSE[kind][1] | ({"hidden_activation": "silu"} if kind == "gemma4_text" else {})
    experts = [make_model(tmp_path / name, seed, kind, **keys) for seed, name in enumerate(("one", "two"), 1)]
    assert problems(tmp_path, base, experts) == [
        f"experts[0] /one: a {kind} {around}, so its FFNs cannot take the place of the base model's: a llama {TAKES}. The "
        "same holds for experts[1] /two"
    ]


def test_attention_of_relatives_is_not_mixed(tmp_path):
    base = make_model(tmp_path / "base", 0, "qwen2")
    experts = [make_model(tmp_path / name, seed, "llama") for seed, name in enumerate(("a", "b", "c"), 1)]
    hybrid = make_model(tmp_path / "d", 4, "lfm2", **DENSE["lfm2"][1])
    end = "so their attention cannot be mixed"
    for method in ("average", "ties", "dare"):
        assert problems(tmp_path, base, [*experts, hybrid], shared_weights=method) == [
            f"experts[0] /a: attention is without {BIASES}, but the base model's is with them, {end}. The same holds for "
            "experts[1] /b, experts[2] /c",
            f"experts[3] /d: a lfm2 does not attend like the base model, a qwen2, {end}",
        ]
    plan = plan_of(tmp_path, base, experts, shared_weights="auto")
    assert plan.config.shared_weights.method == "base"

"""Gemma 4 E2B and E4B: embeddings for each layer, keys that layers share, FFNs of two widths; and heads of one size."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from moemerge import load_config, merge, plan_merge
from moemerge.checks.verification import verify_merge
from moemerge.engines import ENGINES
from moemerge.errors import RefusedError
from moemerge.evaluation.runnable import open_dense
from moemerge.evaluation.running import run_model
from moemerge.merging.gguf import merge_to_gguf
from moemerge.merging.options import MergeOptions
from moemerge.routers import streamed_pass
from tests.evaluation.test_evaluation import CPU, losses_of, windows
from tests.support.families import GEMMA4, GEMMA4_E, reference
from tests.support.hub_world import files_of
from tests.support.models import (
    assert_close,
    load,
    load_weights,
    logits,
    make_model,
    save_weights,
    write_config,
)
from tests.support.multimodal import make_multimodal
from tests.support.vocabularies import with_tokens

pytestmark = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 knows no Gemma 4")
E2B = GEMMA4_E | {"use_double_wide_mlp": True}
TABLE = "model.embed_tokens_per_layer.weight"


def models(folder: Path, count: int = 3, **keys) -> list[Path]:
    return [make_model(folder / str(seed), seed, "gemma4_text", tuned_from=0, **E2B | keys) for seed in range(count)]


def merged(folder: Path, made: list[Path], **keys):
    keys = {"prompts": False} | keys
    plan = plan_merge(load_config(write_config(folder / "m.yaml", made[0], made[1:], **keys)))
    out = folder / f"out{len(list(folder.glob('out*')))}"
    merge(plan, out, MergeOptions(seed=1))
    assert not verify_merge(plan, out).differences
    return plan, out


def as_released(folder: Path) -> Path:
    """Give a model what Google's files hold and nothing reads: keys and values of layers that share those of others."""
    keys = {"k_proj.weight": (32, 32), "v_proj.weight": (32, 32), "k_norm.weight": (16,)}
    more = {f"model.layers.2.self_attn.{name}": torch.full(shape, 9.0) for name, shape in keys.items()}
    held = load_weights(folder)
    assert not more.keys() & held.keys()
    save_weights(folder, held | more)
    return folder


def test_keys_that_nothing_reads_are_left_out(tmp_path):
    made = list(map(as_released, models(tmp_path)))
    plan, out = merged(tmp_path, made)
    unread = "tensor model.layers.2.self_attn.k_norm.weight is not used by the mixture (and 2 more)"
    assert [note for note in plan.notes if "is not used" in note] == [
        f"{name}: {unread}" for name in ("base_model", f"experts[0] {made[1]}", f"experts[1] {made[2]}")
    ]
    assert_close(logits(load(out)), logits(reference(plan, out)))
    found = run_model(open_dense(str(made[0]), "base", print), windows(), CPU)
    assert torch.allclose(found.float(), losses_of(load(made[0])), rtol=1e-4)


def test_ffns_of_one_width_beside_those_of_two(tmp_path):
    """An expert without wide FFNs, in a mixture with some and the other way round."""
    narrow = make_model(tmp_path / "narrow", 4, "gemma4_text", **GEMMA4_E)
    base, *experts = models(tmp_path)
    for chosen in ([base, narrow, *experts], [narrow, narrow, *experts]):
        plan, out = merged(tmp_path, chosen)
        assert_close(logits(load(out)), logits(reference(plan, out)))
    plan, _ = merged(tmp_path, [base, *experts])
    # Of the first two layers, half of each of the two experts.
    assert f"{2 * 2 * 3 * 48 * 32 * 4 / 1000:.2f} kB of the output are zeros: " in "".join(plan.notes)


def test_shared_weights_are_averaged_with_embeddings_of_layers_and_their_projections(tmp_path):
    made = models(tmp_path)
    _, out = merged(tmp_path, made, shared_weights="average")
    found, _, one, other = map(load_weights, (out, *made))
    layers = [f"model.layers.{n}.per_layer_{part}.weight" for n in range(3) for part in ("input_gate", "projection")]
    outside = [f"model.per_layer_{part}.weight" for part in ("model_projection", "projection_norm")]
    for name in (TABLE, *outside, *layers):
        assert torch.allclose(found[name], (one[name] + other[name]) / 2)


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_have_rows_in_both_tables(tmp_path, tied):
    sizes = {"vocab_size": 156, "vocab_size_per_layer_input": 156, "tie_word_embeddings": tied}
    base, fox, plain = models(tmp_path, **sizes)
    chat = with_tokens(plain, tmp_path / "chat")
    _, out = merged(tmp_path, [base, fox, chat], tokenizer="union")
    rows, ours, theirs = (load_weights(folder)[TABLE] for folder in (out, base, chat))
    assert torch.equal(rows, torch.cat([ours, theirs[156:158]]))
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["vocab_size_per_layer_input"]) == (158, 158)
    load(out)


@pytest.mark.parametrize(
    "keys",
    [
        {"attention_k_eq_v": False, "num_global_key_value_heads": None, "global_head_dim": 8},
        {"global_head_dim": 8},
        {"num_global_key_value_heads": None},
    ],
)
def test_a_config_says_of_layers_only_what_differs(tmp_path, keys):
    """transformers leaves `global_head_dim` out, and what is equal in all layers out of `per_layer_config`."""
    base = make_model(tmp_path / "base", 1, "gemma4_text", **GEMMA4 | keys)
    saved = json.loads((base / "config.json").read_text())
    assert "global_head_dim" not in saved
    assert saved["per_layer_config"].get("2", {}).keys() != {"head_dim", "num_key_value_heads"}
    plan = plan_merge(
        load_config(write_config(tmp_path / "m.yaml", base, [base] * 2, prompts=False), allow_identical_experts=True)
    )
    merge(plan, tmp_path / "out")
    assert_close(logits(load(tmp_path / "out")), logits(load(base)))


def test_the_pass_reads_rows_of_tokens_that_occur_alone(tmp_path, monkeypatch):
    made = models(tmp_path)
    plan = plan_merge(load_config(write_config(tmp_path / "m.yaml", made[0], made[1:])))
    rows, parameters = [], []
    read_rows, read_parameter = streamed_pass.read_rows, streamed_pass.read_parameter
    monkeypatch.setattr(
        streamed_pass,
        "read_rows",
        lambda tensor, ids: (rows.append((tensor.name, len(ids))), read_rows(tensor, ids))[1],
    )
    monkeypatch.setattr(
        streamed_pass,
        "read_parameter",
        lambda module, name, tensor, *rest: (
            parameters.append(tensor.name),
            read_parameter(module, name, tensor, *rest),
        ),
    )
    merge(plan, tmp_path / "out")
    assert {name for name, _ in rows} == {"model.embed_tokens.weight", TABLE}
    assert max(count for _, count in rows) < 80
    assert TABLE not in parameters
    assert "model.per_layer_model_projection.weight" in parameters


def test_a_mixture_takes_more_such_experts(tmp_path, run):
    base, *experts, new = models(tmp_path, 4)
    _, out = merged(tmp_path, [base, *experts])
    prompt = ("--prompt", "new=The lazy dog")
    assert run("edit", out, tmp_path / "more", "--add", f"new={new}", *prompt, "-q")[0] == 0
    found, expected = map(load_weights, (tmp_path / "more", merged(tmp_path, [base, *experts, new])[1]))
    assert found.keys() == expected.keys()
    stacks = [name for name in expected if ".experts." in name]
    assert len(stacks) == 6
    assert all(torch.equal(found[name], expected[name]) for name in stacks)
    load(tmp_path / "more")


def test_engines_that_were_not_tried_with_them_are_named(tmp_path, run):
    made = models(tmp_path)
    path = write_config(tmp_path / "m.yaml", made[0], made[1:], prompts=False)
    untried = [ENGINES[engine] for engine in plan_merge(load_config(path)).shape.choice.untried]
    assert "vLLM" in untried
    printed = " ".join(run("plan", path)[1].split())
    assert f"engines right in transformers 5; not tried with {', '.join(untried)} memory" in printed
    facts = "head_dim of its own, embeddings for each layer, layers that share keys and values, FFNs of two widths"
    assert f"): right\n      - was not tried with {facts}\n" in run("families", "gemma4_text")[1]


def test_gguf_files_are_not_written_of_them(tmp_path):
    plan, _ = merged(tmp_path, models(tmp_path))
    with pytest.raises(RefusedError) as refusal:
        merge_to_gguf(plan, tmp_path / "out.gguf")
    assert "was not tried with embeddings for each layer, nor with keys that layers share" in str(refusal.value)


@pytest.mark.slow
def test_from_the_hub_a_streamed_merge_is_the_same(world, machine, tmp_path):
    folders = [make_multimodal(tmp_path / name, "gemma4, as E2B", seed) for seed, name in enumerate(("a", "b", "c"))]
    for folder in folders:
        world.hub.add(f"acme/{folder.name}", files_of(folder))
    path = write_config(machine.folder / "merge.yaml", "acme/a", ["acme/b", "acme/c"])
    result = machine.moemerge(str(path), "streamed", "--stream", "--quiet")
    assert result.code == 0, result.err
    plan = plan_merge(load_config(write_config(tmp_path / "m.yaml", folders[0], folders[1:])))
    merge(plan, tmp_path / "local")
    found, expected = load_weights(machine.folder / "streamed"), load_weights(tmp_path / "local")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

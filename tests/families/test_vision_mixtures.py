"""Mixtures with the towers of a multimodal base: what they compute of images and text, and what they are made of."""

from pathlib import Path

import pytest
import torch

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.derived import read_values
from moemerge.checks.repairing import repair
from moemerge.checks.verification import verify_merge
from moemerge.editing.in_place import changed_shards
from moemerge.editing.planner import plan_edit
from moemerge.engines import ENGINES
from moemerge.errors import IncompatibleError, RefusedError
from moemerge.export.writing import write_gguf
from moemerge.families.engines import Trouble, facts_of, trouble_of
from moemerge.families.multimodal import VISION_MIXTURES
from moemerge.generation.answers import Sampling, open_generator
from moemerge.merging.gguf import merge_to_gguf
from moemerge.model_card.usage import use_it
from moemerge.sources.stored_mixtures import read_mixture
from tests.families.test_multimodal import add_next_tokens, make
from tests.support.models import assert_close, edit_json, load_weights, logits, make_model, save_weights, write_config
from tests.support.multimodal import image_logits, load_multimodal

WITH_VISION = [*VISION_MIXTURES, "gemma4, as E2B"]
PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")


def merged(folder: Path, base: Path, experts: list[Path], name: str = "out", **keys):
    keys = {"prompts": False, "keep_vision": True} | keys
    plan = plan_merge(
        load_config(write_config(folder / f"{name}.yaml", base, experts, **keys), allow_identical_experts=True)
    )
    merge(plan, folder / name)
    return plan, folder / name


@pytest.mark.parametrize("kind", WITH_VISION)
def test_images_and_text_give_what_they_give_with_the_dense_model(tmp_path, kind):
    base = make(tmp_path / "base", kind, 1)
    dense = load_multimodal(base)
    add_next_tokens(base)
    for name in PROCESSORS:
        (base / name).write_text(f'{{"size": "{name}"}}')
    plan, out = merged(tmp_path, base, [base] * 3)
    mixture = load_multimodal(out)
    assert_close(logits(mixture), logits(dense))
    expected = image_logits(dense)
    assert_close(image_logits(mixture), expected)
    assert (image_logits(dense, seed=6) - expected).abs().max() > 0.1
    assert not verify_merge(plan, out).differences
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in PROCESSORS)
    found, stored = load_weights(out), load_weights(base)
    towers = [name for name in stored if not name.startswith(("model.language_model.", "lm_head", "mtp"))]
    assert towers
    assert all(torch.equal(found[name], stored[name]) for name in towers)
    assert [note for note in plan.notes if "left out" in note] == [
        f"{base}: beside the text model, 2 tensors of 256 B are left out: mtp"
    ]
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text\n" in card
    assert use_it(out.name, plan.shape.model_type, plan.right_in, sees=True) in card


@pytest.mark.parametrize("kind", WITH_VISION)
def test_the_text_model_inside_is_the_mixture_of_text_alone(tmp_path, kind):
    """Read back as what it is: stacks that were transposed, and the zeros beside narrow experts, included."""
    narrow = {} if kind.startswith("gemma4") else {"intermediate_size": 24}
    models = [make(tmp_path / "base", kind, 1), make(tmp_path / "first", kind, 2)]
    models.append(make(tmp_path / "second", kind, 3, **narrow))
    _, alone = merged(tmp_path, models[0], models[1:], "alone", keep_vision=False)
    _, out = merged(tmp_path, models[0], models[1:])
    (_, found), (_, expected) = (read_mixture(str(folder), print) for folder in (out, alone))
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert (read_values(found.tensors[name]) == read_values(tensor)).all(), name
    said = [
        open_generator(folder, device="cpu").generate("The quick brown", Sampling(6)).text for folder in (out, alone)
    ]
    assert said[0] == said[1]


def test_towers_are_kept_only_where_a_class_holds_them_beside_experts(tmp_path):
    def refusal(base: Path, **keys) -> str:
        path = write_config(tmp_path / "m.yaml", base, [base] * 2, prompts=False, keep_vision=True, **keys)
        with pytest.raises(IncompatibleError) as caught:
            plan_merge(load_config(path, allow_identical_experts=True))
        return str(caught.value)

    text = make_model(tmp_path / "text")
    assert refusal(text) == (
        f"keep_vision: base_model {text} is a model for text alone. Remove the key, or name the multimodal model as "
        "base_model."
    )
    assert refusal(make(tmp_path / "mistral3", "mistral3")) == (
        "keep_vision: no class has the towers of a mistral3 beside a mixture; there is one for qwen3_5 (qwen3_5_moe), "
        "gemma4 (gemma4), qwen3_vl (qwen3_vl_moe). Remove the key for a mixture of the text model alone."
    )
    vision = make(tmp_path / "vl", "qwen3_vl")
    stored = load_weights(vision)
    save_weights(vision, {name: tensor for name, tensor in stored.items() if ".visual." not in name})
    assert refusal(vision) == (
        f"keep_vision: base_model {vision} has no tensors beside its text model. Remove the key."
    )
    edit_json(vision / "config.json", vision_config=None)
    assert refusal(vision) == (f"keep_vision: config.json of base_model {vision} has no vision_config. Remove the key.")
    assert refusal(make(tmp_path / "other", "qwen3_vl"), architecture="dots1") == (
        "keep_vision: does not go together with other keys:\n"
        "  - architecture: the text model of a qwen3_vl_moe is a qwen3_moe, not a dots1"
    )


@pytest.mark.parametrize("kind", VISION_MIXTURES)
def test_engines_are_asked_about_the_class_with_towers(tmp_path, kind):
    """Not about the mixture of text alone, which some do not read where they read this."""
    base = make(tmp_path / "base", kind, tied=kind == "gemma4")
    config = write_config(tmp_path / "merge.yaml", base, [base] * 3, prompts=False, keep_vision=True)

    def planned(engine: str | None = None):
        return plan_merge(load_config(config, allow_identical_experts=True).model_copy(update={"engine": engine}))

    plan, output = planned(), VISION_MIXTURES[kind].model_type
    facts = facts_of(plan.base, plan.mixture)
    told = {engine: trouble_of(engine, output, facts) for engine in ENGINES}
    assert plan.right_in == tuple(engine for engine, trouble in told.items() if trouble is None)
    assert 0 < len(plan.right_in) < len(ENGINES)
    assert f"keep_vision: what engines compute of a {output} was measured with text alone, without images" in plan.notes
    for engine, trouble in told.items():
        if trouble is None:
            assert planned(engine).right_in == plan.right_in
        elif isinstance(trouble, Trouble):
            with pytest.raises(IncompatibleError) as caught:
                planned(engine)
            assert str(caught.value) == (
                f"keep_vision: '{output}' is not read rightly by {ENGINES[engine]}, which --for or `engine` asks for. Leave "
                f"out `keep_vision`, and another family may fit:\n  - {output}: {ENGINES[engine]} {trouble.words}"
            )


def test_only_the_text_model_of_such_a_mixture_is_written_to_gguf_or_edited(tmp_path):
    base = make(tmp_path / "base", "qwen3_vl")
    plan, out = merged(tmp_path, base, [base] * 2)
    assert (
        "base_model: has none of preprocessor_config.json, processor_config.json, video_preprocessor_config.json, so that "
        "nothing says how images become numbers: copy them from the original model beside the output"
    ) in plan.notes
    with pytest.raises(RefusedError) as refusal:
        merge_to_gguf(plan, tmp_path / "out.gguf")
    assert str(refusal.value) == "keep_vision: a GGUF file holds the text model alone. Remove the key."
    told: list[str] = []
    write_gguf(out, tmp_path / "out.gguf", tell=told.append)
    towers = [tensor for name, tensor in load_weights(base).items() if ".visual." in name]
    left_out = (
        f"{len(towers)} tensors of {sum(tensor.nbytes for tensor in towers) / 1000:.2f} kB are left out: model.visual"
    )
    assert told == [
        f"{out}: beside the text model, {left_out}. The file reads text alone; llama.cpp keeps towers in a second file "
        "(mmproj), which moemerge does not write"
    ]
    experts = [f"{out}#0", f"{out}#1"]
    edit = plan_edit(
        load_config(write_config(tmp_path / "edit.yaml", out, experts, prompts=False), allow_identical_experts=True)
    )
    assert f"{out}: beside the text model, {left_out}" in edit.notes
    with pytest.raises(RefusedError) as refusal:
        changed_shards(edit)
    assert str(refusal.value) == (
        f"{out}: is a multimodal model, and only its text model is edited. Write to another folder."
    )
    with pytest.raises(RefusedError) as refusal:
        repair(out)
    assert str(refusal.value) == f"{out}: is a multimodal model, a qwen3_vl_moe, whose config.json needs no repair."

"""Mixtures with modules that predict further tokens, within the layers' names or outside of them."""

from pathlib import Path

import pytest
import torch
import yaml

from moemerge import EditOptions, edit, load_config, plan_edit
from moemerge.errors import IncompatibleError
from tests.support.mixtures import make_mixture
from tests.support.models import edit_json, load_weights, make_model, save_weights


def with_copy(folder: Path, layer: str, copy: str) -> Path:
    """Give a mixture the tensors of a layer once more, under another prefix."""
    tensors = load_weights(folder)
    again = {name.replace(layer, copy): values.clone() for name, values in tensors.items() if name.startswith(layer)}
    save_weights(folder, tensors | again)
    return folder


def outside(folder: Path, model_type: str = "qwen3_5_moe_text") -> Path:
    return with_copy(make_mixture(folder, model_type), "model.layers.1.", "mtp.layers.0.")


def within(folder: Path, seed: int = 0) -> Path:
    made = with_copy(make_mixture(folder, "deepseek_v3", seed=seed), "model.layers.2.", "model.layers.3.")
    edit_json(made / "config.json", num_nextn_predict_layers=1)
    return made


def of(mixture: Path, *references: object, **keys: object):
    """The config of an edit: experts by number, or by reference."""
    named = [f"{mixture}#{one}" if isinstance(one, int) else str(one) for one in references]
    experts = [{"source_model": one, "name": f"e{number}"} for number, one in enumerate(named)]
    return load_config(yaml.safe_dump({"base_model": str(mixture), "experts": experts, **keys}))


OUTSIDE = {
    "qwen3_5_moe_text": ("mtp.layers.0.mlp.experts.down_proj", 2),
    "qwen3_moe": ("mtp.layers.0.mlp.experts.0.down_proj.weight", 12),
}


@pytest.mark.parametrize("model_type", OUTSIDE)
@pytest.mark.parametrize("change", ["fewer", "split"])
def test_experts_outside_the_layers_must_fit_those_within(tmp_path, model_type, change):
    mixture = outside(tmp_path / "mixture", model_type)
    config = of(mixture, 0, 1, 2) if change == "fewer" else of(mixture, 0, 1, 2, 3, granularity=2)
    with pytest.raises(IncompatibleError) as caught:
        plan_edit(config)
    first, more = OUTSIDE[model_type]
    assert (
        f"it has experts outside its layers, in {first} and {more} more tensors, which predict further tokens and are "
        "not edited, so the number and width of experts must stay. transformers does not use them: edit a copy without "
        "them, such as it saves"
    ) in caught.value.problems


def test_as_many_experts_in_another_order_leave_those_outside_the_layers(tmp_path):
    mixture = outside(tmp_path / "mixture")
    edit(plan_edit(of(mixture, 3, 2, 1, 0)), tmp_path / "out", EditOptions())
    before, after = load_weights(mixture), load_weights(tmp_path / "out")
    for name, values in before.items():
        order = [3, 2, 1, 0] if ".layers." in name and ("experts." in name or "mlp.gate." in name) else slice(None)
        if name.startswith("mtp.") or "shared_expert" in name:
            order = slice(None)
        assert torch.equal(after[name], values[order]), name


def test_a_tensor_that_is_no_expert_s_does_not_matter(tmp_path):
    mixture = make_mixture(tmp_path / "mixture", "qwen3_moe")
    save_weights(
        mixture, load_weights(mixture) | {"mtp.fc.weight": torch.ones(2, 2), "shared_experts.up": torch.ones(2)}
    )
    assert plan_edit(of(mixture, 0, 1)).experts == 2


def test_a_dense_model_has_no_ffn_for_layers_that_predict_further_tokens(tmp_path):
    mixture = within(tmp_path / "mixture")
    dense = make_model(tmp_path / "dense", 3, intermediate_size=24)
    with pytest.raises(IncompatibleError) as caught:
        plan_edit(of(mixture, 0, 1, dense))
    assert caught.value.problems == (
        "experts[2] (e2): it is a dense model, and the mixture has experts in layer 3 too, which predicts further "
        "tokens (num_hidden_layers is 3): a dense model has no FFN for it, and no text enters its router. Experts of "
        "such a mixture can be left out and put into another order, and those of another mixture with the same layers "
        "added, as MIXTURE#EXPERT",
    )


def test_experts_are_left_out_of_layers_that_predict_further_tokens(tmp_path):
    mixture = within(tmp_path / "mixture")
    edit(plan_edit(of(mixture, 3, 1)), tmp_path / "out", EditOptions())
    before, after = load_weights(mixture), load_weights(tmp_path / "out")
    router = "model.layers.3.mlp.gate.weight"
    assert torch.equal(after[router], before[router][[3, 1]])
    for new, old in enumerate((3, 1)):
        name = "model.layers.3.mlp.experts.{}.down_proj.weight"
        assert torch.equal(after[name.format(new)], before[name.format(old)])


def test_rows_of_another_mixture_stay_in_layers_that_predict_further_tokens(tmp_path):
    """No text enters such a layer; rows of the others move."""
    mixture, other = within(tmp_path / "mixture"), within(tmp_path / "other", seed=1)
    config = of(mixture, 0, 1, f"{other}#2").model_dump()
    document = {
        "base_model": str(mixture),
        "experts": [
            {"source_model": one["source_model"], "name": one["name"], "positive_prompts": [text]}
            for one, text in zip(config["experts"], ("the fox jumps", "a lazy dog", "def main(argv):"), strict=True)
        ],
    }
    edit(plan_edit(load_config(yaml.safe_dump(document))), tmp_path / "out", EditOptions())
    theirs, after = load_weights(other), load_weights(tmp_path / "out")
    for layer in (1, 2, 3):
        router = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(after[router][2], theirs[router][2]) == (layer == 3)

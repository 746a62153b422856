"""Saliency, frequency and similarity of experts against transformers' own modules."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moemerge.editing.pruning.saliency import measure_saliency
from moemerge.editing.pruning.similarity import measure_similarity
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.runnable import open_mixture
from moemerge.families.stored_mixture import StoredMixture
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window
from tests.passes.test_passes import IS_V4
from tests.support.families import GEMMA4
from tests.support.mixtures import make_variant
from tests.support.models import SIZES, VOCAB, edit_json, load, load_weights, save_weights, tokenizer

CPU = Compute(torch.device("cpu"), torch.float32)
EXPERTS = 4
_ROUTED = {
    "moe_intermediate_size": 24, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "head_dim": 16,
}  # fmt: skip
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral, gelu": ("mixtral", {"num_local_experts": EXPERTS, "sliding_window": None, "hidden_act": "gelu"}),
    "qwen3_moe, unnormalised": (
        "qwen3_moe",
        {
            "moe_intermediate_size": 24, "num_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 16,
            "norm_topk_prob": False, "mlp_only_layers": [1],
        },
    ),
    "granitemoe": ("granitemoe", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "attention_multiplier": 0.2}),
    "glm4_moe, groups, scaled": (
        "glm4_moe", {**_ROUTED, "n_group": 2, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1, "moe_layer_end_index": 2, "head_dim": 8, "moe_norm_min": 0.9,
        },
    ),
    "hunyuan_v1_moe, experts per token by layer": (
        "hunyuan_v1_moe", {"num_experts": EXPERTS, "moe_topk": [2, 1, 2], "head_dim": 8},
    ),
    "gemma4_text, other states for the router": (
        "gemma4_text",
        {**GEMMA4, "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 24},
    ),
}  # fmt: skip


def make_mixture(folder: Path, name: str) -> Path:
    """A mixture of transformers' own class, with weights large enough that every part matters."""
    model_type, settings = MIXTURES[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor_name, values in model.state_dict().items():
            if values.is_floating_point():
                noise = 0.2 * torch.randn(values.shape, generator=generator)
                values.copy_(1 + noise if "norm" in tensor_name else noise)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return folder


def texts() -> Texts:
    """Windows of two domains, of unequal length, the first token of each a BOS."""
    generator = torch.Generator().manual_seed(5)
    ids = [(1, *torch.randint(3, VOCAB, (length,), generator=generator).tolist()) for length in (25, 34, 19)]
    windows = tuple(Window(n, tokens, (False,) + (True,) * (len(tokens) - 1)) for n, tokens in enumerate(ids))
    return Texts(("one", "two"), (None, None), (2, 1), windows, (0, 0, 1))


class Watched:
    """What enters the modules of experts of a model of transformers: states, chosen experts and weights."""

    def __init__(self, model: Any, texts: Texts) -> None:
        self.modules = [m for m in model.modules() if getattr(m, "gate_up_proj", None) is not None]
        self.modules = [module for module in self.modules if not isinstance(module.gate_up_proj, torch.nn.Linear)]
        self.seen: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in self.modules]
        handles = [
            module.register_forward_pre_hook(lambda _module, inputs, place=place: self.seen[place].append(inputs))
            for place, module in enumerate(self.modules)
        ]
        with torch.no_grad():
            for window in texts.windows:
                model(torch.tensor([window.ids]), use_cache=False)
        for handle in handles:
            handle.remove()

    def tokens(self, place: int) -> tuple[torch.Tensor, ...]:
        """States, experts and weights of all tokens but the BOS ones."""
        return tuple(torch.cat([inputs[part][1:] for inputs in self.seen[place]]) for part in range(3))

    @torch.no_grad()
    def output(self, place: int, expert: int, states: torch.Tensor) -> torch.Tensor:
        """The output of one expert by transformers' own forward."""
        one = torch.ones(len(states), 1)
        made: torch.Tensor = self.modules[place](states, one.long() * expert, one)
        return made


@pytest.mark.skipif(IS_V4, reason="the modules of experts are others in transformers 4")
@pytest.mark.parametrize("name", MIXTURES)
def test_saliency_is_that_of_transformers_own_modules(tmp_path, name):
    """Router inputs, weights and outputs are those inside transformers' class: unnormalised, grouped, scaled, biased."""
    mixture, given = open_mixture(make_mixture(tmp_path, name)), texts()
    found = measure_saliency(mixture, given, CPU, {})
    watched = Watched(load(tmp_path), given)
    assert len(found.layers) == len(watched.modules)
    assert found.tokens == (59, 19)
    for place in range(len(found.layers)):
        states, experts, weights = watched.tokens(place)
        for expert in range(EXPERTS):
            tokens, choice = (experts == expert).nonzero(as_tuple=True)
            lengths = watched.output(place, expert, states[tokens]).norm(dim=1)
            expected = float((weights[tokens, choice] * lengths).mean()) if len(tokens) else 0.0
            assert found.reap[place, expert] == pytest.approx(expected, rel=1e-4)
            assert found.mass[place, expert] == pytest.approx(expected * len(tokens), rel=1e-4)
            assert found.frequency[place, expert] == pytest.approx(len(tokens) / len(states), rel=1e-6)
            assert found.load[0, place, expert] == pytest.approx(float((tokens < 59).sum()) / 59, rel=1e-6)
            mean = float(weights[tokens, choice].mean()) if len(tokens) else 0.0
            assert found.weight[place, expert] == pytest.approx(mean, rel=1e-4)


@pytest.mark.skipif(IS_V4, reason="the modules of experts are others in transformers 4")
def test_experts_that_belong_together_are_judged_by_the_sum_of_their_weights(tmp_path):
    mixture, given = open_mixture(make_mixture(tmp_path, "mixtral, gelu")), texts()
    layers = mixture.moe_layers
    copy_expert(tmp_path, 1, 3)
    found = measure_saliency(open_mixture(tmp_path), given, CPU, {layer: [(1, 3)] for layer in layers})
    watched = Watched(load(tmp_path), given)
    for place in range(len(layers)):
        states, experts, weights = watched.tokens(place)
        mine = (experts == 1) | (experts == 3)
        tokens = mine.any(dim=1)
        lengths = watched.output(place, 1, states[tokens]).norm(dim=1)
        expected = float(((weights * mine).sum(dim=1)[tokens] * lengths).mean())
        assert found.reap[place, [1, 3]] == pytest.approx([expected, expected], rel=1e-4)
        assert found.differences[place, 1, 3] == 0
        assert found.differences[place, 0, 1] > 0.5


def copy_expert(folder: Path, source: int, target: int, noise: float = 0.0) -> None:
    """Replace an expert's FFNs in all layers by another's."""
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if f".experts.{source}." in name:
            values = tensors[name] + noise * torch.randn(
                tensors[name].shape, generator=torch.Generator().manual_seed(3)
            )
            tensors[name.replace(f".experts.{source}.", f".experts.{target}.")] = values
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["mixtral, gelu", "granitemoe"])
def test_distances_are_those_of_all_weights(tmp_path, name):
    mixture = open_mixture(make_mixture(tmp_path, name))
    stored = StoredMixture(mixture.family, mixture.runnable.keys, mixture.tensors, mixture.experts)
    found = measure_similarity(stored)
    tensors = load_file(tmp_path / "model.safetensors")
    for place, layer in enumerate(found.layers):
        if name == "granitemoe":
            prefix = f"model.layers.{layer}.block_sparse_moe."
            parts = [tensors[f"{prefix}{part}.weight"] for part in ("input_linear", "output_linear")]
            flat = torch.cat([part.flatten(1) for part in parts], dim=1).double()
        else:
            prefix = f"model.layers.{layer}.block_sparse_moe.experts."
            flat = torch.stack(
                [
                    torch.cat([tensors[f"{prefix}{e}.{w}.weight"].flatten() for w in ("w1", "w2", "w3")])
                    for e in range(4)
                ]
            ).double()
        squares = flat.square().sum(dim=1)
        expected = torch.cdist(flat, flat) / ((squares[:, None] + squares) / 2).sqrt()
        np.testing.assert_allclose(found.distances[place], expected.numpy(), rtol=1e-5, atol=1e-7)
    assert found.groups_everywhere == ()


def test_equal_experts_are_found_and_nearly_equal_ones_are_not(tmp_path):
    folder = make_mixture(tmp_path, "mixtral, gelu")
    copy_expert(folder, 1, 3)
    copy_expert(folder, 0, 2, noise=1e-6)
    mixture = open_mixture(folder)
    found = measure_similarity(StoredMixture(mixture.family, mixture.runnable.keys, mixture.tensors, mixture.experts))
    assert found.groups_everywhere == ((1, 3),)
    assert [found.groups(layer) for layer in found.layers] == [((1, 3),)] * len(found.layers)
    assert found.distances[:, 1, 3].max() == 0
    near = found.distances[:, 0, 2]
    assert near.min() > 0
    np.testing.assert_allclose(near, 1e-6 / 0.2, rtol=0.1)
    assert found.nearly_equal == ((0, 2),)


def test_experts_that_differ_in_a_factor_alone_are_not_equal(tmp_path):
    tensors = load_weights(make_variant(tmp_path, "gemma4_text"))
    for name, values in tensors.items():
        if ".experts." in name:
            values[1:] = values[0]
        if name.endswith("router.per_expert_scale"):
            values[:] = torch.tensor([1.5, 2.5, 1.5, 1.0])
    save_weights(tmp_path, tensors)
    found = measure_similarity(open_mixture(tmp_path).as_stored)
    assert found.groups_everywhere == ((0, 2),)
    assert found.distances.max() == 0

"""Routers: what each method computes, and what the routing table says of it."""

import json
import math
import shutil
import sys
import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.numbers import float32_of, read_rows, stored_bytes
from moemerge.config.loading import parse_config
from moemerge.config.schema import MergeConfig, RoutedExpert
from moemerge.dtypes import HEADER_DTYPES
from moemerge.errors import CheckpointError, IncompatibleError, RefusedError, RouterError
from moemerge.families.mixture_shape import Mixture
from moemerge.merging.options import MergeOptions
from moemerge.passes import compute_dtype
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.quantised import quantise_weight
from moemerge.planning.options import PlanOptions
from moemerge.routers import computed, streamed_pass
from moemerge.routers.diagnostics import route_layer
from moemerge.routers.initialisation import init_routers
from moemerge.routers.pass_inputs import PassRequest
from moemerge.routers.prompts import encode_prompts
from moemerge.routers.report import LayerRouting, RoutingReport
from moemerge.routers.request import PassOptions
from moemerge.routers.rows import contrast, row_distances, unit
from moemerge.routers.scoring import fit_scale, top_weights
from moemerge.routers.streamed_pass import capture_router_inputs
from tests.support.models import TEXT, edit_json, load, make_model, router_inputs, tokenizer, write_config

LONG = "The quick brown fox jumps over the lazy dog and def main(argv): return [item for item in argv if item]"
GATE = "model.layers.{}.block_sparse_moe.gate.weight"


def plan_of(tmp_path: Path, folders: list[Path], **keys):
    base, *experts = folders
    return plan_merge(load_config(write_config(tmp_path / "merge.yaml", base, experts, **keys)))


def routers(plan, seed: int = 0, **options):
    """The report, and weights (layer, expert, hidden)."""
    made = init_routers(plan.router_request, PassOptions(**options), seed=seed, progress=lambda *_: None)
    dtype, experts = getattr(torch, plan.dtype), len(plan.config.experts)
    rows = [torch.frombuffer(bytearray(layer), dtype=dtype).view(experts, -1) for layer in made.rows.values()]
    gates = {layer: torch.frombuffer(bytearray(gate), dtype=dtype) for layer, gate in made.shared_gates.items()}
    return SimpleNamespace(report=made.report, weights=torch.stack(rows), layers=list(made.rows), gates=gates)


def request(plan) -> PassRequest:
    prompts = encode_prompts(plan.base_folder, plan.config, 128, 0)
    return PassRequest(
        plan.parts.base, plan.mixture, plan.family.scoring, prompts, Compute(torch.device("cpu"), torch.float32)
    )


def asked(experts: int, per_token: int, scoring: str = "softmax", absent=frozenset()) -> PassRequest:
    """Of a mixture whose layer 0 lacks some experts, without a base model."""
    mixture = Mixture(1, 8, (8,) * experts, (), per_token, (0,), {0: absent} if absent else {})
    return PassRequest(None, mixture, scoring, (), Compute(torch.device("cpu"), torch.float32))


def config_of(**keys) -> MergeConfig:
    """Of one expert, without the checks between keys."""
    return MergeConfig.model_construct(base_model="x", experts=[RoutedExpert(source_model="x", **keys)])


def ffn_inputs(model, ids: list[int]) -> list[torch.Tensor]:
    """What enters each layer's FFN in the whole model: (layer) of (token, hidden)."""
    seen = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 12}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("mistral", {"sliding_window": 4}),
        ("mistral", {"sliding_window": None}),
    ],
)
@pytest.mark.parametrize("batch_tokens", [8, 2048])
def test_the_streamed_pass_sees_what_the_whole_model_sees(tmp_path, monkeypatch, model_type, sizes, batch_tokens):
    """Prompts of unequal length, padded together or alone: only true tokens count, each with its true state."""
    monkeypatch.setattr("moemerge.routers.streamed_pass.TOKENS_PER_BATCH", batch_tokens)
    folders = [make_model(tmp_path / str(seed), seed, model_type, **sizes) for seed in range(3)]
    path = write_config(tmp_path / "merge.yaml", folders[0], folders[1:])
    path.write_text(path.read_text().replace("item 1", f"'{LONG}'"))
    plan = plan_merge(load_config(path))
    model = load(folders[0])
    captured = [
        replace(inputs, states=inputs.states.clone(), beginnings=inputs.beginnings.clone())
        for inputs in capture_router_inputs(request(plan))
    ]
    assert len(captured) == 3
    for place, prompt in enumerate(captured[0].prompts):
        for inputs, states in zip(captured, ffn_inputs(model, list(prompt.ids)), strict=True):
            assert torch.allclose(inputs.beginnings[place], states[0], atol=1e-4)
    for number, expert in enumerate(plan.config.experts):
        expected = [
            torch.cat(states)
            for states in zip(
                *([s[1:] for s in ffn_inputs(model, tokenizer()(p)["input_ids"])] for p in expert.positive_prompts),
                strict=True,
            )
        ]
        for inputs, states in zip(captured, expected, strict=True):
            found = inputs.states[inputs.expert == number]
            assert found.shape == states.shape
            assert torch.allclose(found.mean(0), states.mean(0), atol=1e-5)
            assert torch.allclose(found.norm(dim=1).sort().values, states.norm(dim=1).sort().values, atol=1e-4)


def test_the_pass_in_bfloat16_as_on_a_gpu_gives_nearly_the_same(tmp_path, llamas, monkeypatch):
    plan = plan_of(tmp_path, llamas)
    exact = [inputs.states.clone() for inputs in capture_router_inputs(request(plan))]
    place, placed = streamed_pass._place, []

    def watched(layers, name, tensor, rooms, *rest):
        place(layers, name, tensor, rooms, *rest)
        parameter = layers[0].get_parameter(name)
        placed.append((parameter.dtype, parameter.data_ptr() == rooms[0][name].data_ptr()))

    monkeypatch.setattr(streamed_pass, "_place", watched)
    asked = replace(request(plan), compute=Compute(torch.device("cpu"), torch.bfloat16))
    rounded = [inputs.states.clone() for inputs in capture_router_inputs(asked)]
    for first, second in zip(exact, rounded, strict=True):
        assert not torch.equal(first, second)
        assert float((first - second).norm() / first.norm()) < 0.03
    # Weights are held once, as they are computed with.
    assert set(placed) == {(torch.bfloat16, True)}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> list[Path]:
    """Models with rows of whole 4-bit blocks."""
    root = tmp_path_factory.mktemp("wide")
    return [make_model(root / str(seed), seed, hidden_size=64, intermediate_size=128) for seed in range(4)]


@pytest.mark.parametrize(("bits", "likeness"), [(8, 0.99), (4, 0.8)])
def test_routers_of_a_quantised_base_are_near_those_of_the_whole_one(tmp_path, wide, bits, likeness):
    plan = plan_of(tmp_path, wide)
    exact, quantised = routers(plan).weights, routers(plan, base_bits=bits).weights
    cosines = torch.cosine_similarity(exact, quantised, dim=2)  # (layer, expert)
    assert float(cosines.min()) > likeness
    assert not torch.allclose(exact, quantised, rtol=1e-3)
    assert torch.equal(quantised, routers(plan, base_bits=bits).weights)


def test_on_a_cpu_a_quantised_base_is_run_in_float32_unless_asked(tmp_path, wide, monkeypatch):
    plan = plan_of(tmp_path, wide)
    monkeypatch.setattr(compute_dtype, "_SMALL", 1)
    monkeypatch.setattr(compute_dtype, "faster_dtype", lambda *_: torch.bfloat16)
    capture, seen = capture_router_inputs, []
    monkeypatch.setattr(computed, "router_inputs", lambda asked: seen.append(asked.compute.dtype) or capture(asked))
    for bits, asked in ((None, "auto"), (8, "auto"), (8, "bfloat16")):
        routers(plan, base_bits=bits, compute_dtype=asked)
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize(("bits", "kind"), [(8, Linear8bitLt), (4, Linear4bit)])
def test_each_layer_computes_with_bitsandbytes_and_is_gone_before_the_next(tmp_path, wide, monkeypatch, bits, kind):
    called, layers = [], []
    forward = kind.forward

    def watched(self, states):
        called.append(weakref.ref(self))
        assert self.weight.dtype in {torch.int8, torch.uint8}
        return forward(self, states)

    monkeypatch.setattr(kind, "forward", watched)
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *_: pytest.fail("a layer of full precision"))
    for _ in capture_router_inputs(replace(request(plan_of(tmp_path, wide)), base_bits=bits)):
        assert not any(linear() for linear in called)
        layers.append(len(called))
        called.clear()
    assert layers == [7, 7, 4]  # the last layer's FFN is not run


def test_a_quantised_base_without_bitsandbytes_is_refused_before_anything_is_written(tmp_path, llamas, monkeypatch):
    plan = plan_of(tmp_path, llamas)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RefusedError, match="to run the base model in 8 bits, bitsandbytes is needed"):
        merge(plan, tmp_path / "out", MergeOptions(base_bits=8))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_weight_in_full_precision_is_freed(bits):
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64))
    whole = weakref.ref(layer[0].weight)
    quantise_weight(layer, "0.weight", bits)
    assert whole() is None


def test_what_bitsandbytes_cannot_hold_in_4_bits_stays_as_it_is():
    layer = torch.nn.ModuleDict(
        {name: torch.nn.Linear(*sizes) for name, sizes in {"row": (96, 32), "tile": (64, 48), "good": (64, 32)}.items()}
    )
    layer["norm"] = torch.nn.LayerNorm(64)
    before = dict(layer.named_parameters())
    for name in before:
        quantise_weight(layer, name, 4)
    assert [type(module).__name__ for module in layer.values()] == ["Linear", "Linear", "Linear4bit", "LayerNorm"]
    assert {name for name, value in layer.named_parameters() if value is not before[name]} == {"good.weight"}


def test_hidden_is_the_contrast_of_mean_router_inputs(tmp_path, llamas):
    plan = plan_of(tmp_path, llamas)
    made = routers(plan)
    model = load(llamas[0])
    means = []
    for expert in plan.config.experts:
        states = [ffn_inputs(model, tokenizer()(prompt)["input_ids"])[1][1:] for prompt in expert.positive_prompts]
        means.append(torch.cat(states).mean(dim=0))
    expected = unit(torch.stack(means).numpy())
    expected = unit(expected - expected.mean(axis=0))
    assert np.allclose(unit(made.weights[1].numpy()), expected, atol=1e-4)
    assert made.report.layers[1].top_weight == pytest.approx(0.9, abs=0.01)


def test_rows_are_centred_over_the_experts(tmp_path, llamas):
    for mode in ("hidden", "cheap_embed"):
        weights = routers(plan_of(tmp_path, llamas, gate_mode=mode)).weights
        assert weights.mean(dim=1).abs().max() < 1e-5 * weights.abs().max()


def test_cheap_embed_is_the_contrast_of_mean_embeddings(tmp_path, llamas):
    plan = plan_of(tmp_path, llamas, gate_mode="cheap_embed")
    weights = routers(plan).weights
    table = load_file(llamas[0] / "model.safetensors")["model.embed_tokens.weight"]
    means = [
        table[[token for p in expert.positive_prompts for token in tokenizer()(p)["input_ids"][1:]]].mean(dim=0)
        for expert in plan.config.experts
    ]
    # The formula of docs/routers.md in torch, which the program does not use here.
    unit_means = torch.nn.functional.normalize(torch.stack(means))
    expected = unit_means - unit_means.mean(dim=0)
    expected = expected / expected.norm(dim=1).mean()
    assert all(torch.allclose(rows, expected, atol=1e-6) for rows in weights)


def test_prompts_that_end_alike_give_different_rows(tmp_path, llamas):
    text = (
        write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:3])
        .read_text()
        .replace("The lazy dog", "chat chat chat and so on")
        .replace("item 0", "dort sur le tapis and so on")
    )
    text = text.replace("item 1", "return argv main and so on")
    for mode in ("hidden", "cheap_embed"):
        config = parse_config(text.replace("gate_mode: hidden", f"gate_mode: {mode}"))
        assert routers(plan_merge(config)).report.distances[0, 1] > 0.5


def test_embedding_rows_are_looked_up_and_the_rest_is_not_read(tmp_path):
    rows, width = 2_500_000, 1024
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(rows * width * 4)
        file.seek(7 * width * 4)
        file.write(torch.ones(width).numpy().tobytes())
    embeddings = TensorInfo("e", path, "F32", (rows, width), 0, rows * width * 4)
    tracemalloc.start()
    found = read_rows(embeddings, [7, rows - 1])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.sum(axis=1).tolist() == [width, 0]
    assert peak_bytes < 10**6


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_rounded_and_read_as_torch_does(tmp_path, dtype):
    numbers = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 8)
    numbers[0, :2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])  # halfway in bfloat16: to even
    stored = numbers.to(getattr(torch, dtype))
    data = stored_bytes(numbers.numpy(), dtype)
    assert data == stored.view(torch.uint8).numpy().tobytes()
    assert torch.equal(torch.from_numpy(float32_of(data, dtype)).view(64, 8), stored.float())
    path = tmp_path / "rows"
    path.write_bytes(bytes(3) + data)
    tensor = TensorInfo("e", path, HEADER_DTYPES[dtype], (64, 8), 3, len(data))
    assert torch.equal(torch.from_numpy(read_rows(tensor, [0, 63])), stored[[0, 63]].float())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="rows: ended inside tensor 'e'"):
        read_rows(tensor, [63])


def test_an_expert_without_negative_prompts_does_not_win_every_token():
    generator = torch.Generator().manual_seed(0)
    common = 5 * torch.randn(64, generator=generator)
    own = torch.randn(3, 64, generator=generator)
    positive = common + own
    negative = torch.stack([common + own[1], torch.full((64,), torch.nan), common + own[0]])
    rows = torch.from_numpy(contrast(positive.numpy(), negative.numpy()))
    chosen = (positive @ rows.T).argmax(dim=1)
    assert chosen.tolist() == [0, 1, 2]
    naive = positive - torch.where(negative.isnan(), 0, negative)
    assert (positive @ naive.T).argmax(dim=1).tolist() == [1, 1, 1]


def test_negative_prompts_push_away(tmp_path, llamas):
    path = write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:3], experts_per_token=1)
    plain = routers(plan_merge(load_config(path))).weights
    path.write_text(
        path.read_text().replace("- positive_prompts:", "- negative_prompts: [The lazy fox]\n  positive_prompts:", 1)
    )
    pushed = routers(plan_merge(load_config(path))).weights
    assert not torch.allclose(plain, pushed, atol=1e-3)


def test_random_routers_are_seeded_and_scaled_for_the_hidden_size(tmp_path):
    folders = [make_model(tmp_path / str(seed), seed, hidden_size=256, intermediate_size=8) for seed in range(3)]
    for mode, deviation in (("random", 1 / 16), ("uniform_random", 1 / 16 / math.sqrt(3))):
        plan = plan_of(tmp_path, folders, gate_mode=mode)
        first, again, other = routers(plan).weights, routers(plan).weights, routers(plan, seed=1).weights
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert not torch.equal(first[0], first[1])
        assert float(first.std()) == pytest.approx(deviation, rel=0.05)
    assert float(first.abs().max()) <= 1 / 16


def test_two_runs_give_identical_files(tmp_path, llamas):
    plan = plan_of(tmp_path, llamas, gate_mode="hidden")
    for name in ("one", "two"):
        merge(plan, tmp_path / name / "model")
    for file in (tmp_path / "one" / "model").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / "model" / file.name).read_bytes()


def test_the_scale_meets_its_target():
    generator = torch.Generator().manual_seed(0)
    rows, states = torch.randn(4, 16, generator=generator), torch.randn(100, 16, generator=generator)
    for per_token in (1, 2, 3):
        scale = fit_scale(rows, states, per_token)
        weights, _ = top_weights(states @ rows.T * scale, max(per_token, 2), "softmax")
        assert float(weights[:, 0].mean()) == pytest.approx(0.9, abs=1e-3)


def test_the_routing_of_a_layer_is_counted():
    states = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    inputs = router_inputs(states, [0, 0, 1, 1], [True, True, True, False])
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    routing = route_layer(rows, inputs, asked(2, 1))
    assert routing.hit_rate == routing.top1_accuracy == (1.0, 1.0)
    assert routing.load == (0.5, 0.5)
    both = route_layer(rows, inputs, asked(2, 2))
    assert (both.hit_rate, both.top1_accuracy, both.load) == ((1.0, 1.0), (1.0, 1.0), (1.0, 1.0))


def report(own, load, distances=None) -> RoutingReport:
    names = ("fox", "code", "chat", "math")
    return RoutingReport(names, 2, (LayerRouting(0, own, own, load, 0.9),), distances or {})


def test_experts_that_are_never_chosen_are_named():
    found = report((0.9, 0.9, 0.01, 0.4), (0.9, 0.8, 0.01, 0.3)).warnings()
    assert found == [
        "expert chat is almost never chosen: 1.0% of the prompts' tokens reach it",
        "expert math gets fewer of its own prompts' tokens than chance would give it: 40.0% against 50.0%",
    ]


def test_an_expert_that_is_chosen_by_all_but_never_first_is_named():
    routing = LayerRouting(layer=0, hit_rate=(1.0, 1.0), top1_accuracy=(1.0, 0.0), load=(1.0, 1.0), top_weight=0.9)
    assert RoutingReport(("fox", "code"), 2, (routing,), {}).warnings() == [
        "expert code is almost never the first choice, not even for its own prompts: 0.0%"
    ]


def test_rows_that_are_almost_parallel_are_named():
    rows = np.array([[[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [-2.0, 0.0]]], np.float32)
    distances = row_distances(rows)
    # What all rows share changes no choice, and hides nothing.
    moved = row_distances(rows + np.array([7.0, -20.0], np.float32))
    assert moved == pytest.approx(distances, abs=1e-5)
    assert row_distances(rows[:, [0, 3]])[0, 1] == pytest.approx(1.0)
    good = (0.9,) * 4
    assert report(good, (0.5,) * 4, distances).warnings() == [
        "the router can hardly tell fox from code: their rows are almost parallel"
    ]


def test_prompts_are_encoded_as_the_tokenizer_does(tmp_path, llamas):
    plan = plan_of(tmp_path, llamas)
    prompts = encode_prompts(llamas[0], plan.config, 128, 0)
    assert prompts[0].ids == tuple(tokenizer()("The fox jumps.")["input_ids"])
    assert prompts[0].ids[0] == 1
    assert prompts[0].counted == (False,) + (True,) * (len(prompts[0].ids) - 1)


def llama_2_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE over characters, bytes for unknown ones, that puts a space in front, as SentencePiece does."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=140, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator(TEXT.split(), trainer)
    stored = json.loads(bpe.to_str())
    vocabulary = stored["model"]["vocab"]
    stored["model"]["byte_fallback"] = True
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    bpe = Tokenizer.from_str(json.dumps(stored))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["bytes", "spaces", "LlamaTokenizer", "truncating"])
def test_tokenizer_json_alone_gives_the_same_tokens(tmp_path, kind):
    made = llama_2_tokenizer() if kind in {"spaces", "LlamaTokenizer"} else tokenizer()
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if kind == "LlamaTokenizer":
        edit_json(tmp_path / "tokenizer_config.json", tokenizer_class=kind)
    if kind == "truncating":
        stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        stored.enable_truncation(3)
        stored.enable_padding(length=40)
        stored.save(str(tmp_path / "tokenizer.json"))
    texts = [
        "The fox",
        " a  space",
        "line\n\n\tx",
        LONG,
        "é 你 🙂 chat",
        "the <s> fox </s>",
        "<pad>",
        "▁x",
        "it's 12,5 ",
    ]
    config = config_of(positive_prompts=texts, negative_prompts=texts[:3])
    whole = encode_prompts(tmp_path, config, 128, 0)
    alone = encode_prompts(tmp_path, config, 128, 0, special_tokens=False)
    assert [prompt.counted_ids for prompt in whole] == [prompt.ids for prompt in alone]
    assert [(prompt.expert, prompt.positive) for prompt in whole] == [(p.expert, p.positive) for p in alone]
    assert all(len(prompt.ids) < len(all_ids.ids) for prompt, all_ids in zip(alone, whole, strict=True))


def test_cheap_embed_without_tokenizer_json_reads_prompts_by_transformers(tmp_path, llamas):
    base = shutil.copytree(llamas[0], tmp_path / "base")
    expected = routers(plan_of(tmp_path, [base, *llamas[1:]], gate_mode="cheap_embed")).weights
    tokenizer().backend_tokenizer.model.save(str(base))
    (base / "tokenizer.json").unlink()
    edit_json(base / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", unk_token="<pad>")
    found = routers(plan_of(tmp_path, [base, *llamas[1:]], gate_mode="cheap_embed")).weights
    assert torch.equal(found, expected)


@pytest.mark.parametrize("special_tokens", [True, False])
def test_prompts_without_tokens_are_refused(llamas, special_tokens):
    config = config_of(positive_prompts=["The fox", "Ω"])
    with pytest.raises(RouterError) as caught:
        encode_prompts(llamas[0], config, 128, 0, special_tokens=special_tokens)
    assert str(caught.value) == "experts[0].positive_prompts[1]: the base model's tokenizer finds no tokens in 'Ω'."


def test_prompts_that_do_not_fit_are_refused(tmp_path, llamas):
    plan = plan_of(tmp_path, llamas)
    with pytest.raises(
        RouterError, match=r"experts\[1\].positive_prompts\[0\]: has 9 tokens, the base model's context is 5"
    ):
        encode_prompts(llamas[0], plan.config, 5, 0)


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
def test_a_base_without_a_tokenizer_is_refused(tmp_path, mode):
    folders = [make_model(tmp_path / str(seed), seed) for seed in range(3)]
    for file in folders[0].glob("tokenizer*"):
        file.unlink()
    with pytest.raises(IncompatibleError, match="has no tokenizer to read the prompts with"):
        plan_of(tmp_path, folders, gate_mode=mode)
    (folders[0] / "tokenizer.json").write_text("{}")
    with pytest.raises(RouterError, match=r"the model's tokenizer cannot be used .* choose gate_mode random"):
        routers(plan_of(tmp_path, folders, gate_mode=mode))


def test_a_device_that_is_not_there_is_refused(tmp_path, llamas):
    plan = plan_of(tmp_path, llamas)
    with pytest.raises(RefusedError, match="device 'cuda:9' cannot be used here"):
        merge(plan, tmp_path / "out", MergeOptions(device="cuda:9"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path, mode):
    folders = [make_model(tmp_path / str(seed), seed, vocab_size=20) for seed in range(3)]
    with pytest.raises(
        CheckpointError, match=r"'model.embed_tokens.weight' has 20 rows, but the tokenizer gives token"
    ):
        routers(plan_of(tmp_path, folders, gate_mode=mode))


@pytest.mark.parametrize(
    ("mode", "where"),
    [("hidden", "numbers are not finite from the embeddings on"), ("cheap_embed", "embeddings are damaged")],
)
def test_routers_that_are_no_numbers_are_refused(tmp_path, llamas, mode, where):
    base = shutil.copytree(llamas[0], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][:] = math.inf
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(RouterError) as caught:
        routers(plan_of(tmp_path, [base, *llamas[1:]], gate_mode=mode))
    assert str(caught.value) == (
        f"the base model's {where}: model.embed_tokens.weight of {base / 'model.safetensors'} holds 5120 numbers that are "
        "infinite or NaN, the first at [0, 0]. Download it again."
    )


def test_without_prompts_there_is_no_table(tmp_path, llamas):
    path = tmp_path / "merge.yaml"
    experts = "".join(f"- source_model: {folder}\n" for folder in llamas[1:])
    path.write_text(f"base_model: {llamas[0]}\ngate_mode: random\nexperts:\n{experts}")
    assert routers(plan_merge(load_config(path))).report.layers == ()


@pytest.mark.parametrize("mode", ["cheap_embed", "random"])
def test_the_base_reads_prompts_only_for_routers_or_a_table(tmp_path, llamas, mode):
    path = write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:], gate_mode=mode)
    plan = plan_merge(load_config(path))
    assert routers(plan).report.layers == ()
    assert plan.notes == (
        f"the base model does not read the prompts for gate_mode {mode}, so an expert that is never chosen goes "
        "unnoticed; --routing-table has it read them",
    )
    asked = plan_merge(load_config(path), PlanOptions(routing_table=True))
    assert asked.notes == ()
    made = routers(asked)
    assert len(made.report.layers) == 3
    assert torch.equal(made.weights, routers(plan).weights)


def test_equal_directions_are_not_blown_up():
    """What rounding leaves of their difference says nothing."""
    same = np.ones((2, 4), np.float32)
    assert not contrast(same, np.zeros((2, 4), np.float32)).any()


def test_experts_that_never_meet_have_no_distance():
    rows = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    assert row_distances(rows, [frozenset({0}), frozenset({1})]).keys() == {(0, 2), (1, 2)}

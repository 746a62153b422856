"""What a model says, against transformers' own `generate`, and the experts of its tokens, against those of `routes`."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from moemerge import load_config, merge, plan_merge
from moemerge.chats import Chat, Message
from moemerge.errors import CheckpointError, IncompatibleError, RefusedError, SourceError
from moemerge.evaluation.runnable import open_mixture
from moemerge.evaluation.running import run_model
from moemerge.families.selection import MOE_FAMILIES
from moemerge.generation.answers import Sampling, open_generator, prompt_of
from moemerge.generation.loading import check_memory
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window, load_tokenizer
from tests.families.test_families import PAIRS, merged, readable
from tests.passes.test_passes import is_known
from tests.support.chats import CHATML, chat_tokenizer
from tests.support.families import DENSE
from tests.support.mixtures import VARIANTS, Layout, make_variant
from tests.support.models import edit_json, load, load_weights, make_model, save_weights, tokenizer, write_config

CPU = Compute(torch.device("cpu"), torch.float32)
PROMPT = "The quick brown fox"
# With each scoring, cache and attention; the other families are run by `make test-all`.
QUICK = {"mixtral", "deepseek_v3", "lfm2_moe", "gemma4_text", "qwen3_5_moe_text"}


def generated(model, ids: list[int], **keys) -> list[int]:
    """What transformers itself adds to tokens."""
    given = torch.tensor([ids])
    found = model.generate(given, attention_mask=torch.ones_like(given), pad_token_id=0, **keys)
    return found[0, len(ids) :].tolist()


def text_of(ids: list[int], added: list[int], folder: Path | None = None) -> str:
    """What tokens add to the text of others."""
    tokens = load_tokenizer(folder) if folder else tokenizer()
    before, whole = (tokens.decode(part, skip_special_tokens=True) for part in (ids, [*ids, *added]))
    return whole.removeprefix(before)


@pytest.fixture(scope="module")
def out(tmp_path_factory, llamas):
    root = tmp_path_factory.mktemp("generation")
    merge(plan_merge(load_config(write_config(root / "merge.yaml", llamas[0], llamas[1:]))), root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def generator(out):
    return open_generator(out, device="cpu")


@pytest.fixture
def copy(tmp_path, out):
    return shutil.copytree(out, tmp_path / "copy")


def one_of_each():
    first = {moe: name for name, moe in reversed(PAIRS)}
    assert first.keys() == MOE_FAMILIES.keys()
    assert first.keys() >= QUICK
    return [pytest.param(moe, first[moe], marks=() if moe in QUICK else pytest.mark.slow) for moe in sorted(first)]


def check_what_is_said(out: Path) -> None:
    """A mixture says what transformers says, and its experts are those of `routes`."""
    ids = tokenizer()(PROMPT)["input_ids"]
    expected = generated(load(out), ids, max_new_tokens=10, do_sample=False)
    answer = open_generator(out, device="cpu").generate(PROMPT, Sampling(10))
    assert answer.text == text_of(ids, expected, out)
    mixture, chosen = open_mixture(out), {}
    window = Window(0, (*ids, *expected), (True,) * (len(ids) + 10))
    run_model(
        mixture.runnable, [window], CPU, mixture=mixture, chosen=lambda choice: chosen.update({choice.layer: choice})
    )
    special = {token for token, told in load_tokenizer(out).added_tokens_decoder.items() if told.special}
    places = [len(ids) + place for place, token in enumerate(expected) if token not in special]
    (traced,) = answer.routes.texts
    assert answer.routes.layers == tuple(mixture.moe_layers)
    for place, layer in enumerate(mixture.moe_layers):
        choice = chosen[layer]
        count = choice.experts.shape[1]
        np.testing.assert_array_equal(traced.experts[place, :, :count], choice.experts.numpy()[places])
        np.testing.assert_allclose(traced.weights[place, :, :count], choice.weights.numpy()[places], atol=1e-4)
        assert not traced.weights[place, :, count:].any()


@pytest.mark.parametrize(("moe", "name"), one_of_each())
def test_every_kind_of_mixture_says_what_transformers_says_and_its_experts_are_those_of_routes(tmp_path, moe, name):
    readable(name, moe)
    model_type, sizes = DENSE[name]
    folders = [make_model(tmp_path / str(seed), seed, model_type, **sizes) for seed in range(4)]
    _, out = merged(tmp_path, folders[0], folders[1:], architecture=moe)
    check_what_is_said(out)


@pytest.mark.parametrize("layout", ["released", "in_memory"])
@pytest.mark.parametrize(
    "name",
    [
        "hunyuan_v1_moe, lists by layer", "glm4_moe, groups", "deepseek_v2, groups", "olmoe, as released", "gemma4_text",
        "ernie4_5_moe, biases, every second layer",
    ],
)  # fmt: skip
def test_released_mixtures_speak_as_well(tmp_path, name, layout: Layout):
    model_type, _ = VARIANTS[name]
    if not is_known(model_type):
        pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
    check_what_is_said(make_variant(tmp_path / "made", name, layout=layout))


def test_tokens_come_one_by_one_with_the_expert_of_the_largest_weight(generator):
    came = []
    answer = generator.generate(PROMPT, Sampling(12), came.append)
    (traced,) = answer.routes.texts
    assert [token.text for token in came] == list(answer.tokens)
    assert "".join(answer.tokens) == answer.text
    assert [token.expert for token in came] == answer.routes.majority(traced).tolist()
    assert (len(came), answer.is_cut) == (11, True)  # and one that is no text


def test_drawn_tokens_are_those_that_transformers_draws(out, generator):
    torch.manual_seed(5)
    keys = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0, "max_new_tokens": 12}
    ids = tokenizer()(PROMPT)["input_ids"]
    expected = text_of(ids, generated(load(out), ids, **keys))
    before = torch.random.get_rng_state()
    answer = generator.generate(PROMPT, Sampling(12, temperature=1.5, top_p=0.9, seed=5))
    assert answer.text == expected
    assert torch.equal(torch.random.get_rng_state(), before)
    assert generator.generate(PROMPT, Sampling(12, temperature=1.5, seed=6)).text != answer.text


def test_a_dense_model_speaks_without_experts(llamas):
    ids = tokenizer()(PROMPT)["input_ids"]
    expected = generated(load(llamas[0]), ids, max_new_tokens=12, do_sample=False)
    came = []
    answer = open_generator(llamas[0], device="cpu").generate(PROMPT, Sampling(12), came.append)
    assert answer.text == text_of(ids, expected)
    assert answer.routes is None
    assert {token.expert for token in came} == {None}


@pytest.mark.parametrize("where", ["generation_config.json", "tokenizer_config.json"])
def test_an_answer_ends_where_the_model_or_its_tokenizer_says(copy, generator, where):
    whole = generator.generate(PROMPT, Sampling(12))
    ids = tokenizer()(PROMPT)["input_ids"]
    fourth = generated(load(copy), ids, max_new_tokens=4, do_sample=False)[-1]
    if where.startswith("generation"):
        edit_json(copy / where, eos_token_id=[2, fourth])
    else:
        edit_json(copy / where, eos_token=tokenizer().convert_ids_to_tokens(fourth))
    answer = open_generator(copy, device="cpu").generate(PROMPT, Sampling(12))
    assert answer.tokens == whole.tokens[: len(answer.tokens)]
    assert len(answer.tokens) <= 3
    assert answer.tokens
    assert not answer.is_cut


def test_letters_come_whole(tmp_path):
    """Of a byte-level tokenizer and a model that knows no letters."""
    model = make_model(tmp_path / "model", vocab_size=404)
    chat_tokenizer(None).save_pretrained(model)
    answer = open_generator(model, device="cpu").generate("é", Sampling(60, temperature=1.0))
    ids = chat_tokenizer(None)("é")["input_ids"]
    torch.manual_seed(0)
    added = generated(load(model), ids, do_sample=True, top_k=0, max_new_tokens=60, eos_token_id=[1, 2])
    assert answer.text == chat_tokenizer(None).decode(added, skip_special_tokens=True)
    assert answer.text.count("\ufffd") < answer.tokens.count("") + 2


def test_a_chat_is_written_by_the_template():
    asked = prompt_of([("1", "2")], "3", system="0", plain=False)
    roles = ("system", "user", "assistant", "user")
    assert asked == Chat(tuple(Message(role, str(number)) for number, role in enumerate(roles)))
    assert prompt_of([("1", "2")], "3", system=None, plain=True) == "12\n3"


def test_the_template_and_the_next_answer_are_what_the_model_reads(tmp_path):
    model = make_model(tmp_path / "model", vocab_size=404)
    chat_tokenizer(CHATML).save_pretrained(model)
    text = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nfox<|im_end|>\n"
    ids = chat_tokenizer(None)(text, add_special_tokens=False)["input_ids"]
    expected = generated(load(model), ids, max_new_tokens=12, do_sample=False)
    answer = open_generator(model, device="cpu").generate(prompt_of([], "fox", system=None, plain=False), Sampling(12))
    assert answer.text == chat_tokenizer(None).decode(expected, skip_special_tokens=True)


def test_a_prompt_may_not_fill_the_context(generator):
    with pytest.raises(RefusedError) as refused:
        generator.generate("fox " * 200, Sampling(12))
    assert str(refused.value) == f"the prompt has 203 tokens, and {generator.name} reads 128. Shorten it."
    assert len(generator.generate("fox " * 120, Sampling(12)).tokens) == 5


def test_numbers_that_are_not_finite_are_named(copy):
    generator = open_generator(copy, device="cpu")
    generator._model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError) as damaged:
        generator.generate(PROMPT, Sampling(3))
    assert str(damaged.value) == (
        f"{copy}: the model's numbers are not finite. `moemerge eval` says where that begins."
    )


def test_a_router_that_is_not_finite_is_named(copy):
    name = "model.layers.1.block_sparse_moe.gate.weight"
    tensors = load_weights(copy)
    tensors[name][2, 5] = float("nan")
    save_weights(copy, tensors)
    with pytest.raises(CheckpointError) as damaged:
        open_generator(copy, device="cpu")
    assert str(damaged.value) == f"{copy}: {name} holds 1 number that is infinite or NaN, at [2, 5]."


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(out):
    model = open_mixture(out).runnable
    layers = [sum(np.prod(model.shapes[name]) for name in model.names(layer)) for layer in (None, 0, 1, 2)]
    need = 4 * (sum(layers) + max(layers))
    check_memory(model, CPU, need)
    check_memory(model, CPU, None)
    with pytest.raises(RefusedError) as refused:
        check_memory(model, CPU, need - 1)
    assert str(refused.value) == (
        f"{out}: needs {need / 1e3:.2f} kB of memory in float32, {(need - 1) / 1e3:.2f} kB are free on cpu. "
        f"In bfloat16 it needs {need / 2e3:.2f} kB: --compute-dtype bfloat16."
    )
    with pytest.raises(RefusedError) as refused:
        check_memory(model, CPU, 1000)
    assert str(refused.value).endswith(
        "1.00 kB are free on cpu. Use another device, or write it smaller for llama.cpp: `moemerge gguf --type q4_k_m`."
    )


def test_what_is_no_model_is_refused(tmp_path, copy):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(20))
    (tmp_path / "merge.yaml").write_text("base_model: a\n")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "no", "there is no such folder. Name the folder that holds the merged model."),
        (tmp_path / "a.gguf", "is a GGUF file, which llama.cpp runs. Name the folder that it was written from."),
        (
            tmp_path / "merge.yaml",
            f"is a config, not a model. Merge it with `moemerge {tmp_path}/merge.yaml OUT`, then name OUT.",
        ),
        (copy / "config.json", f"is one file of a model. Name its folder, {copy}."),
    ):
        with pytest.raises(SourceError) as refused:
            open_generator(path)
        assert str(refused.value) == f"{path}: {message}"
    with pytest.raises(SourceError, match="has no config.json, so it is not a model that moemerge can read"):
        open_generator(tmp_path / "empty")
    edit_json(copy / "config.json", model_type="gpt2")
    with pytest.raises(IncompatibleError, match="gpt2"):
        open_generator(copy)

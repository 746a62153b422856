"""`tokenizer: union` and `tokenizer: expert NAME`: rows, ids, files, and exactness of what uses no new token."""

import json
import shutil
from pathlib import Path

import gguf
import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from moemerge.checks.verification import verify_merge
from moemerge.config.loading import load_config
from moemerge.config.schema import CARD, MergeConfig
from moemerge.errors import ConfigError, IncompatibleError
from moemerge.evaluation.evaluator import evaluate
from moemerge.evaluation.figures import MERGED
from moemerge.evaluation.settings import EvaluationSettings
from moemerge.export.writing import GgufOptions, write_gguf
from moemerge.merging.gguf import merge_to_gguf
from moemerge.merging.merger import merge
from moemerge.model_card.markdown import as_text
from moemerge.planning import vocabulary_rows
from moemerge.planning.planner import plan_merge
from tests.routers.test_routers import llama_2_tokenizer
from tests.support.gguf_files import write_gguf as write_model
from tests.support.models import TEXT, edit_json, load, load_weights, make_model, save_weights, write_config
from tests.support.vocabularies import CHATML, TEMPLATE, with_tokens

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHAT = {"messages": [{"role": "user", "content": "The fox jumps."}]}


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> list[Path]:
    """A base without room for more tokens, a fine-tune, one with two tokens for chats, and one with three."""
    root = tmp_path_factory.mktemp("vocabularies")
    base, fox, plain, other = (
        make_model(root / name, seed, vocab_size=156, tuned_from=0)
        for seed, name in enumerate(("base", "fox", "plain", "other"))
    )
    chat = with_tokens(plain, root / "chat", seed=2)
    return [base, fox, chat, with_tokens(other, root / "tools", ["<tool>", *CHATML], template=None, seed=3)]


def plan_of(tmp_path: Path, models: list[Path], **keys: object):
    keys = {"experts_per_token": 1, "prompts": False, **keys}
    return plan_merge(load_config(write_config(tmp_path / "merge.yaml", models[0], models[1:], **keys)))


def merged(tmp_path: Path, models: list[Path], **keys: object):
    """Merge by a config, and verify it; gives the plan and the folder."""
    plan, out = plan_of(tmp_path, models, **keys), tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    merge(plan, out)
    assert verify_merge(plan, out).differences == ()
    return plan, out


def refusal(tmp_path: Path, models: list[Path], **keys: object) -> list[str]:
    with pytest.raises(IncompatibleError) as refused:
        plan_of(tmp_path, models, **keys)
    return list(refused.value.problems)


def ids_of(folder: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


def logits_of(folder: Path, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(torch.tensor([ids]), use_cache=False).logits[0]


def test_a_union_appends_the_experts_tokens_with_their_rows(tmp_path, chats):
    plan, out = merged(tmp_path, chats, tokenizer="union")
    _, kept = merged(tmp_path, chats, tokenizer="base")
    ours, base, chat, tools = map(load_weights, (out, chats[0], chats[2], chats[3]))
    for name in (EMBEDDINGS, HEAD):
        assert torch.equal(ours[name], torch.cat([base[name], chat[name][156:158], tools[name][156:157]]))
    assert ids_of(out, "<|im_start|>fox<|im_end|><tool>") == [156, *ids_of(chats[0], "fox"), 157, 158]
    plain = ids_of(chats[0], TEXT)
    assert ids_of(out, TEXT) == plain
    assert torch.equal(logits_of(out, plain)[:, :156], logits_of(kept, plain))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 159
    # The template's ends of turns stop generation beside the base's.
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 157]
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    told = (
        "tokenizer: beside the base's tokens the output has '<|im_start|>' and '<|im_end|>' (156 to 157), with the rows "
        "of experts[1] (chat)",
        "tokenizer: beside the base's tokens the output has '<tool>' (158), with the rows of experts[2] (tools)",
        "the chat template is that of experts[1] (chat), since the base has none, and generation stops at the tokens "
        "that end its texts, too (generation_config.json)",
    )
    assert plan.notes == (
        *told,
        f"tokenizer: the rows of '<|im_start|>', '<|im_end|>' differ between experts[1] {chats[2]} and experts[2] "
        f"{chats[3]}; those of the first are taken",
    )
    (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text().replace("<tool>", "<TOOL>"))
    (difference,) = verify_merge(plan, out).differences
    assert (difference.what, difference.expected) == (
        "tokenizer.json",
        "what `tokenizer: union` makes of the base's files",
    )
    card = (out / CARD).read_text()
    assert all(f"> **Note:** {as_text(note)}." in card for note in told)


def test_a_union_is_the_merge_of_a_base_that_has_the_tokens(tmp_path, chats):
    """Weights, routers and files, where plain prompts are put into the template that the union takes."""
    base, fox, chat, _ = chats
    of_chat = load_weights(chat)
    own = with_tokens(base, tmp_path / "own")
    rows = load_weights(own)
    for name in (EMBEDDINGS, HEAD):
        rows[name][156:158] = of_chat[name][156:158]
    save_weights(own, rows)
    for folder in (fox := shutil.copytree(fox, tmp_path / "fox"), own):
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    keys = {"prompts": True, "router": {"chat_prompts": "auto"}}
    union, out = merged(tmp_path, [base, fox, chat], tokenizer="union", **keys)
    _, expected = merged(tmp_path, [own, fox, chat], **keys)
    found, wanted = load_weights(out), load_weights(expected)
    assert union.shape.chat_prompts
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (out, expected))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.apply_chat_template(CHAT["messages"]) == theirs.apply_chat_template(CHAT["messages"])


def test_added_tokens_take_the_places_of_padding_and_its_dtype(tmp_path):
    """Tied embeddings of 160 rows have room for four tokens behind 156; the expert's rows are narrower than float32."""
    sizes = {"tie_word_embeddings": True, "tuned_from": 0}
    base, fox = (make_model(tmp_path / name, seed, **sizes) for seed, name in enumerate(("base", "fox")))
    chat = with_tokens(make_model(tmp_path / "plain", 2, dtype=torch.bfloat16, **sizes), tmp_path / "chat")
    plan, out = merged(tmp_path, [base, fox, chat], tokenizer_source="union", shared_weights="average")
    ours, average = load_weights(out)[EMBEDDINGS], merged(tmp_path, [base, fox, chat], shared_weights="average")[1]
    assert HEAD not in plan.outputs
    assert ours.shape[0] == 160
    assert torch.equal(ours[156:158], load_weights(chat)[EMBEDDINGS][156:158].float())
    expected = load_weights(average)[EMBEDDINGS]
    assert torch.equal(ours[:156], expected[:156])
    assert torch.equal(ours[158:], expected[158:])


@pytest.mark.parametrize("choice", ["union", "expert chat"])
def test_rows_of_other_tokens_are_not_averaged(tmp_path, chats, choice):
    """The last expert has another token in a row of the base's, whose token has the next row there."""
    own = ["<|pad|>", "<|tool|>"]
    base, fox = (with_tokens(chats[n], tmp_path / f"{n}", own, template=None, seed=n) for n in (0, 1))
    chat = with_tokens(chats[0], tmp_path / "chat", ["<|im_end|>", "<|pad|>"], template=None, seed=2)
    _, out = merged(tmp_path, [base, fox, chat], tokenizer=choice, shared_weights="average")
    ids = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids
    for name in (EMBEDDINGS, HEAD):
        ours, of_base, of_fox, of_chat = (load_weights(folder)[name] for folder in (out, base, fox, chat))
        assert torch.equal(ours[ids("<|pad|>")], of_base[156])
        assert torch.equal(ours[ids("<|im_end|>")], of_chat[156])
        assert torch.allclose(ours[:156], (of_fox + of_chat)[:156] / 2, atol=1e-6)


def test_with_the_bases_tokenizer_rows_of_other_tokens_are_not_averaged(tmp_path, chats, monkeypatch):
    """As above; and where most ids are another token's, embeddings and head are the base's as a whole."""
    own = ["<|pad|>", "<|tool|>"]
    base, fox = (with_tokens(chats[n], tmp_path / f"{n}", own, template=None, seed=n) for n in (0, 1))
    chat = with_tokens(chats[0], tmp_path / "chat", ["<|im_end|>", "<|pad|>"], template=None, seed=2)
    plan, out = merged(tmp_path, [base, fox, chat], shared_weights="average")
    note = (
        f"shared_weights: {{}} rows of {EMBEDDINGS} and {HEAD} are the base model's: an expert's tokenizer has other "
        "tokens under the ids of {} of the base's"
    )
    assert note.format(2, 2) in plan.notes
    for name in (EMBEDDINGS, HEAD):
        ours, of_base, of_fox, of_chat = (load_weights(folder)[name] for folder in (out, base, fox, chat))
        assert torch.equal(ours[156:], of_base[156:])
        assert torch.allclose(ours[:156], (of_fox + of_chat)[:156] / 2, atol=1e-6)
    document = json.loads((fox / "tokenizer.json").read_text())
    words = document["model"]["vocab"]
    document["model"]["vocab"] = dict(zip(words, reversed(words.values()), strict=True))
    (fox / "tokenizer.json").write_text(json.dumps(document))
    monkeypatch.setattr(vocabulary_rows, "_MOST_UNMIXED", 100)
    plan, out = merged(tmp_path, [base, fox, chat], shared_weights="average")
    assert note.format("all", 158 - 3) in plan.notes  # but the special ones, which are added tokens
    for name in (EMBEDDINGS, HEAD):
        assert torch.equal(load_weights(out)[name], load_weights(base)[name])


def test_the_tokenizer_of_an_expert(tmp_path, chats):
    """A fine-tune that gave other strings to ids of the base's added tokens, as those of Llama 3 do."""
    base, fox = (
        with_tokens(folder, tmp_path / folder.name, ["<|reserved_0|>", "<|reserved_1|>"], template=None)
        for folder in chats[:2]
    )
    chat = with_tokens(chats[0], tmp_path / "chat", ["<|im_end|>", "<|reserved_1|>"], seed=5)
    plan, out = merged(tmp_path, [base, fox, chat], tokenizer="expert chat")
    ours, of_base, of_chat = map(load_weights, (out, base, chat))
    for name in (EMBEDDINGS, HEAD):
        assert torch.equal(ours[name], torch.cat([of_base[name][:156], of_chat[name][156:157], of_base[name][157:]]))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (chat / name).read_bytes()
    assert plan.notes == (
        "tokenizer, chat template and generation_config.json are expert chat's, and so are the rows of '<|im_end|>'; it "
        "lacks the base's '<|reserved_0|>'",
    )
    assert ids_of(out, "<|im_end|>") == [156]


def test_other_vocabularies_are_refused(tmp_path, chats):
    base, fox, chat, _ = chats
    odd = shutil.copytree(fox, tmp_path / "odd")
    document = json.loads((odd / "tokenizer.json").read_text())
    words = document["model"]["vocab"]
    first, second = [word for word in words if word not in {"<s>", "</s>", "<pad>"}][:2]
    words[first], words[second] = words[second], words[first]
    (odd / "tokenizer.json").write_text(json.dumps(document))
    bare = shutil.copytree(fox, tmp_path / "bare")
    (bare / "tokenizer.json").rename(bare / "tokenizer.model")
    assert refusal(tmp_path, [base, odd, chat, bare], tokenizer="union") == [
        f"experts[0] {odd}: {first!r} is {words[first]} in its vocabulary, {words[second]} in the base's: `tokenizer: "
        "union` needs the base's vocabulary, beside added tokens. `tokenizer: base` does not",
        f"experts[2] {bare}: has no tokenizer.json, only tokenizer.model. Save it as tokenizer.json in a copy of the "
        "model, as save_pretrained of transformers does: `tokenizer: union` needs it. `tokenizer: base` does not",
    ]


def test_tokens_without_a_place_in_the_head_are_refused(tmp_path, chats):
    base = make_model(tmp_path / "base", vocab_size=156, tie_word_embeddings=True)
    assert refusal(tmp_path, [base, *chats[1:3]], tokenizer="union") == [
        f"experts[1] {chats[2]}: `tokenizer: union` takes rows of its {EMBEDDINGS}, and its head is another matrix "
        "(tie_word_embeddings false), where the base has one for both"
    ]


def test_rows_that_are_scaled_otherwise_are_refused(tmp_path, chats):
    scales = {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "attention_multiplier": 8**-0.5}
    plain = make_model(tmp_path / "plain", 2, "granite", vocab_size=156, residual_multiplier=1.0, **scales)
    chat = with_tokens(plain, tmp_path / "chat")
    where = f"experts[0] {chat}: `tokenizer: union` takes rows of its"
    assert refusal(tmp_path, [chats[0], chat, chats[1]], tokenizer="union") == [
        f"{where} {EMBEDDINGS}, and its embedding_multiplier is 12.0, where the base's is 1.0",
        f"{where} {HEAD}, and its logits_scaling is 8.0, where the base's is 1.0",
    ]


def test_union_is_advised_where_tokens_are_lost(tmp_path, chats):
    plan = plan_of(tmp_path, chats[:3])
    assert [advice for advice in plan.advice if "tokens" in advice] == [
        f"experts[1] {chats[2]}: has '<|im_start|>' and '<|im_end|>' as tokens of its own, which the base's tokenizer "
        "takes to pieces: `tokenizer: union` gives the output these tokens, with the expert's rows (docs/recipes.md)"
    ]
    assert not any("vocabulary of 158" in note for note in plan.notes)


def test_tokens_without_rows_are_left_out(tmp_path, chats):
    """As a padding token that was given to the tokenizer alone."""
    chat = shutil.copytree(chats[2], tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.add_tokens(["<|pad|>"], special_tokens=True)
    tokenizer.save_pretrained(chat)
    plan = plan_of(tmp_path, [*chats[:2], chat], tokenizer="union")
    assert plan.notes[0] == "experts[1] (chat): has no rows for its tokens '<|pad|>', which are left out"
    assert plan.output_config["vocab_size"] == 158


def test_tokens_of_an_expert_in_gguf_are_its_tokens(tmp_path, chats):
    """Whatever its cached small files hold: an expert does without a tokenizer elsewhere."""
    base, fox, chat, _ = chats
    file = write_model(chat, tmp_path / "chat.gguf")
    plan, out = merged(tmp_path, [base, fox, file], tokenizer="union")
    assert [token.text for token in plan.shape.vocabulary.new] == list(CHATML)
    assert torch.equal(load_weights(out)[EMBEDDINGS][156:], load_weights(chat)[EMBEDDINGS][156:158])
    odd = write_model(chat, tmp_path / "odd.gguf", settings={"tokenizer.ggml.pre": "falcon"})
    assert refusal(tmp_path, [base, fox, odd], tokenizer="union") == [
        f"experts[1] {odd}: its tokenizer splits texts in a way that is not known here, 'falcon': put its "
        f"tokenizer.json beside {odd}: `tokenizer: union` needs it. `tokenizer: base` does not"
    ]


def test_a_template_of_the_base_stays(tmp_path, chats):
    base = shutil.copytree(chats[0], tmp_path / "base")
    edit_json(base / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    plan, out = merged(tmp_path, [base, *chats[1:3]], tokenizer="union")
    assert plan.notes[1:] == (
        "the chat template stays the base's, not that of experts[1] (chat); `tokenizer: expert NAME` takes an expert's",
    )
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages[0]['content'] }}"
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()


@pytest.mark.parametrize(("model_type", "reader"), [("llama", "LlamaTokenizer"), ("qwen2", "Qwen2Tokenizer")])
def test_readers_that_take_another_class_for_the_output_read_the_tokens(tmp_path, model_type, reader):
    """transformers 5 makes a Llama's and a Qwen2's tokenizer of vocabulary and merges, a mixture's of the file."""
    base, fox = (make_model(tmp_path / n, seed, model_type, vocab_size=400) for seed, n in enumerate(("base", "fox")))
    for folder in (base, fox):
        if model_type == "llama":
            llama_2_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
            (folder / "tokenizer.model").write_bytes(b"what some programs read")
        edit_json(folder / "tokenizer_config.json", tokenizer_class=reader, unk_token="<unk>", pad_token=None)
    chat = with_tokens(fox, tmp_path / "chat", seed=2)
    edit_json(chat / "tokenizer_config.json", tokenizer_class=reader)
    plan, out = merged(tmp_path, [base, fox, chat], tokenizer="union")
    assert plan.made_files
    if model_type == "llama":  # for readers of tokenizer.model
        added = json.loads((out / "added_tokens.json").read_text())
        assert [added[token] for token in CHATML] == ids_of(out, "".join(CHATML))
    size = len(AutoTokenizer.from_pretrained(base))
    assert ids_of(out, "".join(CHATML)) == [size, size + 1]
    for text in (TEXT, "a  b\n\n c'S ½ 🙂"):
        assert ids_of(out, text) == ids_of(base, text)
        assert ids_of(out, f"{text}<|im_end|>{text}") == ids_of(chat, f"{text}<|im_end|>{text}")


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("kind", ["resized", "trained", "single"])
def test_tokens_that_came_with_an_adapter(tmp_path, chats, kind):
    """PEFT saves resized embeddings whole, and again where they were trained; single tokens beside them."""
    base, fox = chats[:2]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(CHATML), special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(158, mean_resizing=False)
    keys = {
        "resized": {},
        "trained": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "single": {"trainable_token_indices": {"embed_tokens": [156, 157]}},
    }[kind]
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM", **keys))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    for saved in (tuned, tokenizer):
        saved.save_pretrained(tmp_path / "adapter")
    expert = f"{base}+{tmp_path / 'adapter'}"
    (lost,) = [advice for advice in plan_of(tmp_path, [base, fox, expert]).advice if "union" in advice]
    assert lost.startswith(f"experts[1] {expert}: has '<|im_start|>' and '<|im_end|>' as tokens of its own")
    if kind == "single":
        assert refusal(tmp_path, [base, fox, expert], tokenizer="union") == [
            f"experts[1] {expert}: `tokenizer: union` takes rows of its {EMBEDDINGS}, which cannot be merged exactly: "
            f"{tmp_path / 'adapter'}: it trains single tokens"
        ]
        return
    expected = tuned.merge_and_unload().state_dict()
    for choice in ("union", "expert adapter"):
        plan, out = merged(tmp_path, [base, fox, expert], tokenizer=choice)
        for name in (EMBEDDINGS, HEAD):
            rows = torch.cat([load_weights(base)[name], expected[name][156:]])
            assert torch.equal(load_weights(out)[name], rows)
        assert ids_of(out, "<|im_end|>") == [157]
        assert not any("embed_tokens" in note for note in plan.notes)


def test_baselines_that_know_a_token_by_another_id_are_left_out(tmp_path, chats):
    """Of ids 156 to 158 the base has none, and the third expert gives them to other tokens."""
    _, out = merged(tmp_path, chats, tokenizer="union")
    (tmp_path / "chat.txt").write_text(f"<|im_start|>{TEXT}<|im_end|>")
    settings = EvaluationSettings(compute_dtype="float32", kept_losses=tmp_path / "kept")
    found = evaluate(out, {"chat": [str(tmp_path / "chat.txt")]}, settings)
    assert found.losses.keys() == {MERGED, "expert chat"}
    assert found.notes[:3] == (
        "base is left out: its tokenizer does not know '<|im_start|>' as 156",
        "expert fox is left out: its tokenizer does not know '<|im_start|>' as 156",
        "expert tools is left out: its tokenizer does not know '<|im_start|>' as 156",
    )


def test_chats_in_the_new_template_choose_the_shared_weights(tmp_path, chats):
    """The base has no template to read them with."""
    lines = [json.dumps({"messages": [{"role": "user", "content": line}]}) for line in TEXT.splitlines() * 8]
    for name in ("fox", "chat"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    path = write_config(
        tmp_path / "m.yaml", chats[0], chats[1:3], shared_weights="auto", tokenizer="union", gate_mode="ridge"
    )
    document = yaml.safe_load(path.read_text())
    for expert, name in zip(document["experts"], ("fox", "chat"), strict=True):
        expert["positive_texts"] = f"{name}.jsonl"
    document["experts"][0]["negative_prompts"] = ["Le chat"]
    path.write_text(yaml.safe_dump(document))
    said: list[str] = []
    merge(plan_merge(load_config(path)), tmp_path / "out", announce=said.append)
    (choice,) = [line for line in said if "auto chose" in line]
    assert " tokens)" in choice
    assert verify_merge(plan_merge(load_config(path)), tmp_path / "out").differences == ()


@pytest.mark.parametrize(("prompt", "cannot"), [("The fox", [2]), ("<|im_start|>fox", [0, 2]), (CHAT, [0, 2])])
def test_experts_write_text_where_they_know_its_tokens(tmp_path, chats, prompt, cannot):
    """The first expert has no new tokens, the last one by other ids."""
    prompts = [prompt, "<|im_start|>user", "The dog"]
    document = {
        "base_model": str(chats[0]),
        "experts": [
            {"source_model": str(model), "positive_prompts": [prompt]}
            for model, prompt in zip(chats[1:], prompts, strict=True)
        ],
        "router": {"calibration": "generate"},
        "tokenizer": "union",
    }
    with pytest.raises(IncompatibleError) as refused:
        plan_merge(load_config(document))
    assert list(refused.value.problems) == [
        f"experts[{number}] ({chats[number + 1].name}): does not know all tokens of its prompts by the ids that they have "
        "with `tokenizer: union`, so it cannot continue them (router.calibration: generate): give it positive_texts"
        for number in cannot
    ]


def test_tokens_that_vocabulary_and_added_tokens_list_are_added_ones(tmp_path, chats):
    chat = shutil.copytree(chats[2], tmp_path / "chat")
    document = json.loads((chat / "tokenizer.json").read_text())
    document["model"]["vocab"] |= dict(zip(CHATML, (156, 157), strict=True))
    (chat / "tokenizer.json").write_text(json.dumps(document))
    plan = plan_of(tmp_path, [*chats[:2], chat], tokenizer="union")
    assert [token.text for token in plan.shape.vocabulary.new] == [*CHATML]


def test_a_gguf_file_has_the_tokens(tmp_path, chats):
    plan, out = merged(tmp_path, chats, tokenizer="union")
    write_gguf(out, tmp_path / "a.gguf", GgufOptions())
    merge_to_gguf(plan, tmp_path / f"{out.name}.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / f"{out.name}.gguf").read_bytes()
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[156:] == [*CHATML, "<tool>"]
    assert fields["tokenizer.ggml.token_type"].contents()[156:] == [gguf.TokenType.CONTROL] * 3


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"tokenizer": "expert nobody"}, "tokenizer: names no expert, found 'nobody'; the experts are fox, chat"),
        (
            {"tokenizer": "both"},
            "tokenizer: expected base, union, or expert NAME with an expert's name, found 'both'",
        ),
        (
            {"tokenizer": {"source": "union", "tokens": {"<s>": {}}}},
            "tokenizer: expected base, union, or expert NAME with an expert's name: rows of single tokens cannot be "
            "chosen, found {'source': 'union', 'tokens': {'<s>': {}}}",
        ),
        (
            {"tokenizer": "union", "tokenizer_source": "union"},
            "tokenizer_source: is another name of tokenizer: keep one of them",
        ),
    ],
)
def test_wrong_choices_are_refused(chats, keys, problem):
    experts = [{"source_model": str(model)} for model in chats[1:3]]
    with pytest.raises(ConfigError) as refused:
        MergeConfig(base_model=str(chats[0]), experts=experts, **keys)
    assert list(refused.value.problems) == [problem]


def test_mergekits_spellings_mean_the_same(chats):
    experts = [{"source_model": str(model)} for model in chats[1:3]]
    for keys in ({"tokenizer": {"source": "union"}}, {"tokenizer_source": "union"}, {"tokenizer": "union"}):
        assert MergeConfig(base_model=str(chats[0]), experts=experts, **keys).vocabulary == "union"
    assert MergeConfig(base_model=str(chats[0]), experts=experts, tokenizer=None).vocabulary == "base"

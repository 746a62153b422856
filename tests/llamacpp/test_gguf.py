"""GGUF files that moemerge writes: the bytes of llama.cpp's converter, its keys, and transformers' tokens."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moemerge import load_config, merge, plan_merge
from moemerge.export.vocabulary import unknown
from moemerge.export.writing import GgufOptions, write_gguf
from moemerge.merging.gguf import merge_to_gguf
from moemerge.merging.options import MergeOptions
from tests.llamacpp.engine import computed, converted, encoded
from tests.support.families import DENSE, WINDOWS
from tests.support.models import edit_json, load, logits, make_model, token_ids, write_config
from tests.support.sentencepiece_model import VOCAB as PIECES
from tests.support.splits import VOCAB, WAYS, save

LAYERS = 3
TOLERANCE = 1e-3
"""Of the largest logit: all but gemma4_text are below 3e-6; its GELU comes from a table of float16."""
TYPES = ("f32", "f16", "bf16", "q8_0")
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}
MUP = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 2.0}
QWEN3 = {"head_dim": 32}
UNGROUPED = {"head_dim": 32, "num_key_value_heads": 4}
GLM_TOKENS = ("[gMASK]", "<|user|>", "<|observation|>", "<|endoftext|>")
SOLAR_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<unk>")


@dataclass(frozen=True)
class Kind:
    """A mixture: its family, what its models are, and what else there is."""

    moe: str
    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)
    shared: bool = False
    moe_layers: tuple[int, ...] = (0, 1, 2)
    tokens: tuple[str, ...] = ()
    """Added to the tokenizer."""


KINDS: dict[str, Kind] = {
    "mixtral": Kind("mixtral", "llama"),
    "mixtral, tied, llama3 rope": Kind("mixtral", "llama", LLAMA3 | {"tie_word_embeddings": True}),
    "mixtral, yarn": Kind("mixtral", "llama", YARN),
    "mixtral, head_dim, window": Kind("mixtral", "mistral", {"head_dim": 32, "sliding_window": 64}),
    "mixtral, appended shared": Kind("mixtral", "llama", shared=True),
    "granitemoe": Kind("granitemoe", "granite", MUP),
    "granitemoe, biases": Kind("granitemoe", "llama", {"attention_bias": True}),
    "granitemoeshared": Kind("granitemoeshared", "granite", MUP, shared=True),
    "granitemoehybrid": Kind("granitemoehybrid", "granite", MUP, shared=True),
    "qwen3_moe": Kind("qwen3_moe", "qwen3", {"head_dim": 16}),
    "qwen3_moe, tied, yarn": Kind("qwen3_moe", "qwen3", QWEN3 | YARN | {"tie_word_embeddings": True}),
    "glm4_moe of qwen2": Kind("glm4_moe", "qwen2", {}, shared=True, tokens=GLM_TOKENS),
    "glm4_moe, dense layers": Kind("glm4_moe", "llama", {}, shared=True, moe_layers=(1, 2), tokens=GLM_TOKENS),
    "glm4_moe of qwen3": Kind("glm4_moe", "qwen3", QWEN3, shared=True, tokens=GLM_TOKENS),
    "solar_open": Kind("solar_open", "llama", {}, shared=True, tokens=SOLAR_TOKENS),
    "dots1": Kind("dots1", "qwen3", UNGROUPED, shared=True),
    "dots1, dense layers": Kind("dots1", "qwen3", UNGROUPED, shared=True, moe_layers=(2,)),
    "lfm2_moe": Kind("lfm2_moe", "lfm2", DENSE["lfm2"][1] | SIZES | {"tie_word_embeddings": True}),
    "lfm2_moe, dense layers": Kind(
        "lfm2_moe", "lfm2", DENSE["lfm2"][1] | SIZES | {"tie_word_embeddings": True}, moe_layers=(1, 2)
    ),
    "cohere2_moe": Kind("cohere2_moe", "cohere2", DENSE["cohere2"][1] | SIZES),
    "cohere2_moe, dense layers": Kind("cohere2_moe", "cohere2", DENSE["cohere2"][1] | SIZES, moe_layers=(1, 2)),
    "mellum": Kind("mellum", "qwen3", QWEN3 | WINDOWS),
    "hy_v3": Kind("hy_v3", "qwen3", QWEN3),
    "hy_v3, shared, dense layers": Kind("hy_v3", "qwen3", QWEN3, shared=True, moe_layers=(1,)),
    "granitemoe_swa": Kind("granitemoe_swa", "granite_swa", DENSE["granite_swa"][1] | SIZES),
    "granitemoe_swa, shared": Kind("granitemoe_swa", "granite_swa", DENSE["granite_swa"][1] | SIZES, shared=True),
    "deepseek_v3": Kind("deepseek_v3", "youtu", DENSE["youtu"][1] | SIZES, shared=True),
    "deepseek_v3, dense layers": Kind(
        "deepseek_v3", "youtu", DENSE["youtu"][1] | SIZES, shared=True, moe_layers=(1, 2)
    ),
    "exaone_moe": Kind("exaone_moe", "qwen3", QWEN3, shared=True),
    "exaone_moe, dense layers": Kind("exaone_moe", "qwen3", QWEN3, shared=True, moe_layers=(1, 2)),
}


def read(file: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, tuple[int, ...], bytes]]]:
    """Keys with their values, and tensors: type, shape, bytes."""
    reader = gguf.GGUFReader(file)
    return (
        {name: field.contents() for name, field in reader.fields.items()},
        {t.name: (t.tensor_type, tuple(t.shape), t.data.tobytes()) for t in reader.tensors},
    )


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A mixture of a kind, made once, and the config that it is made of."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(name: str) -> tuple[Path, Path]:
        if name not in made:
            kind = KINDS[name]
            root = tmp_path_factory.mktemp("gguf")
            base, *experts = (
                make_model(root / str(seed), seed, kind.model_type, **SIZES | kind.sizes)
                for seed in range(3 + kind.shared)
            )
            tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
            tokenizer.add_tokens(list(kind.tokens), special_tokens=True)
            tokenizer.save_pretrained(base)
            keys: dict[str, Any] = {"shared_experts": [{"source_model": str(experts.pop())}]} if kind.shared else {}
            keys |= {"moe_layers": list(kind.moe_layers)} if len(kind.moe_layers) < LAYERS else {}
            config = write_config(root / "merge.yaml", base, experts, prompts=False, architecture=kind.moe, **keys)
            merge(plan_merge(load_config(config)), root / "out")
            made[name] = root / "out", config
        return made[name]

    return of


def compare(ours: Path, theirs: Path, *, without: str = "") -> None:
    """Equal keys, but for one that only theirs has, and equal tensors to the last byte."""
    keys, tensors = read(ours)
    expected_keys, expected_tensors = read(theirs)
    if without:
        del expected_keys[without]
        expected_keys["GGUF.kv_count"] -= 1
    assert keys == expected_keys
    assert tensors.keys() == expected_tensors.keys()
    for name, expected in expected_tensors.items():
        assert tensors[name] == expected, name


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", KINDS)
def test_files_are_those_of_the_converter_with_and_without_a_checkpoint(tmp_path, merged, name, kind):
    out, config = merged(name)
    ours = tmp_path / "ours.gguf"
    write_gguf(out, ours, GgufOptions(type=kind))
    # That it is the right one is tested below: transformers gives some families' tokenizers another.
    theirs = converted(out, kind, read(ours)[0]["tokenizer.ggml.pre"])
    assert isinstance(theirs, Path), theirs
    compare(ours, theirs)
    merge_to_gguf(plan_merge(load_config(config)), tmp_path / "out.gguf", type=kind)
    assert ours.read_bytes() == (tmp_path / "out.gguf").read_bytes()


@pytest.mark.parametrize(
    ("moe", "model_type", "shared"),
    [
        ("glm4_moe", "llama", False),
        ("glm4_moe", "llama", True),
        ("hunyuan_v1_moe", "hunyuan_v1_dense", True),
        ("hunyuan_v1_moe", "hunyuan_v1_dense", False),
    ],
)
def test_what_the_converter_refuses_is_computed_as_by_transformers(tmp_path, moe, model_type, shared):
    sizes = DENSE[model_type][1] | SIZES
    base, *experts = (make_model(tmp_path / str(n), n, model_type, **sizes) for n in range(4))
    keys = {"shared_experts": [{"source_model": str(experts.pop())}]} if shared else {}
    config = write_config(tmp_path / "merge.yaml", base, experts, prompts=False, architecture=moe, **keys)
    merge(plan_merge(load_config(config)), tmp_path / "out")
    assert isinstance(converted(tmp_path / "out", "f32"), str)
    write_gguf(tmp_path / "out", tmp_path / "ours.gguf", GgufOptions(type="f32"))
    found = computed(tmp_path / "ours.gguf", token_ids().tolist())
    assert found is not None
    expected = logits(load(tmp_path / "out")).numpy()
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


# ---- tokenizers

TEXTS = (
    "The return value of a function is a list of names, sorted by their length.",
    "def main(argv):\n    return {item: 1 for item in argv}\n\n\n\tx = 12345.678",
    "I'm sure they'll say it's HE'S or WE'VE, won't they? 'Twas 1, 22, 333, 4444 or 55555 (3.14e-10)!!!",
    "Ein K\u00e4se f\u00fcr 3 \u20ac, bitte!  \u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002 \u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",
    "   leading and trailing   \n \n\n  \t tabs \r\n",
    "emoji \U0001f680\U0001f636\u200d\U0001f32b\ufe0f (normal) \u2705, d\u00e9j\u00e0-vu na\u00efve",
)


@pytest.fixture
def out(tmp_path, merged):
    """A mixture whose vocabulary has room for all tokenizers."""
    name = "mixtral"
    base, *experts = (make_model(tmp_path / str(n), n, "llama", **SIZES, vocab_size=VOCAB) for n in range(3))
    config = write_config(tmp_path / "merge.yaml", base, experts, prompts=False, architecture=name)
    merge(plan_merge(load_config(config)), tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("name", WAYS)
def test_texts_are_split_as_transformers_splits_them(tmp_path, out, name):
    save(name, out)
    write_gguf(out, tmp_path / "ours.gguf", GgufOptions(type="f16"))
    theirs = converted(out, "f16", name)
    assert isinstance(theirs, Path), theirs
    compare(tmp_path / "ours.gguf", theirs)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert encoded(tmp_path / "ours.gguf", list(TEXTS)) == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("name", ["llama-bpe", "tekken", "qwen2"])
def test_no_token_is_put_in_front_where_the_tokenizer_puts_none(tmp_path, out, name):
    save(name, out)
    edit_json(out / "tokenizer.json", post_processor=None)
    write_gguf(out, tmp_path / "ours.gguf", GgufOptions(type="f16"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id
    assert encoded(tmp_path / "ours.gguf", list(TEXTS)) == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_a_tokenizer_that_is_not_known_is_read_by_the_converter_of_a_checkout(tmp_path, out, tokenizer_folder):
    """It knows one by a hash, which no tiny one has: what is not known here is a setting that it does not look at."""
    for file in out.glob("*token*"):
        file.unlink()
    shutil.copytree(tokenizer_folder, out, dirs_exist_ok=True)
    write_gguf(out, tmp_path / "known.gguf", GgufOptions(type="f16"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moemerge.export.metadata.read_vocabulary", mock.Mock(side_effect=unknown("...")))
        write_gguf(out, tmp_path / "ours.gguf", GgufOptions(type="f16", llama_cpp=Path(os.environ["LLAMACPP"])))
    compare(tmp_path / "ours.gguf", tmp_path / "known.gguf")
    assert not list(tmp_path.glob(".*"))


def test_a_sentencepiece_model_is_read_as_the_converter_reads_it(tmp_path, out, tokenizer_folder):
    for file in out.glob("*token*"):
        file.unlink()
    shutil.copytree(tokenizer_folder, out, dirs_exist_ok=True)
    added = {"<|im_end|>": False, "<unused7>": False, "\u2581user\u2581text": False, "<turn>": True}
    decoder = {
        str(PIECES + number): {"content": text, "special": special}
        for number, (text, special) in enumerate(added.items())
    }
    edit_json(out / "tokenizer_config.json", added_tokens_decoder=decoder, add_prefix_space=True)
    (out / "added_tokens.json").write_text(json.dumps({"<more>": PIECES + 10, "<beyond>": VOCAB}))
    write_gguf(out, tmp_path / "ours.gguf", GgufOptions(type="f16"))
    theirs = converted(out, "f16")
    assert isinstance(theirs, Path), theirs
    compare(tmp_path / "ours.gguf", theirs)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    # Before a text that begins with a space, transformers puts no other in front; llama.cpp and SentencePiece do.
    texts = [text for text in TEXTS if text[0] != " "]
    assert encoded(tmp_path / "ours.gguf", texts) == [tokenizer(text)["input_ids"] for text in texts]


def test_ernies_mixture_is_read_as_the_converter_reads_it(tmp_path, tokenizer_folder):
    sizes = SIZES | {"vocab_size": PIECES}
    base, *experts = (make_model(tmp_path / str(n), n, "ernie4_5", **sizes) for n in range(3))
    shutil.copytree(tokenizer_folder, base, dirs_exist_ok=True)
    config = write_config(tmp_path / "merge.yaml", base, experts, prompts=False, architecture="ernie4_5_moe")
    merge(plan_merge(load_config(config)), tmp_path / "out")
    for kind in TYPES:
        write_gguf(tmp_path / "out", tmp_path / "ours.gguf", GgufOptions(type=kind, overwrite=True))
        theirs = converted(tmp_path / "out", kind)
        assert isinstance(theirs, Path), theirs
        # Where it is null, as here, the converter writes that no space is put in front, which is not so.
        compare(tmp_path / "ours.gguf", theirs, without="tokenizer.ggml.add_space_prefix")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [text for text in TEXTS if text[0] != " "]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    assert encoded(tmp_path / "ours.gguf", texts) == expected
    assert encoded(theirs, texts) != expected


@pytest.mark.parametrize("tied", [True, False])
def test_gemmas_mixture_is_read_as_the_converter_reads_it(tmp_path, tokenizer_folder, tied):
    sizes = DENSE["gemma4_text"][1] | {"vocab_size": PIECES, "vocab_size_per_layer_input": PIECES}
    sizes |= {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": tied}
    base, *experts = (make_model(tmp_path / str(n), n, "gemma4_text", **sizes) for n in range(3))
    shutil.copytree(tokenizer_folder, base, dirs_exist_ok=True)
    (base / "tokenizer.model").unlink()
    config = write_config(tmp_path / "merge.yaml", base, experts, prompts=False, architecture="gemma4_text")
    merge(plan_merge(load_config(config)), tmp_path / "out")
    for kind in TYPES:
        write_gguf(tmp_path / "out", tmp_path / "ours.gguf", GgufOptions(type=kind, overwrite=True))
        theirs = converted(tmp_path / "out", kind)
        assert isinstance(theirs, Path), theirs
        compare(tmp_path / "ours.gguf", theirs)
        merge_to_gguf(plan_merge(load_config(config)), tmp_path / "out.gguf", MergeOptions(overwrite=True), type=kind)
        assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


@pytest.mark.parametrize("named", [True, False])
def test_a_tokenizer_json_with_byte_fallback_is_read_as_the_converter_reads_it(tmp_path, tokenizer_folder, named):
    base, *experts = (make_model(tmp_path / str(n), n, "llama", **SIZES, vocab_size=PIECES + 2) for n in range(3))
    config = write_config(tmp_path / "merge.yaml", base, experts, prompts=False, architecture="mixtral")
    merge(plan_merge(load_config(config)), tmp_path / "out")
    out = tmp_path / "out"
    for file in out.glob("*token*"):
        file.unlink()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    tokenizer.add_tokens(["<user>"])
    tokenizer.add_special_tokens({"pad_token": "<user>"} if named else {})
    tokenizer.save_pretrained(out)
    (out / "tokenizer.model").unlink(missing_ok=True)
    write_gguf(out, tmp_path / "ours.gguf", GgufOptions(type="f16"))
    theirs = converted(out, "f16")
    assert isinstance(theirs, Path), theirs
    compare(tmp_path / "ours.gguf", theirs)


def test_there_are_as_many_tokens_as_embeddings_which_the_engine_demands(tmp_path, tokenizer_folder):
    base, *experts = (make_model(tmp_path / str(n), n, "llama", **SIZES, vocab_size=PIECES + 8) for n in range(3))
    config = write_config(tmp_path / "merge.yaml", base, experts, prompts=False, architecture="mixtral")
    merge(plan_merge(load_config(config)), tmp_path / "out")
    shutil.copytree(tokenizer_folder, tmp_path / "out", dirs_exist_ok=True)
    (tmp_path / "out" / "tokenizer.model").unlink()
    write_gguf(tmp_path / "out", tmp_path / "ours.gguf", GgufOptions(type="f32"))
    theirs = converted(tmp_path / "out", "f32")
    assert isinstance(theirs, Path), theirs
    assert computed(theirs, [[1, 2, 3]]) is None
    assert computed(tmp_path / "ours.gguf", [[1, 2, 3]]) is not None


TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
TEMPLATES: dict[str, dict[str, str]] = {
    "none": {},
    "a file": {"chat_template.jinja": TEMPLATE},
    "files": {"chat_template.jinja": TEMPLATE, "additional_chat_templates/tool-use.jinja": TEMPLATE + "!"},
    "json": {"chat_template.json": json.dumps({"chat_template": TEMPLATE})},
    "the config": {"chat_template.jinja": "other"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "the config": {"chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": "rag"}]},
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_and_settings_are_those_of_the_converter(tmp_path, out, name):
    (out / "additional_chat_templates").mkdir()
    for file, text in TEMPLATES[name].items():
        (out / file).write_text(text)
    edit_json(
        out / "tokenizer_config.json",
        add_bos_token=False,
        add_eos_token=True,
        unk_token="<s>",
        **SETTINGS.get(name, {}),
    )
    edit_json(out / "config.json", pad_token_id=7)
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    (out / "generation_config.json").write_text(json.dumps(sampling))
    card = out / "README.md"
    card.write_text(
        card.read_text().replace(
            "tags:", "license: apache-2.0\nlanguage: [en, de]\nbase_model: [meta-llama/Llama-3.2-1B]\ntags:"
        )
    )
    write_gguf(out, tmp_path / "ours.gguf", GgufOptions(type="f16"))
    theirs = converted(out, "f16", "gpt-2")
    assert isinstance(theirs, Path), theirs
    compare(tmp_path / "ours.gguf", theirs)


@pytest.mark.parametrize("single", ["$A </s>", "<s> $A </s>", "<s> $A <eot>", "$A"])
@pytest.mark.parametrize("pair", ["$A $B", "<s> $A </s> $B </s>", "$A </s> $B", "<s> $A <s> $B"])
@pytest.mark.parametrize("named", [True, False])
def test_what_is_put_around_texts_is_read_as_the_converter_reads_it(tmp_path, out, single, pair, named):
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    ids = {"<s>": 1, "</s>": 2, "<eot>": 0}

    def steps(text: str) -> list[dict[str, Any]]:
        return [
            {"Sequence": {"id": part[1], "type_id": 0}}
            if part[0] == "$"
            else {"SpecialToken": {"id": part, "type_id": 0}}
            for part in text.split()
        ]

    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": steps(single),
        "pair": steps(pair),
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in ids.items()},
    }
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit_json(
        out / "tokenizer_config.json", add_bos_token=True, **({} if named else {"bos_token": None, "eos_token": None})
    )
    write_gguf(out, tmp_path / "ours.gguf", GgufOptions(type="f16"))
    theirs = converted(out, "f16", "gpt-2")
    assert isinstance(theirs, Path), theirs
    compare(tmp_path / "ours.gguf", theirs)

"""GGUF files that moemerge writes: the bytes of llama.cpp's converter, its keys, and transformers' tokens."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoTokenizer

from moemerge import load_config, merge, plan_merge
from moemerge.export.writing import write_gguf
from moemerge.merging_to_gguf import merge_to_gguf
from tests.llamacpp.engine import converted, encoded
from tests.llamacpp.kinds import VOCAB as PIECES
from tests.models import edit_json, make_model, write_config
from tests.splits import VOCAB, WAYS, save

TYPES = ("f32", "f16", "bf16", "q8_0")
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}
KINDS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "mixtral": ("mixtral", "llama", {}, False),
    "mixtral, tied, llama3 rope": ("mixtral", "llama", LLAMA3 | {"tie_word_embeddings": True}, False),
    "mixtral, yarn": ("mixtral", "llama", YARN, False),
    "mixtral, head_dim, window": ("mixtral", "mistral", {"head_dim": 32, "sliding_window": 64}, False),
    "mixtral, appended shared": ("mixtral", "llama", {}, True),
    "granitemoe": ("granitemoe", "granite", {}, False),
    "granitemoe, biases": ("granitemoe", "llama", {"attention_bias": True}, False),
    "granitemoeshared": ("granitemoeshared", "granite", {}, True),
    "qwen3_moe": ("qwen3_moe", "qwen3", {"head_dim": 16}, False),
    "qwen3_moe, tied": ("qwen3_moe", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}, False),
}
# What tells a file of one program from one of another.
ASIDE: set[str] = set()


def read(file: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, tuple[int, ...], bytes]]]:
    """Keys with their values, and tensors: type, shape, bytes."""
    reader = gguf.GGUFReader(file)
    return (
        {name: field.contents() for name, field in reader.fields.items() if name not in ASIDE},
        {t.name: (t.tensor_type, tuple(t.shape), t.data.tobytes()) for t in reader.tensors},
    )  # fmt: skip


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A mixture of a kind, made once, and the config that it is made of."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(name: str) -> tuple[Path, Path]:
        if name not in made:
            moe, model_type, sizes, shared = KINDS[name]
            root = tmp_path_factory.mktemp("gguf")
            base, *experts = (
                make_model(root / str(seed), seed, model_type, **SIZES | sizes) for seed in range(3 + shared)
            )
            keys = {"shared_experts": [{"source_model": str(experts.pop())}]} if shared else {}
            config = write_config(root / "merge.yaml", base, experts, prompts=False, architecture=moe, **keys)
            merge(plan_merge(load_config(config)), root / "out")
            made[name] = root / "out", config
        return made[name]

    return of


def compare(ours: Path, theirs: Path) -> None:
    """Equal keys, and equal tensors to the last byte."""
    keys, tensors = read(ours)
    expected_keys, expected_tensors = read(theirs)
    assert keys == expected_keys
    assert tensors.keys() == expected_tensors.keys()
    for name, expected in expected_tensors.items():
        assert tensors[name] == expected, name


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", KINDS)
def test_files_are_those_of_the_converter_with_and_without_a_checkpoint(tmp_path, merged, name, kind):
    out, config = merged(name)
    theirs = converted(out, kind, "gpt-2")
    assert isinstance(theirs, Path), theirs
    ours = tmp_path / "ours.gguf"
    write_gguf(out, ours, type=kind)
    compare(ours, theirs)
    merge_to_gguf(plan_merge(load_config(config)), tmp_path / "out.gguf", type=kind)
    assert ours.read_bytes() == (tmp_path / "out.gguf").read_bytes()


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
    write_gguf(out, tmp_path / "ours.gguf", type="f16")
    theirs = converted(out, "f16", name)
    assert isinstance(theirs, Path), theirs
    compare(tmp_path / "ours.gguf", theirs)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert encoded(tmp_path / "ours.gguf", list(TEXTS)) == [tokenizer(text)["input_ids"] for text in TEXTS]


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
    write_gguf(out, tmp_path / "ours.gguf", type="f16")
    theirs = converted(out, "f16")
    assert isinstance(theirs, Path), theirs
    compare(tmp_path / "ours.gguf", theirs)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    # Before a text that begins with a space, transformers puts no other in front; llama.cpp and SentencePiece do.
    texts = [text for text in TEXTS if text[0] != " "]
    assert encoded(tmp_path / "ours.gguf", texts) == [tokenizer(text)["input_ids"] for text in texts]


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
    write_gguf(out, tmp_path / "ours.gguf", type="f16")
    theirs = converted(out, "f16")
    assert isinstance(theirs, Path), theirs
    compare(tmp_path / "ours.gguf", theirs)


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
    write_gguf(out, tmp_path / "ours.gguf", type="f16")
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
    write_gguf(out, tmp_path / "ours.gguf", type="f16")
    theirs = converted(out, "f16", "gpt-2")
    assert isinstance(theirs, Path), theirs
    compare(tmp_path / "ours.gguf", theirs)

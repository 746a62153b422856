"""Tokenizers made of GGUF files: their ids are those of the tokenizers that the files were written from."""

import json
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.gguf_contents import read_contents
from moemerge.errors import IncompatibleError
from moemerge.export.vocabulary import read_vocabulary
from moemerge.families.splitting import WHOLE_WORDS
from moemerge.passes.proving import TEXTS
from moemerge.sources.gguf.tokenizer import tokenizer_config, tokenizer_json
from moemerge.sources.model_folder import open_model
from tests.sources.test_gguf import plain_copy
from tests.support.gguf_files import write_gguf
from tests.support.models import load_weights, make_model, write_config
from tests.support.splits import VOCAB, WAYS, byte_level, save


def write_vocabulary(file: Path, vocabulary: Any, **settings: Any) -> Path:
    """A file with a tokenizer alone."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("name", WAYS)
def test_byte_level_tokenizers_give_the_ids_that_they_gave(tmp_path, name):
    save(name, tmp_path)
    settings = {"bos_token_id": 1, "add_bos_token": True}
    contents = read_contents(write_vocabulary(tmp_path / "t.gguf", read_vocabulary(tmp_path, VOCAB), **settings))
    text = tokenizer_json(contents)
    made, given = Tokenizer.from_str(text), byte_level(name)
    assert made.get_vocab() == given.get_vocab()
    for text in (*TEXTS, "a<tool>b <tool> <|plain|>c<s>"):
        assert made.encode(text).ids == given(text)["input_ids"], text
        if "<" not in text:  # which begins special tokens
            whole = unicodedata.normalize("NFC", text) if "qwen" in name else text
            assert made.decode(made.encode(text).ids) == whole
    assert json.loads(tokenizer_json(contents))["model"]["ignore_merges"] == (name in WHOLE_WORDS)


class Pieces:
    """A vocabulary as SentencePiece learns it."""

    model, pre, merges = "llama", "default", ()
    tokens = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
              "▁t", "he", "▁the", "in", "er", "▁a", *"▁abcdefghijklmnopqrstuvwxyz", "<tool>", "[PAD293]")  # fmt: skip
    types = (2, 3, 3, *[6] * 256, *[1] * 33, 4, 5)
    scores = (0.0, 0.0, 0.0, *[0.0] * 256, *(-float(number) for number in range(33)), -1000.0, -10000.0)


def test_pieces_are_converted_as_transformers_converts_them(tmp_path):
    settings = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "context_length": 64}
    file = write_vocabulary(tmp_path / "t.gguf", Pieces, **settings)
    contents = read_contents(file)
    assert tokenizer_config(contents) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 64,
    }
    (tmp_path / "made").mkdir()
    (tmp_path / "made/tokenizer.json").write_text(tokenizer_json(contents))
    (tmp_path / "made/tokenizer_config.json").write_text(json.dumps(tokenizer_config(contents)))
    (tmp_path / "made/config.json").write_text(json.dumps({"model_type": "llama"}))
    made = AutoTokenizer.from_pretrained(tmp_path / "made")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    for text in ("the thinner", "other", "two  spaces ", "a\tb", "größe 🎉", "a<tool>", ""):
        assert made(text)["input_ids"] == theirs(text)["input_ids"], text
        assert made.decode(made(text)["input_ids"], skip_special_tokens=True) == text, text
    assert made("the")["input_ids"] == [1, 261]
    assert made(" the")["input_ids"] == [1, 265, 261]  # as SentencePiece, and unlike transformers, which adds no space
    assert "[PAD293]" not in made.get_vocab()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "t5"}, "is of the kind 't5', and byte-level BPE (gpt2) and SentencePiece (llama) alone are read"),
        ({"pre": "falcon"}, "splits texts in a way that is not known here, 'falcon'"),
        ({"merges": ["a nowhere"]}, "has a merge that gives no token, 'a nowhere'"),
        ({"types": [1]}, f"has {VOCAB} tokens, and types of 1"),
    ],
)
def test_a_tokenizer_of_another_kind_is_none(tmp_path, changes, reason):
    save("qwen2", tmp_path)
    vocabulary = read_vocabulary(tmp_path, VOCAB)
    for name, value in changes.items():
        setattr(vocabulary, name, value)
    contents = read_contents(write_vocabulary(tmp_path / "t.gguf", vocabulary))
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        tokenizer_json(contents)


def test_a_merge_with_prompts_on_a_file_is_that_on_its_plain_copy(tmp_path, llamas):
    base = write_gguf(llamas[0], tmp_path / "base.gguf", "F16", settings={"tokenizer.chat_template": "{{ messages }}"})
    copy = plain_copy(base, llamas[0], tmp_path / "copy")
    outs = []
    for number, reference in enumerate((base, copy)):
        path = write_config(tmp_path / f"{number}.yaml", reference, llamas[1:3], dtype="float32")
        merge(plan_merge(load_config(path)), tmp_path / f"out{number}")
        outs.append(tmp_path / f"out{number}")
    for name in load_weights(outs[1]):
        assert (load_weights(outs[0])[name] == load_weights(outs[1])[name]).all(), name
    made, given = (AutoTokenizer.from_pretrained(out) for out in outs)
    assert all(made(text)["input_ids"] == given(text)["input_ids"] for text in TEXTS)
    assert made.chat_template == "{{ messages }}"
    assert (made.bos_token, made.eos_token, made.pad_token) == ("<s>", "</s>", "<pad>")


def test_a_tokenizer_beside_the_file_takes_the_place_of_one_that_is_not_read(tmp_path, llamas):
    base = write_gguf(llamas[0], tmp_path / "base.gguf", settings={"tokenizer.ggml.pre": "falcon"})
    path = write_config(tmp_path / "merge.yaml", base, llamas[1:3])
    reason = "tokenizer splits texts in a way that is not known here, 'falcon'"
    with pytest.raises(IncompatibleError) as caught:
        plan_merge(load_config(path))
    assert str(caught.value) == (
        "base_model: has no tokenizer to read the prompts with.\n"
        f"  - its {reason}: put its tokenizer.json beside {base}, or remove the prompts and choose gate_mode random"
    )
    shutil.copy(llamas[0] / "tokenizer.json", tmp_path)
    plan = plan_merge(load_config(path))
    own = reason.removeprefix("tokenizer ")
    assert f"{base}: its tokenizer is the tokenizer.json beside it, since its own {own}" in plan.notes
    assert plan.copied_files["tokenizer.json"].read_bytes() == (llamas[0] / "tokenizer.json").read_bytes()


def test_small_files_are_written_once(tmp_path, llamas):
    file = write_gguf(llamas[0], tmp_path / "base.gguf")
    first = open_model(str(file), print)
    again = open_model(str(file), print)
    assert (first.folder, first.config) == (again.folder, again.config)
    assert sorted(path.name for path in first.folder.iterdir()) == ["config.json", "tokenizer_config.json"]
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    open_model(str(file), print)
    assert times == {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    other = open_model(str(write_gguf(make_model(tmp_path / "o", 3, vocab_size=161), tmp_path / "base2.gguf")), print)
    assert other.folder != first.folder

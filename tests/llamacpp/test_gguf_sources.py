"""Files of llama.cpp's own converter, read back as models: tensors, settings and tokenizers are the original's."""

import json

import numpy as np
import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer

from moemerge.checkpoint.derived import read_values
from moemerge.checkpoint.gguf_contents import read_contents
from moemerge.export.vocabulary import read_vocabulary
from moemerge.families.dense import read_dense
from moemerge.passes.proving import TEXTS
from moemerge.sources.gguf.tokenizer import tokenizer_json
from moemerge.sources.model_folder import open_model
from moemerge.sources.tensor_tables import read_tensor_table
from tests.llamacpp.engine import converted
from tests.sources.test_gguf import KINDS, UNSAID
from tests.sources.test_gguf_tokenizer import write_vocabulary
from tests.support import sentencepiece_model
from tests.support.models import load_weights, make_model


@pytest.mark.parametrize("name", KINDS)
def test_a_converted_model_is_read_as_it_was(tmp_path, name):
    model_type, sizes = KINDS[name]
    folder = make_model(tmp_path / "model", 1, model_type, torch.float16, **sizes)
    file = converted(folder, "f16", "gpt-2")
    model = open_model(str(file), print)
    made, given = read_dense(model.config), read_dense(json.loads((folder / "config.json").read_text()))
    ours, theirs = ({k: v for k, v in read.values.items() if k not in UNSAID} for read in (made, given))
    assert (made.facts, made.sizes, ours) == (given.facts, given.sizes, theirs)
    expected = load_weights(folder)
    found = {name: read_values(tensor) for name, tensor in read_tensor_table(model, print).items()}
    assert found.keys() == expected.keys()
    for tensor, numbers in found.items():
        assert np.array_equal(numbers, expected[tensor].float().numpy()), tensor
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    read = Tokenizer.from_str(tokenizer_json(read_contents(file)))
    for text in TEXTS:
        if "<|endoftext|>" not in text:  # which Qwen's class adds, by which the converter reads the tokenizer
            assert read.encode(text).ids == tokenizer.encode(text).ids, text


def test_pieces_give_the_ids_of_sentencepiece(tmp_path):
    sentencepiece_model.learn_pieces(tmp_path / "tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    vocabulary = read_vocabulary(tmp_path, sentencepiece_model.VOCAB)
    file = write_vocabulary(tmp_path / "t.gguf", vocabulary, bos_token_id=1, add_bos_token=False)
    made = Tokenizer.from_str(tokenizer_json(read_contents(file)))
    for text in TEXTS:
        if "<" not in text and "\u2581" not in text:
            assert made.encode(text).ids == pieces.encode(text), text
            assert made.decode(made.encode(text).ids) == text

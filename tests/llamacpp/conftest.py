"""A tokenizer that llama.cpp's converter accepts as it is."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
from transformers import LlamaTokenizer

from tests.llamacpp.engine import VOCAB


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A SentencePiece tokenizer in the files of Llama 2; the text that it learns from comes with Python.

    The converter knows byte-level tokenizers by a hash and refuses a new one.
    """
    folder = tmp_path_factory.mktemp("tokenizer")
    with (folder / "tokenizer.model").open("wb") as written:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for topic in topics.values() for line in topic.splitlines() if line),
            model_writer=written, vocab_size=VOCAB, model_type="bpe", byte_fallback=True, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
        )  # fmt: skip
    LlamaTokenizer.from_pretrained(folder, add_bos_token=True).save_pretrained(folder)
    return folder

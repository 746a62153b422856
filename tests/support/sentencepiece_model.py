"""A SentencePiece tokenizer, learned from text that comes with Python."""

from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece
from transformers import LlamaTokenizer

VOCAB = 512
"""It has a token for every byte."""


def save_sentencepiece(folder: Path) -> None:
    """Write it in the files of Llama 2, as llama.cpp's converter accepts it: a new byte-level one it refuses."""
    learn_pieces(folder / "tokenizer.model")
    LlamaTokenizer.from_pretrained(folder, add_bos_token=True).save_pretrained(folder)


def learn_pieces(file: Path) -> None:
    """Write the pieces alone."""
    with file.open("wb") as written:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for topic in topics.values() for line in topic.splitlines() if line),
            model_writer=written,
            vocab_size=VOCAB,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        )

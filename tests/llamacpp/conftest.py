"""A tokenizer that llama.cpp's converter accepts as it is."""

from pathlib import Path

import pytest

from tests.support.sentencepiece_model import save_sentencepiece


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A SentencePiece tokenizer in the files of Llama 2."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_sentencepiece(folder)
    return folder

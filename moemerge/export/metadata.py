"""Everything in the header of a GGUF file but the tensors' infos, in the order of llama.cpp's converter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moemerge.errors import IncompatibleError
from moemerge.export.blocks import GgufType
from moemerge.export.converter import add_tokenizer_of
from moemerge.export.families import GgufFamily
from moemerge.export.keys import add_keys
from moemerge.export.special_tokens import read_special_tokens
from moemerge.export.vocabulary import Vocabulary, read_gemma4_vocabulary, read_table, read_vocabulary
from moemerge.families.splitting import ADD_BOS

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Types of whole files, as llama.cpp numbers them.
_FILE_TYPES: Final[Mapping[GgufType, int]] = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
# Families of Granite's small models: their tokenizer does not say it, but they know no BOS token.
_WITHOUT_BOS: Final = 49152


@dataclass(frozen=True)
class Described:
    """A model's small files, which describe it."""

    config: Mapping[str, Any]
    """The model's `config.json`."""
    folder: Path
    """The folder with model card, `generation_config.json` and tokenizer; its name is the model's."""
    checkout: Path | None = None
    """A checkout of llama.cpp, whose converter reads a tokenizer that is not known here."""


def add_metadata(writer: "GGUFWriter", family: GgufFamily, model: Described, kind: GgufType, scratch: Path) -> None:
    """Add what a model's small files say, after the tensors' infos.

    Args:
        writer: the writer of the file.
        family: the model's family.
        model: the small files.
        kind: the type of matrices.
        scratch: a file that may be written for a while.

    Raises:
        IncompatibleError: the tokenizer is not known.
        RefusedError: the converter does not know the tokenizer either.
        CheckpointError: a file is damaged.
    """
    from gguf import GGML_QUANT_VERSION, GGUFType

    writer.add_type(GGUFType.MODEL)
    _add_general(writer, model.folder)
    add_keys(writer, family, model.config, _FILE_TYPES[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    try:
        read = read_gemma4_vocabulary if family.is_gemma4 else read_vocabulary
        vocabulary = read(model.folder, model.config["vocab_size"])
    except IncompatibleError:
        if model.checkout is None:
            raise
        add_tokenizer_of(writer, model.checkout, model.folder, scratch)
    else:
        _add_tokenizer(writer, family, model, vocabulary)


def _add_general(writer: "GGUFWriter", folder: Path) -> None:
    """Add the model's name, its owner, and how it is sampled from."""
    import gguf

    total, shared, expert, count = writer.get_total_parameter_count()
    found = gguf.Metadata.load(None, folder, None, total)
    found.name = found.name or folder.name
    found.size_label = found.size_label or gguf.size_label(total, shared, expert, count)
    if found.sampling_penalty_repeat is None:
        # Newer versions of the package read it themselves.
        found.sampling_penalty_repeat = read_table(folder / "generation_config.json").get("repetition_penalty")
    found.set_gguf_meta_model(writer)


def _add_tokenizer(writer: "GGUFWriter", family: GgufFamily, model: Described, vocabulary: Vocabulary) -> None:
    settings = read_table(model.folder / "tokenizer_config.json")
    if family.is_llama and isinstance(settings.get("add_prefix_space"), bool):
        writer.add_add_space_prefix(settings["add_prefix_space"])
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)  # none where it is empty
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    special = read_special_tokens(model.folder, model.config, len(vocabulary.tokens))
    numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
    for part, token in family.named_tokens:
        if token in numbers:
            special.ids.setdefault(part, numbers[token])
    if vocabulary.pre in ADD_BOS:
        special.added.setdefault("bos", False)
    special.add_to(writer)
    if family.is_gemma4:
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(True)
    if family.is_llama and model.config["vocab_size"] == _WITHOUT_BOS:
        writer.add_add_bos_token(False)

"""A tokenizer's files, made of the vocabulary in a GGUF file's settings.

`tokenizer.json` is what released models of the same kind have: byte-level BPE, or BPE made of SentencePiece's pieces.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from moemerge.checkpoint.gguf_contents import GgufContents
from moemerge.families.splitting import ADD_BOS, WHOLE_WORDS, steps_of

_SECTION: Final = "tokenizer.ggml."
_TEMPLATE: Final = "tokenizer.chat_template"
# Types of tokens, as GGUF files number them.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
_ROLES: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SPACE: Final = "▁"
_BYTE_LEVEL: Final = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def tokenizer_config(contents: GgufContents) -> dict[str, Any]:
    """Make `tokenizer_config.json`: special tokens by their roles, and the chat template.

    Args:
        contents: the GGUF file with the settings.
    """
    tokens = contents.values(f"{_SECTION}tokens")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, name in _ROLES.items():
        number = _number(contents, name)
        if number is not None and number < len(tokens):
            config[f"{role}_token"] = tokens[number]
    length = contents.settings.get(f"{contents.architecture}.context_length")
    if isinstance(length, int):
        config["model_max_length"] = length
    template = contents.settings.get(_TEMPLATE)
    return config | ({"chat_template": template} if isinstance(template, str) else {})


def tokenizer_json(contents: GgufContents) -> str:
    """Make the text of `tokenizer.json`.

    Args:
        contents: the GGUF file with the settings.

    Raises:
        ValueError: its tokenizer is of a kind that is not read; the text says which, as it follows `its tokenizer`.
    """
    tokens, types = contents.values(f"{_SECTION}tokens"), contents.values(f"{_SECTION}token_type")
    types = types or [1] * len(tokens)
    kind = contents.settings.get(f"{_SECTION}model")
    if not tokens or len(types) != len(tokens):
        raise ValueError(f"has {len(tokens)} tokens, and types of {len(types)}")
    if kind not in {"gpt2", "llama"}:
        raise ValueError(f"is of the kind {kind!r}, and byte-level BPE (gpt2) and SentencePiece (llama) alone are read")
    # Tokens that only fill up the vocabulary, to as many as there are embeddings.
    named = [
        (token, number) for number, token in enumerate(tokens) if (token, types[number]) != (_filler(number), _UNUSED)
    ]
    vocab = dict(reversed(named))
    parts = _byte_level(contents, vocab) if kind == "gpt2" else _pieces(contents, vocab, types)
    added = [
        {
            "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": types[number] != _USER_DEFINED,
        }
        for token, number in named
        if types[number] in {_UNKNOWN, _CONTROL, _USER_DEFINED}
    ]  # fmt: skip
    made = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}
    bos = _number(contents, _ROLES["bos"])
    if _puts_bos(contents, kind) and bos is not None and bos < len(tokens):
        made["post_processor"] = _with_bos(tokens[bos], bos)
    return json.dumps(made, ensure_ascii=False, indent=2) + "\n"


def _filler(number: int) -> str:
    return f"[PAD{number}]"


def _number(contents: GgufContents, name: str) -> int | None:
    found = contents.settings.get(f"{_SECTION}{name}_token_id")
    return found if type(found) is int and found >= 0 else None


def _puts_bos(contents: GgufContents, kind: str) -> bool:
    usual = kind == "llama" or contents.settings.get(f"{_SECTION}pre") in ADD_BOS
    return bool(contents.settings.get(f"{_SECTION}add_bos_token", usual))


def _with_bos(token: str, number: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    one, two = ({"Sequence": {"id": text, "type_id": place}} for place, text in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, first, two],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _byte_level(contents: GgufContents, vocab: Mapping[str, int]) -> dict[str, Any]:
    """The parts of byte-level BPE, which differ between models in how texts are split."""
    way = contents.settings.get(f"{_SECTION}pre", "default")
    steps = steps_of(way)
    if steps is None:
        raise ValueError(f"splits texts in a way that is not known here, {way!r}")
    merges = [merge.split(" ") for merge in contents.values(f"{_SECTION}merges")]
    wrong = next((merge for merge in merges if len(merge) != 2 or "".join(merge) not in vocab), None)  # noqa: PLR2004
    if wrong or not merges:
        raise ValueError(f"has a merge that gives no token, {' '.join(wrong)!r:.60}" if wrong else "has no merges")
    return {
        "normalizer": steps[0],
        "pre_tokenizer": steps[1],
        "post_processor": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": _bpe(vocab, merges, ignore_merges=way in WHOLE_WORDS),
    }


def _pieces(contents: GgufContents, vocab: Mapping[str, int], types: Sequence[int]) -> dict[str, Any]:
    """The parts of BPE with merges made of SentencePiece's pieces and their scores, as transformers converts them."""
    scores = contents.values(f"{_SECTION}scores")
    if len(scores) != len(types):
        raise ValueError(f"has {len(types)} tokens, and scores of {len(scores)}")
    usual = [(token, number) for token, number in vocab.items() if types[number] not in {_UNKNOWN, _CONTROL, _UNUSED}]
    found = [
        ((-scores[number], number, -place), (token[:place], token[place:]))
        for token, number in usual
        for place in range(1, len(token))
        if token[:place] in vocab and token[place:] in vocab
    ]
    merges = [list(pair) for _, pair in sorted(found)]
    prefix = bool(contents.settings.get(f"{_SECTION}add_space_prefix", True))
    unknown = _number(contents, _ROLES["unk"])
    tokens = {number: token for token, number in vocab.items()}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    first = [{"type": "Prepend", "prepend": _SPACE}]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*(first if prefix else []), replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*back, *(strip if prefix else [])]},
        "model": _bpe(vocab, merges, unk_token=tokens.get(0 if unknown is None else unknown), byte_fallback=True),
    }


def _bpe(vocab: Mapping[str, int], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    usual = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": "unk_token" in settings, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    ordered = dict(sorted(vocab.items(), key=lambda entry: entry[1]))
    return {**usual, **settings, "vocab": ordered, "merges": merges}

"""llama.cpp's names for the ways in which byte-level tokenizers split texts.

llama.cpp's converter knows a tokenizer by a hash of what it makes of one text; here it is known by the steps in its
`tokenizer.json`, which a new vocabulary does not change.
"""

from collections.abc import Mapping
from typing import Any, Final

Step = tuple[Any, ...]

_BYTES: Final[Step] = ("ByteLevel", False)
_GPT2: Final[Step] = ("ByteLevel", True)
_DIGITS: Final[Step] = ("Digits", True)
_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES: Final = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS: Final = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3: Final = _CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _SIGNS + _SPACES
_QWEN2: Final = _CONTRACTIONS + _WORDS + r"|\p{N}" + _SIGNS + _SPACES
_QWEN35: Final = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED: Final = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CASED_SIGNS: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN: Final = "|".join(_CASED) + r"|\p{N}" + _CASED_SIGNS + _SPACES
_GPT4O: Final = "|".join(words + _CONTRACTIONS + "?" for words in _CASED) + r"|\p{N}{1,3}" + _CASED_SIGNS + _SPACES
_DEEPSEEK3: Final = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    + _SPACES
)
_CJK: Final = "[一-龥\u3040-ゟ\u30a0-ヿ]+"


def _split(pattern: str) -> Step:
    return "Split", pattern, "Isolated", False


_WAYS: Final[Mapping[tuple[Step, ...], str]] = {
    (_GPT2,): "gpt-2",
    (_DIGITS, _GPT2): "smollm",
    (_split(_LLAMA3), _BYTES): "llama-bpe",
    (_split(_QWEN2), _BYTES): "qwen2",
    (_split(_QWEN35), _BYTES): "qwen35",
    (_split(_TEKKEN), _BYTES): "tekken",
    (_split(_GPT4O), _BYTES): "gpt-4o",
    (_split(r"\p{N}{1,3}"), _split(_CJK), _split(_DEEPSEEK3), _BYTES): "deepseek-v3",
}
# Tokenizers that split texts as another does but have a name of their own: a token by which each is known.
_NAMESAKES: Final = (
    ("smollm", "<fim_prefix>", "refact"),
    ("qwen2", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "deepseek-r1-qwen"),
    ("llama-bpe", "[gMASK]", "glm4"),
)
# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
# Other names of the same ways, in llama-vocab.cpp.
_SAME: Final[Mapping[str, str]] = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("jina-v5-nano", "glm4", "smaug-bpe", "dbrx"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), "qwen2"),
    **dict.fromkeys(("starcoder", "refact"), "smollm"),
    **dict.fromkeys(("llama4", "kanana2"), "gpt-4o"),
}
ADD_BOS: Final = frozenset({
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken", "chameleon",
})  # fmt: skip
"""Ways of splitting with which engines put a BOS token before every text, unless the file says otherwise."""
WHOLE_WORDS: Final = ADD_BOS - {"chameleon"} | {"jina-v5-nano", "glm4"}
"""Ways of splitting with which a word that is a token is one, whatever its merges make of it (`ignore_merges`)."""
# Those that put texts into the Unicode form NFC first, which llama.cpp does not.
_NFC: Final = frozenset({"qwen2", "qwen35"})


def pre_tokenizer_of(tokenizer: Mapping[str, Any]) -> str | None:
    """Find llama.cpp's name for how a `tokenizer.json` splits texts; None where no name is known.

    Texts are assumed to be in the Unicode form NFC, into which some tokenizers put them first and llama.cpp does not.
    """
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        return None
    name = _WAYS.get(tuple(_steps(tokenizer.get("pre_tokenizer") or {})))
    texts = {entry["content"] for entry in tokenizer.get("added_tokens") or []}
    return next((other for way, token, other in _NAMESAKES if way == name and token in texts), name)


def _steps(pre_tokenizer: Mapping[str, Any]) -> list[Step]:
    """List the steps of a pre-tokenizer, in short; a step that is not known here makes all of it unknown."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            return [step for part in parts for step in _steps(part)]
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return [("ByteLevel", pre_tokenizer.get("use_regex", True))]
        case {"type": "Digits", "individual_digits": bool(each)}:
            return [("Digits", each)]
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": str(behavior), "invert": bool(invert)}:
            return [("Split", pattern, behavior, invert)]
    return [("unknown", str(pre_tokenizer.get("type")))]


def steps_of(name: str) -> tuple[dict[str, Any] | None, dict[str, Any]] | None:
    """Find normaliser and pre-tokenizer of a `tokenizer.json` by llama.cpp's name for them; None for an unknown one."""
    way = _SAME.get(name, name)
    steps = next((steps for steps, known in _WAYS.items() if known == way), None)
    if steps is None:
        return None
    written = [_written(*step) for step in steps]
    parts = written[0] if len(written) == 1 else {"type": "Sequence", "pretokenizers": written}
    return ({"type": "NFC"} if way in _NFC else None), parts


def _written(kind: str, *values: Any) -> dict[str, Any]:
    if kind == "ByteLevel":
        return {"type": kind, "add_prefix_space": False, "trim_offsets": True, "use_regex": values[0]}
    if kind == "Digits":
        return {"type": kind, "individual_digits": values[0]}
    pattern, behavior, invert = values
    return {"type": kind, "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}

"""The flags of `mergekit-moe`, so that published command lines run with only the program's name changed.

Flags and meanings: https://github.com/arcee-ai/mergekit, mergekit 0.1.5 (`mergekit-moe --help`).
"""

import re
from dataclasses import dataclass
from typing import Final

from moemerge.errors import RefusedError


@dataclass(frozen=True)
class Flag:
    """A flag of mergekit-moe and what becomes of it."""

    note: str = ""
    """Why it is not needed, or empty where it is translated."""
    becomes: tuple[str, ...] = ()
    takes_value: bool = False


_BOUNDED: Final = "memory is bounded without it"
_COPIES: Final = "bytes are copied by the kernel in several threads"
_NO_LORA: Final = "adapters are merged while they are read"
FLAGS: Final[dict[str, Flag]] = {
    "--i-understand-this-is-not-useful-without-training": Flag(becomes=("--allow-identical-experts",)),
    "--random-seed": Flag(becomes=("--seed",), takes_value=True),
    "--transformers-cache": Flag(becomes=("--cache-dir",), takes_value=True),
    "--cuda": Flag(becomes=("--device", "cuda")),
    "--gpu-rich": Flag(becomes=("--device", "cuda")),
    "--no-quiet": Flag(),
    "--copy-tokenizer": Flag(),
    "--no-copy-tokenizer": Flag("the tokenizer's files are always copied"),
    "--write-model-card": Flag(),
    "--no-write-model-card": Flag("a model card is always written"),
    "--safe-serialization": Flag(),
    "--no-safe-serialization": Flag("only safetensors are written"),
    "--allow-crimes": Flag("what can be merged exactly is merged, the rest is refused with the reason"),
    "--unsafe-truncate-embeddings": Flag("embeddings come from the base model alone"),
    "--trust-remote-code": Flag("code from a model repository is never executed"),
    "--lora-merge-cache": Flag(_NO_LORA, takes_value=True),
    "--lora-merge-dtype": Flag(_NO_LORA, takes_value=True),
    "--lazy-unpickle": Flag(_BOUNDED),
    "--low-cpu-memory": Flag(_BOUNDED),
    "--clone-tensors": Flag(_BOUNDED),
    "--read-to-gpu": Flag(_COPIES),
    "--multi-gpu": Flag(_COPIES),
    "--async-write": Flag(_COPIES),
    "--write-threads": Flag(_COPIES, takes_value=True),
    "--num-threads": Flag(_COPIES, takes_value=True),
    "-j": Flag(_COPIES, takes_value=True),
}


def translate(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Replace mergekit-moe's flags by moemerge's; gives the arguments and a note for each flag that is not needed."""
    kept: list[str] = []
    notes: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*kept, argument, *rest], notes
        name, equals, value = argument.partition("=")
        if re.fullmatch(r"-j\d+", name):
            name, equals, value = "-j", "=", name[2:]
        flag = FLAGS.get(name)
        if flag is None and name.startswith("--no-") and f"--{name[5:]}" in FLAGS:
            continue  # a default of mergekit-moe, written out
        if flag is None:
            kept.append(argument)
            continue
        kept += flag.becomes
        if flag.takes_value and not equals:
            value = rest.pop(0) if rest else ""
        if flag.takes_value and flag.becomes:
            kept.append(value)
        if flag.note:
            notes.append(f"{name} is not needed: {flag.note}")
    return kept, notes


def parse_parameter_count(text: str) -> int:
    """Parameters in mergekit's `--out-shard-size`: `1B`, `500M`, `1000K` or a number.

    Raises:
        RefusedError: not such a count.
    """
    match = re.fullmatch(r"(\d+)([KMB]?)", text.upper())
    if not match or int(match[1]) == 0:
        raise RefusedError(
            f"--out-shard-size: {text!r} is not a number of parameters like 1B or 500M. For bytes use --max-shard-size."
        )
    return int(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[match[2]]

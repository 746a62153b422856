"""Quantise a GGUF file with llama.cpp: its k-quants and others, with or without an importance matrix."""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from moemerge.checkpoint.gguf_contents import GgufContents, read_contents
from moemerge.errors import OutputError, RefusedError
from moemerge.export.imatrix import FEWEST_TOKENS, Importance
from moemerge.export.quantiser_process import run_engine
from moemerge.export.tensors import GgufTensor
from moemerge.packages import need

# enum llama_ftype of https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
FILE_TYPES: Final[dict[str, int]] = {
    "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q5_k_s": 16, "q5_1": 9, "q5_0": 8, "q4_k_m": 15, "q4_k_s": 14, "q4_1": 3,
    "q4_0": 2, "iq4_nl": 25, "iq4_xs": 30, "q3_k_l": 13, "q3_k_m": 12, "q3_k_s": 11, "iq3_m": 27, "iq3_s": 26,
    "iq3_xs": 22, "iq3_xxs": 23, "q2_k": 10, "q2_k_s": 21, "iq2_m": 29, "iq2_s": 28, "iq2_xs": 20, "iq2_xxs": 19,
    "iq1_m": 31, "iq1_s": 24, "tq2_0": 37, "tq1_0": 36, "mxfp4_moe": 38,
}  # fmt: skip
"""Types of quantised files with llama.cpp's numbers, the finest first."""
NEED_IMPORTANCE: Final = frozenset(
    {"iq3_xs", "iq3_xxs", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"}
)
"""Types that the engine does not make without an importance matrix."""
_FLOATS: Final = {"F32", "F16", "BF16"}
_SMALL_BLOCKS: Final = {"q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "mxfp4_moe"}
_SMALL_BLOCK: Final = 32
_LARGE_BLOCK: Final = 256
# In models with so many experts the engine stores these in Q8_0, whatever their rows are.
_WITH_FINE_KEYS: Final = 8
_FINE_KEYS: Final = ("attn_k.weight", "attn_v.weight")
_LAYER: Final = re.compile(r"blk\.(\d+)\.")
_STACK: Final = re.compile(r"blk\.\d+\..+_exps\.")
# Bits a weight beyond those that name a type: for scales, and for the matrices that llama.cpp stores in finer
# types. Rows that are no whole blocks take as many once more; nothing takes more than Q8_0, as the head may,
# and in types for mixtures all but experts.
_MORE_BITS: Final = 1.5
_MOST_BITS: Final = 8.5
_SHOWN: Final = 3


@dataclass(frozen=True)
class QuantisedReport:
    """A report on the quantised file."""

    path: Path
    type: str
    nbytes: int
    source_bytes: int
    types: Mapping[str, int]
    """Number of tensors of each type, by ggml's name: `Q4_K`."""
    fallbacks: Mapping[str, str]
    """Tensors whose rows the type does not divide, with the type that they are stored as."""
    engine: str
    """The engine that made the file, with its version."""
    notes: tuple[str, ...]


def check_type(type_: str, *, with_importance: bool) -> None:
    """Refuse an unknown type, or one that needs an importance matrix that is not given, before any work.

    Raises:
        RefusedError: says which.
    """
    need("llama_cpp", f"To make {type_}")
    if type_ not in FILE_TYPES:
        raise RefusedError(f"--type {type_}: is not one of {', '.join(FILE_TYPES)}.")
    if not with_importance and type_ in NEED_IMPORTANCE:
        raise RefusedError(
            f"--type {type_}: llama.cpp makes it only with an importance matrix: add --imatrix, or choose q3_k_s."
        )


def quantise(
    gguf: Path,
    out: Path,
    type_: str,
    *,
    importance: Importance | None = None,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> QuantisedReport:
    """Store a model's matrices in fewer bits; if this raises, nothing is left of `out`.

    Args:
        gguf: a GGUF file of floats.
        out: the file to write, in a stage; the importance matrix lies beside it meanwhile.
        type_: a key of `FILE_TYPES`.
        importance: how much each column of each matrix matters.
        threads: number of threads; 0 for all there are.
        progress: called with the tensors done and all there are.

    Raises:
        RefusedError: the type is unknown, it needs an importance matrix, or the given one is another
            model's; llama-cpp-python is not installed; `gguf` is quantised already, `out` is a folder.
        SourceError: `gguf` cannot be read.
        CheckpointError: `gguf` is damaged.
        OutputError: the engine failed, with its reason, or `out` cannot be written.
    """
    check_type(type_, with_importance=importance is not None)
    if out.is_dir():
        raise RefusedError(f"{out}: is a folder. Name the file that is to be written.")
    source = _read_floats(gguf)
    if importance:
        importance.check(source)
    matrix = out.with_suffix(".imatrix")
    command = [str(gguf.resolve()), str(out.resolve()), str(FILE_TYPES[type_]), str(threads)]
    try:
        if importance:
            importance.write(matrix)
            command.append(str(matrix.resolve()))
        run_engine(command, gguf, type_, progress)
        made = read_contents(out)
    except BaseException as error:
        out.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"{out}: cannot be written: {error.strerror or error}.") from error
        raise
    finally:
        matrix.unlink(missing_ok=True)
    return _report(source, made, out, type_, importance)


def _read_floats(gguf: Path) -> GgufContents:
    """Read a GGUF file's contents, and refuse it if it is quantised already."""
    source = read_contents(gguf)
    names = type_names(source)
    if quantised := [name for name in source.tensors if names[name] not in _FLOATS]:
        raise RefusedError(
            f"{gguf}: {quantised[0]} is stored as {names[quantised[0]]}; expected F32, F16 or BF16: what is quantised "
            "twice loses twice. Name the file that it was made from."
        )
    return source


def quantised_bytes(tensors: Sequence[GgufTensor], type_: str) -> int:
    """Estimate the most bytes that tensors in floats take when they are quantised.

    Args:
        tensors: the tensors of a file in floats.
        type_: a key of `FILE_TYPES`.
    """
    named = int(next(letter for letter in type_ if letter.isdecimal()))
    block = _SMALL_BLOCK if type_ in _SMALL_BLOCKS else _LARGE_BLOCK
    coarse = _STACK if type_.endswith("_moe") else _LAYER
    total = 0
    for tensor in tensors:
        row = tensor.shape[-1]
        if tensor.type == "f32" or row % _SMALL_BLOCK:
            total += tensor.nbytes
        else:
            more = _MORE_BITS * (2 if row % block else 1) if coarse.match(tensor.name) else _MOST_BITS
            bits = min(named + more, _MOST_BITS)
            total += math.ceil(math.prod(tensor.shape) * bits / 8)
    return total


def _report(
    source: GgufContents, made: GgufContents, out: Path, type_: str, importance: Importance | None
) -> QuantisedReport:
    types, fallbacks = type_names(made), fallen_back(made, type_)
    notes = [fallback_note(fallbacks, made, type_)] if fallbacks else []
    if importance:
        notes += [*importance.notes, *uncovered_notes(importance)]
    return QuantisedReport(
        out,
        type_,
        made.nbytes,
        source.nbytes,
        dict(Counter(types.values()).most_common()),
        fallbacks,
        _engine_version(),
        tuple(notes),
    )


def _engine_version() -> str:
    try:
        return f"llama-cpp-python {version('llama-cpp-python')}"
    except PackageNotFoundError:  # installed by something else than pip
        return "llama-cpp-python"


def type_names(contents: GgufContents) -> dict[str, str]:
    """Map each tensor's name to its type, as ggml calls it."""
    need("gguf", "To read types of tensors")
    from gguf import GGMLQuantizationType

    known = {int(kind): kind.name for kind in GGMLQuantizationType}
    return {name: known.get(tensor.type, f"type {tensor.type}") for name, tensor in contents.tensors.items()}


def fallen_back(made: GgufContents, type_: str) -> dict[str, str]:
    """Find tensors whose rows are no whole number of the type's blocks, and the types that they have instead.

    Args:
        made: a quantised file.
        type_: the type that was asked for.
    """
    block = _SMALL_BLOCK if type_ in _SMALL_BLOCKS else _LARGE_BLOCK
    by_choice = () if made.settings.get(f"{made.architecture}.expert_count") != _WITH_FINE_KEYS else _FINE_KEYS
    return {
        name: stored
        for name, stored in type_names(made).items()
        if (row := made.tensors[name].sizes[0]) % block and len(made.tensors[name].sizes) > 1
        if stored not in _FLOATS or (stored == "F16" and row % _SMALL_BLOCK)
        if not (stored == "Q8_0" and name.endswith(by_choice))
    }


def fallback_note(fallbacks: Mapping[str, str], made: GgufContents, type_: str) -> str:
    """Say which tensors are stored otherwise than asked for, why, and what that means for the size."""
    matrices = [tensor for tensor in made.tensors.values() if len(tensor.sizes) > 1]
    rows = sorted({made.tensors[name].sizes[0] for name in fallbacks})
    kinds = []
    for kind, count in Counter(fallbacks.values()).most_common():
        names = [name for name, stored in fallbacks.items() if stored == kind]
        kinds.append(f"{count} as {kind} ({', '.join(names[:_SHOWN])}{', ...' if names[_SHOWN:] else ''})")
    weights = sum(math.prod(tensor.sizes) for tensor in made.tensors.values())
    bits = 8 * made.nbytes / weights
    block = _SMALL_BLOCK if type_ in _SMALL_BLOCKS else _LARGE_BLOCK
    return (
        f"{type_}: rows of {' and '.join(map(str, rows))} numbers are not a whole number of its blocks of {block}, so "
        f"llama.cpp stores {len(fallbacks)} of {len(matrices)} matrices otherwise: {'; '.join(kinds)}. The file takes "
        f"{bits:.1f} bits a weight, where q8_0 takes about 8.5 and loses less"
    )


def uncovered_notes(importance: Importance) -> list[str]:
    """Say which experts too little text has reached to tell which of their columns matter."""
    by_expert: dict[int, list[str]] = {}
    for name, experts in importance.uncovered().items():
        layer = match[1] if (match := _LAYER.match(name)) else name
        for expert in experts:
            if layer not in by_expert.setdefault(expert, []):
                by_expert[expert].append(layer)
    ordered = {expert: sorted(layers, key=_by_number) for expert, layers in sorted(by_expert.items())}
    return [
        f"importance matrix: fewer than {FEWEST_TOKENS} tokens reach expert {expert} in layers {', '.join(layers)}: "
        "there it has the mean of the layer's other experts"
        for expert, layers in ordered.items()
    ]


def _by_number(layer: str) -> tuple[int, str]:
    """A sort key that puts layers in their order, before the names of what lies in none."""
    return (int(layer), "") if layer.isdecimal() else (sys.maxsize, layer)

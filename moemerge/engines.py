"""Names of the engines that run merged models."""

from typing import Any, Final, Literal

Engine = Literal["transformers", "vllm", "llamacpp", "converter", "mlx", "openvino"]
ENGINES: Final[dict[Engine, str]] = {
    "transformers": "transformers 4.57",
    "vllm": "vLLM",
    "llamacpp": "llama.cpp",
    "converter": "llama.cpp's converter",
    "mlx": "mlx-lm",
    "openvino": "OpenVINO",
}
"""Engines with their names. All are compared with what transformers 5 computes.

llama.cpp reads the file that `moemerge gguf` writes, and is right with no family that is not written; what it makes of
the files of its own converter, which other tools run, is recorded separately.
"""
NAMES: Final = ("transformers", "vllm", "llama.cpp", "llama.cpp-converter", "mlx", "openvino")
"""Names of engines as a config spells them."""
_OTHERS: Final[dict[str, Engine]] = {"mlxlm": "mlx", "llamacppconverter": "converter"}
SHORT_NAMES: Final = (*ENGINES, *_OTHERS)
"""Names of engines in small letters alone, as every other spelling is read."""


def canonical_engine(name: Any) -> Any:
    """Turn a name that people write into the key of `ENGINES`."""
    plain = "".join(filter(str.isalnum, name.lower())) if isinstance(name, str) else name
    return _OTHERS.get(plain, plain) if isinstance(plain, str) else plain


def engine_of(name: Any) -> Any:
    """Turn a config's value, which may be None, into the key of `ENGINES`.

    Raises:
        ValueError: there is no such engine; says which there are.
    """
    found = canonical_engine(name)
    if found not in (*ENGINES, None):  # a list cannot be looked up in a dict
        raise ValueError(f"expected {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    return found

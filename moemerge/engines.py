"""Names of the engines that merged models are run with."""

from typing import Any, Final, Literal

Engine = Literal["transformers", "vllm", "llamacpp", "converter", "mlx", "openvino"]
ENGINES: Final[dict[Engine, str]] = {
    "transformers": "transformers 4.57", "vllm": "vLLM", "llamacpp": "llama.cpp",
    "converter": "llama.cpp's converter", "mlx": "mlx-lm", "openvino": "OpenVINO",
}  # fmt: skip
"""Each with its name. What transformers 5 computes is what all are compared with.

llama.cpp reads the file that `moemerge gguf` writes, and is right with no family that is not written; what it makes of
the files of its own converter, which other tools run, is told apart.
"""
NAMES: Final = ("transformers", "vllm", "llama.cpp", "llama.cpp-converter", "mlx", "openvino")
"""As they are written in a config."""
_OTHERS: Final[dict[str, Engine]] = {"mlxlm": "mlx", "llamacppconverter": "converter"}


def canonical_engine(name: Any) -> Any:
    """The key of `ENGINES` for a name that people write."""
    plain = "".join(filter(str.isalnum, name.lower())) if isinstance(name, str) else name
    return _OTHERS.get(plain, plain) if isinstance(plain, str) else plain


def engine_of(name: Any) -> Any:
    """The same for a config's value, which may be none.

    Raises:
        ValueError: there is no such engine; says which there are.
    """
    found = canonical_engine(name)
    if found not in (*ENGINES, None):  # a list cannot be looked up in a dict
        raise ValueError(f"expected {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    return found

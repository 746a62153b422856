"""Names of the engines that merged models are run with."""

from typing import Any, Final, Literal

Engine = Literal["transformers", "vllm", "llamacpp", "converter", "mlx", "openvino"]
ENGINES: Final[dict[Engine, str]] = {
    "transformers": "transformers 4.57", "vllm": "vLLM", "llamacpp": "llama.cpp",
    "converter": "llama.cpp's converter", "mlx": "mlx-lm", "openvino": "OpenVINO",
}  # fmt: skip
"""Each with its name. What transformers 5 computes is what all are compared with.

llama.cpp reads the file that `moemerge gguf` writes, of families that it does not write that of llama.cpp's converter;
what it makes of the converter's files, which other tools run, is told of every family beside it.
"""
NAMES: Final = ("transformers", "vllm", "llama.cpp", "converter", "mlx", "openvino")
"""As they are written in a config."""


def canonical_engine(name: Any) -> Any:
    """The key of `ENGINES` for a name that people write."""
    plain = "".join(filter(str.isalnum, name.lower())) if isinstance(name, str) else name
    return "mlx" if plain == "mlxlm" else plain

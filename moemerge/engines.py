"""Names of the engines that merged models are run with."""

from typing import Any, Final, Literal

Engine = Literal["transformers", "vllm", "llamacpp", "mlx", "openvino"]
ENGINES: Final[dict[Engine, str]] = {
    "transformers": "transformers 4.57", "vllm": "vLLM", "llamacpp": "llama.cpp", "mlx": "mlx-lm",
    "openvino": "OpenVINO",
}  # fmt: skip
"""Each with its name. What transformers 5 computes is what all are compared with."""
_OTHER_NAMES: Final = {"llama.cpp": "llamacpp", "mlx-lm": "mlx"}


def canonical_engine(name: Any) -> Any:
    """The key of `ENGINES` for a name that people write."""
    return _OTHER_NAMES.get(name.lower(), name.lower()) if isinstance(name, str) else name

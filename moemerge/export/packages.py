"""Packages that only an export needs: the extra `gguf`."""

from importlib.util import find_spec
from typing import Final

from moemerge.errors import RefusedError

_PACKAGES: Final = {"gguf": "gguf", "llama_cpp": "llama-cpp-python"}
_EXTRA: Final = "pip install 'moemerge[gguf]'"


def need(module: str, purpose: str) -> None:
    """Refuse to begin where a package is not installed; it is found, not imported.

    Args:
        module: what is imported.
        purpose: what for: `To write a GGUF file`.

    Raises:
        RefusedError: it is not installed.
    """
    if find_spec(module) is None:
        raise RefusedError(f"{purpose}, the package {_PACKAGES[module]} is needed: {_EXTRA}.")

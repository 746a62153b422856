"""Packages that only an export needs: the extras `gguf` and `k-quants`."""

from importlib.util import find_spec
from typing import Final

from moemerge.errors import RefusedError

_PACKAGES: Final = {"gguf": ("gguf", "gguf"), "llama_cpp": ("llama-cpp-python", "k-quants")}
"""Of a module, the package that it comes from, and the extra that brings it."""


def need(module: str, purpose: str) -> None:
    """Refuse to begin where a package is not installed; it is found, not imported.

    Args:
        module: what is imported.
        purpose: what for: `To write a GGUF file`.

    Raises:
        RefusedError: it is not installed.
    """
    if find_spec(module) is None:
        package, extra = _PACKAGES[module]
        raise RefusedError(f"{purpose}, the package {package} is needed: pip install 'moemerge[{extra}]'.")

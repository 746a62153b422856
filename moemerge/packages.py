"""Checks for packages that only some work needs."""

from importlib.util import find_spec
from typing import Final

from moemerge.errors import RefusedError

_PACKAGES: Final = {
    "gguf": ("gguf", "gguf"), "llama_cpp": ("llama-cpp-python", "llama-cpp-python"),
    "s3fs": ("s3fs", "'moemerge[remote]'"), "gcsfs": ("gcsfs", "gcsfs"),
}  # fmt: skip
"""The package that a module comes from, and what pip is told to install."""


def need(module: str, purpose: str) -> None:
    """Refuse to begin if a package is not installed; it is searched for, not imported.

    Args:
        module: the module that will be imported.
        purpose: what it is needed for: `To write a GGUF file`.

    Raises:
        RefusedError: the package is not installed.
    """
    if find_spec(module) is None:
        package, installed = _PACKAGES[module]
        raise RefusedError(f"{purpose}, the package {package} is needed: pip install {installed}.")

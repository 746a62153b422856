"""Checks for packages that only some work needs."""

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def importing(package: str, needed: str) -> Iterator[None]:
    """A context in which a package is imported.

    Args:
        package: the package.
        needed: the message where it is not installed.

    Raises:
        RefusedError: it is not installed, or cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        is_absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        raise RefusedError(needed if is_absent else why_not_imported(package, error)) from error


def why_not_imported(package: str, error: ImportError) -> str:
    """Explain why a package that is installed cannot be imported, and what to do about it."""
    cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
    said = " ".join(str(cause).split()).rstrip(".")
    return f"{package} is installed, but cannot be imported ({said:.300}). Install what is missing, or {package} again."

"""Read a tokenizer that moemerge does not know with the converter of a llama.cpp checkout."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from gguf import GGUFWriter

SCRIPT: Final = "convert_hf_to_gguf.py"
_PREFIX: Final = "tokenizer."
_SHOWN: Final = 300


def check_checkout(checkout: Path) -> None:
    """Refuse a folder that is no checkout of llama.cpp.

    Raises:
        RefusedError: the converter is not in the folder.
    """
    if not (checkout / SCRIPT).is_file():
        raise RefusedError(f"--llama-cpp: {checkout} holds no {SCRIPT}. Name the folder of a checkout of llama.cpp.")


def add_tokenizer_of(writer: "GGUFWriter", checkout: Path, folder: Path, scratch: Path) -> None:
    """Add the keys of the tokenizer in `folder`, which the converter writes to `scratch` on the way.

    Raises:
        RefusedError: the converter does not know the tokenizer either; quotes its message.
    """
    from gguf import GGUFReader

    command = [sys.executable, str(checkout / SCRIPT), str(folder), "--vocab-only", "--outfile", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603  named by the user
    if done.returncode or not scratch.is_file():
        said = " ".join(done.stderr.split())[-_SHOWN:]
        raise RefusedError(f"{checkout / SCRIPT}: cannot read the tokenizer of {folder}: ... {said}")
    try:
        for key, field in GGUFReader(scratch).fields.items():
            if key.startswith(_PREFIX):
                kind, *inner = field.types
                writer.add_key_value(key, field.contents(), kind, inner[0] if inner else None)
    finally:
        scratch.unlink()

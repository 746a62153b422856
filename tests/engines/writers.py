"""What writes GGUF files: what is known of a file is known of one such code alone."""

import hashlib
from pathlib import Path
from typing import Final

import moemerge

_PACKAGE: Final = Path(moemerge.__file__).parent
SOURCES: Final = sorted(path for part in ("checkpoint", "export") for path in (_PACKAGE / part).glob("*.py"))
"""Of what is written and of how it is converted, copied and laid out."""
MADE_BY: Final = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:12]

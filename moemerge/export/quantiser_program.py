"""A program that calls llama.cpp's quantiser by its Python package, since the engine ends its process where it fails.

`python -m moemerge.export.quantiser_program GGUF OUT FILE_TYPE THREADS [IMATRIX]` prints progress and reasons for
failure to stderr.
"""

import ctypes
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import llama_cpp

from moemerge.export.imatrix import Importance, read_importance

FAILED: Final = "failed to quantize: "
"""The text that the engine prints before its reason."""
_PACKAGE: Final = "llama-cpp-python"
# Rows that are in memory at a time; by default the engine would take 8 GB.
_BUFFER_BYTES: Final = 2**28
_Q8_0: Final = 7


def main(arguments: list[str]) -> int:
    """Quantise a file, and return the exit code."""
    source, out, file_type, threads, *imatrix = arguments
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), ctypes.c_void_p(0))  # all of it to stderr
    settings = llama_cpp.llama_model_quantize_default_params()
    if settings.ftype != _Q8_0 or settings.imatrix or not hasattr(settings, "max_buf_size"):
        sys.stderr.write(f"{FAILED}{_PACKAGE} {version(_PACKAGE)} has other settings than this program knows\n")
        return 1
    settings.ftype, settings.nthread, settings.max_buf_size = int(file_type), int(threads), _BUFFER_BYTES
    kept = _imatrix(read_importance(Path(imatrix[0]))) if imatrix else None
    if kept:
        settings.imatrix = ctypes.cast(kept[0], type(settings.imatrix))
        settings.kv_overrides = ctypes.cast(kept[1], type(settings.kv_overrides))
    return int(llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings)))


def _imatrix(importance: Importance) -> tuple[Any, Any, list[Any]]:
    """The engine's array of means, metadata keys for the file, and the objects that must live as long."""
    means = {name: found.means() for name, found in importance.tensors.items()}
    floats = ctypes.POINTER(ctypes.c_float)
    entries = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()  # the last is the end: it has no name
    for entry, (name, values) in zip(entries, means.items(), strict=False):
        entry.name, entry.data, entry.size = name.encode(), values.ctypes.data_as(floats), values.size
    # Keys as llama-quantize writes them.
    keys = (llama_cpp.llama_model_kv_override * 2)()
    keys[0].key, keys[0].tag = b"quantize.imatrix.entries_count", llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
    keys[0].value.val_i64 = len(means)
    return entries, keys, list(means.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

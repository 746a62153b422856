"""Rows of Parquet files, read by pyarrow no further than they are asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from moemerge.errors import RefusedError
from moemerge.packages import importing
from moemerge.texts.records import KEYS, is_record, no_known_keys

_ROWS_AT_ONCE: Final = 64


def parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the columns that may be documents, row by row; each row comes with its place, for messages.

    Raises:
        RefusedError: pyarrow is not installed, or the file is damaged or has no such column.
    """
    needed = f"{file}: to read Parquet, pyarrow is needed: pip install pyarrow, or save it as .jsonl."
    with importing("pyarrow", needed):
        from pyarrow.parquet import ParquetFile
    with _explained(file), ParquetFile(file) as opened:
        names = opened.schema_arrow.names
        if not is_record(names):
            raise no_known_keys(str(file), names)
        columns = [name for name in names if name in KEYS]
        number = 0
        for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:  # errors of Arrow are of many classes
        lines = str(error).splitlines() or [type(error).__name__]
        raise RefusedError(f"{file}: cannot be read as Parquet: {lines[0].rstrip('.'):.200}.") from error

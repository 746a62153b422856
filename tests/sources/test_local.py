"""Files of a model on this machine."""

from pathlib import Path

import pytest

from moemerge.errors import CheckpointError
from moemerge.sources.local import resolve_file


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """A user who may read anything, such as root, is refused nothing: the system's answer is put in place."""
    (tmp_path / "config.json").write_text("{}")

    def refused(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(CheckpointError) as error:
        resolve_file(tmp_path, "config.json")
    assert str(error.value) == f"{tmp_path / 'config.json'}: cannot be read: Permission denied."

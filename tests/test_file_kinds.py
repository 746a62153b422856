"""What a path leads to, by its name and its first bytes."""

import shutil
from pathlib import Path

import pytest

from moemerge.file_kinds import Kind, what_is

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n"


@pytest.mark.parametrize(
    ("name", "held", "kind"),
    [
        ("merge.yaml", b"base_model: a\n", Kind.CONFIG),
        ("merge.YML", b"base_model: a\n", Kind.CONFIG),
        ("merge.yaml", POINTER, Kind.POINTER),
        ("merge.yaml", b"\xef\xbb\xbf\n", Kind.EMPTY),
        ("merge.yaml", "base_model: a".encode("utf-16"), Kind.UTF16),
        ("merge.yaml", bytes(8), Kind.BINARY),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{}", Kind.WEIGHTS),
        ("model.safetensors", POINTER, Kind.POINTER),
        ("pytorch_model.bin", b"PK\x03\x04\0", Kind.WEIGHTS),
        ("pytorch_model.bin", b"\x80\x02\0", Kind.WEIGHTS),
        ("model.zip", b"PK\x03\x04\0", Kind.ARCHIVE),
        ("model", b"GGUF\x03\0", Kind.GGUF),
        ("model.gguf", b"", Kind.EMPTY),
        ("run", b"#!/bin/sh\n", Kind.PROGRAM),
        ("notes.txt", b"a\n", Kind.TEXT),
        ("config.json", b"{}", Kind.MODEL_FILE),
    ],
)
def test_a_file(tmp_path, name, held, kind):
    (tmp_path / name).write_bytes(held)
    assert what_is(tmp_path / name) is kind


def test_a_folder(tmp_path, llamas):
    assert what_is(llamas[0]) is Kind.MODEL
    assert what_is(tmp_path) is Kind.FOLDER
    (tmp_path / "a.gguf").mkdir()
    assert what_is(tmp_path / "a.gguf") is Kind.FOLDER
    (tmp_path / "adapter_config.json").write_text("{}")
    assert what_is(tmp_path) is Kind.ADAPTER
    assert what_is(tmp_path / "adapter_config.json") is Kind.MODEL_FILE
    shutil.copy(llamas[0] / "config.json", tmp_path)
    assert what_is(tmp_path) is Kind.MODEL


@pytest.mark.parametrize("name", ["no", "a" * 300, "a\0b", "\udcff" * 3])
def test_a_name_that_leads_nowhere(tmp_path, name):
    assert what_is(tmp_path / name) is Kind.ABSENT


def test_what_cannot_be_read_raises_nothing(tmp_path):
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    assert what_is(tmp_path / "ring") is Kind.UNREADABLE
    assert what_is(Path("/dev/null")) is Kind.OTHER

"""What makes an sdist or a wheel unfit is named."""

import io
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.release import BESIDE, in_clone, problems

METADATA = "moemerge-1.2.dist-info"


def make_release(folder: Path, wheel: Iterable[str], sdist: Iterable[str]) -> None:
    with zipfile.ZipFile(folder / "moemerge-1.2-py3-none-any.whl", "w") as archive:
        for name in wheel:
            archive.writestr(name, "")
    with tarfile.open(folder / "moemerge-1.2.tar.gz", "w:gz") as archive:
        for name in sdist:
            archive.addfile(tarfile.TarInfo(f"moemerge-1.2/{name}"), io.BytesIO())


@pytest.fixture
def package() -> set[str]:
    return in_clone()


def test_a_release_with_the_files_of_the_package_is_fit(tmp_path, package):
    made = {f"{METADATA}/{name}" for name in ("METADATA", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    make_release(
        tmp_path, package | made, package | BESIDE | {"PKG-INFO", "setup.cfg", "moemerge.egg-info/SOURCES.txt"}
    )
    assert problems(tmp_path) == []


def test_what_is_lacking_and_what_is_too_much_is_named(tmp_path, package):
    entry_points = f"{METADATA}/entry_points.txt"
    wheel = package - {"moemerge/py.typed"} | {entry_points, "moemerge/__pycache__/errors.cpython-311.pyc"}
    make_release(tmp_path, wheel, package | BESIDE - {"LICENSE"} | {"tests/test_docs.py"})
    assert problems(tmp_path) == [
        "moemerge-1.2-py3-none-any.whl: lacks moemerge-1.2.dist-info/licenses/LICENSE",
        "moemerge-1.2-py3-none-any.whl: lacks moemerge/py.typed",
        "moemerge-1.2.tar.gz: lacks LICENSE",
        "moemerge-1.2-py3-none-any.whl: holds moemerge/__pycache__/errors.cpython-311.pyc, too",
        "moemerge-1.2.tar.gz: holds tests/test_docs.py, too",
    ]


def test_an_older_wheel_beside_it_is_refused(tmp_path):
    for name in ("moemerge-1.1-py3-none-any.whl", "moemerge-1.2-py3-none-any.whl", "moemerge-1.2.tar.gz"):
        (tmp_path / name).touch()
    assert problems(tmp_path) == [
        f"{tmp_path} holds ['moemerge-1.1-py3-none-any.whl', 'moemerge-1.2-py3-none-any.whl', 'moemerge-1.2.tar.gz']; "
        "expected one wheel and one sdist of the same version."
    ]

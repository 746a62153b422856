"""Whether an sdist and a wheel hold the package's files, and none beside them.

python -m tests.support.release .cache/dist
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BESIDE = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
"""Files of the clone that an sdist holds beside the package."""
MADE = ("PKG-INFO", "setup.cfg", "moemerge.egg-info/")
"""What setuptools adds to an sdist."""


def in_clone() -> set[str]:
    """Paths of the package's files in the clone; what git ignores, such as caches, is none of them."""
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "moemerge")
    listed = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    return {path for path in listed if (ROOT / path).exists()}


def in_wheel(wheel: Path, version: str) -> set[str]:
    """Paths of a wheel's files; of its metadata, only the licence and the entry points."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = f"moemerge-{version}.dist-info/"
    kept = {f"{metadata}licenses/LICENSE", f"{metadata}entry_points.txt"}
    return {name for name in names if not name.startswith(metadata) or name in kept}


def in_sdist(sdist: Path, version: str) -> set[str]:
    """Paths of an sdist's files below its one folder, without what setuptools makes."""
    with tarfile.open(sdist) as archive:
        names = {member.name.removeprefix(f"moemerge-{version}/") for member in archive if member.isfile()}
    return {name for name in names if not name.startswith(MADE)}


def problems(folder: Path) -> list[str]:
    """What is wrong with the one sdist and the one wheel of a folder; nothing if the list is empty."""
    found = sorted(path.name for path in folder.iterdir())
    version = found[-1].removeprefix("moemerge-").removesuffix(".tar.gz")
    wheel, sdist = f"moemerge-{version}-py3-none-any.whl", f"moemerge-{version}.tar.gz"
    if found != [wheel, sdist]:
        return [f"{folder} holds {found}; expected one wheel and one sdist of the same version."]
    package, metadata = in_clone(), f"moemerge-{version}.dist-info"
    expected = {
        wheel: package | {f"{metadata}/licenses/LICENSE", f"{metadata}/entry_points.txt"},
        sdist: package | BESIDE,
    }
    held = {wheel: in_wheel(folder / wheel, version), sdist: in_sdist(folder / sdist, version)}
    return [
        *(f"{name}: lacks {path}" for name in held for path in sorted(expected[name] - held[name])),
        *(f"{name}: holds {path}, too" for name in held for path in sorted(held[name] - expected[name])),
    ]


if __name__ == "__main__":
    if wrong := problems(Path(sys.argv[1])):
        sys.exit("\n".join(wrong))
    print(*sorted(path.name for path in Path(sys.argv[1]).iterdir()))

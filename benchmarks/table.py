"""The table that the suite prints: what, target, measured, met or not; and the machine that it was measured on."""

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HEADINGS = ("what", "target", "measured", "met")


@dataclass(frozen=True)
class Row:
    what: str
    target: str
    measured: str
    met: bool | None = None
    """None: there is no target, or nothing was measured."""

    @property
    def cells(self) -> tuple[str, str, str, str]:
        return self.what, self.target, self.measured, {True: "yes", False: "NO", None: "-"}[self.met]


def as_text(rows: Sequence[Row]) -> str:
    return text_table(HEADINGS, [row.cells for row in rows])


def as_markdown(rows: Sequence[Row]) -> str:
    return markdown_table(HEADINGS, [row.cells for row in rows])


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in (headings, *rows)) for column in range(len(headings))]
    lines = [headings, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(folder: Path) -> str:
    """One line on the processor, memory, system and versions, and the file system that `folder` is on."""
    processor = _field("/proc/cpuinfo", "model name") or platform.machine()
    memory = int((_field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) * 1024
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return (
        f"{processor}, {os.cpu_count()} cores, {memory / 2**30:.0f} GiB, {max(holding, key=lambda m: len(m[1]))[2]}, "
        f"Linux {platform.release()}, Python {sys.version.split()[0]}, {versions}"
    )


def _field(path: str, name: str) -> str | None:
    lines = (line.partition(":") for line in Path(path).read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), None)

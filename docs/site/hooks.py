"""What mkdocs.yml needs beside the pages of docs/: pages from elsewhere, made pages, and links that leave docs/.

The README is the start page. A file outside docs/ that a page links to is published with the site, a folder as a list
of its files.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages from outside docs/: their path in the clone, and on the site."""
COMMANDS = ROOT / ".cache" / "command-line.md"
"""Written by docs/site/command_line.py, in an environment that has moemerge."""
LINK = re.compile(r"(\]\(|\b(?:src|srcset|href)=\")(?!https?:|mailto:|#|/)([^)#\"\s]+)")
GROUPS = {"Functions": str.islower, "Errors": lambda name: name.endswith("Error"), "Types": lambda _: True}


def place(target: Path) -> str:
    """Where a file or folder of the clone is on the site.

    Raises:
        PluginError: there is no such file or folder; mkdocs prints it and stops.
    """
    inside = os.path.relpath(target, ROOT)
    if not target.exists():
        raise PluginError(f"{inside}: a page links to it, and it is not there.")
    if target.is_relative_to(DOCS) and target.suffix == ".md":
        return os.path.relpath(target, DOCS)
    return PAGES.get(inside) or f"files/{inside}{'/index.md' if target.is_dir() else ''}"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from elsewhere, the made ones, and every file that a page links to."""
    added = {shown: (ROOT / path).read_text() for path, shown in PAGES.items()}
    added |= {"command-line.md": COMMANDS.read_text(), "python-reference.md": python_reference()}
    for source in (*(ROOT / path for path in PAGES), *DOCS.glob("*.md")):
        for _, target in LINK.findall(source.read_text()):
            linked = (source.parent / target).resolve()
            shown = place(linked)
            if shown.startswith("files/"):
                added |= listing(linked) if linked.is_dir() else {shown: linked.read_bytes()}
    for shown, content in added.items():
        files.append(File.generated(config, shown, content=content))
    return files


def listing(folder: Path) -> dict[str, str | bytes]:
    """A page that lists a folder's files, and the files."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    page = f"# {folder.relative_to(ROOT)}\n\n" + "\n".join(f"- [{path.name}]({path.name})" for path in paths)
    return {place(folder): page, **{place(path): path.read_bytes() for path in paths}}


def python_reference() -> str:
    """A page with every public name, which mkdocstrings fills in."""
    sys.path.insert(0, str(ROOT))
    import moemerge

    parts, left = ["# Python reference\n"], [name for name in moemerge.__all__ if name != "__version__"]
    for title, belongs in GROUPS.items():
        parts += [f"## {title}\n", *(f"::: moemerge.{name}\n" for name in left if belongs(name))]
        left = [name for name in left if not belongs(name)]
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the clone into links between places of the site."""
    shown = page.file.src_uri
    source = next((ROOT / path for path, site in PAGES.items() if site == shown), DOCS / shown)
    if not source.exists():  # it is made, by the rules of the site
        return markdown

    def moved(link: re.Match[str]) -> str:
        target = place((source.parent / link[2]).resolve())
        return link[1] + os.path.relpath(target, Path(shown).parent)

    return LINK.sub(moved, markdown)

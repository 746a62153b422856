"""Pages in one HTML file, which need no network and no other file: a template, colours, and data as JSON."""

import json
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from moemerge.checkpoint.copy import write_failure
from moemerge.checkpoint.disk import drafted
from moemerge.errors import RefusedError
from moemerge.evaluation.routes.palette import PALETTE, page_colour


@dataclass(frozen=True)
class PageTemplate:
    """The file `page.html` of a package."""

    package: str
    shows: str
    """What the page shows, in a word; in the template, that word in braces is where the data stands."""

    def check(self, path: Path) -> None:
        """Refuse a path that no page can be written to, or that holds anything but a page of this template.

        Raises:
            RefusedError: says what is there.
        """
        if not path.resolve().parent.is_dir():
            raise RefusedError(f"{path}: there is no such folder.")
        if not os.path.lexists(path):
            return
        template = files(self.package).joinpath("page.html").read_bytes()
        begin = template[: template.index(b"</title>")]
        found = b""
        if path.is_file():
            with path.open("rb") as file:
                found = file.read(len(begin))
        if found != begin:
            other = f"holds something else than a page of {self.shows}, and is not replaced"
            raise RefusedError(f"{path}: {'is a folder' if path.is_dir() else other}. Choose another name.")

    def write(self, path: Path, data: Any) -> None:
        """Write the page that shows `data`, any value of JSON, to `path`, in UTF-8.

        Raises:
            OutputError: the system refuses to write it.
        """
        # In a script element only `<` can begin what ends or changes it, and in JSON it stands only in strings.
        shown = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        template = files(self.package).joinpath("page.html").read_text("utf-8")
        colours = "\n".join(f".e{expert} {{ --c: {page_colour(expert)} }}" for expert in range(len(PALETTE)))
        try:
            with drafted(path) as draft:
                draft.write_text(template.replace("{colours}", colours).replace(f"{{{self.shows}}}", shown), "utf-8")
        except OSError as error:
            raise write_failure(path, error) from error

"""Write one HTML file that shows which token goes to which expert; it needs no network and no other file."""

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.copy import write_failure
from moemerge.errors import RefusedError
from moemerge.evaluation.routes.palette import PALETTE, page_colour
from moemerge.evaluation.routes.traced import Routes, TracedText


def check_page(path: Path) -> None:
    """Refuse a path that no page can be written to, or that holds anything but such a page.

    Raises:
        RefusedError: says what is there.
    """
    if not path.resolve().parent.is_dir():
        raise RefusedError(f"{path}: there is no such folder.")
    if not os.path.lexists(path):
        return
    template = files("moemerge.evaluation.routes").joinpath("page.html").read_bytes()
    begin = template[: template.index(b"</title>")]
    found = b""
    if path.is_file():
        with path.open("rb") as file:
            found = file.read(len(begin))
    if found != begin:
        what = "is a folder" if path.is_dir() else "holds something else than a page of routes, and is not replaced"
        raise RefusedError(f"{path}: {what}. Choose another name.")


def write_page(path: Path, routes: Routes) -> None:
    """Write the page of `routes` to `path`, in UTF-8.

    Raises:
        OutputError: the system refuses to write it.
    """
    data = {
        "model": routes.model,
        "experts": routes.experts,
        "layers": routes.layers,
        "load": _thousandths(routes.load()),
        "texts": [_text(routes, text) for text in routes.texts],
    }
    # In a script element only `<` can begin what ends or changes it, and in JSON it stands only in strings.
    shown = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = files("moemerge.evaluation.routes").joinpath("page.html").read_text("utf-8")
    colours = "\n".join(f".e{expert} {{ --c: {page_colour(expert)} }}" for expert in range(len(PALETTE)))
    try:
        path.write_text(template.replace("{colours}", colours).replace("{routes}", shown), "utf-8")
    except OSError as error:
        raise write_failure(path, error) from error


def _text(routes: Routes, text: TracedText) -> dict[str, Any]:
    """The data of a text on the page: (layer, token, choice) flat; shares (1 + layer, expert), first of all layers."""
    shares = [routes.shares(text), *(routes.shares(text, index) for index in range(len(routes.layers)))]
    return {
        "name": text.name,
        "tokens": text.tokens,
        "choices": text.experts.shape[2],
        "experts": text.experts.ravel().tolist(),
        "weights": _thousandths(text.weights.ravel()),
        "majority": routes.majority(text).tolist(),
        "majority_weights": _thousandths(routes.mean_weights(text).max(axis=1)),
        "shares": _thousandths(np.stack(shares)),
    }


def _thousandths(numbers: NDArray[np.floating[Any]]) -> Any:
    """Shares or weights of any shape as whole thousandths, in lists: shorter than decimals."""
    return np.rint(numbers * 1000).astype(int).tolist()

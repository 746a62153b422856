"""Write one HTML file that shows which token goes to which expert; it needs no network and no other file."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moemerge.evaluation.page_files import PageTemplate
from moemerge.evaluation.routes.traced import Routes, TracedText

PAGE: Final = PageTemplate("moemerge.evaluation.routes", "routes")


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
    PAGE.write(path, data)


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

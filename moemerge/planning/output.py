"""A tensor of the merged model: the pieces that it is made of, or what it is computed from later."""

from dataclasses import dataclass
from typing import Literal

from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Band, Piece


@dataclass(frozen=True)
class Computed:
    """A tensor that is made from prompts, or drawn, while the others are written."""

    layer: int
    kind: Literal["router", "shared gate"]


@dataclass(frozen=True)
class Output:
    """A tensor of the merged model."""

    shape: tuple[int, ...]
    origin: tuple[Band, ...] | Computed
    """The pieces that it is made of, or what it is computed from later."""
    is_expert: bool = False
    """Whether it belongs to experts that are chosen between."""

    @property
    def bands(self) -> tuple[Band, ...]:
        """What it is made of; nothing yet where it is computed."""
        return () if isinstance(self.origin, Computed) else self.origin

    @property
    def pieces(self) -> list[Piece]:
        """The same, from left to right and from top to bottom."""
        return [piece for band in self.bands for piece in band]

    @property
    def is_converted(self) -> bool:
        """Whether any of its bytes are computed, or in another order than in the source."""
        return any(not piece.is_unchanged for piece in self.pieces)

    @property
    def copied_from(self) -> TensorInfo | None:
        """The one source whose bytes it holds as they are; None where it is made in another way."""
        match self.pieces:
            case [Piece(source=TensorInfo() as source, is_unchanged=True)]:
                return source
        return None

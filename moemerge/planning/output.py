"""A tensor of the merged model: the pieces that it is made of, or the kind of computation that makes it."""

from dataclasses import dataclass
from typing import Literal

from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Band, Piece


@dataclass(frozen=True)
class Computed:
    """A tensor that is made from prompts, or drawn at random, while the others are written."""

    layer: int
    kind: Literal["router", "shared gate"]


@dataclass(frozen=True)
class Output:
    """A tensor of the merged model."""

    shape: tuple[int, ...]
    origin: tuple[Band, ...] | Computed
    """The pieces that the tensor is made of, or the kind of computation that makes it later."""
    is_expert: bool = False
    """Whether the tensor belongs to experts that the router chooses between."""

    @property
    def bands(self) -> tuple[Band, ...]:
        """The bands that the tensor is made of; empty where it is computed."""
        return () if isinstance(self.origin, Computed) else self.origin

    @property
    def pieces(self) -> list[Piece]:
        """The pieces that the tensor is made of, from left to right and from top to bottom."""
        return [piece for band in self.bands for piece in band]

    @property
    def is_converted(self) -> bool:
        """Whether any bytes are computed, or in another order than in the source."""
        return any(not piece.is_unchanged for piece in self.pieces)

    @property
    def copied_from(self) -> TensorInfo | None:
        """The one source tensor whose bytes are copied unchanged; None for any other tensor."""
        match self.pieces:
            case [Piece(source=TensorInfo() as source, is_unchanged=True)]:
                return source
        return None

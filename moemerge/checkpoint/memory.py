"""The memory that reading a tensor takes, beside the bounded chunks of every stream."""

from moemerge.checkpoint.computed import ComputedFile
from moemerge.checkpoint.dequantised import Dequantised
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.joined import Joined
from moemerge.checkpoint.pieces import Band
from moemerge.checkpoint.transposed import Transposed


def held_bytes(tensor: TensorInfo) -> int:
    """Count the bytes that are held as a whole while a tensor is read: of matrices whose rows lie in columns."""
    match tensor.path:
        case Transposed() as made:
            return made.matrix.nbytes + held_bytes(made.matrix)
        case Dequantised() as made:
            return sum(part.tensor.nbytes for part in made.parts if not part.span)
        case Joined(side_by_side=False) as made:
            return max(map(held_bytes, made.parts))
        case ComputedFile() as made:
            return sum(map(held_bytes, made.sources))
    return 0


def held_by_bands(bands: tuple[Band, ...]) -> int:
    """Count the bytes that are held as a whole while a tensor is written: pieces side by side are read together."""
    sources = ([piece.source for piece in band] for band in bands)
    return max((sum(held_bytes(one) for one in band if isinstance(one, TensorInfo)) for band in sources), default=0)

"""Dense model families that can be merged: what their `config.json` and their tensors mean."""

from moemerge.formats.dense.family import FULL, PLAIN, ROPES, SLIDING, Axes, DenseFamily, Half, Role, Row
from moemerge.formats.dense.model import DenseModel, decoded, read_dense
from moemerge.formats.dense.tables import DENSE_FAMILIES

__all__ = [
    "DENSE_FAMILIES", "FULL", "PLAIN", "ROPES", "SLIDING", "Axes", "DenseFamily", "DenseModel", "Half", "Role", "Row",
    "decoded", "read_dense",
]  # fmt: skip

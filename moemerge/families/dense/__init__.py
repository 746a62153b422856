"""Dense model families that can be merged: what their `config.json` and their tensors mean."""

from moemerge.families.dense.family import FULL, PLAIN, ROPES, SLIDING, Axes, DenseFamily, Half, Role, Row
from moemerge.families.dense.model import DenseModel, decoded, read_dense
from moemerge.families.dense.tables import DENSE_FAMILIES

__all__ = [
    "DENSE_FAMILIES", "FULL", "PLAIN", "ROPES", "SLIDING", "Axes", "DenseFamily", "DenseModel", "Half", "Role", "Row",
    "decoded", "read_dense",
]  # fmt: skip

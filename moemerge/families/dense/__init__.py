"""Dense model families that can be merged: what their `config.json` and their tensors mean."""

from moemerge.families.dense.config_checks import SILENT_KEYS
from moemerge.families.dense.family import (
    FULL,
    NON_LLAMA_FACTS,
    ROLES,
    ROPES,
    SLIDING,
    Axes,
    DenseFamily,
    FfnProjection,
    LayerTensor,
    Role,
)
from moemerge.families.dense.model import DenseModel, decoded, read_dense
from moemerge.families.dense.model_tensors import ModelTensors
from moemerge.families.dense.renamed.tables import RENAMED
from moemerge.families.dense.renamed.tensors import plain_tensors
from moemerge.families.dense.tables import DENSE_FAMILIES

__all__ = [
    "DENSE_FAMILIES",
    "FULL",
    "NON_LLAMA_FACTS",
    "RENAMED",
    "ROLES",
    "ROPES",
    "SILENT_KEYS",
    "SLIDING",
    "Axes",
    "DenseFamily",
    "DenseModel",
    "FfnProjection",
    "LayerTensor",
    "ModelTensors",
    "Role",
    "decoded",
    "plain_tensors",
    "read_dense",
]

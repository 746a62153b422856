"""FFNs that stand beside a mixture's experts in an analysis: its shared expert, or those of a dense model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from moemerge.errors import CheckpointError, RefusedError
from moemerge.families.dense import ROLES, ModelTensors, read_dense
from moemerge.families.expert_view import Ffn
from moemerge.families.stored_mixture import StoredMixture
from moemerge.sources.model_folder import Announce, open_model
from moemerge.sources.tensor_tables import read_tensor_tables

SHARED: Final = "shared"
"""The name of the shared expert beside the others."""


def shared_ffns(mixture: StoredMixture) -> dict[str, Mapping[int, Ffn]]:
    """The shared expert's FFNs by layer, as they are stored, under the name `shared`; nothing for a mixture without."""
    found = {layer: ffn for layer in mixture.moe_layers if (ffn := mixture.shared_ffn(layer))}
    return {SHARED: found} if found else {}


def name_beside(reference: str, mixture: StoredMixture) -> str:
    """What a dense model is called beside a mixture's experts: the last part of its path or of its name on the Hub.

    It has ` (beside)` after it where an expert has that name, or it would be `shared`, as a shared expert is.
    """
    path = Path(reference)
    name = (path.resolve() if path.name in {"", ".."} else path).name or reference
    while name in {*mixture.names, SHARED}:
        name += " (beside)"
    return name


def dense_ffns(reference: str, mixture: StoredMixture, announce: Announce) -> Mapping[int, Ffn]:
    """The FFNs of a dense model in the layers in which a mixture has routers.

    Args:
        reference: the dense model; weights of a Hub model are left there.
        mixture: the mixture.
        announce: called with a line about each step that takes long.

    Raises:
        SourceError: there is no such model.
        RefusedError: it is no dense model that is read, or has another hidden size or number of layers.
        CheckpointError: its files are damaged or incomplete.
    """
    folder = open_model(reference, announce)
    model = read_dense(folder.config)
    if isinstance(model, str):
        raise RefusedError(f"{reference}: cannot stand beside the experts, since {model}.")
    further = len(mixture.further_layers)
    sizes = {"hidden_size": (model.sizes["hidden"], mixture.hidden)}
    layers = mixture.config.get("num_hidden_layers")
    if isinstance(layers, int):
        sizes["num_hidden_layers"] = (model.layers, layers)
    for key, (found, expected) in sizes.items():
        if found != expected:
            raise RefusedError(
                f"{reference}: cannot stand beside the experts: expected the mixture's {key}, {expected}, found "
                f"{found}. Name a dense model of the mixture's sizes, such as its base model."
            )
    (table,) = read_tensor_tables([folder], announce, weights="stream", dense=True)
    tensors = ModelTensors(model, table)
    routed = mixture.moe_layers[: len(mixture.moe_layers) - further]
    try:
        return {layer: {role: tensors.projection(layer, role) for role in ROLES} for layer in routed}
    except KeyError as error:
        raise CheckpointError(f"{reference}: has no tensor {error}. Download it again.") from error

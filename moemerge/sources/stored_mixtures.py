"""Open a mixture as it is stored: its config, its tensors by the names of its family, and names of its experts."""

from pathlib import Path
from typing import Literal

from moemerge.config.loading import load_config
from moemerge.config.schema import CONFIG_COPY, MergeConfig
from moemerge.errors import IncompatibleError, MoemergeError
from moemerge.families.dense import read_dense
from moemerge.families.in_memory import released_layout
from moemerge.families.released import READABLE
from moemerge.families.stored_mixture import StoredMixture, per_token_key
from moemerge.sources.model_folder import Announce, ModelFolder, fetch_files, open_model
from moemerge.sources.quantised.table import plain_model
from moemerge.sources.tensor_tables import read_tensor_table


def is_mixture(model: ModelFolder) -> bool:
    """Whether a model is a mixture of a kind that is read; some types are those of dense models too."""
    return model.config.get("model_type") in READABLE and isinstance(read_dense(model.config), str)


def expert_references(model: ModelFolder, announce: Announce) -> list[str]:
    """References to all experts of a mixture, by name where its folder says their names; nothing of it is checked."""
    family = READABLE[str(model.config["model_type"])]
    count = next((model.config.get(key) for key, name in family.named.items() if name == "experts"), None)
    config = kept_config(model, announce)
    names = config.expert_names if config else range(count if isinstance(count, int) else 0)
    return [f"{model.reference}#{name}" for name in names]


def read_mixture(reference: str, announce: Announce) -> tuple[ModelFolder, StoredMixture]:
    """Open a mixture and read its tensor table; weights of a Hub model are left there.

    Raises:
        SourceError: see `moemerge.sources.model_folder.open_model`.
        IncompatibleError: see `read_stored_mixture`.
        CheckpointError: see `read_stored_mixture`.
    """
    folder = open_model(reference, announce)
    return folder, read_stored_mixture(folder, announce)


def read_stored_mixture(
    model: ModelFolder,
    announce: Announce,
    weights: Literal["download", "stream"] = "stream",
    *,
    plain: bool = False,
) -> StoredMixture:
    """Read the tensor table of a mixture from headers alone.

    Args:
        model: the mixture.
        announce: called with a line about each step that takes long.
        weights: see `moemerge.sources.model_folder.read_tensor_table`.
        plain: whether quantised weights are read as the plain numbers that they stand for.

    Raises:
        IncompatibleError: the model is no mixture of a kind that is read, or has no router.
        SourceError: the Hub does not give the headers.
        CheckpointError: the model's files are damaged or incomplete.
    """
    family = READABLE.get(str(model.config.get("model_type")))
    if family is None:
        if not isinstance(dense := read_dense(model.config), str):
            raise IncompatibleError(
                f"{model.reference}: is a dense model, a {dense.family.model_type}, and a mixture is wanted. A config "
                "makes one of several dense models (`moemerge init`), `moemerge upcycle` one of copies of this.",
                [],
            )
        raise IncompatibleError(
            f"{model.reference}: its model_type is {model.config.get('model_type')!r}, no mixture that moemerge reads. "
            f"Name the folder that a merge wrote, or a released mixture: {', '.join(READABLE)}.",
            [],
        )
    if per_token_key(family) not in model.config:
        raise IncompatibleError(
            f"{model.reference}: its config.json has no {per_token_key(family)}, which a {family.model_type} has.", []
        )
    config, stored = model.config, read_tensor_table(model, announce, weights=weights)
    if plain:
        config, stored = plain_model(config, stored)
    tensors = released_layout(family, stored)
    router = next((tensor for name, tensor in tensors.items() if name.endswith(f".{family.router}")), None)
    if router is None:
        raise IncompatibleError(f"{model.reference}: has no router: no tensor is called *.{family.router}.", [])
    names = _expert_names(kept_config(model, announce), router.shape[0])
    return StoredMixture(family, config, tensors, names)


def _expert_names(config: MergeConfig | None, count: int) -> tuple[str, ...]:
    """Names of a mixture's experts as its config says them; of parts, each with its number; else numbers."""
    names = config.expert_names if config else ()
    if config and config.granularity > 1:
        names = tuple(f"{name}-{part}" for name in names for part in range(config.granularity))
    return names if len(names) == count else tuple(map(str, range(count)))


def kept_config(model: ModelFolder, announce: Announce) -> MergeConfig | None:
    """Read the config that a mixture's folder keeps; None where it has none, or one that is not moemerge's."""
    try:
        copy = fetch_files(model, [CONFIG_COPY], announce).get(CONFIG_COPY)
        return load_config(copy, allow_identical_experts=True) if copy else None
    except MoemergeError:
        return None


def names_itself(config: MergeConfig, folder: Path) -> bool:
    """Whether the config that a mixture's folder keeps names the mixture itself, as it may after an edit in place."""
    return Path(config.base_model).resolve() == folder.resolve()

"""The first step of a plan: open the models, and check that their configs fit together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moemerge.checkpoint.header import TensorInfo
from moemerge.compatibility.checks import check_configs
from moemerge.config.loading import refusal_of
from moemerge.config.schema import MergeConfig
from moemerge.errors import (
    CheckpointError,
    DamagedModelError,
    IncompatibleError,
    MoemergeError,
    NoSuchModelError,
    RefusedError,
    SourceError,
)
from moemerge.families.dense import DenseModel, read_dense
from moemerge.places import Place
from moemerge.sources.model_folder import ModelFolder, open_model
from moemerge.sources.reference import split_expert
from moemerge.sources.stored_mixtures import expert_references, is_mixture
from moemerge.sources.tensor_tables import read_tensor_tables
from moemerge.sources.wrong_names import nearest_model


@dataclass(frozen=True)
class Member:
    """A model that a merge reads."""

    place: str
    """The model's place in the config: `base_model`, `experts[0]`, `shared_experts[0]`."""
    name: str
    """The model's name in messages."""
    folder: ModelFolder
    model: DenseModel


@dataclass(frozen=True)
class Models:
    """The models of a merge, each opened once."""

    base: Member
    experts: tuple[Member, ...]
    """The experts that the router chooses between, in the order of the config."""
    shared: tuple[Member, ...]
    """The shared experts."""
    notes: tuple[str, ...] = ()
    """Notes about the models' configs."""

    @property
    def every_expert(self) -> tuple[Member, ...]:
        """All experts, then all shared experts."""
        return (*self.experts, *self.shared)

    @property
    def sources(self) -> tuple[ModelFolder, ...]:
        """The base, then all experts, then all shared experts; a model may occur more than once."""
        return tuple(member.folder for member in (self.base, *self.every_expert))

    @property
    def by_reference(self) -> dict[str, ModelFolder]:
        """The models by reference, each of them once."""
        return {folder.reference: folder for folder in self.sources}


def open_models(config: MergeConfig, announce: Callable[[str], None]) -> Models:
    """Open every model of a merge; of Hub models only the small files are downloaded.

    Raises:
        ConfigError: names lead to no model, or packages are needed; lists every one.
        SourceError: models cannot be reached; lists every one.
        CheckpointError: a `config.json` is damaged; lists every one.
        IncompatibleError: the configs do not fit together; lists every reason.
    """
    every_expert = [*config.experts, *config.shared_experts]
    opened = _open_all(config, announce)
    base = opened[config.base_model]
    placed = [(place, opened[expert.source_model]) for place, expert in zip(_places(config), every_expert, strict=True)]
    mixtures = [(place, folder) for place, folder in placed if is_mixture(folder)]
    dense = [(_name(place, folder), folder.config) for place, folder in placed if (place, folder) not in mixtures]
    found = check_configs(base.config, dense)
    refuse([*found.problems, *(_choose_expert(place, folder, announce) for place, folder in mixtures)])
    base_member = Member("base_model", "base_model", base, _dense(base))
    members = tuple(Member(place, _name(place, folder), folder, _dense(folder)) for place, folder in placed)
    routed = len(config.experts)
    return Models(base_member, members[:routed], members[routed:], tuple(found.notes))


def _open_all(config: MergeConfig, announce: Callable[[str], None]) -> dict[str, ModelFolder]:
    """Open every model once, by reference; what cannot be opened is listed with its place and the nearest name."""
    opened: dict[str, ModelFolder] = {}
    errors: dict[str, MoemergeError] = {}
    for _, reference in references_of(config):
        if reference in opened or reference in errors:
            continue
        try:
            opened[reference] = open_model(reference, announce)
        except IncompatibleError:
            raise
        except (SourceError, CheckpointError, RefusedError) as error:
            errors[reference] = error
    if errors:
        raise _placed(config, errors)
    return opened


def read_tables(
    config: MergeConfig, models: Models, announce: Callable[[str], None]
) -> dict[str, dict[str, TensorInfo]]:
    """Read the tensors of every model, by reference, from headers alone.

    Raises:
        SourceError: a model cannot be reached.
        CheckpointError: a model's files are damaged or incomplete; names its place.
    """
    opened = models.by_reference
    try:
        tables = read_tensor_tables(opened.values(), announce, weights="stream", dense=True)
    except DamagedModelError as error:
        raise _placed(config, {error.reference: error}) from error
    return dict(zip(opened, tables, strict=True))


def _placed(config: MergeConfig, errors: Mapping[str, MoemergeError]) -> MoemergeError:
    """The error that lists the models that cannot be read, each with its place in the config, and the nearest name."""
    folders = [Path(), *([config.file.parent] if config.file else [])]
    problems: list[tuple[Place, str]] = []
    for reference, reason in errors.items():
        place = next(place for place, named in references_of(config) if named == reference)
        looks = isinstance(reason, SourceError) and "Did you mean" not in str(reason) and not split_expert(reference)
        near = nearest_model(reference, folders) if looks else None
        problems.append((place, f"{reason}{f' Did you mean {near}?' if near else ''}"))
    failures = [one for one in errors.values() if not isinstance(one, RefusedError | NoSuchModelError)]
    kind = next((CheckpointError if isinstance(one, CheckpointError) else SourceError for one in failures), None)
    if len(errors) == 1 and not config.written:  # there is no line to find it by
        (only,) = errors.values()
        return (kind or type(only))(problems[0][1])
    refusal = refusal_of(config, problems)
    return kind(str(refusal)) if kind else refusal


def references_of(config: MergeConfig) -> list[tuple[Place, str]]:
    """Every reference to a model in a config, with its place."""
    parts = (("experts", config.experts), ("shared_experts", config.shared_experts))
    experts: list[tuple[Place, str]] = [
        ((key, number, "source_model"), expert.source_model)
        for key, part in parts
        for number, expert in enumerate(part)
    ]
    return [(("base_model",), config.base_model), *experts]


def refuse(problems: list[str]) -> None:
    """Raise an error if models do not fit together.

    Raises:
        IncompatibleError: there is at least one problem; lists all.
    """
    if problems:
        raise IncompatibleError("These models cannot be merged:", problems)


def _places(config: MergeConfig) -> list[str]:
    """Names of all experts, then of all shared experts, in messages."""
    parts = (("experts", config.experts), ("shared_experts", config.shared_experts))
    return [f"{key}[{number}]" for key, experts in parts for number in range(len(experts))]


def _name(place: str, folder: ModelFolder) -> str:
    return f"{place} {folder.reference}"


def _choose_expert(place: str, folder: ModelFolder, announce: Callable[[str], None]) -> str:
    kind, experts = folder.config["model_type"], expert_references(folder, announce)
    which = f": {', '.join(experts)}" if experts else ", as in MODEL#0"
    already = f"it is a mixture already (model_type {kind!r}): see `moemerge edit`"
    return f"{_name(place, folder)}: {already}, or name one of its experts{which}"


def _dense(folder: ModelFolder) -> DenseModel:
    model = read_dense(folder.config)
    if isinstance(model, str):  # pragma: no cover  `check_configs` has refused it
        raise IncompatibleError("These models cannot be merged:", [f"{folder.reference}: {model}"])
    return model

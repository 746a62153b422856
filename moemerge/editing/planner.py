"""Plan an edit: from a config whose base model is a mixture to every byte of the result."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from moemerge.checkpoint.derived import leaves
from moemerge.checkpoint.header import TensorInfo
from moemerge.config.expert_names import named_place
from moemerge.config.router_methods import AUTO
from moemerge.config.schema import MergeConfig, RoutedExpert
from moemerge.editing.assembly import EditAssembly
from moemerge.editing.config_keys import edited_config
from moemerge.editing.fitting import misfits, strangers
from moemerge.editing.groups import group_warnings, parted_warnings, twin_warnings
from moemerge.editing.notes import edit_notes
from moemerge.editing.plan import EditPlan, specs_of
from moemerge.editing.refusals import fit_problems, foreign_keys
from moemerge.editing.shared_halves import averaged
from moemerge.editing.slots import Added, Foreign, Kept, Slot
from moemerge.editing.texts import described, unread_text
from moemerge.errors import IncompatibleError, MoemergeError
from moemerge.families.dense import DenseModel, ModelTensors, read_dense
from moemerge.families.stored_mixture import StoredMixture, number_of
from moemerge.planning.layout import Layout, divide
from moemerge.planning.options import PlanOptions
from moemerge.planning.origins import Origins
from moemerge.planning.output import Output
from moemerge.planning.reinitialising import reinitialising_of
from moemerge.planning.tokenizer_files import find_base_files
from moemerge.planning.vision import left_out_notes
from moemerge.sources.model_folder import ModelFolder, open_model
from moemerge.sources.reference import split_expert
from moemerge.sources.stored_mixtures import is_mixture, kept_config, read_mixture, read_stored_mixture
from moemerge.sources.tensor_tables import read_tensor_tables

if TYPE_CHECKING:
    from pathlib import Path

_ROUNDING: Final = 1e-6


def edits_mixture(config: MergeConfig, announce: Callable[[str], None]) -> bool:
    """Whether the base model of a config is a mixture, so that the config describes an edit.

    A model that cannot be opened is none; planning a merge says why it cannot.
    """
    if split_expert(config.base_model):
        return False
    try:
        return is_mixture(open_model(config.base_model, announce))
    except MoemergeError:
        return False


def plan_edit(
    config: MergeConfig,
    options: PlanOptions = PlanOptions(),
    *,
    announce: Callable[[str], None] = lambda _: None,
    opened: tuple[ModelFolder, StoredMixture] | None = None,
) -> EditPlan:
    """Decide an edit from configs and headers alone; nothing is written, and weights on the Hub stay there.

    Args:
        config: the edit; its base model is the mixture. Experts called `MIXTURE#NAME`, or by number, are the mixture's
            own, and keep their router rows; any other is a dense model whose FFNs become an expert.
        options: the size of shards, and the folder that will be written.
        announce: called with a line about each step that takes long.
        opened: the mixture's folder and what was read of it, where that is done already.

    Raises:
        SourceError: a model cannot be reached.
        CheckpointError: a model's files are damaged.
        IncompatibleError: the mixture cannot be edited so; lists every reason.
    """
    folder, mixture = opened or read_mixture(config.base_model, announce)
    found = _Experts(config, folder, mixture, announce)
    slots = found.slots()
    _refuse([*foreign_keys(config, averages=bool(found.others)), *found.problems])
    config = _with_experts_per_token(config, mixture)
    _refuse([*fit_problems(config, mixture, slots)])
    shared, parts = _shared_halves(config, mixture, [*found.others.values()]), config.granularity
    width = config.expert_width or max(slot.width(mixture) for slot in slots) // parts
    output_config = edited_config(mixture, len(slots), config.experts_per_token, width, parts)
    computes = _changes_routers(config, slots)
    outputs = EditAssembly(mixture, slots, parts, width, computes, shared).outputs()
    sources = tuple(source for source, _ in found.tables.values())
    notes = edit_notes(mixture, slots, width, parts, computes=computes)
    return EditPlan(
        config=config,
        sources=sources,
        mixture=mixture,
        slots=tuple(slots),
        outputs=MappingProxyType(outputs),
        layout=_layout(outputs, mixture, options),
        output_config=output_config,
        base_files=find_base_files(folder, announce, needed=False),
        origins=_origins(found.tables.values()),
        notes=(*chain(*(source.notes for source in sources)), *left_out_notes(sources), *notes),
        warnings=_warnings(config, mixture, slots, kept_config(folder, announce)),
    )


def _warnings(
    config: MergeConfig, mixture: StoredMixture, slots: Sequence[Slot], before: MergeConfig | None
) -> tuple[str, ...]:
    return (
        *strangers(slots, mixture),
        *group_warnings(mixture, slots),
        *twin_warnings(mixture, slots, config.experts_per_token),
        *parted_warnings(mixture, slots, config.experts_per_token, before.granularity if before else 1),
        *unread_text(config, described(config, slots, before), slots),
    )


def _with_experts_per_token(config: MergeConfig, mixture: StoredMixture) -> MergeConfig:
    """A config that does not say how many experts take each token means as many as before."""
    if "experts_per_token" in config.model_fields_set:
        return config
    per_token = min(mixture.experts_per_token, len(config.experts))
    return (
        config if per_token == config.experts_per_token else config.model_copy(update={"experts_per_token": per_token})
    )


def _changes_routers(config: MergeConfig, slots: Sequence[Slot]) -> bool:
    """Whether router rows are computed: of new experts, or all, fitted by `moemerge prune` or drawn anew."""
    return config.router.fitted or config.gate_mode != AUTO or not all(isinstance(slot, Kept) for slot in slots)


def _shared_halves(
    config: MergeConfig, mixture: StoredMixture, others: Sequence[StoredMixture]
) -> dict[str, TensorInfo]:
    """The tensors beside the experts that are averaged over mixtures, by name, where the config asks for that."""
    if config.shared_weights.method != "average":
        return {}
    shared, problems = averaged(mixture, others)
    _refuse([f"shared_weights: average: {problem}. Remove the key: the mixture's own stay" for problem in problems])
    return shared


@dataclass
class _Experts:
    """The experts of an edit, opened."""

    config: MergeConfig
    folder: ModelFolder
    mixture: StoredMixture
    announce: Callable[[str], None]

    def __post_init__(self) -> None:
        self.problems: list[str] = []
        self.others: dict[Path, StoredMixture] = {}
        self._opened = {self.folder.reference: self.folder}
        self.tables: dict[str, tuple[ModelFolder, Mapping[str, TensorInfo]]] = {
            self.folder.reference: (self.folder, self.mixture.tensors)
        }

    def slots(self) -> list[Slot]:
        """Make a slot of every expert that can be read; the problems of the others are collected."""
        names = self.config.expert_names
        made = [self._slot(n, named_place(n, names), expert) for n, expert in enumerate(self.config.experts)]
        return [slot for slot in made if slot is not None]

    def _slot(self, entry: int, place: str, expert: RoutedExpert) -> Slot | None:
        changed: dict[str, Any] = {
            "scale": 1.0 if expert.residual_scale is None else expert.residual_scale,
            "noise_scale": expert.noise_scale or 0.0,
            "reinit": reinitialising_of(expert, entry),
        }
        model, own = split_expert(expert.source_model) or (expert.source_model, "")
        found: Slot | str
        opened = self._open(model)
        if self._is_shared(opened, own):
            own = ""
        if (own or expert.by_layer) and opened.folder == self.folder.folder:
            shares = self._shares(own, expert.by_layer)
            found = shares if isinstance(shares, str) else self._kept(shares, changed)
        elif own and is_mixture(opened):
            other = self._read(opened)
            number = number_of(own, other)
            changed["scale"] *= other.choosing.scale / self.mixture.choosing.scale
            found = number if isinstance(number, str) else Foreign(place, other, number, **changed)
        else:
            opened = self._open(expert.source_model)
            dense = read_dense(opened.config)
            changed["scale"] /= self.mixture.choosing.scale
            found = dense if isinstance(dense, str) else Added(place, self._tensors(opened, dense), **changed)
        if isinstance(found, str):
            self.problems.append(f"{place}: {found}")
            return None
        self.problems += [f"{place}: {problem}" for problem in misfits(found, self.mixture)]
        return found

    def _open(self, reference: str) -> ModelFolder:
        """Open a model, once for all experts that name it."""
        if reference not in self._opened:
            self._opened[reference] = open_model(reference, self.announce)
        return self._opened[reference]

    def _is_shared(self, opened: ModelFolder, own: str) -> bool:
        """Whether `MIXTURE#shared` is the mixture's shared expert, which is read as a dense model."""
        if own != "shared" or not is_mixture(opened):
            return False
        mixture = self.mixture if opened.folder == self.folder.folder else self._read(opened)
        return own not in mixture.names

    def _read(self, opened: ModelFolder) -> StoredMixture:
        """Read another mixture, once for all its experts."""
        if opened.folder not in self.others:
            self.others[opened.folder] = read_stored_mixture(opened, self.announce)
            self.tables[opened.reference] = opened, self.others[opened.folder].tensors
        return self.others[opened.folder]

    def _tensors(self, opened: ModelFolder, dense: DenseModel) -> ModelTensors:
        (tensors,) = read_tensor_tables([opened], self.announce, weights="stream", dense=True)
        self.tables[opened.reference] = opened, tensors
        return ModelTensors(dense, tensors)

    def _kept(self, shares: Sequence[Mapping[int, float]], changed: Mapping[str, Any]) -> Kept:
        by_layer = dict(zip(self.mixture.moe_layers, shares, strict=True))
        numbers = {layer: next(iter(found)) for layer, found in by_layer.items()}
        averaged = {layer: found for layer, found in by_layer.items() if len(found) > 1}
        return Kept(numbers, shares=averaged, **changed)

    def _shares(
        self, own: str, by_layer: Sequence[int | Mapping[int, float]] | None
    ) -> Sequence[Mapping[int, float]] | str:
        """The mixture's own experts that one is made of in each layer; a returned text says what is wrong with it."""
        layers, experts = len(self.mixture.moe_layers), self.mixture.experts
        if by_layer is None:
            number = number_of(own, self.mixture)
            return number if isinstance(number, str) else [{number: 1.0}] * layers
        if own:
            return "by_layer names an expert for each layer, and source_model another. Leave the name after # out"
        if len(by_layer) != layers:
            return f"by_layer names {len(by_layer)} experts, and the mixture has experts in {layers} layers"
        shares = [{given: 1.0} if isinstance(given, int) else given for given in by_layer]
        largest = max(chain.from_iterable(shares))
        if largest >= experts:
            return f"by_layer names expert {largest}, and the mixture's are numbered 0 to {experts - 1}"
        if odd := next((found for found in shares if abs(sum(found.values()) - 1) > _ROUNDING), None):
            return f"by_layer gives shares of {dict(odd)}, which add up to {sum(odd.values()):g} and not to 1"
        return shares


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise IncompatibleError("This mixture cannot be edited so:", list(problems))


def _layout(outputs: Mapping[str, Output], mixture: StoredMixture, options: PlanOptions) -> Layout:
    copied = {name: source for name, output in outputs.items() if (source := output.copied_from)}
    return divide(specs_of(outputs, mixture), copied, mixture.routers, options)


def _origins(tables: Iterable[tuple[ModelFolder, Mapping[str, TensorInfo]]]) -> Origins:
    stamps = {path: stamp for source, _ in tables for path, stamp in source.stamps.items()}
    references = {
        leaf.path: source.name_of(leaf.path)
        for source, table in tables
        for tensor in table.values()
        for leaf in leaves(tensor)
    }
    return Origins(stamps=MappingProxyType(stamps), references=MappingProxyType(references), reread=())

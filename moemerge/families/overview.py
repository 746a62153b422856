"""Rows of text on which dense families go into which output family, or into none, and what output families hold."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from moemerge.engines import ENGINES
from moemerge.families.dense import DENSE_FAMILIES, NON_LLAMA_FACTS, RENAMED, DenseFamily, DenseModel, read_dense
from moemerge.families.dense.tables import NOT_MERGED
from moemerge.families.engines import readings
from moemerge.families.family import MoeFamily
from moemerge.families.mixture_shape import Mixture
from moemerge.families.multimodal import VISION_MIXTURES, VisionMixture
from moemerge.families.selection import MOE_FAMILIES

_SIZES: Final = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 16,
}
# Most models of these families have fewer peculiarities than their class's defaults.
_PLAIN: Final[dict[str, dict[str, Any]]] = {
    "mistral": {"sliding_window": None},
    "granitemoehybrid": {"position_embedding_type": "rope"},
}
_DENSE_LAYERS: Final = {
    "none": "none",
    "prefix": "the first ones",
    "outside": "before and after the others",
    "any": "any",
}
_SHARED: Final = {"any": "any width", "multiple": "multiples of an expert", "one expert": "one, as wide as an expert"}


@dataclass(frozen=True)
class EngineCell:
    """The measured result of one engine for a family."""

    engine: str
    version: str
    short: str
    """`right`, `wrong`, `fails`, `not tried`, `not written` (as a GGUF file), or facts with which it is not right."""
    troubles: tuple[str, ...]
    """Every trouble in full: how far off, or with what message, and with what facts; empty where it is right."""
    untried: tuple[str, ...] = ()
    """Facts of models that the family holds, and that the engine was not tried with; empty where it always fails."""


@dataclass(frozen=True)
class FamilyRow:
    """An output family in words."""

    family: str
    takes: tuple[str, ...]
    """Dense model types whose plainest models it repeats exactly."""
    holds: tuple[str, ...]
    """Facts that those models may have in addition."""
    shared: str
    dense_layers: str
    scoring: str
    engines: tuple[EngineCell, ...]
    notes: tuple[str, ...]


def family_rows() -> list[FamilyRow]:
    """List every output family in the order in which they are tried, then the multimodal classes around some."""
    models = [_plainest(family) for family in DENSE_FAMILIES.values()]
    rows = {family.model_type: _row(family, models) for family in MOE_FAMILIES.values()}
    return [
        *rows.values(),
        *(_row_around(rows[mixture.family], dense, mixture) for dense, mixture in VISION_MIXTURES.items()),
    ]


def read_as() -> dict[str, list[str]]:
    """List the model types that are read as another dense type, by that type."""
    found: dict[str, list[str]] = {}
    for renamed in RENAMED.values():
        found.setdefault(renamed.plain, []).append(renamed.model_type)
    return found


def not_merged() -> dict[str, list[str]]:
    """Model types that no output family repeats, by the reason."""
    reasons: dict[str, list[str]] = {}
    for model_type, reason in NOT_MERGED.items():
        reasons.setdefault(reason, []).append(model_type)
    return reasons


def _plainest(family: DenseFamily) -> DenseModel:
    """A model with the family's defaults, without peculiarities that most of its models lack."""
    allowed = {key: value for key, (value, _) in family.refusals.items()}
    model = read_dense({**_SIZES, **_PLAIN.get(family.model_type, {}), **allowed, "model_type": family.model_type})
    if isinstance(model, str):
        raise TypeError(model)
    return model


def _engines(model_type: str, family: MoeFamily) -> Iterator[EngineCell]:
    """Yield how each engine reads the family, or a class around it, as measured."""
    for engine, name in ENGINES.items():
        found = readings()[engine].get(model_type)
        if found is None:
            version = next(iter(readings()[engine].values())).version
            yield EngineCell(name, version, "not tried", ())
            continue
        short, untried = "right", found.untried(family.holds)
        if found.troubles:
            always = next((trouble for trouble in found.troubles if not trouble.facts), None)
            short = "not with " + "; ".join(trouble.with_what for trouble in found.troubles)
            if always:
                short, untried = "wrong" if always.is_silent else "fails", []
        if engine == "llamacpp" and not family.in_gguf:
            yield EngineCell(name, found.version, "not written", ())
        else:
            troubles = tuple(trouble.words for trouble in found.troubles)
            yield EngineCell(name, found.version, short, troubles, tuple(untried))


def _row(family: MoeFamily, models: list[DenseModel]) -> FamilyRow:
    width = _SIZES["intermediate_size"]
    plain = Mixture(4, width, (width, width), (), 2, (0, 1, 2, 3), {})
    fitting = [model for model in models if not family.refusals(model, plain)]
    always = set.intersection(*({*model.facts} for model in fitting)) if fitting else set()
    shared = "appended to every expert, on request" if family.appends_shared else "no"
    if family.shared:
        shared = _SHARED[family.shared.width] + (", gated" if family.shared.gate else "")
        shared += {"nothing": "", "zeros": ", of zeros where none is asked for"}[family.shared.absent]
    return FamilyRow(
        family=family.model_type,
        takes=tuple(model.family.model_type for model in fitting),
        holds=tuple(words for fact, words in NON_LLAMA_FACTS.items() if fact in family.holds - always),
        shared=shared,
        dense_layers=_DENSE_LAYERS[family.dense_layers],
        scoring=family.scoring + (", with a selection bias" if family.selection_bias else ""),
        engines=tuple(_engines(family.model_type, family)),
        notes=family.notes,
    )


def _row_around(text: FamilyRow, dense: str, mixture: VisionMixture) -> FamilyRow:
    """A multimodal class around a family, given the family's row and the class with a dense text model."""
    engines = tuple(_engines(mixture.model_type, MOE_FAMILIES[mixture.family]))
    note = f"{mixture.model_type} is written with `keep_vision: true`; engines were asked about text, without images"
    return replace(text, family=mixture.model_type, takes=(dense,), engines=engines, notes=(note,))

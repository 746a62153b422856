"""Whether another of the given models would be the better base, by the experts' weights and by their cards."""

from collections.abc import Iterator, Mapping, Sequence

from moemerge.compatibility.distances import Distance, Known, measure_distances
from moemerge.drafting.cards import CardMetadata
from moemerge.families.dense import ModelTensors
from moemerge.sources.model_folder import ModelFolder
from moemerge.sources.reference import Reference

# Fine-tunes of one model are about as far from each other as both are from it together; rows measure it to a percent.
_CLEARLY = 0.97


def measure_from(base: str, models: Mapping[str, ModelTensors], known: Known) -> dict[str, Distance]:
    """Measure how far the FFNs of every other model are from those of one.

    Args:
        base: reference of the one.
        models: all models by reference.
        known: rows that were read before; those that are read now are added.

    Raises:
        CheckpointError: a file cannot be read.
        SourceError: a file on the Hub cannot be reached.
    """
    others = {name: model for name, model in models.items() if name != base}
    layers = {name: range(model.model.layers) for name, model in others.items()}
    return measure_distances(models[base], others, layers, known)[0]


def nearer_base(
    base: str, folders: Mapping[str, ModelFolder], models: Mapping[str, ModelTensors], known: Known
) -> str | None:
    """Find a model to which every other one is nearer than to the base; returns a sentence about it, or None.

    Args:
        base: reference of the base.
        folders: all models by reference, the base among them.
        models: their tensors.
        known: see `measure_from`.

    Raises:
        CheckpointError: see `measure_from`.
        SourceError: see `measure_from`.
    """
    ours = _means(measure_from(base, models, known))
    for name, folder in folders.items():
        if folder.adapters or not ours.get(name):
            continue
        theirs = _means(measure_from(name, models, known))
        others = [other for other in models if other not in {base, name}]
        if others and all(theirs.get(other, 1) < _CLEARLY * ours.get(other, 0) for other in others):
            near, far = (sum(means[other] for other in others) / len(others) for means in (theirs, ours))
            return (
                f"{name} is nearer to every other model than the base {base} is ({near:.1%} instead of {far:.1%} of "
                "their FFNs differ), so it may be the model that they were trained from. If it is, give it as BASE"
            )
    return None


def _means(distances: Mapping[str, Distance]) -> dict[str, float]:
    return {name: distance.mean for name, distance in distances.items() if distance.by_layer}


def base_remarks(
    base: ModelFolder, card: CardMetadata, experts: Sequence[CardMetadata], *, templates: bool
) -> Iterator[str]:
    """Yield a sentence for each reason, in the models' names and cards, why another base may be right.

    Args:
        base: the base.
        card: its name and card.
        experts: the names and cards of all other models.
        templates: whether the base has a chat template.
    """
    if isinstance(base.origin, Reference):
        named = {origin.lower(): origin for expert in experts for origin in expert.bases[:1]}
        if len(named) == 1 and base.origin.repo.lower() not in named and all(expert.bases for expert in experts):
            yield (
                f"the cards of all experts name {next(iter(named.values()))} as the model that they were trained from, "
                f"not {base.reference}"
            )
    if card.chats or templates:
        why = f"its name is {card.name}" if card.chats else "it has a chat template"
        yield (
            f"the base {base.reference} is a chat model itself ({why}): right if the experts were trained from it, and "
            "not from its pretrained model"
        )

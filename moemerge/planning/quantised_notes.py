"""Notes on models that are stored quantised, for the plan and for the merged model's card."""

from collections.abc import Iterator

from moemerge.checkpoint.derived import kinds_of
from moemerge.config.expert_names import named_place
from moemerge.config.schema import MergeConfig
from moemerge.planning.checking import Tables


def quantised_notes(config: MergeConfig, tables: Tables) -> Iterator[str]:
    """Yield a note for each way in which models of a merge are stored quantised, with the models' places.

    Args:
        config: the merge.
        tables: the models' tensors, before anything is computed of them.
    """
    named = [
        ("base_model", config.base_model),
        *((named_place(n, config.expert_names), expert.source_model) for n, expert in enumerate(config.experts)),
        *((f"shared_experts[{n}]", expert.source_model) for n, expert in enumerate(config.shared_experts)),
    ]
    found: dict[str, list[str]] = {}
    for place, reference in named:
        if kinds := kinds_of(tables[reference].values()):
            found.setdefault(" and ".join(kinds), []).append(place)
    for kind, places in found.items():
        yield f"{', '.join(places)}: {was_stored_as(kind)}"


def was_stored_as(kind: str) -> str:
    """What to say of models that are stored quantised, after their names: `FP8 with a scale per row`."""
    return f"stored as {kind}, and dequantised, which does not bring back what the quantisation lost"

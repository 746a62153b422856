"""The shared half of a mixture whose experts come from several mixtures: embeddings, attention, norms."""

from collections.abc import Sequence

from moemerge.checkpoint.derived import Derived, linear
from moemerge.checkpoint.header import TensorInfo
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.families.stored_mixture import StoredMixture


def averaged(mixture: StoredMixture, others: Sequence[StoredMixture]) -> tuple[dict[str, TensorInfo], list[str]]:
    """Average what the experts of several mixtures share, each mixture by its number of experts.

    Args:
        mixture: the mixture that is edited.
        others: the other mixtures.

    Returns:
        The averaged tensors by name, and the reasons why there is no average; tensors that are equal in all stay.
    """
    if not others:
        return {}, []
    kind = mixture.family.model_type
    problems = [
        f"one mixture is a {kind}, another a {other.family.model_type}"
        for other in others
        if other.family.model_type != kind
    ]
    made: dict[str, TensorInfo] = {}
    counts = [each.experts for each in (mixture, *others)]
    weights = [count / sum(counts) for count in counts]
    for name, tensor in mixture.tensors.items():
        if problems or mixture.is_expert(name):
            continue
        inputs = [each.tensors.get(name) for each in (mixture, *others)]
        found = [each for each in inputs if each is not None and each.shape == tensor.shape]
        if len(found) < len(inputs):
            problems.append(f"another mixture has no tensor {name} of shape {list(tensor.shape)}")
        elif any(each.dtype not in CONFIG_DTYPES for each in found):
            problems.append(f"{name} is stored as {next(e.dtype for e in found if e.dtype not in CONFIG_DTYPES)}")
        else:
            key = repr((weights, name))
            made[name] = Derived(
                f"average of {len(found)} mixtures", tuple(found), linear(weights), key, tensor.dtype
            ).tensor(name)
    return made, problems[:1]

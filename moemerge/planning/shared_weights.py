"""Make the weights that the experts share, embeddings, attention and norms: the base's, or a mix of all models'.

`average` is the mean over the experts, as in Branch-Train-MiX (https://arxiv.org/abs/2403.07816). `ties`
(https://arxiv.org/abs/2306.01708) and `dare` (https://arxiv.org/abs/2311.03099) add to the base what the experts
changed: the largest changes, as far as they agree in sign, or some at random, scaled up for the others. MergeME
(https://arxiv.org/abs/2502.00997) uses both for the shared half of a mixture.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.derived import Derived, Recipe, Rows, blocks_of, linear
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.own_lock import OwnLock
from moemerge.checkpoint.unreadable import Resized, reasons
from moemerge.compatibility.causes import said_once
from moemerge.config.schema import SharedWeights
from moemerge.dtypes import CONFIG_DTYPES, HeaderDType
from moemerge.errors import IncompatibleError
from moemerge.families.dense import NON_LLAMA_FACTS, DenseModel, ModelTensors

# Settings of attention; where they differ, weights cannot be mixed.
_SAME: Final = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "layer_norm_eps",
    "norm_eps",
)
_SAME_VALUES: Final = (
    "rope_with_part", "layer_rope_theta", "positions", "attention_multiplier", "embedding_multiplier",
    "residual_multiplier", "logits_scaling", "layer_types", "window",
)  # fmt: skip
_SAME_FACTS: Final = ("qk_norm", "qkv_bias", "output_bias", "sinks")
_WITHOUT: Final = "has no tensor {} in float32, float16 or bfloat16, as the base model has"
_NO_PLACE: Final = "tensor {} has no place in the base model's attention"
_MOST_RUNS: Final = 4


def share_weights(
    settings: SharedWeights,
    base: ModelTensors,
    experts: Mapping[str, ModelTensors],
    dtype: HeaderDType,
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the base's tensors, the shared ones replaced by a mix of all models', and notes for the user.

    Embeddings and head stay the base's where a vocabulary differs; so do the FFNs of layers without experts.

    Args:
        settings: the method of mixing and its settings.
        base: the base model.
        experts: the experts by their names in messages.
        dtype: dtype of the result, as a safetensors header spells it.

    Raises:
        IncompatibleError: the experts' attention does not compute like the base's.
    """
    if settings.method == "base":
        return dict(base.tensors), []
    if problems := _differences(base, experts):
        raise IncompatibleError(
            f"shared_weights: {settings.method} is not possible with these models. Write `shared_weights: base`, which "
            "takes the base model's attention and norms, or leave out the experts that are named:",
            problems,
        )
    kept = _kept(base, experts)
    notes = [
        f"shared_weights: {name} is the base model's: {whose} has another vocabulary, or none of its own"
        for name, whose in kept.items()
    ]
    made = {
        name: _derive(settings, base.tensors[name], [expert.tensors[name] for expert in experts.values()], dtype)
        for name in (*_inside(base.model), *_outside(base))
        if name not in kept
    }
    return {**base.tensors, **made}, notes


def can_share(base: ModelTensors, experts: Mapping[str, ModelTensors]) -> bool:
    """Whether the models' shared weights can be mixed, and are not all equal."""
    return not _differences(base, experts) and any_changed(base, experts)


def any_changed(base: ModelTensors, experts: Mapping[str, ModelTensors]) -> bool:
    """Whether an expert has another tensor than the base's, of those that would be mixed, as far as headers say."""
    kept = _kept(base, experts)
    names = [name for name in (*_inside(base.model), *_outside(base)) if name not in kept]
    return any(expert.tensors[name] != base.tensors[name] for expert in experts.values() for name in names)


def _kept(base: ModelTensors, experts: Mapping[str, ModelTensors]) -> dict[str, str]:
    """Names of the tensors that stay the base's for the sake of a vocabulary, with the name of an expert at fault."""
    kept: dict[str, str] = {}
    for name in _outside(base):
        for whose, expert in experts.items():
            theirs = expert.tensors.get(name)
            if theirs is None or isinstance(theirs.path, Resized) or theirs.shape != base.tensors[name].shape:
                kept.setdefault(name, whose)
    return kept


def _outside(base: ModelTensors) -> list[str]:
    """Names of the tensors that are mixed only where all vocabularies have one size."""
    return [name for name in (*base.model.first, base.model.family.head) if name in base.tensors]


def _inside(base: DenseModel) -> list[str]:
    """Names of the tensors that are mixed for any vocabularies."""
    return [name for layer in range(base.layers) for name in base.tensors(layer)] + [base.family.last]


def _differences(base: ModelTensors, experts: Mapping[str, ModelTensors]) -> list[str]:
    """List the reasons why attention and norms cannot be mixed, each of them once."""
    found = [
        (name, f"{cause}, so their attention cannot be mixed")
        for name, expert in experts.items()
        for cause in _settings(expert.model, base.model)
    ]
    apart = {name for name, _ in found}
    for name, expert in experts.items():
        # What computes otherwise has other tensors, too.
        found += [(name, cause) for cause in _tensors(expert, base, mixed=name not in apart)]
    return said_once(found)


def _settings(model: DenseModel, base: DenseModel) -> Iterator[str]:
    """Yield how a model attends otherwise than the base."""
    if model.family.block != base.family.block:
        yield f"a {model.family.model_type} does not attend like the base model, a {base.family.model_type}"
        return
    for fact in _SAME_FACTS:
        if (fact in base.facts) != (fact in model.facts):
            ours, theirs = ("with" if fact in one.facts else "without" for one in (base, model))
            yield f"attention is {theirs} {NON_LLAMA_FACTS[fact]}, but the base model's is {ours} them"
    pairs: dict[str, tuple[Any, Any]] = {key: (model.config.get(key), base.config.get(key)) for key in _SAME}
    pairs |= {key.removesuffix("_with_part"): (model.values.get(key), base.values.get(key)) for key in _SAME_VALUES}
    pairs["the order of rotary rows"] = (model.family.interleaved, base.family.interleaved)
    pairs["the offset of its norms"] = (model.family.norm_offset, base.family.norm_offset)
    if pairs["rope"][0] != pairs["rope"][1] and all(len({*thetas}) == 1 for thetas in pairs["layer_rope_theta"]):
        del pairs["layer_rope_theta"]  # which only repeats it
    if pairs["head_dim"][0] != pairs["head_dim"][1] and model.has_plain_scales and base.has_plain_scales:
        del pairs["attention_multiplier"]  # which follows from it
    for key, (theirs, ours) in pairs.items():
        if theirs != ours:
            yield f"{key} is {_shown(theirs)}, but the base model's is {_shown(ours)}"


def _shown(value: Any) -> str:
    """A setting in a message; of one for each layer, runs of layers with the same value."""
    if not isinstance(value, list):
        return repr(value)
    runs, first = [], 0
    for held, run in groupby(value):
        count = len(list(run))
        runs.append(
            f"{held!r} in layer{'' if count == 1 else 's'} {first}{f'-{first + count - 1}' if count > 1 else ''}"
        )
        first += count
    more = len(runs) - _MOST_RUNS
    return ", ".join(runs[:_MOST_RUNS]) + (f" and {more} more runs" if more > 0 else "")


def _tensors(expert: ModelTensors, base: ModelTensors, *, mixed: bool) -> Iterator[str]:
    """Yield what is wrong with an expert's tensors; those that are `mixed` have to be the base's, too."""
    theirs = expert.tensors
    lost = {name: why for name, why in reasons(theirs).items() if not isinstance(theirs[name].path, Resized)}
    inside = dict.fromkeys(_inside(base.model))
    found: dict[str, list[str]] = {}
    for tensor in [*_outside(base), *inside]:
        shape = base.tensors[tensor].shape
        fits = tensor in theirs and theirs[tensor].shape == shape
        if tensor in lost:
            found.setdefault(f"{{}} {lost[tensor]}", []).append(tensor)
        elif mixed and (fits or tensor in inside) and not (fits and theirs[tensor].dtype in CONFIG_DTYPES):
            found.setdefault(_WITHOUT, []).append(f"{tensor} of shape {list(shape)}")
    own = [name for layer in range(base.model.layers) for name in expert.model.tensors(layer)]
    if mixed and (more := [name for name in own if name not in inside]):
        found[_NO_PLACE] = more
    for cause, names in found.items():
        yield cause.replace("{}", names[0], 1) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _derive(settings: SharedWeights, base: TensorInfo, experts: Sequence[TensorInfo], dtype: HeaderDType) -> TensorInfo:
    given = settings.weights or [1.0] * len(experts)
    weights = [weight / sum(given) for weight in given]
    recipe_key = repr((settings.model_dump(), base.name))
    if settings.method == "average":
        if len(set(experts)) == 1:
            return experts[0]
        name = f"average of {len(experts)} models"
        return Derived(name, tuple(experts), linear(weights), recipe_key, dtype).tensor(base.name)
    recipe: Recipe = (
        _Ties(base, experts, settings.density, weights)
        if settings.method == "ties"
        else _dare(base.name, settings, weights)
    )
    name = f"{settings.method} of {len(experts)} models"
    return Derived(name, (base, *experts), recipe, recipe_key, dtype, rereads=settings.method == "ties").tensor(
        base.name
    )


def _dare(name: str, settings: SharedWeights, weights: Sequence[float]) -> Recipe:
    """A recipe for DARE: the base plus the weighted sum of changes, of which some are dropped, the rest rescaled."""

    def recipe(row: int, blocks: list[Rows]) -> Rows:
        base, *others = blocks
        total = base.copy()
        for number, (weight, other) in enumerate(zip(weights, others, strict=True)):
            seed = zlib.crc32(f"{settings.seed} {name} {number} {row}".encode())
            kept = np.random.default_rng(seed).random(base.shape, np.float32) < settings.density
            total += np.float32(weight / settings.density) * (other - base) * kept
        return total

    return recipe


class _Ties:
    """A recipe for TIES: the base plus the mean of each expert's largest changes that have the dominant sign."""

    def __init__(
        self, base: TensorInfo, experts: Sequence[TensorInfo], density: float, weights: Sequence[float]
    ) -> None:
        self._base, self._experts, self._density, self._weights = base, experts, density, weights
        self._lock = OwnLock()
        self._thresholds: list[np.float32] = []

    def __call__(self, _row: int, blocks: list[Rows]) -> Rows:
        with self._lock:
            if not self._thresholds:
                self._thresholds = [self._threshold(expert) for expert in self._experts]
        base, *others = blocks
        changes = np.stack([other - base for other in others])
        for change, threshold in zip(changes, self._thresholds, strict=True):
            change[np.abs(change) < threshold] = 0
        weights = np.array(self._weights, np.float32).reshape(-1, 1, 1)
        weighted = changes * weights
        agrees = np.sign(changes) == np.sign(weighted.sum(axis=0))
        agrees &= changes != 0
        total: Rows = (weighted * agrees).sum(axis=0)
        shares = (weights * agrees).sum(axis=0)
        np.divide(total, shares, out=total, where=shares > 0)
        total[shares <= 0] = 0
        total += base
        total[~np.isfinite(changes).all(axis=0)] = np.nan  # NaN would be lost in the signs
        return total

    def _threshold(self, expert: TensorInfo) -> np.float32:
        """Find the magnitude of the smallest change that is kept, in two passes over the halves of its bits."""
        total = int(np.prod(expert.shape))
        rank = max(total - round(self._density * total), 0)  # the number of changes that are dropped
        upper = np.zeros(2**16, np.int64)
        for bits in self._sizes(expert):
            upper += np.bincount(bits >> 16, minlength=2**16)
        half = int(np.searchsorted(upper.cumsum(), rank, side="right"))
        if half >= len(upper):
            return np.float32(np.inf)
        rank -= int(upper[:half].sum())
        lower = np.zeros(2**16, np.int64)
        for bits in self._sizes(expert):
            lower += np.bincount(bits[bits >> 16 == half] & 0xFFFF, minlength=2**16)
        rest = int(np.searchsorted(lower.cumsum(), rank, side="right"))
        return np.float32(np.array([half << 16 | rest], np.uint32).view(np.float32)[0])

    def _sizes(self, expert: TensorInfo) -> Iterator[NDArray[np.uint32]]:
        """Yield the bits of the changes' magnitudes block by block; they sort like the magnitudes."""
        for base, other in blocks_of([self._base, expert]):
            yield np.abs(other - base).reshape(-1).view(np.uint32)

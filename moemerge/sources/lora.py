"""LoRA adapters of PEFT, added to the tensors of their base model while these are read.

A weight becomes `W + alpha / r * B A`, or `alpha / sqrt(r)` with rank-stabilised adapters
(https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2312.03732); DoRA gives each row the adapter's length
(https://arxiv.org/abs/2402.09353). Keys of adapter_config.json: https://huggingface.co/docs/peft/package_reference/lora
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.derived import Derived
from moemerge.checkpoint.header import TensorInfo, read_header
from moemerge.checkpoint.index import read_json
from moemerge.checkpoint.unreadable import Resized, Unreadable, is_no_tensor
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.errors import SourceError
from moemerge.sources.bin_files import read_pickle
from moemerge.sources.local import resolve_file
from moemerge.sources.lora_sum import LoraSum
from moemerge.sources.name_prefixes import text_name
from moemerge.sources.reference import Reference, parse_reference

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")
_USUAL_ALPHA: Final = 8
_REPEATED: Final = re.compile(r"[*+{]")
_GROUP_REPEATED: Final = re.compile(r"\)\s*[*+{]")
_MOST_REPEATED: Final = 2
# Scales of a trained adapter are of the order of 1; this one makes any factors overflow.
_TOO_LARGE: Final = 1e30
_PREFIXES: Final = re.compile(r"(_orig_mod\.|base_model\.model\.)*")
# A module, and what PEFT has made in it or put in its place.
_MODULE: Final = re.compile(
    r"(.*?)(?:\.((?:lora_|token_adapter\.|base_layer\.|modules_to_save\.).*|weight|bias))?", re.DOTALL
)
_FACTOR: Final = re.compile(r"(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
_WHOLE: Final = re.compile(r"(?:base_layer\.|modules_to_save\.default\.)?(weight|bias)")
_LAYERS: Final = ("model.layers.", "layers.")
# PEFT's settings that change more than such a sum, or change the base model too, with what they are called.
_REFUSED: Final = {
    "use_qalora": "it pools its inputs",
    "alora_invocation_tokens": "it is active in a part of the text",
    "target_parameters": "it targets stacked experts",
    "layer_replication": "it repeats layers",
    "use_bdlora": "its factors are blocks",
    "monteclora_config": "it samples",
    "arrow_config": "it chooses between adapters",
    "kasa_config": "it has more than two factors",
}
# Changes to one module other than such a sum, by how the names of their tensors begin within the module.
_INEXACT: Final = {
    "lora_embedding_": "it adds factors that embeddings have",
    "token_adapter.": "it trains single tokens",
    "lora_B.bias": "it trains a bias of its own",
}
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder and its `adapter_config.json`."""

    reference: str
    folder: Path
    config: Mapping[str, Any]

    @property
    def trained_on(self) -> str | None:
        """The Hub repository that its config names as the base, if it names one and not a folder."""
        named = self.config.get("base_model_name_or_path")
        try:
            model = parse_reference(named) if named and isinstance(named, str) else None
        except SourceError:
            return None
        return model.repo if isinstance(model, Reference) else None


def open_adapter(reference: str, folder: Path) -> Adapter:
    """Read an adapter's config, and refuse an adapter that is no exact sum.

    Raises:
        SourceError: there is no adapter, or it is of another kind than LoRA.
        CheckpointError: its config is damaged.
    """
    if not (folder / CONFIG).exists():
        raise SourceError(
            f"{reference}: has no {CONFIG}, so it is not an adapter. Name it after the + of model+adapter."
        )
    config = read_json(resolve_file(folder, CONFIG))
    kind = config.get("peft_type")
    if kind != "LORA":
        raise SourceError(f"{reference}: is a {kind} adapter; only LORA can be merged exactly. Merge it with PEFT.")
    reasons = [words for key, words in _REFUSED.items() if config.get(key)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        reasons.append(f"init_lora_weights {start} changed the base model's weights too")
    if reasons:
        raise SourceError(f"{reference}: cannot be merged exactly: {' and '.join(reasons)}. Merge it with PEFT.")
    return Adapter(reference, folder, config)


def merge_adapter(adapter: Adapter, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The base model's tensors with an adapter added to those that it targets.

    A change outside the layers, or other than by a sum, is often not needed: such a tensor is marked as unreadable with
    the reason.

    Raises:
        SourceError: the adapter does not fit the base model's layers.
        CheckpointError: its file is damaged.
    """
    found = _read(adapter)
    nothing = {name: entry for name, entry in found.items() if is_no_tensor(entry)}
    merged = {**tensors, **nothing}
    for module, parts in _modules([tensor for name, tensor in found.items() if name not in nothing], tensors).items():
        merged |= _changed(adapter, module, parts, tensors)
    return merged


def _read(adapter: Adapter) -> dict[str, TensorInfo]:
    name = next((name for name in WEIGHTS if (adapter.folder / name).exists()), None)
    if name is None:
        raise SourceError(f"{adapter.reference}: has no {' and no '.join(WEIGHTS)}.")
    path = resolve_file(adapter.folder, name)
    return read_pickle(path) if name.endswith(".bin") else read_header(path)


def _modules(found: Iterable[TensorInfo], tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Group the adapter's tensors by module of the base model, or of what it lacks, and by their name within that."""
    own = {name.rpartition(".")[0] for name in tensors}
    modules: dict[str, dict[str, TensorInfo]] = {}
    for tensor in found:
        plain = _PREFIXES.sub("", tensor.name, count=1)
        # Trained without a head, a decoder's names lack `model.`; trained inside a multimodal model, they have more.
        splits = [_split(name) for name in (text_name(plain) or plain, f"model.{plain}")]
        module, part = next((split for split in splits if split[0] in own), splits[0])
        factor = _FACTOR.fullmatch(part)
        parts = modules.setdefault(module, {})
        if parts.setdefault(factor[1] if factor else part, tensor) is not tensor:
            raise SourceError(f"{tensor.path}: tensor {tensor.name} is there twice, under another name.")
    return modules


def _split(name: str) -> tuple[str, str]:
    match = _MODULE.fullmatch(name)
    return (match[1], match[2] or "") if match else (name, "")


def _changed(
    adapter: Adapter, module: str, parts: Mapping[str, TensorInfo], tensors: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """The tensors of a module with the adapter added, or marked as unreadable."""
    whole = {name: tensors[name] for name in (f"{module}.weight", f"{module}.bias") if name in tensors}
    if any(isinstance(tensor.path, Unreadable) for tensor in whole.values()):
        return {}
    stored = next(iter(parts.values()))
    if not whole and not module.startswith(_LAYERS):
        lacking = replace(stored, name=f"{module}.weight")
        reason = f"is in the adapter {adapter.reference} alone: the model before the + has no such tensor"
        return {lacking.name: Unreadable(stored, reason).tensor(lacking)}
    inexact = [words for begin, words in _INEXACT.items() if any(part.startswith(begin) for part in parts)]
    if inexact and whole:
        reason = f"{adapter.reference}: {' and '.join(inexact)}"
    else:
        try:
            return _merged(adapter, module, parts, whole)
        except SourceError as error:
            if module.startswith(_LAYERS):
                raise
            reason = str(error).removesuffix(".")
    resized, reason = _resized(parts, whole), f"cannot be merged exactly: {reason}"
    unreadable = Resized(resized, reason) if resized else Unreadable(stored, reason)
    return {name: unreadable.tensor(tensor) for name, tensor in whole.items()}


def _resized(parts: Mapping[str, TensorInfo], whole: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The weight of a module with more or fewer rows, where nothing else of the adapter changes the module.

    Beside embeddings that it trained, PEFT saves a second copy where their number changed.
    """
    found = {part: tensor for part, tensor in parts.items() if part != "modules_to_save.weight"}
    shapes = {tensor.shape[1:] for tensor in (*whole.values(), *found.values())}
    part, tensor = next(iter(found.items()))
    return tensor if len(found) == len(shapes) == 1 and _WHOLE.fullmatch(part) else None


def _merged(
    adapter: Adapter, module: str, parts: Mapping[str, TensorInfo], whole: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    weight = f"{module}.weight"
    factors = {part: tensor for part, tensor in parts.items() if _FACTOR.fullmatch(part)}
    merged = {}
    for part, tensor in parts.items():
        match = _WHOLE.fullmatch(part)
        name = f"{module}.{match[1]}" if match else weight
        if isinstance(tensor.path, Unreadable):
            raise SourceError(f"{adapter.reference}: its {tensor.name} {tensor.path.reason}.")
        if name not in whole:
            raise SourceError(f"{adapter.reference}: targets {module}, which the model before the + does not have.")
        if not match and part not in factors:
            raise SourceError(f"{adapter.reference}: nothing is known of its tensor {tensor.name}. Merge it with PEFT.")
        if part == "weight" and factors:
            raise SourceError(f"{adapter.reference}: has both a weight and factors for {module}.")
        if match and tensor.shape != whole[name].shape:
            raise SourceError(
                f"{adapter.reference}: its {module} has the shape {list(tensor.shape)}, but the model's is "
                f"{list(whole[name].shape)}."
            )
        if match:
            merged[name] = tensor
    if factors:
        merged[weight] = _merge(adapter, module, merged.get(weight, whole[weight]), factors)
    return merged


def _merge(adapter: Adapter, module: str, weight: TensorInfo, parts: Mapping[str, TensorInfo]) -> TensorInfo:
    lost = sorted({"lora_A", "lora_B"} - parts.keys())
    if lost:
        raise SourceError(f"{adapter.reference}: has no {lost[0]} for {module}.")
    a, b, lengths = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
    fits = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] > 0  # noqa: PLR2004
    if not fits or (b.shape[0], a.shape[1]) != weight.shape or (lengths and math.prod(lengths.shape) != b.shape[0]):
        raise SourceError(
            f"{adapter.reference}: for {module} it has matrices {list(b.shape)} and {list(a.shape)}, but the model's "
            f"weight is {list(weight.shape)}: it was trained on another base model."
        )
    for tensor in (weight, *parts.values()):
        if tensor.dtype not in CONFIG_DTYPES:
            raise SourceError(
                f"{adapter.reference}: {tensor.name} is stored as {tensor.dtype}; expected one of "
                f"{', '.join(CONFIG_DTYPES)}. Save the adapter in float32."
            )
    trained, _ = _split(_PREFIXES.sub("", a.name, count=1))  # PEFT's patterns are of the module's name as it was then
    recipe = LoraSum(a, b, lengths, _scale(adapter, trained, a.shape[0]))
    name = f"adapter {adapter.reference} on"
    recipe_key = repr(recipe.scale)
    return Derived(name, (weight,), recipe, recipe_key, "F32", others=recipe.tensors).tensor(f"{module}.weight")


def _scale(adapter: Adapter, module: str, rank: int) -> float:
    """The factor on `B A`.

    Raises:
        SourceError: `lora_alpha`, `alpha_pattern` or the rank is not what PEFT takes, or not finite.
    """
    stated = _of_module(adapter, module, "r", "rank_pattern", rank)
    if stated != rank:
        raise SourceError(
            f"{adapter.reference}: {CONFIG} says that {module} has rank {stated!r:.20}, but its matrices have {rank}. "
            "Save the adapter again."
        )
    alpha = _of_module(adapter, module, "lora_alpha", "alpha_pattern", _USUAL_ALPHA)
    try:
        scale = float(alpha) / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)
    except (TypeError, ValueError, OverflowError) as error:
        raise SourceError(
            f"{adapter.reference}: {CONFIG}: lora_alpha or alpha_pattern is not a number ({error}). Save it again."
        ) from error
    if not abs(scale) < _TOO_LARGE:  # nor NaN
        raise SourceError(
            f"{adapter.reference}: {CONFIG}: with lora_alpha {alpha!s:.20} no factors are small enough. Set it to what "
            "the adapter was trained with, often 8 to 64."
        )
    return scale


def _of_module(adapter: Adapter, module: str, key: str, pattern_key: str, default: int) -> Any:
    """Look up a setting of a module; patterns match its whole name or its end, as in PEFT."""
    patterns = adapter.config.get(pattern_key) or {}
    if not isinstance(patterns, Mapping):
        raise SourceError(f"{adapter.reference}: {CONFIG}: {pattern_key} is not an object. Save the adapter again.")
    for pattern, own in patterns.items():
        # Nested repetitions, or many in a row, can take longer to match than anyone waits.
        if len(_REPEATED.findall(pattern)) > _MOST_REPEATED or _GROUP_REPEATED.search(pattern):
            raise SourceError(
                f"{adapter.reference}: {CONFIG}: {pattern_key} has a pattern that is too intricate, {pattern!r:.60}. "
                "Write the modules' names in its place."
            )
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return own
        except re.error as error:
            raise SourceError(
                f"{adapter.reference}: {CONFIG}: {pattern_key} has a pattern that is not one, {pattern!r:.60} "
                f"({error}). Save the adapter again."
            ) from error
    return adapter.config.get(key, default)

"""The towers of a multimodal base, which `keep_vision` copies beside a mixture of its text model."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, Final

from moemerge.checkpoint.disk import shown_bytes
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Band, Fill, Piece
from moemerge.checkpoint.transposed import Transposed
from moemerge.config.schema import MergeConfig
from moemerge.config.tokenizer_choice import BASE, UNION
from moemerge.dtypes import HeaderDType
from moemerge.errors import IncompatibleError
from moemerge.families.multimodal import VISION_MIXTURES, VisionMixture
from moemerge.planning.output import Output
from moemerge.planning.tokenizer_files import BaseFiles
from moemerge.sources.model_folder import ModelFolder
from moemerge.sources.name_prefixes import module_of

PROCESSORS: Final = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files that say how images become numbers."""
_BODY: Final = "model."
_TEXT: Final = "model.language_model."
_PROJECTION: Final = re.compile(r"(?P<module>.+\.mlp\.experts\.)(?P<expert>\d+)\.(?P<role>gate|up|down)_proj\.weight")
_STACKS: Final = {"gate": "gate_up_proj", "down": "down_proj"}


def vision_mixture(config: MergeConfig, base: ModelFolder) -> VisionMixture | None:
    """Find the multimodal class that holds the base's towers beside a mixture; None if the config asks for no towers.

    Raises:
        IncompatibleError: the base has no towers, or no class holds them so; or other keys of the config exclude them.
    """
    if not config.keep_vision:
        return None
    if base.whole is None:
        raise IncompatibleError(
            f"keep_vision: base_model {base.reference} is a model for text alone. Remove the key, or name the "
            "multimodal model as base_model.",
            [],
        )
    found = VISION_MIXTURES.get(base.stored_type)
    if found is None:
        known = ", ".join(f"{dense} ({mixture.model_type})" for dense, mixture in VISION_MIXTURES.items())
        raise IncompatibleError(
            f"keep_vision: no class has the towers of a {base.stored_type} beside a mixture; there is one for {known}. "
            "Remove the key for a mixture of the text model alone.",
            [],
        )
    if not isinstance(base.whole.get("vision_config"), dict):
        raise IncompatibleError(
            f"keep_vision: config.json of base_model {base.reference} has no vision_config. Remove the key.", []
        )
    if problems := list(_excluded(config, found)):
        raise IncompatibleError("keep_vision: does not go together with other keys:", problems)
    return found


def _excluded(config: MergeConfig, found: VisionMixture) -> Iterator[str]:
    if config.architecture and config.architecture.lower() != found.family:
        yield f"architecture: the text model of a {found.model_type} is a {found.family}, not a {config.architecture}"
    if config.vocabulary not in {BASE, UNION}:
        yield f"tokenizer: the ids of images are the base's, not those of `tokenizer: {config.vocabulary}`"


def with_processors(files: BaseFiles, base: ModelFolder) -> BaseFiles:
    """Copy the files of the base's processors, too."""
    found = {name: path for name in PROCESSORS if (path := base.file(name))}
    return replace(files, copied={**files.copied, **found})


def around(found: VisionMixture | None, base: ModelFolder, text: dict[str, Any]) -> dict[str, Any]:
    """Write the `config.json` of a mixture, given that of its text model, with the towers of the base around it."""
    return found.config(base.whole, text) if found and base.whole else text


def kept_towers(base: ModelFolder) -> list[str]:
    """Names of the base's tensors that go with it: all but layers that predict further tokens."""
    return [name for name in base.left_out if name.startswith(_BODY)]


def left_out_notes(models: Iterable[ModelFolder], kept: Collection[str] = ()) -> list[str]:
    """Say how much of some models is no part of their text models.

    Args:
        models: the models, whose tensors have been read; the first is the base.
        kept: names of its tensors that are kept all the same.
    """
    said: dict[str, list[str]] = {}
    for number, model in enumerate(models):
        others = {name: tensor for name, tensor in model.left_out.items() if number or name not in kept}
        if others:
            said.setdefault(left_out_in_words(others), []).append(model.reference)
    return [f"{', '.join(references)}: beside the text model, {what}" for what, references in said.items()]


def keeping_towers(base: ModelFolder) -> VisionMixture | None:
    """The multimodal class that would hold a base's towers beside a mixture; None for a base without, or for none."""
    return VISION_MIXTURES.get(base.stored_type) if base.whole else None


def vision_notes(found: VisionMixture | None, base: ModelFolder) -> Iterator[str]:
    """Say that the base's towers could be kept, or what is missing beside those that are."""
    if found is None:
        if could := keeping_towers(base):
            yield f"base_model: `keep_vision: true` would keep its towers, in a {could.model_type} (docs/families.md)"
        return
    yield f"keep_vision: what engines compute of a {found.model_type} was measured with text alone, without images"
    if not any(base.file(name) for name in PROCESSORS):
        yield (
            f"base_model: has none of {', '.join(PROCESSORS)}, so that nothing says how images become numbers: copy "
            "them from the original model beside the output"
        )


def left_out_in_words(tensors: Mapping[str, TensorInfo]) -> str:
    """Say of tensors that are left out how many they are, how large, and whose: `27 tensors of 1.33 GB ...`."""
    modules = dict.fromkeys(map(module_of, tensors))
    count = f"{len(tensors)} tensors" if len(tensors) > 1 else "1 tensor"
    size = shown_bytes(sum(tensor.nbytes for tensor in tensors.values()))
    return f"{count} of {size} are left out: {', '.join(modules)}"


def beside_towers(
    found: VisionMixture, outputs: Mapping[str, Output], base: ModelFolder, dtype: HeaderDType
) -> dict[str, Output]:
    """Put a mixture's tensors where a multimodal class has them, and the base's towers beside them.

    Args:
        found: the class.
        outputs: the tensors of the mixture for text alone.
        base: the base model.
        dtype: dtype of the merged model, as a safetensors header spells it.

    Raises:
        IncompatibleError: the base's files hold no towers.
    """
    towers = {name: base.left_out[name] for name in kept_towers(base)}
    if not towers:
        raise IncompatibleError(
            f"keep_vision: base_model {base.reference} has no tensors beside its text model. Remove the key.", []
        )
    stacked = _transposed_stacks(outputs) if found.stacks_transposed else outputs
    text = {_inside(name): output for name, output in stacked.items()}
    return {name: Output(tensor.shape, ((Piece(tensor, dtype),),)) for name, tensor in towers.items()} | text


def _inside(name: str) -> str:
    return f"{_TEXT}{name.removeprefix(_BODY)}" if name.startswith(_BODY) else name


def _transposed_stacks(outputs: Mapping[str, Output]) -> dict[str, Output]:
    """Stack the projections of each layer's experts, transposed, where the first of them was."""
    stacked: dict[str, Output] = {}
    for name in outputs:
        match = _PROJECTION.fullmatch(name)
        if match is None:
            stacked[name] = outputs[name]
        elif match["expert"] == "0" and match["role"] != "up":
            roles = ("gate", "up") if match["role"] == "gate" else ("down",)
            stacked[f"{match['module']}{_STACKS[roles[0]]}"] = _stack(outputs, match["module"], roles)
    return stacked


def _stack(outputs: Mapping[str, Output], module: str, roles: tuple[str, ...]) -> Output:
    """Stack matrices of all experts of a module: those of several roles side by side, as columns."""
    bands: list[Band] = []
    experts = 0
    while f"{module}{experts}.{roles[0]}_proj.weight" in outputs:
        parts = [outputs[f"{module}{experts}.{role}_proj.weight"] for role in roles]
        pieces = [[_transposed(piece) for piece in part.pieces] for part in parts]
        # Neurons that lay below each other lie side by side, and the other way round.
        bands += [(piece,) for piece in pieces[0]] if roles == ("down",) else [tuple(chain.from_iterable(pieces))]
        experts += 1
    rows, columns = outputs[f"{module}0.{roles[0]}_proj.weight"].shape
    return Output((experts, columns, len(roles) * rows), tuple(bands), is_expert=True)


def _transposed(piece: Piece) -> Piece:
    match piece.source:
        case TensorInfo() as matrix:
            return replace(piece, source=Transposed(matrix).tensor())
        case Fill(value, shape):
            return replace(piece, source=Fill(value, shape[::-1]))
        case _:  # pragma: no cover  no expert is made of bytes
            raise TypeError(piece)

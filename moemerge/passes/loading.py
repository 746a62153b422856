"""Load tensors with a checkpoint's names into a model of transformers, whatever it calls them in memory."""

import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from moemerge.errors import CheckpointError


def load_tensors(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Give some of a model's parameters and buffers their values, in the dtype that they have there.

    Other parameters stay as they are.

    transformers 5 stacks experts in memory; its conversion of a whole checkpoint is used here for a part of one.
    Version 4 calls the tensors of our families as they are stored. What a class leaves out on purpose, such as layers
    that predict further tokens, is left out.

    Raises:
        CheckpointError: the model has no place for a tensor.
    """
    if not tensors:
        return
    if find_spec("transformers.core_model_loading") is None:
        for name, tensor in tensors.items():
            _place(model, name, tensor, device)
        return
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        dtype = next(iter(tensors.values())).dtype
        settings = LoadStateDictConfig(
            device_map={"": device}, dtype=dtype, weight_mapping=get_model_conversion_mapping(model)
        )
        found, _ = convert_and_load_state_dict_in_model(model, dict(tensors), settings)
    finally:
        if shown:
            logging.enable_progress_bar()
    unexpected = [name for name in found.unexpected_keys if not _is_left_out(model, name)]
    wrong = [*unexpected, *found.mismatched_keys, *found.conversion_errors]
    if wrong:
        raise CheckpointError(
            f"{type(model).__name__} has no place for {wrong[0]}: the checkpoint is not what it says."
        )


def _is_left_out(model: PreTrainedModel, name: str) -> bool:
    """Whether a model's class leaves a tensor of its checkpoints out on purpose, if it has no place for it."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast matrices to a narrow dtype, as they will be loaded; vectors stay, since the model may hold them wider."""
    return values if values.dim() < 2 else values.to(dtype)  # noqa: PLR2004


def path_in_memory(model: PreTrainedModel, name: str) -> str:
    """What a model calls the parameter that a tensor of its checkpoint is loaded into."""
    return paths_in_memory(model, [name])[name]


def paths_in_memory(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """What a model calls the parameters that tensors of its checkpoint are loaded into, by the tensors' names."""
    if find_spec("transformers.core_model_loading") is None:
        return {name: name for name in names}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    return {name: rename_source_key(name, renamings, converters)[0] for name in names}


def check_complete(module: Any, path: str) -> None:
    """Refuse a module with a parameter that got no values.

    Raises:
        CheckpointError: names the first such parameter.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise CheckpointError(f"{path}.{name}: no tensor of the checkpoint gives its values.")


def complete_head(model: Any) -> None:
    """Freeze the head, tied to the embeddings if it has no tensor of its own and the config says so.

    Raises:
        CheckpointError: nothing gives its values.
    """
    head = model.get_output_embeddings()
    if head.weight.is_meta and model.config.tie_word_embeddings:
        head.weight = model.model.embed_tokens.weight
    check_complete(head, "lm_head")
    head.requires_grad_(requires_grad=False)


def _place(model: Any, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    path, _, own = name.rpartition(".")
    try:
        module = model.get_submodule(path)
        expected = getattr(module, own)
    except AttributeError as error:
        if _is_left_out(model, name):
            return
        raise CheckpointError(f"{type(model).__name__} has no place for {name}.") from error
    if expected.shape != tensor.shape:
        raise CheckpointError(
            f"{name}: {type(model).__name__} expects the shape {list(expected.shape)}, found {list(tensor.shape)}."
        )
    tensor = tensor.to(device, expected.dtype)
    if own in dict(module.named_buffers(recurse=False)):
        setattr(module, own, tensor)
    else:
        setattr(module, own, torch.nn.Parameter(tensor, requires_grad=False))

"""The streamed pass: compute each layer's router inputs with one decoder layer in memory at a time.

Every prompt passes through a layer before the next is loaded; meanwhile the next layer's bytes are brought into the
page cache, which the system can drop at any time. The FFN of the last layer that gets a router, and all that follows
it, is never run.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from typing import Any, Final

import torch

from moemerge.checkpoint.finite import first_not_finite
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.numbers import read_rows
from moemerge.errors import RouterError
from moemerge.families.layer_names import layer_prefix
from moemerge.passes.decoder import Batch, before_layers, embed, empty_model, group, run_layer
from moemerge.passes.finite import all_finite, where_it_began
from moemerge.passes.sharing_out import shared_out
from moemerge.passes.weights import copy_parameter, read_ahead, read_parameter
from moemerge.routers.pass_inputs import PassRequest, RouterInputs
from moemerge.routers.prompts import EncodedPrompt

TOKENS_PER_BATCH: Final = 1024


class _EndOfPassError(Exception):
    """Raised inside the last layer once its router input is known."""


def capture_router_inputs(request: PassRequest) -> Iterator[RouterInputs]:
    """Yield the router inputs of each layer that has a router, for the request's prompts.

    The tensors of one layer are overwritten by the next.

    Raises:
        RouterError: the model's numbers are not finite; says where that began.
    """
    base = request.base.model
    groups = list(group(request.prompts, lambda prompt: len(prompt.ids), TOKENS_PER_BATCH))
    computes = request.compute.each[: len(groups)]  # a device without a batch gets no weights
    models = [empty_model(base.family.model_type, base.class_keys, one.device) for one in computes]
    counted = [_counted(part) for part in groups]
    inputs = torch.empty(sum(int(part.sum()) for part in counted), base.config["hidden_size"])
    places = torch.split(inputs, [int(part.sum()) for part in counted])
    beginnings = torch.empty(len(request.prompts), base.config["hidden_size"])
    first_places = torch.split(beginnings, [len(part) for part in groups])
    batches = _embedded(models, groups, request)
    order = tuple(prompt for part in groups for prompt in part)
    prompt = torch.repeat_interleave(torch.tensor([sum(prompt.counted) for prompt in order]))
    last = max(request.mixture.moe_layers)
    rooms: list[dict[str, torch.Tensor]] = [{} for _ in models]
    with ThreadPoolExecutor(1) as reader:
        for index in range(last + 1):
            layers = [model.layers[index] for model in models]
            stored = _stored(layers[0], request, index, skip_ffn=index == last)
            for name, tensor in stored.items():
                _place(layers, name, tensor, rooms, request)
            ahead = None
            if index < last and not request.low_memory:
                following = _stored(models[0].layers[index + 1], request, index + 1, skip_ffn=index + 1 == last)
                ahead = reader.submit(read_ahead, following.values())
            entering = _last_states(groups, batches) if request.entering else None
            run = partial(_run, layers, index, base.family.ffn_module, stop_at_ffn=index == last)
            for _ in shared_out(run, zip(batches, counted, places, first_places, strict=True), len(models)):
                pass
            _check_finite(f"layer {index}", batches, stored.values(), inputs)
            # Nothing may refer to the layer: bitsandbytes keeps weights that a move to meta does not reach.
            for model in models:
                model.layers[index] = torch.nn.Identity()
            del layers, run
            if index in request.mixture.moe_layers:
                yield RouterInputs(index, inputs, prompt, order, beginnings, entering)
            if ahead:
                ahead.result()


def _embedded(models: Sequence[Any], groups: Sequence[Sequence[EncodedPrompt]], request: PassRequest) -> list[Batch]:
    """Run the embeddings over each group of prompts, up to the first layer."""
    family = request.base.model.family
    norm = family.last.removeprefix("model.").removesuffix(".weight")
    tensors = request.base.tensors
    for name in before_layers(models[0], norm):
        _read(models, name, tensors[f"model.{name}"], [{} for _ in models], request)
    batches = [
        embed(
            model,
            norm,
            [prompt.ids for prompt in part],
            lambda name, ids: torch.from_numpy(read_rows(tensors[name], ids)),
            compute,
        )
        for part, model, compute in zip(groups, cycle(models), cycle(request.compute.each[: len(models)]), strict=False)
    ]
    _check_finite("the embeddings", batches, [tensors[family.embeddings]])
    return batches


def _check_finite(
    place: str, batches: Sequence[Batch], tensors: Iterable[TensorInfo], inputs: torch.Tensor | None = None
) -> None:
    """Raise an error if the output of a part of the model, made of these tensors, is not finite."""
    if all(batch.is_finite for batch in batches) and (inputs is None or all_finite(inputs)):
        return
    broken = first_not_finite(tensors)
    advice = "Download it again." if broken else "gate_mode random needs no pass over it."
    raise RouterError(f"the base model's {where_it_began(place, broken, batches[0].states.dtype)}. {advice}")


def _counted(part: Sequence[EncodedPrompt]) -> torch.Tensor:
    """Mask (prompt * position,) of the padded positions that count."""
    counted = torch.zeros(len(part), max(len(prompt.ids) for prompt in part), dtype=torch.bool)
    for row, prompt in enumerate(part):
        counted[row, : len(prompt.ids)] = torch.tensor(prompt.counted)
    return counted.flatten()


def _last_states(groups: Sequence[Sequence[EncodedPrompt]], batches: Sequence[Batch]) -> torch.Tensor:
    """Collect the residual stream (prompt, hidden) in float32 after a layer, at each prompt's last token."""
    found = [
        batch.states[row, len(prompt.ids) - 1].float().cpu()
        for part, batch in zip(groups, batches, strict=True)
        for row, prompt in enumerate(part)
    ]
    return torch.stack(found)


def _stored(layer: Any, request: PassRequest, index: int, *, skip_ffn: bool) -> dict[str, TensorInfo]:
    """Find the stored tensors of a layer, by name within the layer; without the FFN's if it is not run."""
    ffn = request.base.model.family.ffn_module
    return {
        name: request.base.tensors[layer_prefix(index) + name]
        for name in layer.state_dict()
        if not (skip_ffn and name.startswith(f"{ffn}."))
    }


def _read(
    modules: Sequence[Any],
    name: str,
    tensor: TensorInfo,
    rooms: Sequence[dict[str, torch.Tensor]],
    request: PassRequest,
) -> None:
    """Read a tensor into a module, on each device."""
    first, *others = zip(modules, rooms, request.compute.each, strict=False)
    read_parameter(first[0], name, tensor, *first[1:])
    for module, room, compute in others:
        copy_parameter(module, name, rooms[0][name], room, compute)


def _place(
    layers: Sequence[Any],
    name: str,
    tensor: TensorInfo,
    rooms: Sequence[dict[str, torch.Tensor]],
    request: PassRequest,
) -> None:
    """Read a tensor into a layer, on each device, quantised if the request says so."""
    _read(layers, name, tensor, rooms, request)
    path, _, own = name.rpartition(".")
    if request.base_bits and own in dict(layers[0].get_submodule(path).named_parameters(recurse=False)):
        from moemerge.passes.quantised import quantise_weight  # imports bitsandbytes, an extra

        for layer, room in zip(layers, rooms, strict=True):
            quantise_weight(layer, name, request.base_bits)
            del room[name]


def _run(
    layers: Sequence[Any],
    index: int,
    ffn_module: str,
    device: int,
    part: tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    stop_at_ffn: bool,
) -> None:
    """Pass a batch through a layer on one of the devices, and keep the states that enter its FFN in float32.

    A part is the batch, the mask of its tokens that count, and places for states of those (counted token, hidden) and
    of first tokens (prompt, hidden).
    """
    batch, counted, place, first_place = part
    mask = counted.to(batch.states.device)

    def keep(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        place.copy_(inputs[0].flatten(0, 1)[mask])
        first_place.copy_(inputs[0][:, 0])
        if stop_at_ffn:
            raise _EndOfPassError

    handle = layers[device].get_submodule(ffn_module).register_forward_pre_hook(keep)
    try:
        run_layer(layers[device], batch, index)
    except _EndOfPassError:
        pass
    finally:
        handle.remove()

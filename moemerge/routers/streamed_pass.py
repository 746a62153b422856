"""The streamed pass: compute each layer's router inputs with one decoder layer in memory at a time.

Every prompt passes through a layer before the next is loaded; meanwhile the next layer's bytes are brought into the
page cache, which the system can drop at any time. The FFN of the last layer that gets a router, and all that follows
it, is never run.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch

from moemerge.checkpoint.finite import first_not_finite
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.numbers import read_rows
from moemerge.errors import RouterError
from moemerge.families.layer_names import layer_prefix
from moemerge.passes.decoder import Batch, before_layers, embed, empty_model, group, run_layer
from moemerge.passes.finite import all_finite, where_it_began
from moemerge.passes.weights import read_ahead, read_parameter
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
    base, device = request.base.model, request.compute.device
    model = empty_model(base.family.model_type, base.class_keys, device)
    groups = list(group(request.prompts, lambda prompt: len(prompt.ids), TOKENS_PER_BATCH))
    counted = [_counted(part) for part in groups]
    inputs = torch.empty(sum(int(part.sum()) for part in counted), base.config["hidden_size"])
    places = torch.split(inputs, [int(part.sum()) for part in counted])
    beginnings = torch.empty(len(request.prompts), base.config["hidden_size"])
    first_places = torch.split(beginnings, [len(part) for part in groups])
    batches = _embedded(model, groups, request)
    order = tuple(prompt for part in groups for prompt in part)
    prompt = torch.repeat_interleave(torch.tensor([sum(prompt.counted) for prompt in order]))
    last = max(request.mixture.moe_layers)
    room: dict[str, torch.Tensor] = {}
    with ThreadPoolExecutor(1) as reader:
        for index in range(last + 1):
            layer = model.layers[index]
            stored = _stored(layer, request, index, skip_ffn=index == last)
            for name, tensor in stored.items():
                _place(layer, name, tensor, room, request)
            ahead = None
            if index < last and not request.low_memory:
                following = _stored(model.layers[index + 1], request, index + 1, skip_ffn=index + 1 == last)
                ahead = reader.submit(read_ahead, following.values())
            entering = _last_states(groups, batches) if request.entering else None
            for batch, mask, *kept in zip(batches, counted, places, first_places, strict=True):
                _run(layer, batch, index, base.family.ffn_module, mask.to(device), *kept, stop_at_ffn=index == last)
            _check_finite(f"layer {index}", batches, stored.values(), inputs)
            # Nothing may refer to the layer: bitsandbytes keeps weights that a move to meta does not reach.
            model.layers[index] = torch.nn.Identity()
            del layer
            if index in request.mixture.moe_layers:
                yield RouterInputs(index, inputs, prompt, order, beginnings, entering)
            if ahead:
                ahead.result()


def _embedded(model: Any, groups: Sequence[Sequence[EncodedPrompt]], request: PassRequest) -> list[Batch]:
    """Run the embeddings over each group of prompts, up to the first layer."""
    family = request.base.model.family
    norm = family.last.removeprefix("model.").removesuffix(".weight")
    tensors = request.base.tensors
    for name in before_layers(model, norm):
        read_parameter(model, name, tensors[f"model.{name}"], {}, request.compute)
    batches = [
        embed(
            model,
            norm,
            [prompt.ids for prompt in part],
            lambda name, ids: torch.from_numpy(read_rows(tensors[name], ids)),
            request.compute,
        )
        for part in groups
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


def _place(layer: Any, name: str, tensor: TensorInfo, room: dict[str, torch.Tensor], request: PassRequest) -> None:
    """Read a tensor into a layer, quantised if the request says so."""
    read_parameter(layer, name, tensor, room, request.compute)
    path, _, own = name.rpartition(".")
    if request.base_bits and own in dict(layer.get_submodule(path).named_parameters(recurse=False)):
        from moemerge.passes.quantised import quantise_weight  # imports bitsandbytes, an extra

        quantise_weight(layer, name, request.base_bits)
        del room[name]


def _run(  # noqa: PLR0917
    layer: Any,
    batch: Batch,
    index: int,
    ffn_module: str,
    counted: torch.Tensor,
    place: torch.Tensor,
    first_place: torch.Tensor,
    *,
    stop_at_ffn: bool,
) -> None:
    """Pass a batch through a layer, and keep the states that enter its FFN in float32.

    States of tokens that count (counted token, hidden) go to `place`, states of first tokens (prompt, hidden) to
    `first_place`.
    """

    def keep(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        place.copy_(inputs[0].flatten(0, 1)[counted])
        first_place.copy_(inputs[0][:, 0])
        if stop_at_ffn:
            raise _EndOfPassError

    handle = layer.get_submodule(ffn_module).register_forward_pre_hook(keep)
    try:
        run_layer(layer, batch, index)
    except _EndOfPassError:
        pass
    finally:
        handle.remove()

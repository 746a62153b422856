"""The streamed forward pass: what each layer's router will see, with one decoder layer in memory at a time.

Every prompt passes through a layer before the next is loaded; meanwhile the next layer's bytes are brought into the
page cache, where they take no memory from anyone. Embeddings, rotary tables, masks and layers are the
`transformers` classes' own; only the order of the loops is ours. The FFN of the last layer that gets a router, and all
that follows it, is never run.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModel, PreTrainedModel

from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.stored import read_rows
from moemerge.routers.prompts import EncodedPrompt
from moemerge.routers.request import RouterInputs, RouterRequest
from moemerge.routers.weights import read_ahead, read_into

TOKENS_PER_BATCH: Final = 1024
_COMPUTE_DTYPES: Final = {"cpu": torch.float32}


@dataclass
class _Batch:
    """Prompts that pass together, padded to one length."""

    states: torch.Tensor
    """(prompt, position, hidden)"""
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
    """By layer, what the model passes to it beside the states, by position and by name."""
    counted: torch.Tensor
    """(prompt * position,) bool"""
    inputs: torch.Tensor
    """(counted token, hidden) float32 on the CPU: where the layer's router inputs go."""


class _EndOfPassError(Exception):
    """Raised inside the last layer once its router input is known."""


def capture_router_inputs(request: RouterRequest) -> Iterator[RouterInputs]:
    """Router inputs of each layer with a router in turn, for the request's prompts.

    On a CPU the pass computes in float32, elsewhere in bfloat16. Each layer's states overwrite those of the layer
    before: long-lived blocks between the short-lived ones of a layer would keep the heap from shrinking.
    """
    dtype = _COMPUTE_DTYPES.get(request.device.type, torch.bfloat16)
    model = _empty_model(request)
    groups = list(_group(request.prompts))
    counted, expert, positive = zip(*map(_labels, groups), strict=True)
    inputs = torch.empty(sum(int(part.sum()) for part in counted), request.base.config["hidden_size"])
    places = torch.split(inputs, [int(part.sum()) for part in counted])
    batches = [
        _embed(model, request, group, dtype, part, place)
        for group, part, place in zip(groups, counted, places, strict=True)
    ]
    labels = [
        torch.cat([part[kept] for part, kept in zip(parts, counted, strict=True)]) for parts in (expert, positive)
    ]
    last = max(request.mixture.moe_layers)
    room: dict[str, torch.Tensor] = {}
    with ThreadPoolExecutor(1) as reader:
        for index in range(last + 1):
            layer = model.layers[index]
            for name, tensor in _stored(layer, request, index, skip_ffn=index == last).items():
                _place(layer, name, tensor, room, request, dtype)
            ahead = None
            if index < last and not request.low_memory:
                following = _stored(model.layers[index + 1], request, index + 1, skip_ffn=index + 1 == last)
                ahead = reader.submit(read_ahead, following.values())
            for batch in batches:
                _run(layer, batch, index, request.base.family.ffn_module, stop_at_ffn=index == last)
            # Nothing may refer to the layer: bitsandbytes keeps weights that a move to meta does not reach.
            model.layers[index] = torch.nn.Identity()
            del layer
            if index in request.mixture.moe_layers:
                yield RouterInputs(index, inputs, *labels)
            if ahead:
                ahead.result()


def _empty_model(request: RouterRequest) -> Any:
    """The decoder without weights; its buffers, such as rotary frequencies, are real and on the request's device."""
    # Not from config.json itself: a hostile one can name a repository for its attention's code.
    family = request.base.family
    config = AutoConfig.for_model(family.model_type, **request.base.class_keys | {"pad_token_id": None})
    with init_empty_weights(include_buffers=False), _uninitialised():
        model = AutoModel.from_config(config, trust_remote_code=False)
    for name, buffer in list(model.named_buffers()):
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, buffer.to(request.device))
    return model.eval()


@contextmanager
def _uninitialised() -> Iterator[None]:
    """Models are made without first values for weights that lie nowhere: transformers 4 fails to give Mamba's."""
    given = PreTrainedModel.init_weights
    PreTrainedModel.init_weights = lambda _: None
    try:
        yield
    finally:
        PreTrainedModel.init_weights = given


def _group(prompts: Sequence[EncodedPrompt]) -> Iterator[list[EncodedPrompt]]:
    """Prompts of similar length together, within a budget of padded tokens."""
    group: list[EncodedPrompt] = []
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.ids)):
        if group and (len(group) + 1) * len(prompt.ids) > TOKENS_PER_BATCH:
            yield group
            group = []
        group.append(prompt)
    yield group


def _labels(group: Sequence[EncodedPrompt]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each padded position (prompt * position,): whether it counts, its expert, its sign."""
    length = max(len(prompt.ids) for prompt in group)
    counted = torch.zeros(len(group), length, dtype=torch.bool)
    for row, prompt in enumerate(group):
        counted[row, : len(prompt.ids)] = torch.tensor(prompt.counted)
    expert = torch.tensor([prompt.expert for prompt in group]).repeat_interleave(length)
    positive = torch.tensor([prompt.positive for prompt in group]).repeat_interleave(length)
    return counted.flatten(), expert, positive


def _embed(  # noqa: PLR0917
    model: Any, request: RouterRequest, group: Sequence[EncodedPrompt], dtype: torch.dtype, counted: torch.Tensor,
    inputs: torch.Tensor,
) -> _Batch:  # fmt: skip
    """Run everything before the layers, recording what the model would pass to each of them.

    Only the rows of the prompts' tokens are read from the embeddings. Padding is on the right, and no mask tells of
    it: attention, convolutions and states are causal, so no token of a prompt sees what follows it.
    """
    ids = sorted({token for prompt in group for token in prompt.ids})
    place = {token: index for index, token in enumerate(ids)}
    rows = torch.from_numpy(read_rows(request.tensors[request.base.family.embeddings], ids))
    model.embed_tokens.weight = torch.nn.Parameter(rows.to(device=request.device, dtype=dtype), requires_grad=False)
    length = max(len(prompt.ids) for prompt in group)
    padded = [[place[token] for token in prompt.ids] + [0] * (length - len(prompt.ids)) for prompt in group]
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    embedded: list[torch.Tensor] = []

    def recorder(index: int) -> Any:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            arguments[index] = args, kwargs
            embedded.append(hidden_states)
            # Where transformers 4 expects a tuple, it passes on the first prompt alone: never what came in.
            return embedded[0]

        return forward

    last_norm = model.get_submodule(request.base.family.last.removeprefix("model.").removesuffix(".weight"))
    passers = [*model.layers, last_norm]
    for index, module in enumerate(passers):
        module.forward = recorder(index)
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor(padded, device=request.device), use_cache=False)
    finally:
        for module in passers:
            del module.forward
    return _Batch(embedded[0], arguments, counted.to(request.device), inputs)


def _stored(layer: Any, request: RouterRequest, index: int, *, skip_ffn: bool) -> dict[str, StoredTensor]:
    """Of a layer's tensors, by name within it, where they are stored; without the FFN's if it will not run."""
    ffn = request.base.family.ffn_module
    return {
        name: request.tensors[f"model.layers.{index}.{name}"]
        for name in layer.state_dict()
        if not (skip_ffn and name.startswith(f"{ffn}."))
    }


def _place(  # noqa: PLR0917
    layer: Any, name: str, tensor: StoredTensor, room: dict[str, torch.Tensor], request: RouterRequest,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Read a tensor straight to its device, into the room that the layer before had for it."""
    if name not in room or room[name].shape != tensor.shape:
        room[name] = torch.empty(tensor.shape, device=request.device, dtype=dtype)
    read_into(tensor, room[name])
    path, _, parameter = name.rpartition(".")
    module = layer.get_submodule(path)
    if parameter in dict(module.named_buffers(recurse=False)):
        setattr(module, parameter, room[name])
        return
    setattr(module, parameter, torch.nn.Parameter(room[name], requires_grad=False))
    if request.base_bits:
        from moemerge.routers.quantised import quantise_weight  # imports bitsandbytes, an extra

        quantise_weight(layer, name, request.base_bits)
        del room[name]


def _run(layer: Any, batch: _Batch, index: int, ffn_module: str, *, stop_at_ffn: bool) -> None:
    """Pass a batch through a layer: its router inputs and its states are replaced."""

    def keep(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        batch.inputs.copy_(inputs[0].flatten(0, 1)[batch.counted])
        if stop_at_ffn:
            raise _EndOfPassError

    handle = layer.get_submodule(ffn_module).register_forward_pre_hook(keep)
    try:
        with torch.inference_mode():
            args, kwargs = batch.arguments[index]
            made = layer(batch.states, *args, **kwargs)
            batch.states.copy_(made[0] if isinstance(made, tuple) else made)  # a tuple in transformers 4
    except _EndOfPassError:
        pass
    finally:
        handle.remove()

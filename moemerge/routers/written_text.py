"""Text that the experts write themselves: each continues its prompts, and routers are fitted to what it wrote.

All sequences of an expert are sampled in one batch. Its layers are read one at a time for each new token, so that
memory holds one layer, the embeddings and the keys and values of attention.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from moemerge.chats import Chat, as_chat
from moemerge.checkpoint.derived import unscaled
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.numbers import read_rows
from moemerge.families.dense import ModelTensors
from moemerge.families.layer_names import layer_prefix
from moemerge.passes.chats import encode_question
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.decoder import empty_model
from moemerge.passes.generating import Sampling, generate_tokens, stop_tokens
from moemerge.passes.tokens import load_tokenizer
from moemerge.passes.weights import read_parameter
from moemerge.progress import Progress, Task
from moemerge.routers.pass_inputs import PassRequest
from moemerge.routers.prompts import LONGEST_START, NEW_TOKENS, SEQUENCES, EncodedPrompt
from moemerge.routers.request import RouterRequest

# Nucleus sampling (https://arxiv.org/abs/1904.09751): without it, small models stray from their subject.
_TOP_P: Final = 0.95


def add_written_text(asked: PassRequest, request: RouterRequest, seed: int, progress: Progress) -> PassRequest:
    """Add what experts write when they continue their positive prompts; only new tokens count.

    All that is written from a prompt belongs to the prompt's document.

    Args:
        asked: the request of the pass; its prompts stay.
        request: the merge's request, with the experts that write.
        seed: seed for what is sampled.
        progress: called as each expert writes.
    """
    tokenizer = load_tokenizer(request.folder)
    special = set(tokenizer.all_special_ids)
    added = []
    for number in request.config.writers:
        expert, name = asked.experts[number], request.config.expert_names[number]
        starts = _starts(asked, request, number, tokenizer)
        sequences = [starts[place % len(starts)] for place in range(SEQUENCES)]
        folders = request.expert_folders[number]
        written = generate_tokens(
            _streamed(expert, asked.compute, partial(_layers_ran, progress, name, expert.model.layers)),
            [start for start, _ in sequences],
            Sampling(NEW_TOKENS, temperature=1.0, top_p=_TOP_P, seed=(seed + number) % 2**64),
            folder=folders[0],
            stops=sorted(
                {token for folder in folders for token in stop_tokens(folder, expert.model.class_keys, tokenizer)}
            ),
        )
        for (start, document), ids in zip(sequences, written, strict=True):
            counted = [False] * len(start) + [token not in special for token in ids]
            if any(counted):
                added.append(EncodedPrompt(number, True, (*start, *ids), tuple(counted), document))
        progress(Task("text", name), NEW_TOKENS, NEW_TOKENS)  # all sequences may have ended before
    return replace(asked, prompts=(*asked.prompts, *added))


def _layers_ran(progress: Progress, name: str, layers: int, ran: int) -> None:
    progress(Task("text", name), ran // layers, NEW_TOKENS)


def _starts(
    asked: PassRequest, request: RouterRequest, number: int, tokenizer: Any
) -> list[tuple[tuple[int, ...], int]]:
    """Give the tokens that an expert continues, and their document, for each of its positive prompts.

    Of a long prompt the first tokens are continued; of a long chat, the last.
    """
    context = request.base.model.config["max_position_embeddings"]
    longest = max(1, min(LONGEST_START, context - NEW_TOKENS))
    encoded = [prompt for prompt in asked.prompts if prompt.expert == number and prompt.positive]
    starts = []
    for given, prompt in zip(request.config.experts[number].positive_prompts, encoded, strict=True):
        if request.chat_prompts or isinstance(given, Chat):
            ids = tuple(encode_question(tokenizer, request.folder, as_chat(given))[-longest:])
        else:
            ids = prompt.ids[:longest]
        starts.append((ids, prompt.document))
    return starts


def _streamed(expert: ModelTensors, compute: Compute, ran: Callable[[int], None]) -> Any:
    """Make the whole model of an expert, whose layers are read from their files each time that they run."""
    source = expert.model
    model = empty_model(source.family.model_type, source.class_keys, compute.device, head=True, dtype=compute.dtype)
    for name in model.state_dict():
        if name.startswith("model.layers.") or name not in expert.tensors:
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings():
            module.register_forward_pre_hook(partial(_read_occurring, expert.tensors[name], compute))
        else:
            read_parameter(model, name, expert.tensors[name], {}, compute)
    head = model.get_output_embeddings()
    if head.weight.is_meta:
        head.weight = model.get_input_embeddings().weight
    room: dict[str, torch.Tensor] = {}
    runs = 0
    for index, layer in enumerate(model.model.layers):
        stored = {name: unscaled(expert.tensors[layer_prefix(index) + name]) for name in layer.state_dict()}

        def read(module: Any, _inputs: Any, stored: dict[str, TensorInfo] = stored) -> None:
            nonlocal runs
            for name, tensor in stored.items():
                read_parameter(module, name, tensor, room, compute)
            runs += 1
            ran(runs)

        layer.register_forward_pre_hook(read)
    return model


def _read_occurring(
    stored: TensorInfo, compute: Compute, module: nn.Embedding, inputs: tuple[torch.Tensor]
) -> tuple[torch.Tensor]:
    """Give a table of embeddings, which may be larger than all layers, only the rows of tokens that occur."""
    tokens, places = torch.unique(inputs[0], return_inverse=True)
    rows = torch.from_numpy(read_rows(stored, tokens.tolist()))
    module.weight = nn.Parameter(rows.to(compute.device, compute.dtype), requires_grad=False)
    return (places,)

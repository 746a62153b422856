"""Text that the experts write themselves: each continues its prompts, and routers are fitted to what it wrote.

All sequences of an expert are sampled in one batch. Its layers are read one at a time for each new token, so that
memory holds one layer, the embeddings and the keys and values of attention.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from moemerge.checkpoint.header import TensorInfo
from moemerge.families.dense import ModelTensors
from moemerge.families.layer_names import layer_prefix
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.decoder import empty_model
from moemerge.passes.tokens import load_tokenizer
from moemerge.passes.weights import read_parameter
from moemerge.routers.pass_inputs import PassRequest
from moemerge.routers.prompts import NEW_TOKENS, SEQUENCES, EncodedPrompt

# Nucleus sampling (https://arxiv.org/abs/1904.09751): without it, small models stray from their subject.
_TOP_P: Final = 0.95


def layers_to_write(experts: Sequence[ModelTensors]) -> int:
    """Count the layers that run until these experts have written their text."""
    return sum(expert.model.layers for expert in experts) * NEW_TOKENS


def add_written_text(
    request: PassRequest, writers: Sequence[int], folder: Path, seed: int, progress: Callable[[int], None]
) -> PassRequest:
    """Add to a request what experts write when they continue their positive prompts; only new tokens count.

    Args:
        request: the request; its prompts stay.
        writers: numbers of the experts that write.
        folder: the base model's folder, for its tokenizer.
        seed: seed for what is sampled.
        progress: called with the number of layers that have run.
    """
    special = set(load_tokenizer(folder).all_special_ids)
    document = 1 + max(prompt.document for prompt in request.prompts)
    done, added = 0, []
    for number in writers:
        expert = request.experts[number]
        prompts = [prompt for prompt in request.prompts if prompt.expert == number and prompt.positive]
        starts = [prompts[place % len(prompts)].ids for place in range(SEQUENCES)]
        written = _continue(expert, starts, request.compute, seed + number, partial(_add, progress, done))
        for start, ids in zip(starts, written, strict=True):
            counted = [False] * len(start) + [token not in special for token in ids]
            if any(counted):
                added.append(EncodedPrompt(number, True, (*start, *ids), tuple(counted), document))
                document += 1
        done += layers_to_write([expert])
        progress(done)
    return replace(request, prompts=(*request.prompts, *added))


def _add(progress: Callable[[int], None], before: int, ran: int) -> None:
    progress(before + ran)


def _continue(
    expert: ModelTensors, starts: Sequence[tuple[int, ...]], compute: Compute, seed: int, ran: Callable[[int], None]
) -> list[list[int]]:
    """Sample the tokens that follow each start, up to the model's end of text."""
    model = _streamed(expert, compute, ran)
    longest = max(map(len, starts))
    ids = torch.tensor([[0] * (longest - len(start)) + list(start) for start in starts], device=compute.device)
    known = torch.tensor([[0] * (longest - len(start)) + [1] * len(start) for start in starts], device=compute.device)
    ends = model.config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        found = model.generate(
            input_ids=ids, attention_mask=known, do_sample=True, temperature=1.0, top_k=0, top_p=_TOP_P,
            max_new_tokens=NEW_TOKENS, pad_token_id=0,
        )  # fmt: skip
    written = [row[longest:] for row in found.tolist()]
    return [row[: next((place for place, token in enumerate(row) if token in ends), len(row))] for row in written]


def _streamed(expert: ModelTensors, compute: Compute, ran: Callable[[int], None]) -> Any:
    """Make the whole model of an expert, whose layers are read from their files each time that they run."""
    source = expert.model
    model = empty_model(source.family.model_type, source.class_keys, compute.device, head=True, dtype=compute.dtype)
    for name in model.state_dict():
        if not name.startswith("model.layers.") and name in expert.tensors:
            read_parameter(model, name, expert.tensors[name], {}, compute)
    head = model.get_output_embeddings()
    if head.weight.is_meta:
        head.weight = model.get_input_embeddings().weight
    room: dict[str, torch.Tensor] = {}
    runs = 0
    for index, layer in enumerate(model.model.layers):
        stored = {name: expert.tensors[layer_prefix(index) + name] for name in layer.state_dict()}

        def read(module: Any, _inputs: Any, stored: dict[str, TensorInfo] = stored) -> None:
            nonlocal runs
            for name, tensor in stored.items():
                read_parameter(module, name, tensor, room, compute)
            runs += 1
            ran(runs)

        layer.register_forward_pre_hook(read)
    return model

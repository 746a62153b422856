"""The shared parts of streamed passes: a model without weights, and token sequences before and after its layers.

Embeddings, rotary tables, masks and layers are those of the `transformers` classes; only the loops are different.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moemerge.passes.compute_dtype import Compute
from moemerge.passes.finite import all_finite

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import no_init_weights

_Sequence = TypeVar("_Sequence")

Ids = Sequence[int]


@dataclass
class Batch:
    """Token sequences that pass together, padded on the right to one length.

    Padding is not masked: attention, convolutions and states are causal, so no token sees what follows it.
    """

    states: torch.Tensor
    """Inputs of the next layer (sequence, position, hidden)."""
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
    """Arguments that the model passes to each layer beside the states, by position and by name."""
    lengths: tuple[int, ...]
    """Number of tokens in each sequence."""

    @property
    def is_finite(self) -> bool:
        """Whether the states of all tokens are finite numbers; padding does not count."""
        return all_finite(self.states) or all(
            all_finite(states[:length]) for states, length in zip(self.states, self.lengths, strict=True)
        )


def empty_model(
    model_type: str,
    keys: Mapping[str, Any],
    device: torch.device,
    *,
    head: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Make a decoder, or with `head` a causal language model, without weights; weights to be loaded become `dtype`.

    Its buffers, such as rotary frequencies and selection biases, are real, on the device, and float32. It is not made
    from `config.json` itself, since a hostile one can name a repository for its attention's code.
    """
    config = AutoConfig.for_model(model_type, **{**keys, "pad_token_id": None})
    # Without initial values, which transformers 4 fails to give Mamba's parameters on the meta device.
    with init_empty_weights(include_buffers=False), no_init_weights(), _EmptyOnMeta():
        model = (AutoModelForCausalLM if head else AutoModel).from_config(config, trust_remote_code=False, dtype=dtype)
    for name, buffer in list(model.named_buffers()):
        _put(model, name, buffer.to(device, torch.float32 if buffer.is_floating_point() else buffer.dtype))
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()  # ernie4_5_moe's routers
    for name, parameter in list(model.named_parameters()):
        if any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in kept):
            _put(model, name, torch.nn.Parameter(parameter.float(), requires_grad=False))
    return model.eval()


class _EmptyOnMeta(TorchFunctionMode):
    """A mode in which `torch.empty`, of which parameters are made, takes no memory.

    accelerate first makes parameters and then moves them to the meta device. The blocks that they leave free lie
    between modules that stay, so that the heap grows by a small model's size for each model that is made.
    """

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        return func(*args, **({**given, "device": "meta"} if func is torch.empty else given))


def _put(model: Any, name: str, value: torch.Tensor) -> None:
    """Replace the buffer or parameter of this name."""
    path, _, own = name.rpartition(".")
    setattr(model.get_submodule(path), own, value)


def group(sequences: Sequence[_Sequence], length: Callable[[_Sequence], int], budget: int) -> Iterator[list[_Sequence]]:
    """Group sequences of similar length, within a budget of padded tokens."""
    together: list[_Sequence] = []
    for sequence in sorted(sequences, key=length):
        if together and (len(together) + 1) * length(sequence) > budget:
            yield together
            together = []
        together.append(sequence)
    if together:
        yield together


def before_layers(decoder: Any, norm: str) -> list[str]:
    """Names within a decoder of what it computes with before its layers, beside tables of embeddings.

    Args:
        decoder: the part of the model with `embed_tokens` and `layers`.
        norm: the name in it of the norm after the layers.
    """
    apart = tuple(f"{name}." for name in ("layers", norm, *_tables(decoder)))
    return [name for name, _ in decoder.named_parameters() if not name.startswith(apart)]


def _tables(decoder: Any) -> dict[str, int]:
    """The tables of embeddings by their names within a decoder, with the width of their rows."""
    children = decoder.named_children()
    return {name: module.embedding_dim for name, module in children if isinstance(module, torch.nn.Embedding)}


def embed(
    decoder: Any,
    norm: str,
    sequences: Sequence[Ids],
    read_rows: Callable[[str, list[int]], torch.Tensor],
    compute: Compute,
) -> Batch:
    """Run everything before the layers, recording what the decoder would pass to each of them.

    Args:
        decoder: the part of the model with `embed_tokens` and `layers`; what `before_layers` names has its weights.
        norm: the name in it of the norm after the layers.
        sequences: token ids of each sequence.
        read_rows: reads rows (token, width) of a table of embeddings, by its name in checkpoints; only those of the
            tokens that occur are read.
        compute: the device of the pass, and the dtype of the states.
    """
    tokens = sorted({token for ids in sequences for token in ids})
    place = {token: index for index, token in enumerate(tokens)}
    length = max(map(len, sequences))
    padded = [[place[token] for token in ids] + [0] * (length - len(ids)) for ids in sequences]
    tables = {
        name: read_rows(f"model.{name}.weight", tokens).to(device=compute.device, dtype=compute.dtype)
        for name in _tables(decoder)
    }
    batch = Batch(torch.empty(0), {}, tuple(map(len, sequences)))
    embedded: list[torch.Tensor] = []

    def recorder(index: int) -> Any:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            batch.arguments[index] = args, kwargs
            embedded.append(hidden_states)
            # Where transformers 4 expects a tuple it passes on only the first sequence, never all that came in.
            return embedded[0]

        return forward

    modules = [*decoder.layers, decoder.get_submodule(norm)]
    forwards = {module: recorder(index) for index, module in enumerate(modules)}
    _call(decoder, decoder, torch.tensor(padded, device=compute.device), tables, forwards)
    batch.states = embedded[0]
    return batch


def finish(model: Any, decoder: Any, norm: str, batch: Batch) -> torch.Tensor:
    """Run everything after the layers, from states to logits (sequence, position, vocab)."""
    last = decoder.get_submodule(norm)
    forward = last.forward

    def skip(_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return batch.states

    def norm_states(*_args: Any, **_kwargs: Any) -> Any:
        return forward(batch.states)

    # The states are known, whatever the tokens were.
    tables = {name: batch.states.new_zeros(1, width) for name, width in _tables(decoder).items()}
    ids = torch.zeros(batch.states.shape[:2], dtype=torch.long, device=batch.states.device)
    forwards = {**dict.fromkeys(decoder.layers, skip), last: norm_states}
    logits: torch.Tensor = _call(model, decoder, ids, tables, forwards).logits
    return logits


def _call(
    model: Any,
    decoder: Any,
    ids: torch.Tensor,
    tables: Mapping[str, torch.Tensor],
    forwards: Mapping[Any, Callable[..., Any]],
) -> Any:
    """Call a model on row numbers (sequence, position) of tables, with other forwards in place of some modules' own."""
    for name, table in tables.items():
        decoder.get_submodule(name).weight = torch.nn.Parameter(table, requires_grad=False)
    for module, forward in forwards.items():
        module.forward = forward
    try:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False)
    finally:
        for module in forwards:
            del module.forward


def run_layer(layer: Any, batch: Batch, index: int) -> None:
    """Pass a batch through a layer; its states are replaced in place.

    Long-lived blocks between the short-lived ones of a layer would keep the heap from shrinking.
    """
    with torch.inference_mode():
        args, kwargs = batch.arguments[index]
        made = layer(batch.states, *args, **kwargs)
        batch.states.copy_(made[0] if isinstance(made, tuple) else made)  # a tuple in transformers 4

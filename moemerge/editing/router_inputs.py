"""What enters a mixture's routers when text passes through the mixture itself."""

from collections.abc import Callable, Sequence

import torch

from moemerge.chats import COUNTED_ROLES, Document
from moemerge.evaluation.runnable import MixtureModel
from moemerge.evaluation.running import read_router_inputs
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window, by_transformers, cut_windows
from moemerge.routers.pass_inputs import RouterInputs
from moemerge.routers.prompts import NEUTRAL, NEUTRAL_TEXT, WINDOW, EncodedPrompt


def encode_documents(
    mixture: MixtureModel,
    documents: Sequence[Sequence[Document]],
    *,
    tokens: int,
    seed: int,
    roles: Sequence[str] = COUNTED_ROLES,
) -> tuple[EncodedPrompt, ...]:
    """Cut documents into windows, each with the number of its expert, and moemerge's neutral text with `NEUTRAL`.

    Args:
        mixture: the mixture, whose tokenizer is used.
        documents: the documents of each expert; there may be none.
        tokens: how many tokens of each expert's documents are read.
        seed: decides which documents come first.
        roles: whose messages of chats count.

    Raises:
        RouterError: the mixture's tokenizer cannot be used.
        RefusedError: its chat template does not take a chat.
    """
    encode = by_transformers(mixture.folder, roles=roles)
    length = min(WINDOW, int(mixture.runnable.keys.get("max_position_embeddings", WINDOW + 1)) - 1)
    encoded, first = [], 0
    for expert, texts in (*enumerate(documents), (NEUTRAL, NEUTRAL_TEXT)):
        windows = cut_windows(texts, encode, tokens=tokens, length=length, seed=seed, even=True)
        encoded += [EncodedPrompt(expert, True, w.ids, w.counted, first + w.document) for w in windows]
        first += len(texts)
    return tuple(encoded)


def visit_router_inputs(
    mixture: MixtureModel,
    prompts: Sequence[EncodedPrompt],
    compute: Compute,
    visit: Callable[[RouterInputs], None],
    progress: Callable[[int, int], None],
) -> None:
    """Call `visit` with the router inputs of each layer that has a router; the next layer's take the place of them.

    Args:
        mixture: the mixture that the windows pass through.
        prompts: the windows of text.
        compute: the device and dtype to run in.
        visit: called with each layer's router inputs.
        progress: called with the layers done and all there are.

    Raises:
        CheckpointError: the mixture's tensors do not fit its class, or numbers are not finite.
    """
    counts = [sum(prompt.counted) for prompt in prompts]
    hidden = mixture.runnable.shapes[mixture.router(mixture.moe_layers[0])][-1]
    states, beginnings = torch.empty(sum(counts), hidden), torch.empty(len(prompts), hidden)
    places, counted = torch.split(states, counts), [torch.tensor(prompt.counted) for prompt in prompts]
    number = torch.repeat_interleave(torch.tensor(counts))
    routed = set(mixture.moe_layers)

    def enter(_layer: int, window: int, inputs: torch.Tensor) -> None:
        places[window].copy_(inputs[counted[window]])
        beginnings[window] = inputs[0]

    def layer_done(done: int, layers: int) -> None:
        if done - 1 in routed:
            visit(RouterInputs(done - 1, states, number, tuple(prompts), beginnings))
        progress(done, layers)

    windows = [Window(prompt.document, prompt.ids, prompt.counted) for prompt in prompts]
    read_router_inputs(mixture, windows, compute, enter, layer_done)

"""Find which experts a merged model's routers choose for each token of a text."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from moemerge.chats import COUNTED_ROLES, Chat, Document, shortened
from moemerge.dtypes import ComputeDtype
from moemerge.errors import RefusedError
from moemerge.evaluation.choices import Choice
from moemerge.evaluation.routes.traced import Routes, TracedText
from moemerge.evaluation.runnable import open_mixture
from moemerge.evaluation.running import run_model
from moemerge.passes.chats import encode_chat
from moemerge.passes.compute_dtype import find_compute
from moemerge.passes.tokens import CHARACTERS_PER_TOKEN, Window, load_tokenizer
from moemerge.routers.scoring import widened


def trace(
    folder: Path | str,
    texts: Mapping[str, Document],
    *,
    tokens: int,
    device: str,
    compute_dtype: ComputeDtype = "auto",
    roles: Sequence[str] = COUNTED_ROLES,
    layer: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Routes:
    """Run a merged model over texts and keep what its routers choose: see `moemerge.evaluation.routes.tracer`."""
    mixture = open_mixture(folder)
    layers = mixture.moe_layers
    if layer is not None and layer not in layers:
        raise RefusedError(f"layer {layer} has no router; those with one: {', '.join(map(str, layers))}.")
    tokens = min(tokens, mixture.runnable.keys.get("max_position_embeddings", tokens))
    tokenizer = load_tokenizer(mixture.folder)
    windows: list[Window] = []
    pieces: list[tuple[str, ...]] = []
    for name, text in texts.items():
        document = shortened(text, CHARACTERS_PER_TOKEN * tokens)
        if isinstance(document, Chat):
            chat = encode_chat(tokenizer, mixture.folder, document, roles)
            ids, special, parts = chat.ids, chat.special, chat.parts
        else:
            ids, special, parts = _split(tokenizer, document)
        if not any(parts):
            raise RefusedError(f"{name}: the model's tokenizer finds no tokens in it.")
        windows.append(Window(len(windows), tuple(ids[:tokens]), tuple(not added for added in special[:tokens])))
        pieces.append(tuple(part for part, added in zip(parts[:tokens], special[:tokens], strict=True) if not added))
    kept: list[dict[int, Choice]] = [{} for _ in windows]
    run_model(
        mixture.runnable,
        windows,
        find_compute(device, compute_dtype, mixture.runnable.layer_shapes),
        mixture=mixture,
        losses=False,
        progress=progress,
        chosen=lambda choice: kept[choice.window].update({choice.layer: choice}),
    )
    traced = tuple(
        _traced(name, tokens_of, window, [choices[layer] for layer in layers])
        for name, tokens_of, window, choices in zip(texts, pieces, windows, kept, strict=True)
    )
    return Routes(Path(folder).resolve().name, mixture.experts, tuple(layers), traced)


def _traced(name: str, tokens: tuple[str, ...], window: Window, choices: Sequence[Choice]) -> TracedText:
    """Put a text's tokens together with the choices of each layer, without those of special tokens."""
    counted = np.array(window.counted)
    most = max(choice.experts.shape[1] for choice in choices)
    even = [widened(choice.weights, choice.experts, most) for choice in choices]
    return TracedText(
        name,
        tokens,
        np.stack([experts.numpy()[counted] for _, experts in even]),
        np.stack([weights.numpy()[counted] for weights, _ in even]),
    )


def _split(tokenizer: object, text: str) -> tuple[list[int], list[int], list[str]]:
    """Split a text into tokens, whether the tokenizer added them, and the part of the text that each stands for.

    The first of several tokens of a letter stands for it; the others are empty.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    result = tokenizer(text, return_special_tokens_mask=True, return_offsets_mapping=fast, verbose=False)  # type: ignore[operator]
    ids, special = result["input_ids"], result["special_tokens_mask"]
    if not fast:
        return ids, special, [tokenizer.decode([token]) for token in ids]  # type: ignore[attr-defined]
    parts = [""] * len(ids)
    own = [index for index, added in enumerate(special) if not added]
    # Text that a tokenizer leaves out, such as a space, belongs to the token after it.
    end = 0
    for index in own:
        upto = result["offset_mapping"][index][1]
        parts[index] = text[end:upto]
        end = max(end, upto)
    return ids, special, parts

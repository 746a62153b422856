"""Find which experts a merged model's routers choose for each token of a text."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from moemerge.chats import Chat, Document, shortened
from moemerge.errors import RefusedError
from moemerge.evaluation.choices import Choice
from moemerge.evaluation.processes import processes_of, run_windows
from moemerge.evaluation.routes.traced import Routes, TracedText
from moemerge.evaluation.runnable import open_mixture
from moemerge.evaluation.settings import TraceSettings
from moemerge.passes.chats import encode_chat
from moemerge.passes.compute_dtype import find_compute
from moemerge.passes.tokens import CHARACTERS_PER_TOKEN, Window, load_tokenizer
from moemerge.routers.scoring import widened


def trace(
    folder: Path | str,
    texts: Mapping[str, Document],
    settings: TraceSettings,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Routes:
    """Run a merged model over texts and keep what its routers choose: see `moemerge.evaluation.routes.tracer`."""
    mixture = open_mixture(folder)
    layers = mixture.moe_layers
    if settings.layer is not None and settings.layer not in layers:
        raise RefusedError(f"layer {settings.layer} has no router; those with one: {', '.join(map(str, layers))}.")
    tokens = min(settings.tokens, mixture.runnable.keys.get("max_position_embeddings", settings.tokens))
    tokenizer = load_tokenizer(mixture.folder)
    windows: list[Window] = []
    pieces: list[tuple[str, ...]] = []
    for name, text in texts.items():
        document = shortened(text, CHARACTERS_PER_TOKEN * tokens)
        if isinstance(document, Chat):
            chat = encode_chat(tokenizer, mixture.folder, document, settings.roles)
            ids, special, parts = chat.ids, chat.special, chat.parts
        else:
            ids, special, parts = _split(tokenizer, document)
        if not any(parts):
            raise RefusedError(f"{name}: the model's tokenizer finds no tokens in it.")
        windows.append(Window(len(windows), tuple(ids[:tokens]), tuple(not added for added in special[:tokens])))
        pieces.append(tuple(part for part, added in zip(parts[:tokens], special[:tokens], strict=True) if not added))
    compute = find_compute(settings.device, settings.compute_dtype, mixture.runnable.layer_shapes)
    kept = _Choices(windows)
    with processes_of(settings.ray, settings.workers, compute, len(windows)) as processes:
        run_windows(mixture.runnable, windows, compute, processes, mixture, kept, progress, losses=False)
    traced = tuple(
        _traced(name, tokens_of, [choices[layer] for layer in layers])
        for name, tokens_of, choices in zip(texts, pieces, kept.by_layer, strict=True)
    )
    return Routes(Path(folder).resolve().name, mixture.experts, tuple(layers), traced)


class _Choices:
    """Keeps what routers choose for the tokens that count; see `ChoiceTally`."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self._windows = windows
        self.by_layer: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in windows]
        """The weights and the chosen experts (token, choice) of each window, by layer."""

    def add(self, choice: Choice) -> None:
        """Keep the choices of a layer for a window."""
        counted = torch.tensor(self._windows[choice.window].counted)
        self.by_layer[choice.window][choice.layer] = choice.weights[counted], choice.experts[counted]

    def part(self, windows: Sequence[int]) -> "_Choices":
        """Make what keeps those of some of the windows."""
        return _Choices([self._windows[window] for window in windows])

    def join(self, part: "_Choices", windows: Sequence[int]) -> None:
        """Take over what a part has kept."""
        for window, found in zip(windows, part.by_layer, strict=True):
            self.by_layer[window] = found


def _traced(name: str, tokens: tuple[str, ...], choices: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> TracedText:
    """Put a text's tokens together with the weights and experts of each layer."""
    most = max(experts.shape[1] for _, experts in choices)
    even = [widened(weights, experts, most) for weights, experts in choices]
    return TracedText(
        name,
        tokens,
        np.stack([experts.numpy() for _, experts in even]),
        np.stack([weights.numpy() for weights, _ in even]),
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

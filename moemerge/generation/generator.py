"""A whole model that continues prompts, token by token, and the experts of each token."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from moemerge.chats import Chat, Document
from moemerge.dtypes import ComputeDtype
from moemerge.errors import RefusedError
from moemerge.evaluation.routes.traced import Routes, TracedText
from moemerge.evaluation.runnable import MixtureModel, Runnable, open_dense, open_mixture
from moemerge.families.released import READABLE
from moemerge.generation.answers import Answer, Sampling, Token
from moemerge.generation.loading import load_model
from moemerge.generation.recorder import RouterRecorder
from moemerge.passes.chats import encode_question
from moemerge.passes.compute_dtype import find_compute
from moemerge.passes.device import memory_watched
from moemerge.passes.generating import generate_tokens, stop_tokens
from moemerge.passes.tokens import load_tokenizer
from moemerge.sources.model_folder import ModelFolder

# Tokens before a new one that its text may depend on, as a space between two words does.
_CONTEXT: Final = 5


def load_generator(
    model: ModelFolder, device: str, compute_dtype: ComputeDtype, progress: Callable[[int, int], None]
) -> "TextGenerator":
    """Load a model; see `moemerge.generation.answers.open_generator`."""
    mixture = open_mixture(model.reference) if model.config.get("model_type") in READABLE else None
    runnable = mixture.runnable if mixture else open_dense(model.reference, model.reference, lambda _: None)
    tokenizer = load_tokenizer(model.folder)  # before what takes long
    whole = load_model(runnable, find_compute(device, compute_dtype, runnable.layer_shapes), progress)
    return TextGenerator(model.folder, runnable, tokenizer, whole, mixture)


class TextGenerator:
    """A model in memory that continues texts and answers chats."""

    def __init__(
        self, folder: Path, runnable: Runnable, tokenizer: Any, model: Any, mixture: MixtureModel | None
    ) -> None:
        self.name = runnable.name
        self._folder, self._runnable, self._tokenizer, self._model = folder, runnable, tokenizer, model
        self._routers = RouterRecorder(mixture, model) if mixture else None

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts; none for a dense model."""
        return self._routers.mixture.experts if self._routers else ()

    @property
    def computes(self) -> str:
        """What it computes in, and on."""
        return f"{str(self._model.dtype).removeprefix('torch.')} on {self._model.device.type}"

    def generate(
        self,
        prompt: Document,
        sampling: Sampling,
        on_token: Callable[[Token], None] = lambda _token: None,
        *,
        shorter: str = "Shorten it.",
    ) -> Answer:
        """Continue a text, or answer the last message of a chat.

        Args:
            prompt: the text or chat.
            sampling: how tokens are chosen, and how many.
            on_token: called with each token; an exception that it raises ends the answer.
            shorter: what a refusal says to do if the prompt is too long.

        Raises:
            RefusedError: the prompt is empty or too long, or the template refuses the chat.
            CheckpointError: the model's numbers are not finite.
            RouterError: memory ran out.
        """
        ids = self._encode(prompt)
        context = self._runnable.keys.get("max_position_embeddings") or len(ids) + sampling.max_new_tokens
        if len(ids) >= context:
            raise RefusedError(f"the prompt has {len(ids)} tokens, and {self.name} reads {context}. {shorter}")
        most = min(sampling.max_new_tokens, context - len(ids))
        stops = stop_tokens(self._folder, self._runnable.keys, self._tokenizer)
        builder = _AnswerBuilder(self._tokenizer, self._routers, ids, stops, on_token)
        # The choices of a token are known when the next one comes, so that one more is asked for.
        asked = replace(sampling, max_new_tokens=most + bool(self._routers))
        with memory_watched(f"{self.name} was generating text. Use another device, or a shorter prompt."):
            generate_tokens(self._model, [ids], asked, folder=self._folder, stops=stops, on_token=builder.add)
        return builder.finish(self.name, is_cut=builder.count == asked.max_new_tokens and builder.last not in stops)

    def _encode(self, prompt: Document) -> list[int]:
        if isinstance(prompt, Chat):
            has_system = prompt.messages[0].role == "system"
            step = "Leave --system out, or continue" if has_system else "Continue"
            return encode_question(self._tokenizer, self._folder, prompt, f"{step} plain text, with --raw.")
        ids: list[int] = self._tokenizer(prompt, verbose=False)["input_ids"]
        if not ids:
            raise RefusedError("the prompt is empty. Give a text to continue.")
        return ids


class _AnswerBuilder:
    """An answer that grows by a token at a time."""

    def __init__(
        self,
        tokenizer: Any,
        routers: RouterRecorder | None,
        ids: Sequence[int],
        stops: Sequence[int],
        on_token: Callable[[Token], None],
    ) -> None:
        self._routers, self._on_token, self._text = routers, on_token, _Decoder(tokenizer, ids)
        added = tokenizer.added_tokens_decoder.items()
        self._silent = {*stops, *tokenizer.all_special_ids, *(token for token, told in added if told.special)}
        self._waiting: deque[int] = deque()
        self._parts: list[str] = []
        self._choices: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.count, self.last = 0, -1
        if routers:
            routers.clear()

    def add(self, token: int) -> None:
        """Take a new token, and give those whose experts are known."""
        if self._routers and not self.count:
            self._routers.skip()  # the pass of the prompt
        self.count, self.last = self.count + 1, token
        self._waiting.append(token)
        while self._waiting and (self._routers is None or self._routers.has_pass):
            known = self._waiting.popleft()
            choices = self._routers.choices() if self._routers else None
            if known not in self._silent:
                self._give(self._text.add(known), choices)

    def _give(self, part: str, choices: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self._parts.append(part)
        if choices:
            self._choices.append(choices)
        self._on_token(Token(part, _largest(*choices) if choices else None))

    def finish(self, name: str, *, is_cut: bool) -> Answer:
        """The whole answer; the rest of a letter that no token completed is given first."""
        if self._parts and (rest := self._text.rest()):
            self._parts[-1] += rest
            self._on_token(Token(rest, _largest(*self._choices[-1]) if self._choices else None))
        tokens = tuple(self._parts)
        routes = self._routes(name, tokens, self._routers) if self._routers else None
        return Answer("".join(tokens), tokens, routes, is_cut)

    def _routes(self, name: str, tokens: tuple[str, ...], routers: RouterRecorder) -> Routes:
        mixture, layers = routers.mixture, routers.layers
        experts = np.zeros((len(layers), len(tokens), mixture.experts_per_token), np.int64)
        weights = np.zeros(experts.shape, np.float32)
        for place, (chosen, weight) in enumerate(self._choices):
            experts[:, place], weights[:, place] = chosen, weight
        return Routes(name, mixture.experts, layers, (TracedText("answer", tokens, experts, weights),))


def _largest(experts: torch.Tensor, weights: torch.Tensor) -> int:
    """The expert with the largest weight summed over layers, of experts and weights (layer, choice)."""
    return int(np.bincount(experts.flatten().numpy(), weights.flatten().numpy()).argmax())


class _Decoder:
    """Text of tokens that follow others, in whole letters."""

    def __init__(self, tokenizer: Any, ids: Sequence[int]) -> None:
        self._tokenizer, self._ids = tokenizer, list(ids[-_CONTEXT:])
        self._start, self._read = 0, len(self._ids)

    def add(self, token: int) -> str:
        """Take a token; returns the letters that it completes."""
        self._ids.append(token)
        new = self.rest()
        if not new or new.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return new

    def rest(self) -> str:
        """The text that was not returned yet; a part of a letter is U+FFFD."""
        return self._decode(len(self._ids)).removeprefix(self._decode(self._read))

    def _decode(self, end: int) -> str:
        ids = self._ids[self._start : end]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

"""Continue tokens with a model of transformers by its own `generate`: what ends a text, and how tokens are chosen."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.index import read_json
from moemerge.errors import CheckpointError, RefusedError
from moemerge.passes.tokens import read_tokenizer_config

_SETTINGS: Final = "generation_config.json"
_PENALTY: Final = "repetition_penalty"
# What a model's own settings decide, with the least and the most; the rest is asked for, or would need more than the
# model's numbers. A penalty beyond these makes infinite logits.
_KEPT: Final[dict[str, tuple[float, float]]] = {_PENALTY: (0.01, 100), "top_k": (0, math.inf), "min_p": (0, 1)}
_LOWEST_TEMPERATURE: Final = 1e-6
_SEEDS: Final = 2**64


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen."""

    max_new_tokens: int = 256
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 takes the most likely token each time; 1 draws tokens as likely as the model says."""
    top_p: float = 1.0
    """Share of the likelihood, of the most likely tokens, that tokens are drawn from."""
    seed: int = 0
    """Seed of what is drawn."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RefusedError: one of them cannot be used.
        """
        if self.temperature and not _LOWEST_TEMPERATURE <= self.temperature < math.inf:
            raise RefusedError(
                f"temperature: expected 0, which takes the most likely token, or a number from {_LOWEST_TEMPERATURE}, "
                f"found {self.temperature}."
            )
        if not 0 <= self.top_p <= 1:
            raise RefusedError(f"top_p: expected a number from 0 to 1, found {self.top_p}.")
        if not 0 <= self.seed < _SEEDS:
            raise RefusedError(f"seed: expected a whole number from 0 to {_SEEDS - 1}, found {self.seed}.")


def generate_tokens(
    model: Any,
    starts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    folder: Path,
    stops: Sequence[int],
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue each of `starts`, all in one batch.

    The penalty for repetition, and `top_k` and `min_p`, are those of the model's own settings.

    Args:
        model: a causal language model of transformers.
        starts: the tokens that it has read, at least one in each.
        sampling: how tokens are chosen, and how many.
        folder: holds its `generation_config.json`, if it has one.
        stops: tokens that end a text.
        on_token: called with each new token, the one that ends the text too; for one start alone.

    Returns:
        The new tokens of each, without the one that ends it.

    Raises:
        CheckpointError: `generation_config.json` is damaged, or the model's numbers are not finite.
    """
    import torch

    longest = max(map(len, starts))
    # A start is padded with its own first token, which no penalty for repetition meets twice.
    given = torch.tensor([[start[0]] * (longest - len(start)) + [*start] for start in starts], device=model.device)
    known = torch.tensor([[0] * (longest - len(start)) + [1] * len(start) for start in starts], device=model.device)
    settings = _settings(sampling, folder, stops)
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.inference_mode():
        torch.manual_seed(sampling.seed)
        found = model.generate(
            given,
            attention_mask=known,
            generation_config=settings,
            logits_processor=[_Finite(folder)],
            streamer=_Stream(on_token) if on_token else None,
        )
    added = [row[longest:] for row in found.tolist()]
    return [row[: next((place for place, token in enumerate(row) if token in stops), len(row))] for row in added]


def _settings(sampling: Sampling, folder: Path, stops: Sequence[int]) -> Any:
    """What is asked for, with the model's own settings, as transformers takes it."""
    from transformers import GenerationConfig

    own = _own_settings(folder)
    draws = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature else {}
    # transformers 4 draws from the 50 most likely tokens unless a model says otherwise.
    kept: dict[str, float] = {"top_k": 0} if draws else {}
    kept |= {
        key: _own_number(folder, own, key) for key in _KEPT if own.get(key) is not None and (draws or key == _PENALTY)
    }
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=bool(draws),
        eos_token_id=list(stops) or None,
        pad_token_id=next(iter(stops), 0),
        **draws,
        **kept,
    )


def _own_number(folder: Path, own: Mapping[str, Any], key: str) -> float:
    """One of a model's own settings, of the type that transformers asks for."""
    value, (least, most) = own[key], _KEPT[key]
    kinds = int if key == "top_k" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        what = "whole number" if key == "top_k" else "number"
        span = f"from {least}" + ("" if most == math.inf else f" to {most}")
        raise CheckpointError(
            f"{folder / _SETTINGS}: {key}: expected a {what} {span}, found {value!r:.60}. Correct it, or take it out."
        )
    return value if key == "top_k" else float(value)


def stop_tokens(folder: Path, config: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The tokens that end a text, by a model's `generation_config.json`, its `config.json` and its tokenizer.

    They need not agree: fine-tunes for chats often change the tokenizer's alone.

    Args:
        folder: the model's folder.
        config: what its `config.json` says.
        tokenizer: the tokenizer that is used, its own or the base model's.

    Raises:
        CheckpointError: `generation_config.json` is damaged.
    """
    named = [_own_settings(folder).get("eos_token_id"), config.get("eos_token_id"), tokenizer.eos_token_id]
    own = read_tokenizer_config(folder).get("eos_token")
    text = own.get("content") if isinstance(own, dict) else own
    named.append(tokenizer.get_vocab().get(text))
    flat = [token for one in named for token in (one if isinstance(one, list) else [one])]
    return sorted({token for token in flat if isinstance(token, int) and not isinstance(token, bool)})


def _own_settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}


class _Finite:
    """What `generate` takes for a change of logits: it refuses those that say nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, _ids: Any, logits: Any) -> Any:
        """Give the logits (sequence, vocab) back as they are."""
        if logits.isnan().any():
            raise CheckpointError(
                f"{self._folder}: the model's numbers are not finite. `moemerge eval` says where that begins."
            )
        return logits


class _Stream:
    """What `generate` takes for a streamer: it gives the prompt first, which is left out here."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token, self._had_prompt = on_token, False

    def put(self, ids: Any) -> None:
        """Take the prompt, then a token at a time."""
        if self._had_prompt:
            self._on_token(int(ids.flatten()[-1]))
        self._had_prompt = True

    def end(self) -> None:
        """Take the end of the answer, which needs nothing."""

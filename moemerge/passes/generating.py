"""Continue tokens with a model of transformers by its own `generate`, and give each new one as it comes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.index import read_json
from moemerge.errors import CheckpointError

_SETTINGS: Final = "generation_config.json"
# What a model's own settings decide; the rest is asked for, or would need more than its numbers.
_KEPT: Final = ("repetition_penalty", "top_k", "min_p")


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


def generate_tokens(
    model: Any,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    folder: Path,
    stops: Sequence[int],
    came: Callable[[int], None],
) -> None:
    """Continue `ids`; the penalty for repetition, and `top_k` and `min_p`, are those of the model's own settings.

    Args:
        model: a causal language model of transformers.
        ids: the tokens that it has read.
        sampling: how tokens are chosen.
        folder: holds its `generation_config.json`, if it has one.
        stops: tokens that end the answer.
        came: called with each new token; the one that ends the answer too.

    Raises:
        CheckpointError: `generation_config.json` is damaged, or the model's numbers are not finite.
    """
    import torch
    from transformers import GenerationConfig

    own = _own_settings(folder)
    draws = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature else {}
    # transformers 4 draws from the 50 most likely tokens unless a model says otherwise.
    kept = {"top_k": 0} if draws else {}
    kept |= {key: own[key] for key in _KEPT if own.get(key) is not None and (draws or key == _KEPT[0])}
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=bool(draws),
        eos_token_id=list(stops) or None,
        pad_token_id=next(iter(stops), 0),
        **draws,
        **kept,
    )
    given = torch.tensor([list(ids)], device=model.device)
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.inference_mode():
        torch.manual_seed(sampling.seed)
        model.generate(
            given,
            attention_mask=torch.ones_like(given),
            generation_config=settings,
            logits_processor=[_Finite()],
            streamer=_Stream(came),
        )


def stop_tokens(folder: Path, config: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The tokens that end a text, by a model's `generation_config.json`, its `config.json` and its tokenizer.

    They need not agree: fine-tunes for chats often change the tokenizer's alone.

    Raises:
        CheckpointError: `generation_config.json` is damaged.
    """
    named = [_own_settings(folder).get("eos_token_id"), config.get("eos_token_id"), tokenizer.eos_token_id]
    flat = [token for one in named for token in (one if isinstance(one, list) else [one])]
    return sorted({token for token in flat if isinstance(token, int)})


def _own_settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}


class _Finite:
    """What `generate` takes for a change of logits: it refuses those that say nothing."""

    def __call__(self, _ids: Any, logits: Any) -> Any:
        """Give the logits (sequence, vocab) back as they are."""
        if logits.isnan().any():
            raise CheckpointError("the model's numbers are not finite. `moemerge eval` says where that begins.")
        return logits


class _Stream:
    """What `generate` takes for a streamer: it gives the prompt first, which is left out here."""

    def __init__(self, came: Callable[[int], None]) -> None:
        self._came, self._prompt_came = came, False

    def put(self, ids: Any) -> None:
        """Take the prompt, then a token at a time."""
        if self._prompt_came:
            self._came(int(ids.flatten()[-1]))
        self._prompt_came = True

    def end(self) -> None:
        """Take the end of the answer, which needs nothing."""

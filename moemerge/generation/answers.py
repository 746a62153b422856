"""Open a model that continues prompts or answers chats, and what it gives: text, with the experts of each token.

Nothing heavy is imported before a model is loaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.chats import Chat, Document, Message
from moemerge.dtypes import ComputeDtype
from moemerge.evaluation.routes.traced import Routes
from moemerge.passes.generating import Sampling
from moemerge.sources.model_folder import open_merged

if TYPE_CHECKING:
    from moemerge.generation.generator import TextGenerator

__all__ = ["Answer", "Sampling", "Token", "open_generator", "prompt_of"]


@dataclass(frozen=True)
class Token:
    """A new token of an answer."""

    text: str
    """What it adds to the text; the last of several tokens of a letter adds it."""
    expert: int | None
    """The expert with the largest weight summed over layers; None for a dense model."""


@dataclass(frozen=True)
class Answer:
    """What a model generated for one prompt."""

    text: str
    tokens: tuple[str, ...]
    """What each token adds to the text; those that only steer, such as the last one, are left out."""
    routes: Routes | None
    """The experts of each token; None for a dense model."""
    is_cut: bool
    """Whether the most tokens were reached, so that the model might have gone on."""


def open_generator(
    model: Path | str,
    *,
    device: str = "auto",
    compute_dtype: ComputeDtype = "auto",
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> "TextGenerator":
    """Load a merged model, or a dense one, whole into memory.

    Args:
        model: its folder.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        compute_dtype: `float32`, `bfloat16`, or `auto`, which is the faster one on a CPU.
        progress: called with the layers loaded and all there are.

    Raises:
        SourceError: there is no such model.
        IncompatibleError: it is of no family that moemerge knows.
        RefusedError: it does not fit into memory, or there is no such device.
        CheckpointError: its files are damaged.
        RouterError: the tokenizer cannot be used.
    """
    folder = replace(open_merged(model), reference=str(model))
    from moemerge.generation.generator import load_generator  # imports torch and transformers

    return load_generator(folder, device, compute_dtype, progress)


def prompt_of(turns: Sequence[tuple[str, str]], asked: str, *, system: str | None, plain: bool) -> Document:
    """What a model is given to read: a chat, or, if `plain`, all turns as one text to be continued.

    Args:
        turns: what was asked before, each with its answer.
        asked: what is asked now.
        system: the system message of a chat.
        plain: whether no template is used.
    """
    if plain:
        return "".join(f"{question}{answer}\n" for question, answer in turns) + asked
    messages = [Message("system", system)] if system else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    return Chat((*messages, Message("user", asked)), "prompt")

"""A merged model's choices of experts, token by token; nothing heavy is imported before it runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moemerge.chats import COUNTED_ROLES, Document
from moemerge.dtypes import ComputeDtype
from moemerge.evaluation.routes.traced import Routes


def trace_routes(
    folder: Path | str,
    texts: Mapping[str, Document],
    *,
    tokens: int = 2000,
    layer: int | None = None,
    roles: Sequence[str] = COUNTED_ROLES,
    device: str = "auto",
    compute_dtype: ComputeDtype = "auto",
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Routes:
    """Run a merged model over texts, a layer at a time, and keep what its routers choose for each token.

    Args:
        folder: holds the merged model.
        texts: by name; of each, the first `tokens` tokens are read, at most the model's context length.
        tokens: how many tokens of each text are read.
        roles: whose messages of chats are shown.
        layer: the number of a layer that has to have a router.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        compute_dtype: `float32`, `bfloat16`, or `auto`, which is the faster one on a CPU.
        progress: called with the layers done and all there are.

    Raises:
        SourceError: there is no such model.
        IncompatibleError: it is no mixture that moemerge reads.
        RefusedError: a text has no tokens, or `layer` no router, or there is no such device.
        CheckpointError: the model's files are damaged, or its numbers are not finite.
        RouterError: the tokenizer cannot be used.
    """
    from moemerge.evaluation.routes.tracing import trace  # imports torch and transformers

    return trace(
        folder,
        texts,
        tokens=tokens,
        layer=layer,
        roles=roles,
        device=device,
        compute_dtype=compute_dtype,
        progress=progress,
    )

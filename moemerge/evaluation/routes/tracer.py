"""A merged model's choices of experts, token by token; nothing heavy is imported before it runs."""

from collections.abc import Callable, Mapping
from pathlib import Path

from moemerge.chats import Document
from moemerge.evaluation.routes.traced import Routes
from moemerge.evaluation.settings import TraceSettings


def trace_routes(
    folder: Path | str,
    texts: Mapping[str, Document],
    settings: TraceSettings = TraceSettings(),
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Routes:
    """Run a merged model over texts, a layer at a time, and keep what its routers choose for each token.

    Args:
        folder: holds the merged model.
        texts: by name; each is read from its beginning.
        settings: how much of each text is read, and on which device.
        progress: called with the layers done and all there are; with processes, those that are done and all.

    Raises:
        SourceError: there is no such model.
        IncompatibleError: it is no mixture that moemerge reads.
        RefusedError: a text has no tokens, or the settings' layer no router, or there is no such device or cluster.
        CheckpointError: the model's files are damaged, or its numbers are not finite.
        RouterError: the tokenizer cannot be used.
    """
    from moemerge.evaluation.routes.tracing import trace  # imports torch and transformers

    return trace(folder, texts, settings, progress)

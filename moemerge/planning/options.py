"""Options of a plan beside its config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from moemerge.engines import Engine
from moemerge.errors import RefusedError

DEFAULT_MAX_SHARD_BYTES: Final = 5_000_000_000


@dataclass(frozen=True)
class PlanOptions:
    """Options of `plan_merge`.

    Raises:
        RefusedError: `max_shard_bytes` is below 1.
    """

    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
    """Upper bound of the tensor data in one output file."""
    target: Path | None = None
    """The folder that will be written, if known.

    Where its file system can share blocks with the sources', shards are laid out for that; this is tried with an
    unnamed temporary file.
    """
    to_store: bool = False
    """Whether the client of an object store will send the output, which takes memory, too; none is for `file:///`."""
    weights: Literal["auto", "stream"] = "auto"
    """How weights of Hub models that are not in the cache are read.

    `stream` leaves them on the Hub, to be read by ranges; `auto` does so where the disk has no room for them.
    """
    routing_table: bool = False
    """Whether to make the routing table even where that alone needs a pass of the base model."""
    needs_texts: bool = True
    """Whether the text files that the config names have to exist; making routers needs them."""
    proves_tokenizer: bool = False
    """Whether the output's tokenizer is proved before any weights are downloaded; otherwise `merge` proves it."""
    preferred: Engine | None = None
    """An engine that should compute the output correctly where possible; `config.engine` is one that has to."""

    def __post_init__(self) -> None:
        if self.max_shard_bytes < 1:
            raise RefusedError(
                f"max_shard_bytes: a shard of at most {self.max_shard_bytes} bytes holds nothing. Choose 1 or more."
            )

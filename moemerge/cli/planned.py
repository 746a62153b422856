"""From a config file and the options of a command line to a plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from moemerge.cli.console import saying
from moemerge.engines import ENGINES, NAMES, canonical_engine
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from moemerge.planning.plan import MergePlan
    from moemerge.sources.model_folder import ModelFolder

# A bare number below is a size in GB or MB whose unit was left out.
_FEWEST_BARE_BYTES: Final = 1_000_000


def plan_from(  # noqa: PLR0917  what typer has made of the command line
    console: "Console", config: Path, max_shard_size: str | None, out_shard_size: str | None,
    quiet: bool, allow_identical_experts: bool,
    target: Path | None = None, routing_table: bool = False, needs_texts: bool = True,
    weights: Literal["auto", "stream"] = "auto", approve: "Callable[[Sequence[ModelFolder]], None]" = lambda _: None,
    prove: bool = False, engine: str | None = None, family: str | None = None,
    to_gguf: bool = False,
) -> "MergePlan":  # fmt: skip
    """The plan of a config file; says what the user should know.

    `engine` goes before the config's, `family` is taken where the config names no architecture, whatever an engine that
    it names makes of that; `to_gguf` prefers what llama.cpp reads.
    """
    from dataclasses import replace

    from moemerge.config.schema import load_config
    from moemerge.families.selection import MOE_FAMILIES
    from moemerge.planning.options import PlanOptions
    from moemerge.planning.planner import plan_merge

    loaded = load_config(config, allow_identical_experts=allow_identical_experts)
    if engine is not None:
        if canonical_engine(engine) not in ENGINES:
            raise RefusedError(f"--for: {engine!r} is none of {', '.join(NAMES)}.")
        loaded = loaded.model_copy(update={"engine": canonical_engine(engine)})
    asked = loaded.engine
    if family in MOE_FAMILIES and not loaded.architecture:  # whatever would be chosen today
        loaded = loaded.model_copy(update={"architecture": family, "engine": None})
    max_bytes = _shard_bytes(max_shard_size, out_shard_size, 4 if loaded.dtype == "float32" else 2)
    say = saying(console, quiet=quiet)
    plan = plan_merge(
        loaded,
        PlanOptions(
            max_shard_bytes=max_bytes, target=target, routing_table=routing_table, needs_texts=needs_texts,
            weights=weights, proves_tokenizer=prove, preferred="llamacpp" if to_gguf else None,
        ),
        approve=approve, announce=say,
    )  # fmt: skip
    for note in plan.notes:
        say(f"note: {note}")
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow")
    return (
        plan if plan.config.engine == asked else replace(plan, config=plan.config.model_copy(update={"engine": asked}))
    )


def _shard_bytes(size: str | None, parameters: str | None, parameter_bytes: int) -> int:
    """The largest shard, by `--max-shard-size` or by the parameters of `--out-shard-size`, which goes before.

    Raises:
        RefusedError: it is no size, or so small that its unit was surely left out.
    """
    from moemerge.checkpoint.shards import parse_size
    from moemerge.cli.legacy import parse_parameter_count
    from moemerge.planning.options import DEFAULT_MAX_SHARD_BYTES

    nbytes = DEFAULT_MAX_SHARD_BYTES
    if size is not None:
        try:
            nbytes = parse_size(size)
        except ValueError as error:
            raise RefusedError(f"--max-shard-size: {error}.") from error
        if nbytes < _FEWEST_BARE_BYTES and size.strip().replace(".", "", 1).isdecimal():
            raise RefusedError(f"--max-shard-size: {size!r} is {nbytes} bytes: write a unit, as in 5GB or 500MB.")
    return nbytes if parameters is None else parse_parameter_count(parameters) * parameter_bytes

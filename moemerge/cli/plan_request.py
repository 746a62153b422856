"""Make a plan of a config file and the options of a command line."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moemerge.cli.console import announcer
from moemerge.cli.standard_input import STANDARD_INPUT, read_standard_input
from moemerge.engines import ENGINES, NAMES, canonical_engine
from moemerge.errors import ConfigError, RefusedError
from moemerge.places import address

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from moemerge.config.schema import MergeConfig
    from moemerge.planning.options import PlanOptions
    from moemerge.planning.plan import MergePlan
    from moemerge.sources.model_folder import ModelFolder

# A bare number below is a size in GB or MB whose unit was left out.
_FEWEST_BARE_BYTES: Final = 1_000_000
# Open values of a recipe that a message names.
_SHOWN: Final = 3


@dataclass(frozen=True)
class PlanRequest:
    """A config file and the options of the command line that bear on its plan."""

    config: Path
    allow_identical_experts: bool = False
    engine: str | None = None
    """The engine of `--for`, which takes precedence over the config's own."""
    family: str | None = None
    """The output family if the config names no architecture; then the config's engine does not count."""
    max_shard_size: str | None = None
    out_shard_size: str | None = None
    given: "MergeConfig | None" = None
    """The config, where a command has written it instead of a person; `config` is not read then."""

    def read(self) -> "MergeConfig":
        """Read the config, with the engine that is asked for.

        Raises:
            ConfigError: the file is no config, or a wrong one, or a recipe.
            RefusedError: there is no such engine.
        """
        from moemerge.config.loading import parse_config

        if self.given is not None:
            loaded = self.given
        elif str(self.config) == STANDARD_INPUT:
            same = self.allow_identical_experts
            loaded = parse_config(read_standard_input(), "standard input", allow_identical_experts=same)
        else:
            loaded = self._load()
        if self.engine is None:
            return loaded
        if canonical_engine(self.engine) not in ENGINES:
            raise RefusedError(f"--for: {self.engine!r} is not one of {', '.join(NAMES)}.")
        return loaded.model_copy(update={"engine": canonical_engine(self.engine)})

    def _load(self) -> "MergeConfig":
        from moemerge.config.loading import load_config

        try:
            return load_config(self.config, allow_identical_experts=self.allow_identical_experts)
        except ConfigError:
            names = _open_values(self.config)
            if not names:
                raise
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise ConfigError(
            f"{self.config}: is a recipe, which leaves {', '.join(names[:_SHOWN])}{more} open. `moemerge search "
            f"{self.config} --data NAME=PATH` tries what they may be, and writes the config of the best one.",
            [],
        )

    def local_models(self) -> list[Path]:
        """Find the folders of models that a config file names, without those of the Hub and names that lead nowhere.

        Standard input, which can be read once, is left unread.

        Raises:
            ConfigError: the file is no config, or a wrong one.
            RefusedError: there is no such engine.
        """
        from moemerge.planning.models import references_of
        from moemerge.sources.reference import local_folders

        if str(self.config) == STANDARD_INPUT:
            return []
        return [folder for _, reference in references_of(self.read()) for folder in local_folders(reference)]


def _open_values(config: Path) -> list[str]:
    """Name what a recipe leaves open; nothing of a file that is no recipe, or a wrong one."""
    from moemerge.config.recipe import load_recipe

    try:
        return [address(point.place) for point in load_recipe(config).first().asked]
    except ConfigError:
        return []


def plan_from(
    console: "Console",
    request: PlanRequest,
    options: "PlanOptions",
    *,
    quiet: bool,
    approve: "Callable[[Sequence[ModelFolder]], None]" = lambda _: None,
) -> "MergePlan":
    """Make the plan of a config file, and print its notes and warnings."""
    from moemerge.families.selection import MOE_FAMILIES
    from moemerge.planning.planner import plan_merge

    loaded = request.read()
    planned = loaded
    if request.family in MOE_FAMILIES and not loaded.architecture:  # whatever would be chosen today
        planned = loaded.model_copy(update={"architecture": request.family, "engine": None})
    max_bytes = shard_bytes(request.max_shard_size, request.out_shard_size, 4 if loaded.dtype == "float32" else 2)
    say = announcer(console, quiet=quiet)
    plan = plan_merge(planned, replace(options, max_shard_bytes=max_bytes), approve=approve, announce=say)
    for note in plan.notes:
        say(f"note: {note}")
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow")
    if plan.config.engine == loaded.engine:
        return plan
    return replace(plan, config=plan.config.model_copy(update={"engine": loaded.engine}))


def edit_in(console: "Console", request: PlanRequest, *, quiet: bool) -> "MergeConfig | None":
    """Read a config whose base model is a mixture, which describes an edit; None for a merge of dense models.

    Standard input, which can be read once, is taken for a merge. So is a wrong config: what is wrong in it is said
    where the merge is planned, after what is wrong in the command's options.

    Raises:
        RefusedError: there is no such engine.
    """
    from moemerge.editing.planner import edits_mixture
    from moemerge.sources.model_folder import LOOKING_UP, LOOKING_UP_STORE

    if str(request.config) == STANDARD_INPUT and request.given is None:
        return None
    try:
        loaded = request.read()
    except ConfigError:
        return None
    say = announcer(console, quiet=quiet)
    # The plan looks the model up again, and says so; a wait for the Hub is here.
    is_edit = edits_mixture(loaded, lambda line: None if line.endswith((LOOKING_UP, LOOKING_UP_STORE)) else say(line))
    return loaded if is_edit else None


def shard_bytes(size: str | None, parameters: str | None = None, parameter_bytes: int = 2) -> int:
    """Compute the most bytes of a shard, by `--max-shard-size`, or by `--out-shard-size` in parameters if it is given.

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

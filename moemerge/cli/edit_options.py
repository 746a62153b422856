"""Options of `moemerge edit`, in groups, in the order in which its help lists them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from moemerge.cli.options import ComputeIn, Devices, ShardSize
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from moemerge.editing.changes import Changes


@dataclass(frozen=True)
class ExpertOptions:
    """Options for which experts the result has; experts are given by name or number, several between commas."""

    heading: ClassVar[str] = "Experts, by name or number"

    keep: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Keep these alone, in this order.", show_default=False)
    ] = None
    drop: Annotated[str | None, typer.Option(metavar="A,B,...", help="Leave these out.", show_default=False)] = None
    replace: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="Take another model's FFNs for an expert.", show_default=False),
    ] = None
    add: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="Add a dense model's FFNs as an expert.", show_default=False),
    ] = None
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TEXT",
            help="A prompt that a new expert should take; may be given several times.",
            show_default=False,
        ),
    ] = None
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Files with text that a new expert should take, as eval takes them.",
            show_default=False,
        ),
    ] = None
    order: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Put all experts into this order.", show_default=False)
    ] = None
    rename: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Give an expert another name.", show_default=False)
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="How many experts take each token.", show_default="as before"),
    ] = None

    granularity: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Split every expert into N narrower ones that are always chosen together."
        ),
    ] = 1
    width: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Pad every expert with zeros to N neurons; k-quants want multiples of 256.",
            show_default=False,
        ),
    ] = None

    def changes(self) -> "Changes":
        """Read the options as changes.

        Raises:
            RefusedError: one is not of the form that it should have, or names text that is not there.
        """
        from moemerge.cli.standard_input import path_of
        from moemerge.editing.changes import Changes
        from moemerge.texts.documents import find_files

        given = _several("--text", "NAME=PATH", self.text)
        texts = {name: [path_of(path) for path in paths] for name, paths in given.items()}
        for name, paths in texts.items():
            find_files(paths, f"--text {name}")
        return Changes(
            keep=_listed("--keep", self.keep),
            drop=_listed("--drop", self.drop),
            replace=_single("--replace", "NAME=MODEL", self.replace),
            add=_single("--add", "NAME=MODEL", self.add),
            order=_listed("--order", self.order),
            rename=_single("--rename", "OLD=NEW", self.rename),
            experts_per_token=self.top_k,
            granularity=self.granularity,
            width=self.width,
            prompts=_several("--prompt", "NAME=TEXT", self.prompt),
            texts=texts,
        )


@dataclass(frozen=True)
class EditOutputOptions:
    """Options for what is written, and where."""

    heading: ClassVar[str] = "Output"

    max_shard_size: ShardSize = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint that OUT holds.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written; write nothing.")] = False


@dataclass(frozen=True)
class RunningOptions:
    """Options for how the mixture is run, where that is needed for router rows."""

    heading: ClassVar[str] = "Running the mixture for new router rows"

    device: Devices = "auto"
    compute_dtype: ComputeIn = "auto"
    seed: Annotated[int, typer.Option(metavar="N", help="Seed for random rows, noise and the choice of documents.")] = 0


@dataclass(frozen=True)
class InPlaceOptions:
    """Options for changing the mixture in its own folder, and for going back."""

    heading: ClassVar[str] = "In place of OUT"

    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change MODEL itself; what is replaced is kept until --commit.")
    ] = False
    undo: Annotated[bool, typer.Option("--undo", help="Go back to what MODEL was before its last edit in place.")] = (
        False
    )
    commit: Annotated[
        bool, typer.Option("--commit", help="Make MODEL's last edit in place final: remove what it replaced.")
    ] = False


def _listed(option: str, given: str | None) -> list[str]:
    if given is None:
        return []
    names = [name.strip() for name in given.split(",")]
    if not all(names):
        raise RefusedError(f"{option}: expected names or numbers between commas, found {given!r}.")
    return names


def _several(option: str, form: str, given: list[str] | None) -> dict[str, list[str]]:
    """Read values that are given for names; one name may have several."""
    found: dict[str, list[str]] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name.strip() and equals and value):
            raise RefusedError(f"{option}: expected {form}, found {text!r}.")
        found.setdefault(name.strip(), []).append(value)
    return found


def _single(option: str, form: str, given: list[str] | None) -> dict[str, str]:
    """Read values that are given for names, one for each."""
    found = _several(option, form, given)
    for name, values in found.items():
        if len(values) > 1:
            raise RefusedError(f"{option}: {name} is given {len(values)} times: {', '.join(values)}. Give it once.")
    return {name: values[0] for name, values in found.items()}

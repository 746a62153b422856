"""`moemerge push`: a merged model sent to the Hub."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.console import saying, speaking
from moemerge.cli.options import CreatePr, Debug, License, Private, Quiet, Revision
from moemerge.cli.streams import say
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from moemerge.publish.destination import Destination
    from moemerge.publish.publisher import Publisher
    from moemerge.sources.model_folder import ModelFolder


def push(  # noqa: PLR0917  typer makes options of arguments
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The repository, user/name.", show_default=False)],
    private: Private = False,
    revision: Revision = None,
    create_pr: CreatePr = False,
    license: License = None,  # noqa: A002  the option's name, as in model cards
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model of another kind.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Send a merged model to the Hub, in one commit; what is there already is not sent again.

    The token is the one of `hf auth login`, or HF_TOKEN.
    """
    with speaking(quiet=quiet, verbose=0, debug=debug) as console:
        from moemerge.publish.pushing import push as send

        url = send(
            out,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            licence=license,
            overwrite=overwrite,
            announce=saying(console, quiet=quiet),
        )
        say(url)


class Pushing:
    """What a merge's `--push` and the options beside it ask for."""

    def __init__(
        self,
        repo: str | None,
        licence: str | None,
        say: Callable[[str], None],
        *,
        streaming: bool,
        private: bool,
        revision: str | None,
        create_pr: bool,
    ) -> None:
        """Take the options.

        Raises:
            RefusedError: one of them makes no sense without `--push`, or the destination's name is none.
        """
        others = {
            "--push-streaming": streaming,
            "--private": private,
            "--revision": revision,
            "--create-pr": create_pr,
            "--license": licence,
        }
        if not repo and (given := [name for name, value in others.items() if value]):
            raise RefusedError(f"{given[0]}: says how to push, but not where to. Add --push user/repo.")
        self.licence, self._say = licence, say
        self._destination = _destination(repo, private, revision, create_pr) if repo else None
        self.publisher: Publisher | None = None

    def approve(self, sources: "Sequence[ModelFolder]") -> None:
        """Make sure that a merge of these models will be taken by the Hub.

        Raises:
            RefusedError: their licences do not agree, or the destination has to change.
            PublishError: the Hub refuses.
        """
        if not self._destination:
            return
        from moemerge.model_card.metadata import licence_of
        from moemerge.publish.publisher import Publisher

        self.licence = self.licence or licence_of(sources)
        self.publisher = Publisher(self._destination, self._say)
        self.publisher.open()


def _destination(repo: str, private: bool, revision: str | None, create_pr: bool) -> "Destination":
    from moemerge.publish.destination import Destination, check_names

    destination = Destination(repo, private, revision, create_pr)
    check_names(destination)
    return destination

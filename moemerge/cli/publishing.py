"""`moemerge push`, and the `--push` of a merge: a merged model is sent to the Hub."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.console import announcer, console_session, print_json
from moemerge.cli.grouping import grouped
from moemerge.cli.merge_options import PushOptions
from moemerge.cli.mistakes import check_order
from moemerge.cli.options import CreatePr, License, Private, ResultOptions, Revision
from moemerge.cli.streams import say
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from moemerge.publish.publisher import Publisher
    from moemerge.publish.repository import Repository
    from moemerge.sources.model_folder import ModelFolder


@grouped
def push(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The repository, user/name.", show_default=False)],
    *,
    private: Private = False,
    revision: Revision = None,
    create_pr: CreatePr = False,
    license: License = None,  # noqa: A002  the option's name, as in model cards
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model of another kind.")] = False,
    messages: ResultOptions,
) -> None:
    """Send a merged model to the Hub.

    It is sent in one commit; files that are there already are not sent again. The token is the one of
    `hf auth login`, or HF_TOKEN.

    Examples:
        moemerge push out user/name --private
        moemerge push out user/name --create-pr
    """
    with console_session(quiet=messages.quiet, verbose=0, debug=messages.debug) as console:
        check_order(out, repo, f"moemerge push {repo} {out}")
        from moemerge.publish.pushing import push as send

        url = send(
            out,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            licence=license,
            overwrite=overwrite,
            announce=announcer(console, quiet=messages.quiet),
        )
        if messages.json:
            print_json({"out": str(out), "url": url})
        else:
            say(url)


class PlannedPush:
    """The push that a merge's `--push` and the options beside it ask for, if any."""

    def __init__(self, options: PushOptions, announce: Callable[[str], None]) -> None:
        """Take the options.

        Raises:
            RefusedError: one of them makes no sense without `--push`, or the repository's name is none.
        """
        others = {
            "--push-streaming": options.push_streaming,
            "--private": options.private,
            "--revision": options.revision,
            "--create-pr": options.create_pr,
            "--license": options.license,
        }
        if not options.push and (given := [name for name, value in others.items() if value]):
            raise RefusedError(f"{given[0]}: says how to push, but not where to. Add --push user/repo.")
        self.licence, self._announce, self._streaming = options.license, announce, options.push_streaming
        self._repository = _repository(options.push, options) if options.push else None
        self.publisher: Publisher | None = None

    def approve(self, sources: "Sequence[ModelFolder]") -> None:
        """Make sure that a merge of these models will be taken by the Hub.

        Raises:
            RefusedError: their licences do not agree, or the repository has to change.
            PublishError: the Hub refuses.
        """
        if not self._repository:
            return
        from moemerge.model_card.metadata import licence_of
        from moemerge.publish.publisher import Publisher

        self.licence = self.licence or licence_of(sources)
        self.publisher = Publisher(self._repository, self._announce)
        self.publisher.open()

    def finish(self, out: Path) -> str | None:
        """Send the model, unless it was sent while it was made; returns its URL, None without a push."""
        if self.publisher is None:
            return None
        return self.publisher.url if self._streaming else self.publisher.push(out)


def _repository(repo: str, options: PushOptions) -> "Repository":
    from moemerge.publish.repository import Repository, check_names

    repository = Repository(repo, options.private, options.revision, options.create_pr)
    check_names(repository)
    return repository

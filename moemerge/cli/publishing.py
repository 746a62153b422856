"""`moemerge push`: a merged model sent to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.console import speaking
from moemerge.cli.options import CreatePr, Debug, License, Private, Quiet, Revision
from moemerge.errors import RefusedError


def push(  # noqa: PLR0917  typer makes options of arguments
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The repository, user/name.", show_default=False)],
    private: Private = False,
    revision: Revision = None,
    create_pr: CreatePr = False,
    license: License = None,  # noqa: A002  the option's name, as in model cards
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Send a merged model to the Hub, in one commit; what is there already is not sent again.

    The token is the one of `hf auth login`, or HF_TOKEN.
    """
    with speaking(quiet=quiet, verbose=0, debug=debug) as console:
        from moemerge.card import read_licence, set_licence
        from moemerge.publish import Destination, Publisher, checkpoint_files

        def say(line: str) -> None:
            if not quiet:
                console.print(line)

        # Before the Hub is asked for anything.
        checkpoint_files(out, lambda _: None)
        if not license and not read_licence(out):
            raise RefusedError(
                f"{out / 'README.md'}: names no licence, and nobody may use a model that has none. "
                "Name it with --license NAME."
            )
        publisher = Publisher(Destination(repo, private, revision, create_pr), say)
        publisher.open()
        if license:
            set_licence(out, license)
        typer.echo(publisher.push(out))

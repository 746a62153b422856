"""Options that several commands have."""

from typing import Annotated

import typer

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more: routing by layer, log messages.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Private = Annotated[bool, typer.Option("--private", help="Create the repository private.")]
Revision = Annotated[
    str | None,
    typer.Option(metavar="BRANCH", help="Push to a branch, or to a pull request as refs/pr/N.", show_default=False),
]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Propose the model in a pull request.")]
License = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        show_default=False,
        help='The model\'s licence, as the Hub calls it, such as apache-2.0, or "other NAME LINK".',
    ),
]
Device = Annotated[str, typer.Option(help="Runs the model: auto, cpu, cuda, cuda:1, mps.")]

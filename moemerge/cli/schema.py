"""`moemerge schema`: the JSON Schema of a merge config, for editors."""

from moemerge.cli.console import console_session
from moemerge.cli.options import Debug
from moemerge.cli.streams import say


def print_schema(debug: Debug = False) -> None:
    """Print the JSON Schema of a merge config, for editors.

    Editors use it to complete, explain and check a config that names it in its first line:
    # yaml-language-server: $schema=moemerge.schema.json
    """
    with console_session(quiet=False, verbose=0, debug=debug):
        from moemerge.config.json_schema import published_schema

        say(published_schema().removesuffix("\n"))

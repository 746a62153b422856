"""`moemerge schema`: the JSON Schema of a merge config, for editors."""

from moemerge.cli.console import console_session, print_json
from moemerge.cli.options import Debug


def print_schema(debug: Debug = False) -> None:
    """Print the JSON Schema of a merge config, for editors.

    By it they complete, explain and check a config. Name its file in the config's first line:
    # yaml-language-server: $schema=moemerge.schema.json
    """
    with console_session(quiet=False, verbose=0, debug=debug):
        from moemerge.config.json_schema import config_schema

        print_json(config_schema())

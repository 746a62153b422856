"""The text of a config in a merged model's folder: as it was written, with paths that lead from that folder."""

import json
from pathlib import Path
from typing import Any

import yaml

from moemerge.config.local_paths import path_values, paths_from, replaced
from moemerge.config.problems import steps_to
from moemerge.config.schema import MergeConfig
from moemerge.config.yaml_text import YamlTextError, read_yaml, write_yaml
from moemerge.places import Place


def text_for(config: MergeConfig, folder: Path | None) -> str:
    """Write a config for another folder: relative paths that lead somewhere here count from `folder` there.

    Comments and order stay; only the paths are written again, and none if `folder` is None, for another machine.
    """
    text = config.text
    if folder is None:
        return text
    document, root = read_yaml(text)
    moved = paths_from(config.model_dump(by_alias=True), folder)
    changes = {place: value for place, given, _ in path_values(document) if (value := _text_at(moved, place)) != given}
    edits: dict[tuple[int, int], str] = {}
    for place, value in changes.items():
        steps = [node for _, node in steps_to(root, place)]
        if len(steps) == len(place) and isinstance(node := steps[-1], yaml.ScalarNode):
            end = "\n" if text[: node.end_mark.index].endswith("\n") else ""
            edits[node.start_mark.index, node.end_mark.index] = json.dumps(value, ensure_ascii=False) + end
    for (start, stop), value in sorted(edits.items(), reverse=True):
        text = text[:start] + value + text[stop:]
    wanted = replaced(document, changes)
    try:
        if read_yaml(text)[0] == wanted:
            return text
    except YamlTextError:
        pass
    return write_yaml(wanted)  # an anchor was in the way


def written_references(text: str) -> list[str]:
    """The references of base, experts and shared experts in a config's text, as they are written there.

    There are none in a text that is no YAML, or no keys with values.
    """
    try:
        document, _ = read_yaml(text)
    except YamlTextError:
        return []
    values = path_values(document) if isinstance(document, dict) else ()
    return [value for place, value, _ in values if place[-1] in {"base_model", "source_model"}]


def _text_at(value: Any, place: Place) -> str:
    for step in place:
        value = value[step]
    return str(value[0] if isinstance(value, list) else value)

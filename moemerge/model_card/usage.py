"""Write the section of a model card on use, for the engines that were measured to compute its family correctly."""

import json
import shlex
from collections.abc import Sequence
from typing import Final

from moemerge.engines import ENGINES, Engine
from moemerge.families.dense import DENSE_FAMILIES
from moemerge.families.engines import readings
from moemerge.model_card.template import render

_COMMANDS: Final[dict[Engine, str]] = {
    "vllm": "python -m vllm.entrypoints.openai.api_server --model {word}",
    "llamacpp": "moemerge gguf {word} {word}.gguf",
    "mlx": 'python -m mlx_lm generate --model {word} --prompt "Once upon a time"',
    "openvino": "{loader}.from_pretrained({text}, export=True)",
}
"""Commands by engine; `{word}` is the model's name quoted for a shell, `{text}` as a Python string."""


def use_it(name: str, family: str, engines: Sequence[Engine], *, sees: bool = False) -> str:
    """Write Markdown on how to run a model in the engines that compute its family correctly.

    Args:
        name: the model's folder.
        family: the model's `model_type`.
        engines: the engines that compute it as transformers 5 does; see `moemerge.families.engines.right_in`.
        sees: whether it is multimodal, with the towers of its base.
    """
    loader = "OVModelForVisualCausalLM" if sees else "OVModelForCausalLM"
    named = {"word": shlex.quote(name), "text": json.dumps(name), "loader": loader}
    commands = [
        (ENGINES[engine], readings()[engine][family].version, command.format(**named))
        for engine, command in _COMMANDS.items()
        if engine in engines
    ]
    return render(
        "multimodal_use" if sees else "use",
        quoted=named["text"],
        engines=engines,
        commands=commands,
        is_mixture=family not in DENSE_FAMILIES,
    )

"""How to use a merged model, for its card: only in the engines that were seen to compute its family rightly."""

import json
import shlex
from collections.abc import Sequence
from typing import Final

from moemerge.engines import ENGINES, Engine
from moemerge.families.engines import readings
from moemerge.model_card.markdown import as_code

_PROGRAM: Final = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({name})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))
```"""
_COMMANDS: Final[dict[Engine, str]] = {
    "vllm": "python -m vllm.entrypoints.openai.api_server --model {word}",
    "llamacpp": "moemerge gguf {word} {word}.gguf",
    "mlx": 'python -m mlx_lm generate --model {word} --prompt "Once upon a time"',
    "openvino": "OVModelForCausalLM.from_pretrained({text}, export=True)",
}
"""Commands with the model's name as a word of a shell and as a text of Python."""
_AGAIN: Final = (
    "After fine-tuning with transformers 5, run {} on what was saved: other readers miss keys of its config.json."
)


def use_it(name: str, family: str, engines: Sequence[Engine]) -> list[str]:
    """Write paragraphs of Markdown on how to run a model of a family in the engines that are right, and what then.

    Args:
        name: the model's folder.
        family: the model's `model_type`.
        engines: the engines that compute it as transformers 5 does; see `moemerge.families.engines.right_in`.
    """
    versions = "transformers 4.57 and 5" if "transformers" in engines else "transformers 5"
    named = {"word": shlex.quote(name), "text": json.dumps(name)}
    rows = [
        f"- {ENGINES[engine]} ({readings()[engine][family].version}): {as_code(command.format(**named))}"
        for engine, command in _COMMANDS.items()
        if engine in engines
    ]
    return [
        f"In {versions}:",
        _PROGRAM.format(name=json.dumps(name)),
        *(["Tiny mixtures of this kind computed the same in:", "\n".join(rows)] if rows else []),
        _AGAIN.format(as_code("moemerge repair FOLDER")),
    ]

"""What the installed transformers has that no table covers, tried by the oracle: dense classes, and mixtures.

    python -m tests.support.new_families [MODEL_TYPE ...]

A dense class is built tiny, under the type of each dense family whose tensors it has, and merged with equal experts into
each output family that holds it: the logits are the class's, or not. A mixture is built tiny with equal experts, and
given the weights of each dense class whose tensors it has. What is exact there is a pair to describe and prove as
the others are, with its windows, biases and scales; what is not, has a difference to look for in its modelling file.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moemerge.families.dense import DENSE_FAMILIES, RENAMED
from moemerge.families.dense.tables import NOT_MERGED
from moemerge.families.multimodal import text_alone
from moemerge.families.released import READABLE
from tests.support.models import SIZES
from tests.support.new_families.dense import try_dense
from tests.support.new_families.found import LAYER, PLAIN, ROUTED, Found, line
from tests.support.new_families.mixtures import try_mixture

_MOST_PARAMETERS: Final = 20_000_000


def uncovered() -> list[str]:
    """Model types of causal language models that no table names."""
    known = {*DENSE_FAMILIES, *RENAMED, *READABLE, *NOT_MERGED}
    plain = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in known]
    return [name for name in plain if text_alone({"model_type": name}) == {"model_type": name}]


def look_at(model_type: str, folder: Path) -> Found:
    """Try everything that is known with a class."""
    try:
        model = _model(model_type)
    except Exception as error:  # noqa: BLE001  each class raises in its own way
        return Found(model_type, f"cannot be made so small ({line(error)})")
    names = [name for name, _ in model.named_parameters()]
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _MOST_PARAMETERS:
        return Found(model_type, f"more than {_MOST_PARAMETERS // 10**6} M parameters, however small the settings")
    if not any(LAYER.match(name) for name in names):
        return Found(model_type, "no decoder whose layers are model.layers")
    is_mixture = any(re.search(r"(^|\.)experts?(\.|$)", name) for name in names)
    return (try_mixture if is_mixture else try_dense)(model_type, folder)


def _model(model_type: str, **keys: Any) -> Any:
    config = AutoConfig.for_model(model_type, **{**SIZES, **PLAIN, **ROUTED, **keys})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def main(names: list[str]) -> None:
    """Print what is found of each class that is named, or of all that no table names."""
    transformers.logging.set_verbosity_error()
    chosen = names or uncovered()
    print(f"transformers {transformers.__version__}: {len(chosen)} causal language models", flush=True)
    idle: dict[str, list[str]] = {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            found = look_at(name, Path(folder))
        if found.kind in {"dense", "mixture"}:
            print("\n".join(found.lines), flush=True)
        else:
            idle.setdefault(found.kind, []).append(name)
    for why, skipped in idle.items():
        print(f"not tried: {why}: {', '.join(skipped)}")


if __name__ == "__main__":
    main(sys.argv[1:])

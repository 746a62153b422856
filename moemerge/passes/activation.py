"""The function between the projections of an FFN, as transformers' class of the model has it."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from transformers import AutoConfig
from transformers.activations import ACT2FN

_KEYS: Final = ("hidden_act", "hidden_activation")


def class_config(model_type: str, keys: Mapping[str, Any]) -> Any:
    """Make the config of a class of transformers from some of its settings; it has its defaults for all others."""
    return AutoConfig.for_model(model_type, **{**keys, "pad_token_id": None})


def activation_of(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Find the activation that a config names; lfm2_moe, which names none, has SiLU."""
    name = next((found for key in _KEYS if (found := getattr(config, key, None))), "silu")
    function: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return function

"""What an output family is: names of tensors, keys of `config.json`, and what it can hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moemerge.formats.dense import DenseModel


@dataclass(frozen=True)
class MoeFamily:
    """An MoE family as data, in the layout of its released checkpoints; names hold `{layer}` and `{expert}`."""

    model_type: str
    architecture: str
    takes: tuple[str, ...]
    """Dense model types whose computation it repeats exactly."""
    experts: Mapping[str, str]
    """FFN role (`gate`, `up`, `down`) to tensor name, in the order in which they are stored."""
    router: str
    """Tensor of shape (expert, hidden)."""
    holds_shared_experts: bool
    carried: tuple[str, ...]
    """Keys of the dense `config.json` that mean the same here."""
    fixed: Mapping[str, Any]
    """Keys that the family adds, with their values."""
    experts_key: str
    experts_per_token_key: str
    required: Mapping[str, tuple[Any, str]]
    """Key of the dense config to the only value the family can express, and the reason."""

    def refusals(self, model: DenseModel) -> list[str]:
        """Why this family cannot hold a model that computes like `model`; empty where it can."""
        if model.family.model_type not in self.takes:
            return [f"does not compute like {model.family.model_type}; it takes {', '.join(self.takes)}"]
        reasons = [
            f"{key} is {model.config[key]!r}: {reason}"
            for key, (value, reason) in self.required.items()
            if model.config.get(key, value) != value
        ]
        layer_types = set(model.config.get("layer_types") or [])
        if len(layer_types) > 1:
            reasons.append(
                f"layer_types mixes {', '.join(sorted(layer_types))}: one kind of attention serves all layers"
            )
        return reasons

    def config(self, base: DenseModel, num_experts: int, experts_per_token: int, dtype: str) -> dict[str, Any]:
        """The merged model's `config.json`, every value explicit: class defaults differ between families.

        Rope settings are written in both spellings: with `rope_parameters` alone, transformers 4.57 falls back to
        the class's `rope_theta` without a message.
        """
        rope_scaling = base.config["rope_scaling"]
        config = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{key: base.config[key] for key in self.carried},
            **self.fixed,
            self.experts_key: num_experts,
            self.experts_per_token_key: experts_per_token,
            "sliding_window": base.config["sliding_window"] if "sliding_window" in base.family.defaults else None,
            "rope_theta": base.config["rope_theta"],
            "rope_scaling": rope_scaling,
            "rope_parameters": {
                "rope_theta": base.config["rope_theta"], **(rope_scaling or {"rope_type": "default"})
            },
            "torch_dtype": dtype,
            "dtype": dtype,
        }  # fmt: skip
        return dict(sorted(config.items()))

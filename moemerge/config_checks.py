"""Problems between the keys of a merge config: prompts that make no router, experts that are all alike."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

PROMPT_FREE: Final = ("random", "uniform_random")
_MIN_EXPERTS: Final = 2
Place = tuple[int | str, ...]
"""Keys and indices that lead to a value."""


def listed(value: Any) -> Any:
    """A text alone as a list of one, nothing as an empty list."""
    return [] if value is None else [value] if isinstance(value, str) else value


def cross_check(document: dict[str, Any], *, allow_identical_experts: bool) -> list[tuple[Place, str]]:
    """Problems between keys; works on the raw document, so that they show beside problems within keys."""
    experts = document.get("experts")
    if not isinstance(experts, list) or not all(isinstance(expert, dict) for expert in experts):
        return []
    problems: list[tuple[Place, str]] = []
    per_token = document.get("experts_per_token", 2)
    if len(experts) < _MIN_EXPERTS:
        problems.append((("experts",), f"a mixture needs at least {_MIN_EXPERTS} experts, found {len(experts)}"))
    elif type(per_token) is int and len(experts) < per_token:
        problems.append((
            ("experts_per_token",),
            f"each token is to go to {per_token} experts, but there are only {len(experts)}: "
            "name more experts or lower experts_per_token",
        ))  # fmt: skip
    models = [expert.get("source_model") for expert in experts]
    folders = {os.path.normpath(os.path.expanduser(model)) if isinstance(model, str) else None for model in models}  # noqa: PTH111  Path.expanduser raises
    if len(folders) == 1 and None not in folders and len(experts) >= _MIN_EXPERTS and not allow_identical_experts:
        problems.append((
            ("experts",),
            "every expert is the same model, so the result computes what that model does at a higher cost. "
            "Name different models, or, to train the result further, pass --allow-identical-experts",
        ))  # fmt: skip
    problems += _blank_prompts("experts", experts) + _blank_prompts("shared_experts", document.get("shared_experts"))
    problems += _lone_negatives(document.get("shared_experts"))
    return problems + _check_prompts(document.get("gate_mode", "hidden"), experts)


def _blank_prompts(key: str, experts: Any) -> list[tuple[Place, str]]:
    problems: list[tuple[Place, str]] = []
    for number, expert in enumerate(experts if isinstance(experts, list) else []):
        for sign in ("positive_prompts", "negative_prompts"):
            prompts = listed(expert.get(sign)) if isinstance(expert, dict) else None
            if isinstance(prompts, list):
                blank = [
                    index for index, prompt in enumerate(prompts) if isinstance(prompt, str) and not prompt.strip()
                ]
                problems += [((key, number, sign, index), "the prompt is empty") for index in blank]
    return problems


def _lone_negatives(shared_experts: Any) -> list[tuple[Place, str]]:
    return [
        (("shared_experts", number), "negative_prompts say what differs from positive_prompts, but there are none")
        for number, expert in enumerate(shared_experts if isinstance(shared_experts, list) else [])
        if isinstance(expert, dict) and expert.get("negative_prompts") and not expert.get("positive_prompts")
    ]


def _check_prompts(gate_mode: Any, experts: Sequence[Mapping[str, Any]]) -> list[tuple[Place, str]]:
    problems: list[tuple[Place, str]] = []
    prompts = []
    for number, expert in enumerate(experts):
        positive, negative = (listed(expert.get(f"{sign}_prompts")) for sign in ("positive", "negative"))
        prompts.append((_in_order(positive), _in_order(negative)))
        place: Place = ("experts", number, "positive_prompts")
        if not positive and gate_mode not in PROMPT_FREE:
            problems.append((
                place if "positive_prompts" in expert else place[:2],
                f"gate_mode {gate_mode} needs positive_prompts: text that should be routed to this expert",
            ))  # fmt: skip
    if (
        gate_mode not in PROMPT_FREE
        and len(prompts) > 1
        and prompts[0][0]
        and all(pair == prompts[0] for pair in prompts[1:])
    ):
        problems.append((
            ("experts",),
            "all experts have the same prompts, so nothing tells the router which to choose. "
            "Give each expert prompts that only it should answer",
        ))  # fmt: skip
    return problems


def _in_order(prompts: Any) -> Any:
    return sorted(map(str, prompts)) if isinstance(prompts, list) else prompts

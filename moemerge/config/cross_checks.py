"""Find problems between the keys of a merge config: prompts that make no router, experts that are all alike."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from moemerge.chats import Chat
from moemerge.config.chat_prompts import prompt_problems
from moemerge.config.expert_names import repeated_names
from moemerge.config.router_methods import AUTO, METHODS, SETTINGS, RouterMethod, canonical_gate_mode, choose_method
from moemerge.config.tokenizer_choice import tokenizer_problems
from moemerge.places import Place

# `model_dump` gives every setting; one with its default value counts as not set.
_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "router": {
        "lambda": None,
        "scale": 1.0,
        "tokens_per_expert": 4096,
        "calibration_texts": [],
        "calibration": None,
        "load_prior": None,
        "seed": None,
    },
    "shared_weights": {"method": "base", "weights": None, "density": 0.5, "seed": 0},
}
_USED_SHARED: Final[dict[str, tuple[str, ...]]] = {
    "base": (), "auto": (), "average": ("weights",), "ties": ("weights", "density"),
    "dare": ("weights", "density", "seed"),
}  # fmt: skip
MIN_EXPERTS: Final = 2
_KEYS: Final = ("positive_prompts", "negative_prompts", "positive_texts", "negative_texts")


def listed(value: Any) -> Any:
    """Turn a single text into a list of one, and None into an empty list."""
    return [] if value is None else [value] if isinstance(value, str) else value


def listed_prompts(value: Any) -> Any:
    """A text or a chat alone as a list of one, nothing as an empty list."""
    return [value] if isinstance(value, dict | Chat) else listed(value)


def cross_check(document: dict[str, Any], *, allow_identical_experts: bool) -> list[tuple[Place, str]]:
    """Find problems between keys in the raw document, so that they show beside problems within keys."""
    experts = document.get("experts")
    if not isinstance(experts, list) or not all(isinstance(expert, dict) for expert in experts):
        return []
    problems: list[tuple[Place, str]] = []
    per_token = document.get("experts_per_token", 2)
    if len(experts) < MIN_EXPERTS:
        problems.append((("experts",), f"a mixture needs at least {MIN_EXPERTS} experts, found {len(experts)}"))
    elif type(per_token) is int and len(experts) < per_token:
        problems.append(
            (
                ("experts_per_token",),
                f"each token is to go to {per_token} experts, but there are only {len(experts)}: "
                "name more experts or lower experts_per_token",
            )
        )
    models = [None if expert.get("by_layer") else expert.get("source_model") for expert in experts]
    folders = {os.path.normpath(model) if isinstance(model, str) else None for model in models}
    if len(folders) == 1 and None not in folders and len(experts) >= MIN_EXPERTS and not allow_identical_experts:
        problems.append(
            (
                ("experts",),
                "every expert is the same model, so the result computes what that model does at a higher cost. "
                "Name different models, or, to train the result further, pass --allow-identical-experts",
            )
        )
    names = [name if isinstance(name := expert.get("name"), str) else None for expert in experts]
    problems += [(("experts", e, "name"), "is another expert's name, too") for e in repeated_names(names)]
    problems += _prompt_problems("experts", experts)
    problems += _prompt_problems("shared_experts", document.get("shared_experts"))
    problems += _lone_negatives(document.get("shared_experts"))
    problems += tokenizer_problems(document, experts)
    return problems + _check_descriptions(document, experts)


def _prompt_problems(key: str, experts: Any) -> list[tuple[Place, str]]:
    problems: list[tuple[Place, str]] = []
    for number, expert in enumerate(experts if isinstance(experts, list) else []):
        for sign in ("positive_prompts", "negative_prompts"):
            prompts = listed_prompts(expert.get(sign)) if isinstance(expert, dict) else None
            for index, prompt in enumerate(prompts if isinstance(prompts, list) else []):
                place: Place = (key, number, sign, index)
                problems += [((*place, *within), problem) for within, problem in prompt_problems(prompt)]
    return problems


def _lone_negatives(shared_experts: Any) -> list[tuple[Place, str]]:
    return [
        (("shared_experts", number), "negative_prompts say what differs from positive_prompts, but there are none")
        for number, expert in enumerate(shared_experts if isinstance(shared_experts, list) else [])
        if isinstance(expert, dict)
        and (expert.get("negative_prompts") or expert.get("negative_texts"))
        and not (expert.get("positive_prompts") or expert.get("positive_texts"))
    ]


def _check_descriptions(document: Mapping[str, Any], experts: Sequence[Mapping[str, Any]]) -> list[tuple[Place, str]]:
    settings = document.get("router")
    settings = settings if isinstance(settings, dict) else {}
    gate_mode = canonical_gate_mode(document.get("gate_mode", AUTO))
    given = [{key: listed_prompts(expert.get(key)) for key in _KEYS} for expert in experts]
    described = [bool(keys["positive_prompts"] or keys["positive_texts"]) for keys in given]
    calibrated = bool(settings.get("calibration_texts"))
    method = choose_method(gate_mode, described=all(described), calibrated=calibrated)
    mode, prompts_alone = f"gate_mode {method.name}", method.reads_descriptions and "texts" not in method.reads
    edits = any(_is_kept(expert, document.get("base_model")) for expert in experts)
    any_described = any(described) and not edits
    problems: list[tuple[Place, str]] = []
    for number, (expert, keys) in enumerate(zip(experts, given, strict=True)):
        missing = ""
        if prompts_alone and not keys["positive_prompts"]:
            missing = f"{mode} needs positive_prompts: text that should be routed to this expert"
        elif "texts" in method.reads and not described[number]:
            missing = f"{mode} needs positive_prompts or positive_texts: what should be routed to this expert"
        elif method.reads_what_there_is and any_described and not described[number]:
            missing = (
                "has neither positive_prompts nor positive_texts, though others have: give it some, or none to any "
                "expert, and the weights alone make the routers"
            )
        elif method.reads_weights and not described[number] and any(keys.values()):
            missing = "negative text says what differs from positive text, but there is none"
        place: Place = ("experts", number)
        problems += [((*place, "positive_prompts") if "positive_prompts" in expert else place, missing)] * bool(missing)
        if prompts_alone:
            problems += [
                ((*place[:2], key), f"{mode} reads prompts alone; ridge reads texts too")
                for key in ("positive_texts", "negative_texts")
                if keys[key]
            ]
    contents = [{key: _in_order(value) for key, value in keys.items()} for keys in given]
    all_alike = len(contents) > 1 and described[0] and all(keys == contents[0] for keys in contents[1:])
    if method.reads_descriptions and all_alike and not edits:
        problems.append(
            (
                ("experts",),
                "all experts have the same prompts, so nothing tells the router which to choose. "
                "Give each expert prompts that only it should answer",
            )
        )
    if settings.get("calibration") and not any(k["positive_prompts"] and not k["positive_texts"] for k in given):
        problems.append((("router", "calibration"), "no expert has prompts alone that it could continue"))
    return problems + _check_settings(method, settings, len(experts)) + _check_shared(document, len(experts))


def _is_kept(expert: Mapping[str, Any], base: Any) -> bool:
    """Whether an expert is the base model's own, which has router rows already."""
    model = expert.get("source_model")
    return isinstance(model, str) and isinstance(base, str) and (model == base or model.startswith(f"{base}#"))


def _check_settings(method: RouterMethod, settings: Mapping[str, Any], experts: int) -> list[tuple[Place, str]]:
    problems: list[tuple[Place, str]] = []
    if "unsorted texts" in method.reads and not settings.get("calibration_texts"):
        problems.append(
            (
                ("gate_mode",),
                f"{method.name} needs router.calibration_texts: files of text of all kinds that the experts are for",
            )
        )
    for key in _unused_by(method, settings):
        users = ", ".join(other.name for other in METHODS.values() if key in other.settings)
        problems.append((("router", key), f"gate_mode {method.name} does not use it; {users} do"))
    if settings.get("calibration_texts") and "texts" in method.reads and not settings.get("load_prior"):
        problems.append(
            (
                ("router", "calibration_texts"),
                f"gate_mode {method.name} uses them for a load_prior alone, which is missing; "
                "without prompts and texts, routers are made from them",
            )
        )
    prior = settings.get("load_prior")
    if isinstance(prior, list) and len(prior) != experts:
        problems.append((("router", "load_prior"), f"names {len(prior)} shares, but there are {experts} experts"))
    return problems


def unused_settings(document: Mapping[str, Any]) -> list[Place]:
    """List the settings that the methods of a raw document do not use, of its routers and its shared weights."""
    experts = document.get("experts")
    described = isinstance(experts, list) and all(map(_is_described, experts))
    settings = document.get("router")
    settings = settings if isinstance(settings, dict) else {}
    gate_mode = canonical_gate_mode(document.get("gate_mode", AUTO))
    calibrated = bool(settings.get("calibration_texts"))
    unused = _unused_by(choose_method(gate_mode, described=described, calibrated=calibrated), settings)
    return [*(("router", key) for key in unused), *(("shared_weights", key) for key in _unused_shared(document))]


def _is_described(expert: Any) -> bool:
    return isinstance(expert, dict) and bool(
        listed_prompts(expert.get("positive_prompts")) or listed_prompts(expert.get("positive_texts"))
    )


def _unused_by(method: RouterMethod, settings: Mapping[str, Any]) -> list[str]:
    """The router settings that a method does not use."""
    return [key for key in SETTINGS if _is_set("router", settings, key) and key not in method.settings]


def _unused_shared(document: Mapping[str, Any]) -> list[str]:
    """The settings of shared weights that their method does not use."""
    given = document.get("shared_weights")
    if not isinstance(given, dict):
        return []
    method, keys = given.get("method", "base"), ("weights", "density", "seed")
    used = _USED_SHARED.get(method, keys) if isinstance(method, str) else keys
    return [key for key in keys if _is_set("shared_weights", given, key) and key not in used]


def _check_shared(document: Mapping[str, Any], experts: int) -> list[tuple[Place, str]]:
    given = document.get("shared_weights")
    given = given if isinstance(given, dict) else {}
    problems: list[tuple[Place, str]] = [
        (("shared_weights", key), f"method {given.get('method', 'base')} does not use it")
        for key in _unused_shared(document)
    ]
    weights = given.get("weights")
    if isinstance(weights, list) and len(weights) != experts:
        problems.append((("shared_weights", "weights"), f"are {len(weights)}, but there are {experts} experts"))
    return problems


def _is_set(group: str, settings: Mapping[str, Any], key: str) -> bool:
    """Whether a setting differs from its default."""
    defaults = _DEFAULTS[group]
    return settings.get(key) is not None and not (settings.keys() >= defaults.keys() and settings[key] == defaults[key])


def _in_order(prompts: Any) -> Any:
    return sorted(map(str, prompts)) if isinstance(prompts, list) else prompts

"""A dense class under the type of each family whose tensors it has, merged with equal experts."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from moemerge import load_config, merge, plan_merge
from moemerge.errors import MoemergeError
from moemerge.families.dense import DENSE_FAMILIES, read_dense
from moemerge.families.mixture_shape import Mixture
from moemerge.families.selection import MOE_FAMILIES
from tests.support.models import edit_json, load, load_weights, logits, make_model, write_config
from tests.support.new_families.found import PLAIN, VARIANTS, Found, beside, difference, inside, line, nearest


def try_dense(model_type: str, folder: Path) -> Found:
    """Try a dense class as each known type, in every output family."""
    found = Found(model_type, "dense")
    for told, keys in VARIANTS.items():
        try:
            base = make_model(folder / f"dense {told}", 1, model_type, **{**PLAIN, **keys})
            expected = logits(load(base))
        except Exception as error:  # noqa: BLE001
            found.remarks.append(f"{told or 'as it is'}: {line(error)}")
            continue
        for kind, moe, apart in _as_others(base, expected, folder / f"merged {told}"):
            found.apart.setdefault(f"{kind} {told}".rstrip(), {})[moe] = apart
        if found.is_exact:
            break
        if not found.apart:
            names = load(base).state_dict()
            found.remarks += [nearest(beside(names)), f"its FFN has {', '.join(sorted(inside(names)))}"]
            break
    return found


def _as_others(base: Path, expected: torch.Tensor, folder: Path) -> Iterator[tuple[str, str, float]]:
    """Merge equal experts as if the model were of each known type, into every output family that takes them."""
    config = json.loads((base / "config.json").read_text())
    stored = {name: tuple(tensor.shape) for name, tensor in load_weights(base).items()}
    for kind in DENSE_FAMILIES:
        model = read_dense({**config, "model_type": kind})
        if isinstance(model, str):
            continue
        needed = {**model.outside(), model.family.head: ("vocab", "hidden")}
        for layer in range(model.layers):
            needed |= model.tensors(layer) | model.ffn(layer)
        if {name: model.shape(axes) for name, axes in needed.items()} != stored:
            continue
        edit_json(base / "config.json", model_type=kind)
        width = model.sizes["ffn"]
        plain = Mixture(model.layers, width, (width,) * 3, (), 2, tuple(range(model.layers)), {})
        for moe, family in MOE_FAMILIES.items():
            if not family.refusals(model, plain):
                yield kind, moe, _merged(base, expected, folder / f"{kind} {moe}", moe)


def _merged(base: Path, expected: torch.Tensor, folder: Path, moe: str) -> float:
    folder.mkdir(parents=True)
    config = write_config(folder / "merge.yaml", base, [base] * 3, prompts=False, architecture=moe)
    try:
        merge(plan_merge(load_config(config, allow_identical_experts=True)), folder / "out")
    except MoemergeError:
        return float("nan")
    return difference(load(folder / "out"), expected)

"""A method that moemerge does not have is one file, here this one, and one row in the table of methods."""

import re
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from moemerge import load_config, merge, plan_merge
from moemerge.cli.render import plan_facts
from moemerge.config.router_methods import METHODS, RouterMethod
from moemerge.errors import ConfigError
from moemerge.passes.compute_dtype import Compute
from moemerge.routers.method_lookup import rows_from_pass, rows_without_pass
from moemerge.routers.pass_inputs import LayerRows, PassRequest, RouterInputs
from moemerge.routers.prompts import encode_prompts
from moemerge.routers.request import RouterRequest
from moemerge.routers.rows import Rows
from moemerge.routers.streamed_pass import capture_router_inputs
from tests.support.models import load_weights, write_config

ROOT = Path(__file__).parents[2]
GATE = "model.layers.{}.block_sparse_moe.gate.weight"


def longest_rows(inputs: RouterInputs, request: PassRequest) -> LayerRows:
    """The longest router input of each expert's prompts."""
    rows = torch.zeros(len(request.mixture.expert_widths), inputs.states.shape[1])
    for expert in request.present(inputs.layer):
        states = inputs.states[inputs.expert == expert]
        rows[expert] = states[states.norm(dim=1).argmax()]
    return LayerRows(rows)


def numbered_rows(request: RouterRequest, seed: int) -> dict[int, Rows]:
    """Rows that hold the seed and their expert's number."""
    hidden = request.base.model.config["hidden_size"]
    numbers = torch.arange(len(request.config.experts), dtype=torch.float32)
    return {layer: (seed + numbers).repeat(hidden, 1).T.numpy() for layer in request.mixture.moe_layers}


ROWS = (
    RouterMethod(
        "longest", f"{__name__}:longest_rows", frozenset({"prompts"}), frozenset({"scale"}), aliases=("loudest",)
    ),
    RouterMethod("numbered", f"{__name__}:numbered_rows", runs_base=False),
)


@pytest.fixture(autouse=True)
def _rows(monkeypatch):
    for row in ROWS:
        monkeypatch.setitem(METHODS, row.name, row)


def gates(folder: Path, layers: int) -> list[torch.Tensor]:
    tensors = load_weights(folder)
    return [tensors[GATE.format(layer)] for layer in range(layers)]


@pytest.mark.parametrize("gate_mode", ["longest", "loudest"])
def test_a_method_that_reads_what_the_base_computes_is_merged_with(tmp_path, llamas, gate_mode):
    plan = plan_merge(load_config(write_config(tmp_path / "c.yaml", llamas[0], llamas[1:4], gate_mode=gate_mode)))
    assert plan_facts(plan)["gate_mode"] == "longest"
    assert plan.runs_base
    report = merge(plan, tmp_path / "out")
    assert [row.layer for row in report.layers] == list(plan.mixture.moe_layers)
    prompts = encode_prompts(plan.base_folder, plan.config, 128, 0)
    request = PassRequest(
        plan.parts.base, plan.mixture, plan.family.scoring, prompts, Compute(torch.device("cpu"), torch.float32)
    )
    expected = [longest_rows(inputs, request).rows for inputs in capture_router_inputs(request)]
    assert all(map(torch.equal, gates(tmp_path / "out", plan.base.layers), expected))
    assert "routers from `gate_mode: longest`" in (tmp_path / "out" / "README.md").read_text()


def test_a_method_that_reads_nothing_is_merged_with(tmp_path, llamas):
    path = write_config(tmp_path / "c.yaml", llamas[0], llamas[1:4], gate_mode="numbered", router={"seed": 5})
    plan = plan_merge(load_config(path))
    assert not plan.runs_base
    assert any("does not read the prompts for gate_mode numbered" in note for note in plan.notes)
    merge(plan, tmp_path / "out")
    for gate in gates(tmp_path / "out", plan.base.layers):
        assert gate.T.unique(dim=0).tolist() == [[5, 6, 7]]


def test_the_configs_problems_know_a_new_method():
    def problems(**keys) -> tuple[str, ...]:
        experts = [{"source_model": name, "positive_prompts": name, **keys.pop(name, {})} for name in "ab"]
        with pytest.raises(ConfigError) as caught:
            load_config({"base_model": "base", "experts": experts, **keys})
        return tuple(caught.value.problems)

    assert problems(gate_mode="longest", router={"lambda": 1}, a={"positive_texts": "a.txt"}) == (
        "experts[0].positive_texts: gate_mode longest reads prompts alone; ridge reads texts too",
        "router.lambda: gate_mode longest does not use it; combined, ridge, logistic, delta_bootstrap do",
    )
    assert problems(gate_mode="numbered", router={"scale": 2}) == (
        "router.scale: gate_mode numbered does not use it; hidden, combined, ridge, logistic, delta, delta_bootstrap, longest do",
    )
    assert problems(gate_mode="longst") == (
        "gate_mode: expected auto, hidden, mergekit_hidden, combined, ridge, logistic, delta, delta_bootstrap, cheap_embed, "
        "random, uniform_random, longest or numbered, found 'longst'; did you mean longest?",
    )


@pytest.mark.parametrize("method", [*METHODS.values(), *ROWS], ids=lambda method: method.name)
def test_every_row_names_a_function_of_its_kind(method):
    if method.runs_base:
        kind, function = [RouterInputs, PassRequest, LayerRows], rows_from_pass(method)
    else:
        kind, function = [RouterRequest, int, dict[int, Rows]], rows_without_pass(method)
    assert list(get_type_hints(function).values()) == kind


def test_the_documentation_has_every_method():
    known = {method.name for method in METHODS.values()} - {row.name for row in ROWS}
    page = (ROOT / "docs" / "routers.md").read_text()
    table = page.partition("| `gate_mode` | needs |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == known
    line = next(
        line for line in (ROOT / "docs" / "config.md").read_text().splitlines() if line.startswith("| `gate_mode` |")
    )
    assert set(re.findall(r"`(\w+)`", line.split("|")[2])) == {"auto", *known}

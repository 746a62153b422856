"""Edits of mixtures with many experts: planning takes time in proportion to their number."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from moemerge import load_config
from moemerge.cli.edit_report import edit_facts, print_edit
from moemerge.config.yaml_text import write_yaml
from moemerge.editing.changes import Changes, edit_document
from moemerge.editing.plan import EditPlan
from moemerge.editing.planner import plan_edit
from moemerge.sources.model_folder import open_model
from moemerge.sources.stored_mixtures import read_stored_mixture
from tests.support.mixtures import make_mixture


def calls_of(work: Callable[[], object]) -> int:
    """How many functions, Python's own among them, the work calls."""
    count = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def shown(plan: EditPlan) -> None:
    edit_facts(plan)
    print_edit(Console(file=io.StringIO()), plan)


def costs(folder: Path, experts: int) -> tuple[int, int]:
    """The calls that it takes to plan an edit, and those to show the plan."""
    made = make_mixture(folder, "mixtral", num_local_experts=experts, num_hidden_layers=1)
    mixture = read_stored_mixture(open_model(str(made), lambda _: None), lambda _: None)
    (folder / "edit.yaml").write_text(write_yaml(edit_document(mixture, str(made), Changes(drop=["0"]))))
    config = load_config(folder / "edit.yaml")
    plans = []
    planning = calls_of(lambda: plans.append(plan_edit(config)))
    return planning, calls_of(lambda: shown(plans[0]))


def test_four_times_as_many_experts_take_four_times_as_much_work(tmp_path):
    few, many = costs(tmp_path / "few", 64), costs(tmp_path / "many", 256)
    assert many[0] < 5 * few[0]
    assert many[1] < 5 * few[1]

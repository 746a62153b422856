"""The public border, the layout names that other readers expect, the card, inspection."""

import ast
import pkgutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import pytest
from huggingface_hub import ModelCard
from mypy import api

import moemerge
from moemerge import load_config, merge, plan_merge
from moemerge.checks.inspection import inspect_checkpoint
from moemerge.families.engines import readings
from moemerge.families.selection import MOE_FAMILIES
from moemerge.model_card.usage import use_it
from moemerge.planning.options import PlanOptions
from tests.next_steps.serve import command
from tests.support.models import write_config

ROOT = Path(__file__).parents[1]


def test_what_is_public_is_importable_and_documented():
    assert dir(moemerge) == sorted(moemerge.__all__)
    for name in moemerge.__all__:
        assert getattr(moemerge, name).__doc__, name
    assert version("moemerge") == moemerge.__version__
    with pytest.raises(AttributeError, match="module 'moemerge' has no attribute 'bogus'"):
        _ = moemerge.bogus


def test_every_error_is_public():
    classes = {name: held for name, held in vars(moemerge.errors).items() if isinstance(held, type) and name[0] != "_"}
    errors = {name for name, held in classes.items() if issubclass(held, Exception)}
    assert errors == {name for name in moemerge.__all__ if name.endswith("Error")}


def test_no_module_hides_a_public_name():
    assert not {module.name for module in pkgutil.iter_modules(moemerge.__path__)} & {*moemerge.__all__}


def parameters(function):
    """Number of a function's parameters without `self`."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in {"self", "cls"}]) + bool(given.vararg) + bool(given.kwarg)


def test_modules_and_functions_are_short():
    """At most 300 lines a module, 50 a function, 8 parameters."""
    found = []
    for path in sorted((ROOT / "moemerge").rglob("*.py")):
        text = path.read_text()
        found += [f"{path.name}: {len(text.splitlines())} lines"] * (len(text.splitlines()) > 300)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines, count = node.end_lineno - node.lineno + 1, parameters(node)
                found += [f"{path.name}: {node.name}: {lines} lines, {count} parameters"] * (lines > 50 or count > 8)
    assert found == []


def test_type_checkers_and_the_interpreter_know_the_same_names():
    hidden, told = ast.parse((ROOT / "moemerge" / "__init__.py").read_text()), {}
    block = next(node for node in hidden.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            home = node.module.removeprefix("moemerge.")
            told |= {alias.asname or alias.name: f"{home}:{alias.name}" for alias in node.names}
    assert told == moemerge._HOMES


def test_a_misspelt_name_is_an_error_of_types(tmp_path):
    """Only the package's own file is checked beside the probe: what it imports is taken for anything."""
    probe = tmp_path / "probe.py"
    probe.write_text("from moemerge import plan_merge\nfrom moemerge import plan_merg\n")
    found, problems, code = api.run(
        ["--strict", "--follow-imports=skip", f"--cache-dir={tmp_path}", str(ROOT / "moemerge/__init__.py"), str(probe)]
    )
    told = 'probe.py:2: error: Module "moemerge" has no attribute "plan_merg"; maybe "plan_merge"?  [attr-defined]'
    assert (found.splitlines()[0].rpartition("/")[2], len(found.splitlines()), problems, code) == (told, 2, "", 1)


def test_importing_the_package_imports_nothing_slow():
    code = (
        "import sys, moemerge.merging.merger, moemerge.cli.app; from moemerge import *; "
        "assert not {'torch', 'transformers', 'accelerate', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    # What a name needs is imported when it is asked for.
    code = "import sys, moemerge; assert not {'numpy', 'pydantic', 'huggingface_hub', 'yaml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_llama_cpp_has_a_name_for_every_tensor(tmp_path, llamas):
    """The converter maps Hub names by this table; experts are first stacked under their part's name."""
    plan = plan_merge(load_config(write_config(tmp_path / "c.yaml", llamas[0], llamas[1:], gate_mode="random")))
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, plan.base.layers)
    for name in plan.outputs:
        parts = name.split(".")
        stacked = ".".join([*parts[:4], "experts", *parts[6:]]) if "experts" in parts else name
        assert table.get_name(stacked, try_suffixes=(".weight",)), name


def test_output_names_are_those_of_released_checkpoints():
    mixtral = MOE_FAMILIES["mixtral"]
    assert mixtral.router == "block_sparse_moe.gate.weight"
    assert {
        name.format(expert=3).removeprefix("block_sparse_moe.experts.3."): roles
        for name, roles in mixtral.experts.items()
    } == {"w1.weight": ("gate",), "w3.weight": ("up",), "w2.weight": ("down",)}


def test_the_card_says_what_the_model_is(tmp_path, llamas):
    path = write_config(tmp_path / "c.yaml", llamas[0], llamas[1:])
    plan = plan_merge(load_config(path))
    report = merge(plan, tmp_path / "my-model")
    card = ModelCard.load(tmp_path / "my-model" / "README.md", ignore_metadata_errors=False)
    assert card.data.tags == ["moe", "merge", "frankenmoe", "moemerge"]
    assert card.data.library_name == "transformers"
    # Folders of this machine are no repositories, and have no cards.
    assert not {"base_model", "base_model_relation", "license"} & card.data.to_dict().keys()
    for part in (
        path.read_text().rstrip(),
        "# my-model",
        "parameters",
        "## Routing",
        f"| fox | {report.hit_rate[0]:.1%} | {report.top1_accuracy[0]:.1%} |",
    ):
        assert part in card.text


def test_the_card_names_the_engines_that_are_right_and_no_other():
    told = use_it("my model", "mixtral", ["vllm", "llamacpp", "transformers"])
    versions = {engine: families["mixtral"].version for engine, families in readings().items()}
    assert told.startswith("In transformers 4.57 and 5:\n\n```python\n")
    assert 'AutoModelForCausalLM.from_pretrained("my model", dtype="auto")' in told
    assert told.endswith(
        f"""

Tiny mixtures of this kind computed the same in:

- vLLM ({versions["vllm"]}): `python -m vllm.entrypoints.openai.api_server --model 'my model'`
- llama.cpp ({versions["llamacpp"]}): `moemerge gguf 'my model' 'my model'.gguf`

After fine-tuning with transformers 5, run `moemerge repair FOLDER` on what was saved: other readers miss keys of its config.json."""
    )
    # What `make test-engines` runs, and the page shows.
    words = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "my model", "--port", "81"]
    assert command("my model", 81) == words
    alone = use_it("m", "mellum", []).split("\n\n")
    assert alone[0] == "In transformers 5:"
    assert len(alone) == 4  # the program has an empty line


def test_the_card_of_a_multimodal_mixture_says_that_engines_were_asked_about_text():
    found = readings()
    told = use_it("my model", "qwen3_vl_moe", ["transformers", "converter", "openvino"], sees=True)
    assert told.startswith("In transformers 4.57 and 5:\n\n```python\n")
    assert 'AutoModelForImageTextToText.from_pretrained("my model", dtype="auto")' in told
    assert told.endswith(
        f"""base's FFNs.

Of text, without images, tiny mixtures of this kind computed the same in:

- OpenVINO ({found["openvino"]["qwen3_vl_moe"].version}): `OVModelForVisualCausalLM.from_pretrained("my model", export=True)`"""
    )
    assert use_it("m", "qwen3_vl_moe", [], sees=True).endswith("base's FFNs.")


def test_the_card_takes_its_engines_from_what_was_measured(tmp_path, llamas):
    plan = plan_merge(load_config(write_config(tmp_path / "c.yaml", llamas[0], llamas[1:], prompts=False)))
    merge(plan, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert {"vllm", "llamacpp"} <= set(plan.right_in)
    assert "\n\n".join(["## Use", use_it("out", "mixtral", plan.right_in), "## Routing"]) in card


def test_inspect_notices_what_does_not_fit(tmp_path, llamas):
    path = write_config(tmp_path / "c.yaml", llamas[0], llamas[1:], gate_mode="random")
    merge(plan_merge(load_config(path), PlanOptions(max_shard_bytes=30_000)), tmp_path / "out")
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"total_size": ', '"total_size": 1'))
    (tmp_path / "out" / "model-00001-of-00009.safetensors").write_bytes(b"old")
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"num_local_experts": 3', '"num_local_experts": 4'))
    first, second, third = inspect_checkpoint(str(tmp_path / "out")).warnings
    assert first == "config.json announces 4 experts, the tensors hold 3"
    assert second == "model-00001-of-00009.safetensors: not in the index, so no reader loads it"
    assert third.startswith("model.safetensors.index.json announces 1")

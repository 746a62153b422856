"""The program that looks for families in a new transformers finds those that the tables already have."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moemerge.families.dense import DENSE_FAMILIES
from moemerge.families.selection import MOE_FAMILIES
from tests.support.new_families.__main__ import look_at, uncovered
from tests.support.new_families.found import CLOSE


def known(model_type: str) -> str:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {model_type}")
    return model_type


def test_what_a_table_covers_is_not_looked_for():
    found = set(uncovered())
    assert found
    assert not found & {*DENSE_FAMILIES, *MOE_FAMILIES, "falcon", "internlm3", "qwen2_vl_text"}


def test_a_class_without_a_gate_is_told_by_its_tensors(tmp_path):
    assert [*look_at(known("arcee"), tmp_path).lines] == [
        "arcee: dense",
        "  nearest by what is beside its FFN: llama; it lacks nothing; it has in addition nothing",
        "  its FFN has mlp.down_proj.weight, mlp.up_proj.weight",
    ]


@pytest.mark.slow
def test_a_llama_by_another_name_becomes_what_a_llama_does(tmp_path):
    found = look_at(known("internlm3"), tmp_path)
    assert found.kind == "dense"
    assert found.apart["llama"].keys() > {"mixtral", "granitemoe", "glm4_moe"}
    assert max(found.apart["llama"].values()) <= CLOSE
    assert min(found.apart["gemma"].values()) > 0.01
    assert any(line.startswith("  exact as llama: mixtral ") for line in found.lines)


@pytest.mark.slow
@pytest.mark.parametrize(("moe", "dense"), [("qwen2_moe", "qwen2"), ("qwen3_moe", "qwen3")])
def test_a_mixture_is_found_to_be_what_its_dense_sibling_becomes(tmp_path, moe, dense):
    found = look_at(known(moe), tmp_path)
    assert found.kind == "mixture"
    assert found.is_exact
    assert min(apart[""] for name, apart in found.apart.items() if name.startswith(dense)) <= CLOSE

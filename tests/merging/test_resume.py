"""Merges that were cut off go on where they were, or say why they cannot."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint import writer
from moemerge.checkpoint.journal import Journal
from moemerge.checkpoint.shards import TensorSpec, layout_shards
from moemerge.checkpoint.staging import journal_of, kept_shards
from moemerge.checks.verification import verify_merge
from moemerge.errors import CheckpointError, OutputError, RefusedError, RouterError
from moemerge.merging.options import MergeOptions
from moemerge.planning.options import PlanOptions
from moemerge.planning.output import Computed
from tests.support.kill import contents
from tests.support.models import edit_json, make_model, write_config

ROOT = Path(__file__).parents[2]
SHARD_BYTES = 20_000


@pytest.fixture
def models(tmp_path) -> list[Path]:
    return [make_model(tmp_path / name, seed) for seed, name in enumerate(("base", "fox", "code"))]


def plan_of(tmp_path: Path, models: list[Path], shard_bytes: int = SHARD_BYTES, **keys):
    config = write_config(tmp_path / "merge.yaml", models[0], models[1:], prompts=False, **keys)
    return plan_merge(load_config(config), PlanOptions(max_shard_bytes=shard_bytes))


def cut_off(plan, out: Path, monkeypatch) -> set[str]:
    """Stop a merge when two shards are complete; gives what is left in its folder."""
    with monkeypatch.context() as patch:
        record = Journal.record

        def stop_after_two(journal, shard):
            if len(journal) == 2:
                raise CheckpointError("cut off")
            record(journal, shard)

        patch.setattr(Journal, "record", stop_after_two)
        with pytest.raises(CheckpointError, match="cut off"):
            merge(plan, out)
    return {path.name for path in (out.parent / f".{out.name}.moemerge-partial").iterdir()}


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_random_moments_and_the_result_is_the_same(tmp_path, models, kills):
    config = write_config(tmp_path / "merge.yaml", models[0], models[1:], prompts=False)
    folder = tmp_path / "kills"
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.kill", str(config), str(folder), str(kills)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout)
    assert counts["nothing"] + counts["kept"] >= kills
    assert counts["kept"] >= kills / 5
    assert counts["shards"] >= 8


def test_complete_shards_are_kept_and_only_the_rest_is_written(tmp_path, models, monkeypatch):
    plan = plan_of(tmp_path, models)
    left = cut_off(plan, tmp_path / "out", monkeypatch)
    assert left >= {shard.name for shard in plan.shards}
    assert "config.json" not in left
    assert kept_shards(tmp_path / "out") == 2
    partial = tmp_path / ".out.moemerge-partial"
    written = {shard.name: (partial / shard.name).stat().st_mtime_ns for shard in plan.shards}
    done = []
    merge(
        plan,
        tmp_path / "out",
        MergeOptions(resume=True),
        progress=lambda task, n, _: task.stage == "weights" and done.append(n),
    )
    again = [name for name, when in written.items() if (tmp_path / "out" / name).stat().st_mtime_ns != when]
    assert len(again) == len(plan.shards) - 2
    assert min(done) > 0.5 * SHARD_BYTES
    assert done[-1] == plan.tensor_bytes
    merge(plan, tmp_path / "again" / "out")  # the folder's name stands in the card
    assert contents(tmp_path / "out") == contents(tmp_path / "again" / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_another_merge_is_not_continued_and_says_what_differs(tmp_path, models, monkeypatch):
    out = tmp_path / "out"
    cut_off(plan_of(tmp_path, models), out, monkeypatch)
    with pytest.raises(RefusedError) as refused:
        merge(plan_of(tmp_path, models, experts_per_token=1), out, MergeOptions(resume=True, seed=3))
    assert str(refused.value) == (
        "--resume: the merge that was cut off was not this one; what differs: config.experts_per_token, seed. "
        "Undo the change, or start over without --resume."
    )
    weights = models[2] / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    with pytest.raises(
        RefusedError, match=f"what differs: sources.{weights}.changed, sources.{weights}.modified. Undo"
    ):
        merge(plan_of(tmp_path, models), out, MergeOptions(resume=True))
    with pytest.raises(RefusedError, match=r"what differs: layout of the shards \(--max-shard-size\), sources"):
        merge(plan_of(tmp_path, models, 30_000), out, MergeOptions(resume=True))
    assert kept_shards(out) == 2


def test_without_resume_a_merge_starts_over(tmp_path, models, monkeypatch):
    plan = plan_of(tmp_path, models)
    cut_off(plan, tmp_path / "out", monkeypatch)
    done = []
    merge(plan, tmp_path / "out", progress=lambda task, n, _: task.stage == "weights" and done.append(n))
    assert min(done) < plan.shards[0].nbytes
    assert kept_shards(tmp_path / "out") == 0


def test_with_nothing_to_resume_a_merge_begins(tmp_path, models):
    merge(plan_of(tmp_path, models), tmp_path / "out", MergeOptions(resume=True))
    assert (tmp_path / "out" / "config.json").exists()


def test_a_shard_that_is_damaged_is_written_again(tmp_path, models, monkeypatch):
    plan = plan_of(tmp_path, models)
    cut_off(plan, tmp_path / "out", monkeypatch)
    partial = tmp_path / ".out.moemerge-partial"
    os.truncate(partial / plan.shards[0].name, 100)
    merge(plan, tmp_path / "out", MergeOptions(resume=True))
    merge(plan, tmp_path / "again")
    name = plan.shards[0].name
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("way", ["copy fails", "pass fails", "interrupted"])
def test_whatever_stops_a_merge_its_complete_shards_are_flushed_and_kept(tmp_path, models, monkeypatch, way):
    plan = plan_of(tmp_path, models)
    out = tmp_path / "out"
    flush, last = writer.flush, plan.shards_without_routers[-1]
    monkeypatch.setattr(writer, "flush", lambda path: time.sleep(0.05) or flush(path))
    monkeypatch.setattr("moemerge.merging.merge_work.MAX_THREADS", 1)
    name = list(last.starts)[-1]
    if way == "pass fails":

        def fail(*_, **__):
            time.sleep(0.3)
            raise RouterError("cut off")

        monkeypatch.setattr("moemerge.merging.merge_work.init_routers", fail)
        error: type[BaseException] = RouterError
    else:
        error = CheckpointError if way == "copy fails" else KeyboardInterrupt
        write = writer._write_band

        def stop(band, seeds, path, start, *rest, **keys):
            if path.name == last.name and start == last.starts[name]:
                raise error("cut off")
            write(band, seeds, path, start, *rest, **keys)

        monkeypatch.setattr(writer, "_write_band", stop)
    with pytest.raises(error, match="cut off"):
        merge(plan, out)
    monkeypatch.undo()
    assert kept_shards(out) >= len(plan.shards) - 3
    merge(plan, out, MergeOptions(resume=True))
    assert verify_merge(plan, out).differences == ()


def test_a_failing_flush_stops_the_copies(tmp_path, models, monkeypatch):
    plan = plan_of(tmp_path, models)

    def full(_path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "flush", full)
    write, written = writer._write_band, []
    slowly = lambda *args, **keys: time.sleep(0.01) or written.append(1) or write(*args, **keys)  # noqa: E731
    monkeypatch.setattr(writer, "_write_band", slowly)
    with pytest.raises(OutputError, match="the disk is full"):
        merge(plan, tmp_path / "out")
    assert len(written) < len(plan.outputs) - 10


def test_shards_with_routers_are_computed_again(tmp_path, models):
    plan = plan_of(tmp_path, models)
    assert 0 < len(plan.shards_without_routers) < len(plan.shards)
    for shard in plan.shards:
        with_routers = any(isinstance(plan.outputs[name].origin, Computed) for name in shard.starts)
        assert with_routers != (shard in plan.shards_without_routers)


def test_what_the_base_no_longer_has_is_not_published(tmp_path, models, monkeypatch):
    template = models[0] / "chat_template.jinja"
    template.write_text("{{ messages }}")
    cut_off(plan_of(tmp_path, models), tmp_path / "out", monkeypatch)
    stage = tmp_path / ".out.moemerge-partial"
    (stage / "chat_template.jinja").write_text("{{ messages }}")
    template.unlink()
    merge(plan_of(tmp_path, models), tmp_path / "out", MergeOptions(resume=True))
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_a_journal_without_shards_or_without_its_folder_stops_nobody(tmp_path, models):
    journal = journal_of(tmp_path / ".out.moemerge-partial")
    journal.begin({"another": "merge"})
    merge(plan_of(tmp_path, models), tmp_path / "out", MergeOptions(resume=True))
    journal.begin({"another": "merge"})
    for shard in shards():
        journal.record(shard)  # killed after the last rename
    assert kept_shards(tmp_path / "out") == 0
    merge(plan_of(tmp_path, models), tmp_path / "out", MergeOptions(resume=True, overwrite=True))
    assert len(journal) == 0


@pytest.mark.parametrize("text", ["5\n", "[]\n", "{}\n{}\n", "\x00", "nonsense"])
def test_a_journal_that_makes_no_sense_holds_nothing(tmp_path, text):
    (tmp_path / "journal").write_text(text)
    folder = tmp_path / "folder"
    folder.mkdir()
    if text == "{}\n{}\n":
        with pytest.raises(RefusedError, match="was not this one"):
            Journal(tmp_path / "journal").resume({"x": 1}, folder, shards())
    else:
        assert Journal(tmp_path / "journal").resume({"x": 1}, folder, shards()) == set()


def shards():
    return layout_shards([TensorSpec(name, "U8", (50,), 50) for name in "abc"], 50)


def test_a_shard_that_is_being_written_again_is_not_in_the_journal(tmp_path):
    a, b, _ = shards()
    folder = tmp_path / "folder"
    folder.mkdir()
    journal = Journal(tmp_path / "journal")
    assert journal.resume({"x": 1}, folder, shards()) == set()
    for shard in (a, b):
        journal.record(shard)
    (folder / b.name).write_bytes(b.header + bytes(50))
    assert journal.resume({"x": 1}, folder, shards()) == {b.name}
    (folder / a.name).write_bytes(a.header + bytes(50))  # preallocated, not yet filled
    assert journal.resume({"x": 1}, folder, shards()) == {b.name}


def test_a_line_that_was_cut_off_says_nothing(tmp_path):
    a, b, _ = shards()
    folder = tmp_path / "folder"
    folder.mkdir()
    journal = Journal(tmp_path / "journal")
    journal.begin({"x": 1})
    for shard in (a, b):
        journal.record(shard)
    for cut in range(1, 60):
        for shard in (a, b):
            (folder / shard.name).write_bytes(shard.header + bytes(50))
        text = (tmp_path / "journal").read_text()
        (tmp_path / "journal").write_text(text[:-cut])
        assert journal.resume({"x": 1}, folder, shards()) == ({a.name, b.name} if cut == 1 else {a.name})
        (tmp_path / "journal").write_text(text)


def test_a_refused_command_leaves_what_can_be_resumed(tmp_path, models, monkeypatch):
    out = tmp_path / "out"
    plan = plan_of(tmp_path, models)
    cut_off(plan, out, monkeypatch)
    out.mkdir()
    (out / "thesis.odt").write_text("mine")
    with pytest.raises(RefusedError, match="is not empty"):
        merge(plan, out)
    assert kept_shards(out) == 2
    edit_json(models[0] / "generation_config.json", temperature=0.5)
    (out / "thesis.odt").unlink()
    merge(plan_of(tmp_path, models), out, MergeOptions(resume=True))
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.5

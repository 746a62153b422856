"""A model's files replaced in place: the old model or the new one, never a mix, and back again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from moemerge.checkpoint import in_place, output_folder
from moemerge.checkpoint.change_journal import Change
from moemerge.checkpoint.in_place import (
    changing,
    commit,
    is_unfinished,
    recover,
    replace_model,
    undo,
    undoable_bytes,
)
from moemerge.errors import BusyError, CheckpointError, OutputError, RefusedError
from tests.support.kill_changes import CHANGED, NEW, OLD, REMOVED, STEPS, change, contents, fill, prepare, start

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path) -> Path:
    return prepare(tmp_path / "home", "change")


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def beside(model: Path) -> set[str]:
    return {path.name for path in model.parent.iterdir()} - {model.name}


def test_a_change_is_undone_to_the_same_files(model):
    before = stamps(model)
    change(model)
    assert contents(model) == NEW
    assert not (model / "templates" / "one.jinja").exists()
    assert undoable_bytes(model) == sum(len(OLD[name]) for name in {*REMOVED, *(CHANGED.keys() & OLD.keys())})
    assert beside(model) == {".model.moemerge-undo"}
    undo(model)
    assert stamps(model) == before
    assert contents(model) == OLD
    assert (beside(model), undoable_bytes(model)) == (set(), 0)


def test_no_file_that_stays_is_touched_and_no_old_one_is_copied(model):
    before = stamps(model)
    change(model)
    after = stamps(model)
    assert {name for name in before if after.get(name) == before[name]} == NEW.keys() - CHANGED.keys()
    kept = stamps(model.parent / ".model.moemerge-undo" / "old")
    assert kept == {name: before[name] for name in before.keys() - (NEW.keys() - CHANGED.keys())}


def test_a_change_that_is_made_final_leaves_nothing(model):
    change(model)
    commit(model)
    assert contents(model) == NEW
    assert beside(model) == set()
    with pytest.raises(RefusedError) as refused:
        undo(model)
    assert str(refused.value) == (f"{model}: there is no edit to undo: none was made in place, or it was made final.")
    with pytest.raises(RefusedError) as refused:
        commit(model)
    assert str(refused.value) == (
        f"{model}: there is no edit to make final: none was made in place, or it was made final."
    )


def test_a_mount_point_keeps_its_old_files_inside(model, monkeypatch):
    """Files can be renamed only within it."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == model)
    change(model)
    assert beside(model) == set()
    assert {name for name in contents(model) if not name.startswith(".moemerge-undo/")} == NEW.keys()
    assert [entry.name for entry in output_folder.entries(model) if entry.name.startswith(".")] == []
    undo(model)
    assert contents(model) == OLD


def test_a_link_is_moved_and_what_it_leads_to_stays(model):
    kept = model.parent / "kept"
    (model / REMOVED[0]).rename(kept)
    (model / REMOVED[0]).symlink_to("../kept")
    change(model)
    assert contents(model) == NEW
    undo(model)
    assert (model / REMOVED[0]).readlink() == Path("../kept")
    assert contents(model) == OLD


def test_a_folder_that_disappears_with_its_last_file_comes_back(model):
    with changing(model):
        replace_model(model, ["templates/one.jinja"])
    assert not (model / "templates").exists()
    undo(model)
    assert contents(model) == OLD


def test_what_fails_before_the_files_are_complete_changes_nothing(model):
    before = stamps(model)

    def fail(new: Path) -> None:
        fill(new, CHANGED)
        raise ValueError

    with pytest.raises(ValueError), changing(model) as new:  # noqa: PT011
        fail(new)
    assert stamps(model) == before
    assert beside(model) == set()


def test_without_a_config_there_is_no_model_to_change(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(CheckpointError) as failed, changing(folder):
        replace_model(folder)
    assert str(failed.value) == f"{folder / 'config.json'}: cannot be read: No such file or directory."
    assert beside(folder) == set()


def test_a_second_change_waits_until_the_first_is_final(model):
    change(model)
    with pytest.raises(RefusedError) as refused, changing(model):
        pass
    assert str(refused.value) == (
        f"{model}: its last edit can still be undone. Make it final with --commit, or go back with --undo; then edit "
        "again."
    )
    commit(model)
    with changing(model) as new:
        fill(new, {"config.json": b"newer"})
        replace_model(model)
    assert contents(model) == NEW | {"config.json": b"newer"}
    undo(model)
    assert contents(model) == NEW


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model-edit1-00001.safetensors", b"tuned"),
        ("model-00002-of-00002.safetensors", b"tuned"),
        ("model-00001-of-00002.safetensors", b"saved again"),
    ],
)
def test_what_was_changed_since_is_not_lost_by_going_back(model, name, text):
    change(model)
    (model / "mine.txt").write_bytes(b"mine")
    (model / "tuned").write_bytes(text)
    (model / "tuned").replace(model / name)
    found = contents(model)
    with pytest.raises(RefusedError) as refused:
        undo(model)
    assert str(refused.value) == (
        f"{model}: {name} is not as the last edit left it, and undoing that would lose or mix something. Move it away "
        "or back, and undo again; or make the edit final with --commit."
    )
    assert contents(model) == found
    commit(model)
    assert contents(model) == found


def test_files_that_came_since_stay(model):
    change(model)
    (model / "mine.txt").write_bytes(b"mine")
    (model / "config.json").unlink()  # what is gone need not be moved
    undo(model)
    assert contents(model) == OLD | {"mine.txt": b"mine"}


@pytest.mark.parametrize("purpose", ["moemerge-undo", "moemerge-tune", "moemerge-partial"])
def test_only_one_process_writes_to_a_model(model, purpose):
    with FileLock(model.parent / f".model.{purpose}.lock"):
        for doing in (change, undo, commit):
            with pytest.raises(BusyError) as busy:
                doing(model)
            assert str(busy.value) == f"{model}: another moemerge is writing to it. Wait for it to end."
    assert contents(model) == OLD


def test_a_full_disk_is_noticed_first(model):
    message = "what changes, beside what it replaces, takes 1000000000.00 GB, but the disk has"
    with pytest.raises(OutputError, match=message), changing(model, nbytes=10**18):
        pass
    assert beside(model) == set()


def test_a_folder_that_cannot_be_written_to_is_refused(model, monkeypatch):
    def refuse(dir: Path) -> None:  # noqa: A002
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(in_place.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError) as failed, changing(model):
        pass
    assert str(failed.value) == (
        f"{model}: cannot be changed: in {model} no file can be made (Permission denied). Write the changed model to "
        "another folder."
    )


@pytest.mark.parametrize("name", STEPS)
def test_whoever_opens_the_model_meanwhile_finds_the_old_one_the_new_one_or_none(tmp_path, monkeypatch, name):
    doing, allowed = STEPS[name]
    model = prepare(tmp_path / "home", name)
    seen, move = [], in_place._move

    def watched(source: Path, target: Path) -> None:
        move(source, target)
        seen.append(contents(model))

    monkeypatch.setattr(in_place, "_move", watched)
    doing(model)
    assert all("config.json" not in found or found == allowed[-1] for found in seen)
    assert contents(model) == allowed[-1]
    assert bool(seen) == (name != "commit")


@pytest.mark.parametrize("name", STEPS)
def test_a_kill_after_any_step_leaves_the_old_model_or_the_new_one(tmp_path, name):
    doing, allowed = STEPS[name]
    steps = unfinished = 0
    while True:
        model, left = prepare(tmp_path / "home", name), [steps]

        def killed(model: Path, left: list[int] = left) -> None:
            def count(function):
                def counted(*arguments):
                    if left[0] == 0:
                        os._exit(9)
                    left[0] -= 1
                    return function(*arguments)

                return counted

            for step in ("_move", "flush", "_remove", "_discard"):
                setattr(in_place, step, count(getattr(in_place, step)))
            Change.write = count(Change.write)
            doing(model)

        status = os.waitstatus_to_exitcode(os.waitpid(start(killed, model), 0)[1])
        if status == 0:
            break
        assert status == 9
        unfinished += is_unfinished(model)
        assert is_unfinished(model) == ("config.json" not in contents(model)) or contents(model) in allowed
        recover(model)
        assert contents(model) in allowed
        assert not is_unfinished(model)
        assert not recover(model)
        steps += 1
    assert steps >= (2 if name == "commit" else 10)
    assert (unfinished > 5) == (name != "commit")


def test_a_command_that_was_killed_can_be_given_again(tmp_path):
    """What was begun is finished first; that may be just what was asked for."""
    for doing, state, after in ((undo, "undoing", OLD), (commit, "committed", NEW)):
        model = prepare(tmp_path / "home", "undo")
        journal = model.parent / ".model.moemerge-undo" / "journal.json"
        journal.write_text(json.dumps(json.loads(journal.read_text()) | {"state": state}))
        doing(model)
        assert contents(model) == after
        assert beside(model) == set()


def test_a_file_that_takes_the_place_of_one_to_come_is_named(tmp_path):
    model = prepare(tmp_path / "home", "undo")
    journal = model.parent / ".model.moemerge-undo" / "journal.json"
    journal.write_text(json.dumps(json.loads(journal.read_text()) | {"state": "undoing"}))
    (model / "templates" / "one.jinja").write_bytes(b"mine")
    with pytest.raises(RefusedError) as refused:
        recover(model)
    assert str(refused.value) == (
        f"{model}: templates/one.jinja has come into it meanwhile. Move it away, and try again."
    )
    (model / "templates" / "one.jinja").unlink()
    assert recover(model)
    assert contents(model) == OLD


def test_a_file_that_cannot_be_moved_is_named_and_moved_later(model, monkeypatch):
    move = in_place._move

    def refuse(source: Path, target: Path) -> None:
        if source.name == "model-edit1-00001.safetensors":
            raise PermissionError(13, "Permission denied", str(source))
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(in_place, "_move", refuse)
        with pytest.raises(OutputError) as failed:
            change(model)
    moved = model.parent / ".model.moemerge-undo" / "new" / "model-edit1-00001.safetensors"
    assert str(failed.value) == (
        f"{moved}: cannot be moved or removed (Permission denied). When it can, the next `moemerge edit` on the model "
        "goes on."
    )
    assert is_unfinished(model)
    assert recover(model)
    assert contents(model) == NEW


def test_a_damaged_journal_is_named_and_removes_nothing(model):
    change(model)
    journal = model.parent / ".model.moemerge-undo" / "journal.json"
    journal.write_text("{")
    for doing in (undo, commit, change):
        with pytest.raises(CheckpointError, match=rf"^{journal}: is damaged \(Expecting .*\)\. The files of the model"):
            doing(model)
    assert contents(model) == NEW


@pytest.mark.parametrize("kills", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_kills_at_random_moments(tmp_path, kills):
    words = [sys.executable, "-m", "tests.support.kill_changes", str(tmp_path / "kills"), str(kills)]
    done = subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["killed"] == kills == counts["old"] + counts["new"]
    assert min(counts["old"], counts["new"]) > 0

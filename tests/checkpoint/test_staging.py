"""Output is finished or absent, and nothing that lies in its place is lost."""

import errno
import os
import resource
import signal
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from moemerge.checkpoint import disk, output_folder, staging
from moemerge.checkpoint.copy import copy_file, write_failure
from moemerge.checkpoint.disk import allocate, allow_open_files, flush, limit_of
from moemerge.checkpoint.journal import _remove_all_but
from moemerge.checkpoint.output_folder import check_limits, check_scratch, check_space, check_target, check_writable
from moemerge.checkpoint.staging import locked, staged
from moemerge.errors import CheckpointError, OutputError, RefusedError


def everything(folder: Path) -> set[str]:
    """As if every file in a folder were a checkpoint's."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_output_appears_only_when_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged(out) as folder:
        (folder / "config.json").write_text("{}")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_output_that_fails_leaves_what_was_there(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(error), staged(out, replaceable=everything) as folder:  # noqa: PT012  the block is what is interrupted
        (folder / "config.json").write_text("new")
        raise error
    assert (out / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_leaves_no_old_file(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_text("old")
    with staged(out, replaceable=everything) as folder:
        (folder / "config.json").write_text("new")
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_mount_point_is_filled_from_within_config_last(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("old")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    order = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: order.append(path.name) or rename(path, target))
    with staged(out, replaceable=everything) as folder:
        assert folder.parent == out
        for name in ("config.json", "a.safetensors", "README.md"):
            (folder / name).write_text("new")
    assert order[-1] == "config.json"
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "a.safetensors", "config.json"]


def test_a_stage_left_by_a_killed_process_is_taken_over(tmp_path):
    stage = tmp_path / ".out.moemerge-partial"
    stage.mkdir()
    (stage / "model.safetensors").write_text("half")
    with staged(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
        (folder / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_do_not_write_the_same_output(tmp_path):
    failed = []

    def second():
        try:
            with staged(tmp_path / "out"):
                pass
        except OutputError as error:
            failed.append(str(error))

    with staged(tmp_path / "out") as folder:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        (folder / "config.json").write_text("{}")
    assert failed == [f"{tmp_path / 'out'}: another moemerge is writing to it. Wait for it to end."]
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_replacement_that_stops_between_its_renames_is_undone(tmp_path, monkeypatch, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    rename = Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda path, target: _fail(error) if path.name.endswith("partial") else rename(path, target)
    )
    with pytest.raises((error, OutputError)), staged(out, replaceable=everything) as folder:
        (folder / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _fail(error):
    raise error


def test_a_replacement_that_was_killed_between_its_renames_is_undone_by_the_next_run(tmp_path):
    old = tmp_path / ".out.moemerge-old"
    old.mkdir()
    (old / "config.json").write_text("old")
    with pytest.raises(RefusedError, match="is not empty"), staged(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_what_appears_in_the_target_during_the_merge_is_not_lost(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RefusedError, match="is not empty"), staged(out) as folder:  # noqa: PT012  what happens meanwhile
        (folder / "config.json").write_text("{}")
        out.mkdir()
        (out / "thesis.odt").write_text("mine")
    assert (out / "thesis.odt").read_text() == "mine"


def test_a_stage_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "mine.txt").write_text("mine")
    (tmp_path / ".out.moemerge-partial").symlink_to(tmp_path / "victim")
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "victim").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "out").is_symlink()


def test_targets_that_would_lose_something_are_refused(tmp_path):
    source = tmp_path / "models" / "base"
    source.mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for folder in (source, source.parent, source / "out"):
        with pytest.raises(RefusedError, match="is one of the models|holds or lies within the model"):
            check_target(folder, [source], replaceable=everything)
    with pytest.raises(RefusedError, match="exists and is not a folder"):
        check_target(tmp_path / "file")
    out = tmp_path / "out"
    out.mkdir()
    check_target(out, [source])
    (out / "config.json").write_text("{}")
    with pytest.raises(RefusedError, match=r"is not empty \(1 entries, among them 'config.json'\).*--overwrite"):
        check_target(out, [source])
    check_target(out, [source], replaceable=everything)
    with pytest.raises(RefusedError, match="holds no complete checkpoint, that is, config.json"):
        check_target(out, replaceable=lambda _: None)
    (out / "notes").mkdir()
    (out / "notes" / "thesis.md").write_text("")
    with pytest.raises(RefusedError, match=r"holds 'notes/thesis.md', which this merge does not write \(1 such file\)"):
        check_target(out, replaceable=lambda _: {"config.json", "thesis.md"})
    with pytest.raises(RefusedError, match="holds 'thesis.md', which this merge reads"):
        check_target(out, inputs=[out / "notes" / "thesis.md"], replaceable=everything)
    check_target(out, inputs=[tmp_path / "file"], replaceable=lambda _: {"config.json", "notes/thesis.md"})


def test_names_that_do_not_serve_are_refused_with_the_cause(tmp_path):
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    (tmp_path / "file").write_text("")
    for name, message in (
        ("a" * 240, "its name is too long. While it is written, its name is used with 30"),
        ("a" * 300, "cannot be looked up: File name too long. Choose another output folder."),
        ("\udcff", r"\\xff: the folder's name is not text in UTF-8, so no program could open the model by its name"),
        (
            "ring",
            "^{}: cannot be looked up: its links form a ring. Choose another output folder.$".format(tmp_path / "ring"),
        ),
        ("file/below", f"{tmp_path / 'file'} is not a folder. Choose another output folder."),
    ):
        with pytest.raises(RefusedError, match=message):
            check_target(tmp_path / name)
    long = tmp_path / ("a" * 300)
    for check in (check_writable, partial(check_scratch, sources=[])):
        with pytest.raises(RefusedError) as caught:
            check(long)
        assert str(caught.value) == (
            f"{long}: its name is too long. While it is written, its name is used with 30 letters more. "
            "Choose a shorter one."
        )
    with pytest.raises(OutputError, match="^/proc/x: cannot be written: in /proc no file can be made"):
        check_target(Path("/proc/x"))
    assert {path.name for path in tmp_path.iterdir()} == {"ring", "file"}


def test_a_refusal_makes_nothing_and_a_failure_leaves_no_folder(tmp_path):
    source = tmp_path / "base"
    source.mkdir()
    with pytest.raises(RefusedError), staged(source / "x" / "y", [source]):
        pass
    assert list(source.iterdir()) == []
    with pytest.raises(RuntimeError), staged(tmp_path / "deep" / "er" / "out"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_comes_while_the_old_output_is_moved_away_is_not_lost(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    rename = Path.rename

    def bring_a_file(path, target):
        if path == out:
            (out / "thesis.odt").write_text("mine")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", bring_a_file)
    with (
        pytest.raises(RefusedError, match="'thesis.odt' has come into it meanwhile"),
        staged(out, replaceable=lambda _: {"config.json"}) as folder,
    ):
        (folder / "config.json").write_text("new")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"config.json": "old", "thesis.odt": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("point", ["rename", "rmtree", "unlink", "release"])
def test_a_signal_behind_the_rename_stops_nothing(tmp_path, monkeypatch, caplog, point, sent):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    owner = {"rename": Path, "unlink": Path, "rmtree": staging.shutil, "release": staging.FileLock}[point]
    given, handled, signals = getattr(owner, point), signal.getsignal(sent), [sent]

    def signalled(*arguments, **keys):
        found = given(*arguments, **keys)
        if signals and (point != "rename" or arguments[0].name.endswith("partial")):
            signal.raise_signal(signals.pop())
        return found

    signal.signal(sent, signal.default_int_handler)
    try:
        with staged(out, replaceable=everything) as folder:
            (folder / "config.json").write_text("new")
            monkeypatch.setattr(owner, point, signalled)
        monkeypatch.undo()
        assert signal.getsignal(sent) == signal.default_int_handler
    finally:
        signal.signal(sent, handled)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == "new"
    told = f"{out}: the interrupt came when the work on it was ending, and stopped nothing"
    assert {record.getMessage() for record in caplog.records} == {told}


def test_behind_a_complete_output_nothing_is_an_error(tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    monkeypatch.setattr(
        staging.shutil,
        "rmtree",
        lambda path, **_: _fail(OSError) if path.name == ".out.moemerge-old" and path.exists() else None,
    )
    with staged(out, replaceable=everything) as folder:
        (folder / "config.json").write_text("new")
        # A name that unlink refuses.
        (tmp_path / ".out.moemerge-partial.journal").mkdir()
    assert (out / "config.json").read_text() == "new"
    messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(" (")[0] for message in messages] == [
        f"{out}: is complete; something beside it could not be removed"
    ] * 2


def test_a_disk_too_small_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match=r"takes 1000000000.00 GB, but the disk has .* [GM]B free"):
        check_space(tmp_path / "not" / "there", 10**18)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=12))
    with pytest.raises(OutputError, match=r"takes 1.50 kB, but the disk has 12 B free"):
        check_space(tmp_path, 1500)


def test_limits_of_the_process_are_refused_before_work(tmp_path, monkeypatch):
    limits = {"FSIZE": 10_000, "AS": None}
    monkeypatch.setattr(output_folder, "limit_of", limits.get)
    with pytest.raises(
        OutputError, match="largest file has 20.00 kB, but this process may write files of 10.00 kB at most"
    ):
        check_limits(tmp_path, largest=20_000, memory=0)
    limits |= {"FSIZE": None, "AS": 10**9}
    check_limits(tmp_path, largest=20_000, memory=10**8)
    with pytest.raises(
        OutputError, match=r"about 1.60 GB of address space are needed, but this process may use 1.00 GB"
    ):
        check_limits(tmp_path, largest=20_000, memory=10**9)
    monkeypatch.setattr(output_folder, "allow_open_files", lambda _: 12)
    with pytest.raises(OutputError, match="this process may have 12 files open, and 32 are needed"):
        check_limits(tmp_path, largest=0, memory=0)


def test_the_limit_of_open_files_is_raised_as_far_as_it_can_be():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        assert allow_open_files(128) == 128
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (128, hard)
        assert allow_open_files(100) == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_limits_are_those_of_the_process():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**12, hard))
        assert limit_of("FSIZE") == 10**12
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (limit_of("FSIZE") is None) == (soft == resource.RLIM_INFINITY)


def test_what_is_probed_is_the_folder_that_is_written_to(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    probed = []
    given = output_folder.tempfile.TemporaryFile
    monkeypatch.setattr(
        output_folder.tempfile, "TemporaryFile", lambda **keys: (probed.append(keys["dir"]), given(**keys))[1]
    )
    for name in ("out", "new", "far/away/new"):
        check_target(tmp_path / name)
    assert probed == [tmp_path] * 3


def test_a_full_disk_is_said_of_the_output_not_of_the_source(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "stage").mkdir()
    given = Path.open

    def refuse(path, mode="r", **keys):
        opened = given(path, mode, **keys)
        if path.parent.name == "stage":
            opened.close()
            opened = given(Path("/dev/full"), mode, **keys)
        return opened

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OutputError) as caught:
        copy_file(tmp_path / "tokenizer.json", tmp_path / "stage" / "tokenizer.json")
    assert str(caught.value) == (
        f"{tmp_path / 'stage' / 'tokenizer.json'}: the disk is full. Free some space, or write to another disk."
    )
    with pytest.raises(OutputError, match=f"^{tmp_path / 'out'}: the disk is full"), staged(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "tokenizer.json"))
    assert "lower --max-shard-size" in str(write_failure(tmp_path / "x", OSError(errno.EFBIG, "x"))).lower()
    assert str(write_failure(Path("x.gguf"), OSError(errno.EFBIG, "x"))) == (
        "x.gguf: is larger than this file system, or the limit of `ulimit -f`, allows. Choose a --type with fewer bits, or "
        "write to another disk."
    )
    with pytest.raises(CheckpointError, match=r"gone.json: cannot be read: No such file"):
        copy_file(tmp_path / "gone.json", tmp_path / "x")


def test_what_lies_beside_complete_shards_is_removed(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("model-00001-of-00002.safetensors", "additional_chat_templates/tool.jinja", "merges.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "additional_chat_templates")
    _remove_all_but(tmp_path, {"model-00001-of-00002.safetensors"})
    assert [path.name for path in tmp_path.iterdir()] == ["model-00001-of-00002.safetensors"]


def test_a_lock_that_cannot_be_made_is_said_of_the_output(tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    with pytest.raises(OutputError) as caught, locked(out, out, "writing"):
        pass
    assert str(caught.value) == f"{tmp_path / 'file'}: File exists. Choose another output folder, or make way there."


def test_outside_the_main_thread_no_signal_is_held_back(tmp_path):
    """Python lets only the main thread choose who is told of a signal."""

    def write():
        with staged(tmp_path / "out") as folder:
            (folder / "config.json").write_text("{}")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_a_file_that_may_only_be_read_is_flushed(tmp_path, monkeypatch):
    modes, given = [], os.open

    def refuse(path, mode, *rest):
        modes.append(mode & os.O_ACCMODE)
        if mode & os.O_RDWR:
            raise PermissionError
        return given(path, mode, *rest)

    (tmp_path / "a").write_text("")
    monkeypatch.setattr(os, "open", refuse)  # root may write everywhere
    flush(tmp_path / "a")
    assert modes == [os.O_RDWR, os.O_RDONLY]


def test_space_that_is_not_there_is_refused_before_it_is_written(tmp_path, monkeypatch):
    """Where the file system cannot reserve space, the file gets its size alone."""
    with (tmp_path / "a").open("wb") as file:
        monkeypatch.setattr(disk.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(fallocate=lambda *_: -1))
        monkeypatch.setattr(disk.ctypes, "get_errno", lambda: errno.EOPNOTSUPP)
        allocate(file.fileno(), 100, reserve=True)
        assert (tmp_path / "a").stat().st_size == 100
        monkeypatch.setattr(disk.ctypes, "get_errno", lambda: errno.ENOSPC)
        with pytest.raises(OSError, match="No space left on device"):
            allocate(file.fileno(), 200, reserve=True)
    assert (tmp_path / "a").stat().st_size == 100


def test_an_empty_mount_point_takes_a_model_though_the_lock_lies_within(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    with staged(out) as folder:
        assert sorted(path.name for path in out.iterdir()) == [".moemerge-partial", ".moemerge-partial.lock"]
        (folder / "config.json").write_text("new")
    assert [path.name for path in out.iterdir()] == ["config.json"]

"""Merges into an object store: finished or absent, in S3 and in a folder that is read as a store."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from moemerge import MergeOptions, load_config, merge, plan_merge
from moemerge.checkpoint.staging import staged
from moemerge.errors import BusyError, OutputError, RefusedError
from moemerge.merging.store import Store, scratch_for
from moemerge.planning.options import PlanOptions
from moemerge.publish import store as publish_store
from moemerge.publish.store import StoreOutput
from moemerge.sources.reference import location_of
from moemerge.sources.remote_weights import TEMPLATES
from moemerge.sources.store_files import COMPLETE, UNFINISHED
from moemerge.sources.stores import PART_BYTES, PARTS_AT_ONCE, StoreFolder
from tests.support.machine import ROOT, SINGLE
from tests.support.models import write_config

SHARDS = ("--max-shard-size", "60kB")


@dataclass(frozen=True)
class Place:
    """An address in a store, and where its files can be looked at."""

    url: str
    fs: object

    @property
    def path(self) -> str:
        location = location_of(self.url)
        return location.path

    def files(self) -> dict[str, bytes]:
        self.fs.invalidate_cache()
        return {path.removeprefix(f"{self.path}/"): self.fs.cat_file(path) for path in self.fs.find(self.path)}

    def write(self, name: str, content: bytes) -> None:
        self.fs.pipe_file(f"{self.path}/{name}", content)


@pytest.fixture(params=["file", "s3"])
def place(request, tmp_path, monkeypatch) -> Place:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "s3":
        bucket = request.getfixturevalue("bucket")
        return Place(bucket.url("models/mixture"), bucket.fs)
    import fsspec

    return Place((tmp_path / "store" / "mixture").as_uri(), fsspec.filesystem("file", auto_mkdir=True))


@pytest.fixture
def config(tmp_path, llamas):
    return write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:3], prompts=False)


@pytest.fixture
def expected(config, tmp_path, run) -> dict[str, bytes]:
    """The files of the same merge into a folder of the same name."""
    folder = tmp_path / "here" / "mixture"
    assert run(config, folder, *SHARDS, "--quiet")[0] == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_paths(files):
    """Without the two files in which a folder's own paths are written."""
    return {name: content for name, content in files.items() if name not in {"README.md", "moemerge_config.yaml"}}


def test_a_store_holds_what_a_folder_would_and_a_last_object_that_lists_it(place, config, expected, tmp_path, run):
    assert run(config, place.url, *SHARDS, "--quiet") == (0, "", "")
    files = place.files()
    marker = json.loads(files.pop(COMPLETE))
    assert without_paths(files) == without_paths(expected)
    assert files.keys() == expected.keys()
    assert len([name for name in files if name.endswith(".safetensors")]) > 3
    assert marker["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(files.items())
    }
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    assert run("verify", place.url, "--quiet") == (0, "", "")
    assert run(config, place.url)[::2] == (
        2,
        f"error: {place.url}: is not empty ({len(files) + 1} objects, among them 'README.md'). Choose another address, "
        "or replace what is there with --overwrite.\n",
    )
    assert run(config, place.url, "--resume")[::2] == (
        2,
        f"error: {place.url}: holds a complete merge, so there is nothing to resume. `moemerge verify {place.url}` "
        "checks it; --overwrite merges again and replaces it.\n",
    )
    place.write("results.csv", b"of somebody")
    assert run(config, place.url, "--overwrite")[::2] == (
        2,
        f"error: {place.url}: holds 'results.csv', which this merge does not write (1 such objects). Move it away, or "
        "choose another address.\n",
    )
    assert place.files().keys() == {*files, COMPLETE, "results.csv"}
    place.fs.rm_file(f"{place.path}/results.csv")
    code, printed, _ = run(config, place.url, "--overwrite")  # in one shard
    done, following = printed.splitlines()[-2:]
    assert code == 0
    assert done.startswith(f"{place.url}: done, ")
    assert following == f"Next: moemerge verify {place.url}"
    assert SINGLE not in files
    assert {name for name in place.files() if name.startswith("model")} < {"model.safetensors.index.json", *ONE_OR_TWO}


ONE_OR_TWO = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", SINGLE}


def test_what_fails_is_kept_and_goes_on_on_another_machine(place, config, expected, run, monkeypatch):
    send, sent = StoreOutput.send, []

    def fail_at_third(self, path, name=None):
        sent.append(name or path.name)
        if len(sent) == 3:
            raise OutputError("the network is gone.")
        return send(self, path, name)

    with monkeypatch.context() as patch:
        patch.setattr(StoreOutput, "send", fail_at_third)
        code, _, said = run(config, place.url, *SHARDS, "--quiet")
    assert (code, said) == (
        1,
        "2 complete shards are kept in the store: --resume continues from them, a run without it starts over.\n"
        "error: the network is gone.\n",
    )
    assert place.files().keys() == {*sent[:2], UNFINISHED}
    assert run("inspect", place.url)[2].splitlines()[-1] == (
        f"error: {place.url}: holds a merge that was cut off before it was complete. The command that made it, with "
        "--resume, continues it."
    )
    # Another machine, on which one of the shards was replaced meanwhile.
    monkeypatch.setenv("XDG_CACHE_HOME", str(config.parent / "other"))
    place.write(sent[1], expected[sent[1]][::-1])
    again = []
    monkeypatch.setattr(
        StoreOutput, "send", lambda self, path, name=None: again.append(name or path.name) or send(self, path, name)
    )
    assert run(config, place.url, *SHARDS, "--resume", "--quiet") == (0, "", "")
    assert sent[0] not in again
    assert sent[1] in again
    files = place.files()
    assert json.loads(files.pop(COMPLETE))["files"].keys() == files.keys()
    assert without_paths(files) == without_paths(expected)


def test_another_merge_is_not_resumed(place, config, llamas, run, monkeypatch):
    plan = plan_merge(load_config(config), PlanOptions(max_shard_bytes=60_000))
    remaining = [None, OutputError("it ends here.")]

    def fail_before_the_last(self):
        if error := remaining.pop(0):
            raise error

    monkeypatch.setattr(StoreOutput, "_check_sent", fail_before_the_last)
    with pytest.raises(OutputError, match=r"^it ends here\.$"):
        merge(plan, place.url)
    assert "config.json" in place.files()
    other = write_config(config.with_name("other.yaml"), llamas[0], llamas[2:4], prompts=False)
    code, _, said = run(other, place.url, *SHARDS, "--resume", "--quiet")
    assert (code, said.split(";")[0]) == (2, "error: --resume: the merge that was cut off was not this one")


def test_a_merge_that_is_killed_leaves_no_model_and_is_resumed(bucket, config, expected, tmp_path, run):
    url = bucket.url("models/mixture")
    command = [sys.executable, "-m", "moemerge", str(config), url, *SHARDS, "--quiet"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    process = subprocess.Popen(command, env=environment)
    third = sorted(name for name in expected if name.endswith(".safetensors"))[2]
    bucket.server.before("PUT", f"models/mixture/{third}", process.kill)
    assert process.wait(120) == -9
    left = bucket.files("models/mixture")
    assert {"config.json", COMPLETE}.isdisjoint(left)
    assert UNFINISHED in left
    bucket.server.calls.clear()
    assert run(config, url, *SHARDS, "--resume", "--quiet") == (0, "", "")
    sent = [key.rpartition("/")[2] for key in bucket.server.sent("models/mixture/*")]
    noted = json.loads(left[UNFINISHED])["objects"].keys()
    assert len(noted) == 2
    assert noted.isdisjoint(sent)
    assert sent[-2:] == ["config.json", COMPLETE]
    assert without_paths(bucket.files("models/mixture")) == without_paths(expected) | {
        COMPLETE: bucket.files("models/mixture")[COMPLETE]
    }


def test_a_large_file_is_sent_in_parts(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(publish_store, "_PARTS", {"s3": {"chunksize": 5 * 2**20, "max_concurrency": 2}})
    content = os.urandom(12 * 2**20)
    (tmp_path / "large").write_bytes(content)
    output = StoreOutput(location_of(bucket.url("out")), print)
    assert output.send(tmp_path / "large") == hashlib.sha256(content).hexdigest()
    assert len([c for c in bucket.server.calls if c.method == "PUT" and c.key == "out/large"]) == 3
    assert bucket.files("out") == {"large": content}


def test_the_plan_counts_the_memory_of_what_is_sent(bucket, config, tmp_path, run):
    alone, to_store = (
        json.loads(run(config, out, "--dry-run", "--json")[1])["peak_memory_bytes"]
        for out in (tmp_path / "out", bucket.url("out"))
    )
    with (tmp_path / "large").open("wb") as file:
        file.truncate(PART_BYTES * PARTS_AT_ONCE)
    code = (
        "import sys; from moemerge.publish.store import StoreOutput; from moemerge.sources.reference import location_of;"
        "from pathlib import Path; peak = lambda: next(int(line.split()[1]) for line in open('/proc/self/status')"
        " if line.startswith('VmHWM')); before = peak();"
        "StoreOutput(location_of(sys.argv[1]), print).send(Path(sys.argv[2])); print(1024 * (peak() - before))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-c", code, bucket.url("out"), str(tmp_path / "large")]
    taken = int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert 0.9 * taken < to_store - alone < 1.3 * taken


def test_the_plan_counts_no_memory_for_what_is_copied_to_a_folder(config, tmp_path, run):
    here, there = (
        json.loads(run(config, out, "--dry-run", "--json")[1])["peak_memory_bytes"]
        for out in (tmp_path / "out", (tmp_path / "store" / "out").as_uri())
    )
    assert here == there


def test_a_store_that_takes_nothing_says_so_before_the_work(bucket, config, run):
    bucket.server.before("PUT", "out/*", lambda: 403)
    code, _, said = run(config, bucket.url("out"), "--quiet")
    assert code == 1
    assert said == (
        f"error: {bucket.url('out')}: access is denied (Forbidden). Check the credentials, and what they allow: "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, as for the `aws` command; a public bucket is read "
        "with FSSPEC_S3_ANON=true.\n"
    )
    assert bucket.files("out") == {}
    assert run(config, "s3://no-such-bucket-at-all/out", "--quiet")[::2] == (
        2,
        "error: s3://no-such-bucket-at-all/out: there is no bucket 'no-such-bucket-at-all', or it was removed. Check the "
        "name, and the address of the store.\n",
    )


def test_what_an_address_cannot_be_is_refused(tmp_path, config, llamas, run, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store, mixture = (tmp_path / "store").as_uri(), tmp_path / "mixture"
    assert run(config, mixture, "--quiet")[0] == 0
    edit = write_config(tmp_path / "edit.yaml", mixture, [f"{mixture}#0", f"{mixture}#1"], prompts=False)
    no_address = (
        "{}: is an address, and this writes to a folder on this machine. Name a folder, and copy it there; only merges "
        "of dense models write to object stores, as to s3://BUCKET/PATH."
    )
    neither = "moemerge reads and writes s3://, gs:// and file:///, not {}://."
    refusals = {
        (
            config,
            f"{store}/out.gguf",
        ): f"{store}/out.gguf: a GGUF file is written on this machine. Name a file here, and copy it.",
        (config, f"{store}/out", "--push", "user/name"): "--push: a merge into an object store does not use it. Remove "
        "it, or name a folder.",
        (
            "extract",
            f"{mixture}#0",
            "s3://store/out",
        ): no_address.format("s3://store/out"),
        (
            config,
            tmp_path / "out",
            "--keep-states",
            "s3://bucket/kept",
        ): "--keep-states: s3://bucket/kept is in an object store. Name a folder on this machine.",
        (config, "s3://"): "s3://: names no folder. Write s3://BUCKET/PATH.",
        (config, "S3://bucket/out"): f"S3://bucket/out: {neither.format('S3')} Did you mean s3://?",
        (config, "az://c/out.gguf"): f"az://c/out.gguf: {neither.format('az')}",
        (config, "folder/s3://bucket/out"): "folder/s3://bucket/out: an address begins with s3://. Did you mean "
        "s3://bucket/out?",
        (config, "file://out"): "file://out: file:// takes an absolute path: file:///PATH.",
        ("verify", "file://out"): "file://out: file:// takes an absolute path: file:///PATH.",
        ("eval", "file://out", "--data", "a=b.txt"): "file://out: file:// takes an absolute path: file:///PATH.",
        (config, "out", "--keep-states=file://kept"): "file://kept: file:// takes an absolute path: file:///PATH.",
        ("plan", "file://merge.yaml"): "file://merge.yaml: a config is read from this machine. Copy it here, and name "
        "the copy.",
        (
            config,
            mixture,
            "--resume",
        ): f"{mixture}: holds a complete merge, so there is nothing to resume. `moemerge verify "
        f"{mixture}` checks it; --overwrite merges again and replaces it.",
        ("plan", "s3://bucket/merge.yaml"): "s3://bucket/merge.yaml: a config is read from this machine. Copy it here, "
        "and name the copy.",
        (
            edit,
            f"{store}/out",
        ): f"{store}/out: an edit of a mixture is written to a folder. Name one, and copy it there.",
    }
    for words, message in refusals.items():
        assert run(*words, "--quiet")[::2] == (2, f"error: {message}\n"), words
    inside = write_config(tmp_path / "in.yaml", llamas[0].as_uri(), [llamas[1].as_uri(), llamas[2]], prompts=False)
    assert run(inside, f"{llamas[1].as_uri()}/out", "--quiet")[::2] == (
        2,
        f"error: {llamas[1].as_uri()}/out: is, holds or lies within the model {llamas[1].as_uri()}. Choose another "
        "address.\n",
    )
    (tmp_path / "linked").symlink_to(llamas[1])
    held = sorted(path.name for path in llamas[1].iterdir())
    for address in (llamas[1].as_uri(), (tmp_path / "linked").as_uri()):  # a model here, written as if in a store
        assert run(config, address, "--overwrite", "--quiet")[::2] == (
            2,
            f"error: {address}: is, holds or lies within the model {llamas[1]}. Choose another address.\n",
        )
    assert sorted(path.name for path in llamas[1].iterdir()) == held
    assert not (tmp_path / "store").exists()
    with pytest.raises(RefusedError, match=r"^file://out: file:// takes an absolute path: file:///PATH\.$"):
        merge(plan_merge(load_config(config)), "file://out")


def test_a_folder_that_cannot_be_made_is_no_bucket(tmp_path, config, run, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("kept")
    beginnings = {
        tmp_path / "file": "is a file, not a folder ([Errno 17] File exists",
        tmp_path / "file" / "out": "lies in a file, not in a folder ([Errno 20] Not a directory",
    }
    for folder, said in beginnings.items():
        assert run(config, folder.as_uri(), "--quiet") == (
            1, "", f"error: {folder.as_uri()}: {said}: '{folder}'). Choose another folder.\n"
        )  # fmt: skip
    assert (tmp_path / "file").read_text() == "kept"


def test_an_interrupted_merge_does_not_claim_that_nothing_changed(place, config, run, monkeypatch):
    send, sent = StoreOutput.send, []

    def stop_at_third(self, path, name=None):
        sent.append(path)
        if len(sent) == 3:
            raise KeyboardInterrupt
        return send(self, path, name)

    monkeypatch.setattr(StoreOutput, "send", stop_at_third)
    assert run(config, place.url, *SHARDS, "--quiet")[::2] == (
        130,
        "2 complete shards are kept in the store: --resume continues from them, a run without it starts over.\n"
        f"interrupted: nothing takes {place.url} for a model until the same command with --resume has ended\n",
    )
    sent[:] = [None, None]  # the first shard of a merge that starts over
    assert run(config, place.url, *SHARDS, "--quiet")[::2] == (
        130,
        f"interrupted: nothing takes {place.url} for a model until the same command has ended\n",
    )
    monkeypatch.setattr(StoreOutput, "begin", stop_at_third)
    sent[:] = [None, None]
    place.fs.rm(place.path, recursive=True)
    assert run(config, place.url, *SHARDS, "--quiet")[::2] == (
        130,
        "interrupted: the output is as it was before\n",
    )
    assert place.files() == {}


def test_a_model_that_another_merge_completes_meanwhile_stays(place, config, llamas):
    other = write_config(config.with_name("other.yaml"), llamas[0], llamas[2:4], prompts=False)
    plan, later = (plan_merge(load_config(path), PlanOptions(max_shard_bytes=60_000)) for path in (config, other))
    location = location_of(place.url)
    output = StoreOutput(location, print)  # by a command that plans while the other merge ends
    merge(plan, place.url)
    files = place.files()
    with pytest.raises(RefusedError, match=r": is not empty \(\d+ objects, among them 'README.md'\)\."):
        merge(later, Store(scratch_for(location), output))
    assert place.files() == files


def test_a_model_that_another_machine_completes_meanwhile_stays(place, config, monkeypatch):
    files = {"config.json": b"{}", "model.safetensors": b"of another machine"}
    begin = Store._begin_sending

    def late(self, shards):
        for name, content in files.items():
            place.write(name, content)
        begin(self, shards)

    monkeypatch.setattr(Store, "_begin_sending", late)
    with pytest.raises(RefusedError) as raised:
        merge(plan_merge(load_config(config)), place.url)
    assert str(raised.value) == (
        f"{place.url}/config.json: is new, or was changed, since this merge began. Look who else writes there, and "
        "merge again."
    )
    assert place.files() == files


def busy(place) -> str:
    return (
        f"{place.url}: another merge has begun to write there, so this one stops, and leaves everything as it is. Wait "
        "for the other one to end and check it with `moemerge verify`, or choose another address."
    )


def test_of_two_merges_that_begin_together_one_stops(place):
    first, second = (StoreOutput(location_of(place.url), print) for _ in range(2))
    first.claim()
    files = place.files()
    with pytest.raises(BusyError) as raised:
        second.claim()
    assert str(raised.value) == busy(place)
    second.give_up()
    assert place.files() == files  # S3 took no other note
    first.begin("journal", ())
    first.give_up()
    assert place.files() == {}


def test_a_store_that_knows_no_conditions_shows_the_other_merge_later(bucket):
    place = Place(bucket.url("out"), bucket.fs)
    first, second = (StoreOutput(location_of(place.url), print) for _ in range(2))
    first.claim()
    bucket.fs.rm_file(f"{place.path}/{UNFINISHED}")  # as if the two had come at the same moment
    bucket.server.before("PUT", f"out/{UNFINISHED}", lambda: 501)
    second.claim()
    with pytest.raises(BusyError) as raised:
        first.begin("journal", ())
    assert str(raised.value) == busy(place)
    second.begin("journal", ())
    assert json.loads(place.files()[UNFINISHED])["journal"] == "journal"


class Unconditional:
    """A store that takes an object whether or not there is one."""

    def __init__(self, fs):
        self._fs = fs

    def __getattr__(self, name):
        return getattr(self._fs, name)

    def pipe_file(self, path, value, **_):
        self._fs.pipe_file(path, value)


@pytest.mark.parametrize("knows_conditions", [True, False])
def test_the_note_of_a_merge_stays_until_another_one_begins_to_send(place, knows_conditions, monkeypatch):
    if not knows_conditions:
        monkeypatch.setattr(StoreFolder, "store", property(lambda _: Unconditional(place.fs)))
    running = StoreOutput(location_of(place.url), print)
    running.begin("journal", ())
    files = place.files()
    late, later = (StoreOutput(location_of(place.url), print) for _ in range(2))
    late.claim()
    assert place.files() == files
    running.note("the running one goes on")
    for begin in (late.claim, lambda: late.begin("journal", ())):
        with pytest.raises(BusyError) as raised:
            begin()
        assert str(raised.value) == busy(place)
    later.look()
    later.begin("later", ())
    with pytest.raises(BusyError) as raised:
        running.note("still at work")
    assert str(raised.value) == busy(place)
    running.give_up()
    assert json.loads(place.files()[UNFINISHED])["journal"] == "later"


def test_an_unfinished_merge_is_announced_unless_it_is_resumed(place, config, monkeypatch):
    plan, location, said = plan_merge(load_config(config)), location_of(place.url), []

    def fail(self, folder):
        raise OutputError("it ends here.")

    monkeypatch.setattr(StoreOutput, "finish", fail)
    for options in (MergeOptions(), MergeOptions(resume=True), MergeOptions()):
        assert said == []
        with pytest.raises(OutputError, match=r"^it ends here\.$"):
            merge(plan, Store(scratch_for(location), StoreOutput(location, said.append)), options)
    assert said == [
        f"{place.url}: holds an unfinished merge, which this one replaces. If it still runs on another machine, stop this "
        "command now."
    ]


def test_of_two_merges_on_one_machine_the_second_is_told_the_address(place, config):
    plan, location = plan_merge(load_config(config)), location_of(place.url)
    with staged(scratch_for(location), temporary=True), pytest.raises(BusyError) as raised:
        merge(plan, place.url)
    assert str(raised.value) == (f"{place.url}: another moemerge on this machine is writing to it. Wait for it to end.")
    assert place.files() == {}


def test_a_merge_leaves_what_another_one_has_completed(place, config, llamas, tmp_path, monkeypatch):
    other = write_config(config.with_name("other.yaml"), llamas[0], llamas[2:4], prompts=False)
    plan, later = (plan_merge(load_config(path), PlanOptions(max_shard_bytes=60_000)) for path in (config, other))
    send, sent, complete = StoreOutput.send, [], {}

    def another_machine_merges_before_the_third(self, path, name=None):
        sent.append(path)
        if len(sent) == 3:
            merge(later, Store(tmp_path / "another" / "scratch", StoreOutput(location_of(place.url), print)))
            complete.update(place.files())
        return send(self, path, name)

    monkeypatch.setattr(StoreOutput, "send", another_machine_merges_before_the_third)
    with pytest.raises(BusyError) as raised:
        merge(plan, place.url)
    assert str(raised.value) == busy(place)
    assert place.files() == complete
    assert COMPLETE in complete
    assert UNFINISHED not in complete


def test_what_another_merge_sends_late_is_noticed_before_the_end(place, config, expected, run, monkeypatch):
    shards, check_sent = [name for name in expected if name.startswith("model-")], StoreOutput._check_sent
    content, template = b"of another merge", f"{TEMPLATES}/rag.jinja"
    for stray, check in ((shards[1], 1), (SINGLE, 1), (template, 1), ("chat_template.jinja", 2), (COMPLETE, 2)):
        checks = []

        def late(self, stray=stray, check=check, checks=checks):
            checks.append(self)
            if len(checks) == check:
                place.write(stray, content)
            check_sent(self)

        with monkeypatch.context() as patch:
            patch.setattr(StoreOutput, "_check_sent", late)
            assert run(config, place.url, *SHARDS, "--quiet")[::2] == (
                1,
                f"{len(shards)} complete shards are kept in the store: --resume continues from them, a run without it starts "
                f"over.\nerror: {place.url}/{stray}: is not, or no longer, what this merge has sent. Look who else "
                "writes there, and run the same command with --resume: it sends what is missing.\n",
            )
        files = place.files()
        assert ("config.json" in files) == (check == 2)
        assert files.get(COMPLETE, content) == content
    place.fs.rm_file(f"{place.path}/{COMPLETE}")
    assert run(config, place.url, *SHARDS, "--resume", "--quiet") == (0, "", "")
    files = place.files()
    assert without_paths(files) == without_paths(expected) | {COMPLETE: files[COMPLETE]}

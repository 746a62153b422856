"""Models in object stores: read by ranges from a real S3 server, and what is said when that fails."""

import json
import pickle
import shutil
import sys
from importlib import util

import pytest
from fsspec.registry import filesystem
from safetensors.torch import load_file

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.files import read_exactly
from moemerge.errors import CheckpointError, SourceError
from moemerge.sources import retries
from moemerge.sources.model_folder import open_model
from moemerge.sources.reference import location_of
from moemerge.sources.stores import StoreFolder
from moemerge.sources.tensor_tables import read_tensor_table
from tests.sources.test_lora import make_adapter
from tests.support.gguf_files import write_gguf
from tests.support.machine import SINGLE
from tests.support.models import TEXT, write_config


def header_bytes(folder):
    with (folder / SINGLE).open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def weights_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


@pytest.fixture
def urls(bucket, llamas):
    """The models in the bucket; nothing was asked for yet."""
    found = [bucket.put(folder, f"models/{folder.name}") for folder in llamas]
    bucket.server.calls.clear()
    return found


def test_bytes_from_s3_are_those_from_the_disk_and_each_is_fetched_once(bucket, urls, llamas, tmp_path, run):
    config = write_config(tmp_path / "merge.yaml", urls[0], urls[1:])
    plan = json.loads(run("plan", config, "--json", "--quiet")[1])
    whole = sum((folder / SINGLE).stat().st_size for folder in llamas)
    headers = sum(map(header_bytes, llamas))

    def fetched():
        return sum(last + 1 - first for first, last in bucket.server.ranges(f"*/{SINGLE}"))

    assert fetched() == headers + plan["compared_bytes"]
    bucket.server.calls.clear()
    assert run(config, tmp_path / "out", "--quiet") == (0, "", "")
    assert fetched() == headers + plan["compared_bytes"] + plan["download_bytes"]
    assert plan["download_bytes"] < plan["remote_bytes"] == whole
    assert run(write_config(tmp_path / "local.yaml", llamas[0], llamas[1:]), tmp_path / "local", "--quiet")[0] == 0
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    # Small files are there already, and weights need no look of their own: a model is one listing, and one at each end.
    assert [c.key for c in bucket.server.calls if c.method == "HEAD"] == []
    assert {c.key for c in bucket.server.calls if c.method == "GET"} == {
        "", *(f"models/{folder.name}/{SINGLE}" for folder in llamas)
    }  # fmt: skip


def test_another_process_reads_a_file_that_it_is_given(bucket, urls, llamas):
    tensor = read_tensor_table(open_model(urls[0], print), print)["model.norm.weight"]
    given = pickle.dumps(tensor)
    bucket.fs.clear_instance_cache()
    bucket.server.calls.clear()
    other = pickle.loads(given)  # noqa: S301  our own
    for _ in range(3):
        with other.open() as reader:
            found = read_exactly(reader, tensor.nbytes)
        assert found == load_file(llamas[0] / SINGLE)["model.norm.weight"].numpy().tobytes()
    assert [call.method for call in bucket.server.calls] == ["GET"] * 4  # a listing, and each reading


def test_another_process_is_not_sent_the_credentials_that_fsspec_has_found(tmp_path, monkeypatch):
    from fsspec.config import conf

    monkeypatch.setitem(conf, "file", {"secret": "hunter2"})  # as of FSSPEC_FILE_SECRET
    (tmp_path / "config.json").write_text("{}")
    folder = StoreFolder(location_of(as_store(tmp_path)))
    assert b"hunter2" in pickle.dumps(folder.store)
    given = pickle.dumps(folder)
    assert b"hunter2" not in given
    with pickle.loads(given).open("config.json") as opened:  # noqa: S301  our own
        assert opened.read() == b"{}"


def test_a_store_that_stumbles_is_asked_again(bucket, urls, tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of botocore itself, which would hide ours
    model = open_model(urls[1], print)
    plan = plan_merge(load_config(write_config(tmp_path / "m.yaml", urls[0], urls[1:3], prompts=False)))
    for status in (500, 503, 503, 500, 503, 503):
        bucket.server.before("GET", f"*/{SINGLE}", lambda status=status: status)
    merge(plan, tmp_path / "out")
    assert not bucket.server.faults
    assert model.config["model_type"] == "llama"
    assert (tmp_path / "out" / "config.json").exists()


def test_a_model_that_changes_meanwhile_spoils_nothing(bucket, urls, llamas, tmp_path):
    plan = plan_merge(load_config(write_config(tmp_path / "m.yaml", urls[0], urls[1:3], prompts=False)))
    fox = llamas[1] / SINGLE
    changed = fox.read_bytes()[:-1] + b"\x01"

    def change():
        bucket.fs.pipe(f"{bucket.name}/models/fox/{SINGLE}", changed)

    bucket.server.before("GET", f"models/fox/{SINGLE}", change)
    with pytest.raises(SourceError) as error:
        merge(plan, tmp_path / "out")
    assert str(error.value) == (
        f"{urls[1]}/{SINGLE}: was changed while it was read. Run it again, which starts from what is there now."
    )
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_reached_says_why(bucket, urls, monkeypatch, run):
    s3fs = pytest.importorskip("s3fs")
    assert run("inspect", bucket.url("models/nothing"))[2].splitlines()[-1] == (
        f"error: {bucket.url('models/nothing')}: there is nothing in the store at this address. Check the name."
    )
    assert run("inspect", "s3://no-such-bucket-at-all/model")[::2] == (
        2,
        "s3://no-such-bucket-at-all/model: looking it up in its store\n"
        "error: s3://no-such-bucket-at-all/model: there is no bucket 'no-such-bucket-at-all', or it was removed. Check "
        "the name, and the address of the store.\n",
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    assert run("inspect", urls[0], "--json")[::2] == (
        1,
        f"{urls[0]}: looking it up in its store\n"
        f"error: {urls[0]}: there are no credentials for it (Unable to locate credentials). Set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, as for the `aws` command; a public bucket is read with "
        "FSSPEC_S3_ANON=true.\n",
    )


def test_a_missing_package_is_named(monkeypatch, run):
    found = util.find_spec
    monkeypatch.setattr("moemerge.packages.find_spec", lambda name: None if name.endswith("fs") else found(name))
    assert run("inspect", "s3://bucket/model")[::2] == (
        2,
        "s3://bucket/model: looking it up in its store\n"
        "error: To reach s3://bucket/model, the package s3fs is needed: pip install 'moemerge[remote]'.\n",
    )
    assert run("inspect", "gs://bucket/model")[2].splitlines()[-1] == (
        "error: To reach gs://bucket/model, the package gcsfs is needed: pip install gcsfs."
    )


def test_a_package_that_lacks_another_one_says_so(tmp_path, monkeypatch, run):
    (tmp_path / "s3fs.py").write_text("import what_s3fs_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "s3fs", raising=False)
    monkeypatch.delitem(sys.modules[filesystem.__module__]._registry, "s3", raising=False)
    assert run("inspect", "s3://bucket/model")[::2] == (
        1,
        "s3://bucket/model: looking it up in its store\n"
        "error: s3://bucket/model: s3fs is installed, but cannot be imported (No module named 'what_s3fs_needs'). Install "
        "what is missing, or s3fs again.\n",
    )


def test_other_addresses_are_not_looked_up_on_the_hub(tmp_path, llamas, run):
    neither = "moemerge reads and writes s3://, gs:// and file:///, not {}://."
    said = {
        "az://container/model": neither.format("az"),
        "s4://bucket/model": f"{neither.format('s4')} Did you mean s3://?",
        "https://host/model": f"{neither.format('https')} A model on the Hub is written user/name.",
        "file://model": "file:// takes an absolute path: file:///PATH.",
        "folder/s3://bucket/model": "an address begins with s3://. Did you mean s3://bucket/model?",
    }
    for address, message in said.items():
        assert run("inspect", address) == (2, "", f"error: {address}: {message}\n")
        config = write_config(tmp_path / "merge.yaml", llamas[0], [llamas[1], address])
        code, _, printed = run("plan", config, "--quiet")
        problem = f"line {line_of(config, address)}: experts[1].source_model: {address}: {message}"
        assert (code, printed.partition("merge.yaml: ")[2]) == (2, f"1 problem:\n  - {problem}\n")
    assert run("verify", "az://container/model") == (
        2, "", f"error: az://container/model: {said['az://container/model']}\n"
    )  # fmt: skip


def line_of(config, text):
    return next(number for number, line in enumerate(config.read_text().splitlines(), 1) if text in line)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def as_store(folder):
    """The address of a folder here that is read as a store is."""
    return folder.as_uri()


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_every_kind_of_reference_may_be_in_a_store(tmp_path, llamas, run):
    base, fox, code, _ = llamas
    make_adapter(tmp_path / "adapter", base)
    (tmp_path / "gguf").mkdir()
    write_gguf(code, tmp_path / "gguf" / "code.gguf")
    mixture = tmp_path / "mixture"
    assert run(write_config(tmp_path / "first.yaml", base, [fox, code], prompts=False), mixture)[0] == 0
    here = [f"{base}+{tmp_path / 'adapter'}", tmp_path / "gguf" / "code.gguf", f"{mixture}#fox", fox]
    there = [
        f"{as_store(base)}+{as_store(tmp_path / 'adapter')}", as_store(tmp_path / "gguf" / "code.gguf"),
        f"{as_store(mixture)}#fox", as_store(fox) + "/",
    ]  # fmt: skip
    for name, experts, root in (("here", here, base), ("there", there, as_store(base))):
        assert run(write_config(tmp_path / f"{name}.yaml", root, experts, prompts=False), tmp_path / name)[0] == 0
    assert weights_of(tmp_path / "here") == weights_of(tmp_path / "there")
    assert run("verify", as_store(tmp_path / "there"), "--quiet")[:2] == (0, "")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    judged = [run("eval", place, "--data", f"x={text}", "--json", "--quiet") for place in (mixture, as_store(mixture))]
    assert [code for code, *_ in judged] == [0, 0]
    assert judged[1][1] == judged[0][1].replace(str(mixture), as_store(mixture))
    assert run("generate", as_store(mixture), "The fox", "--quiet") == (
        2, "", f"error: {as_store(mixture)}: is in an object store. Copy the model to a folder here, and name that.\n"
    )  # fmt: skip
    local, stored = (run("inspect", place)[1] for place in (mixture, as_store(mixture)))
    assert stored == local.replace(str(mixture), as_store(mixture))


def test_a_file_that_changes_after_the_plan_is_noticed_where_a_store_compares_nothing(tmp_path, llamas):
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in llamas[:2]]
    config = write_config(tmp_path / "m.yaml", as_store(copies[0]), [as_store(copies[1]), llamas[3]], prompts=False)
    plan = plan_merge(load_config(config))
    shutil.copyfile(llamas[2] / SINGLE, copies[1] / SINGLE)
    with pytest.raises(CheckpointError) as error:
        merge(plan, tmp_path / "out")
    assert str(error.value) == (
        f"{as_store(copies[1])}/{SINGLE}: was changed since the plan was made. The output would be of two models. Merge "
        "again."
    )


def test_nothing_is_to_be_downloaded_from_a_folder_here(tmp_path, llamas, run):
    config = write_config(tmp_path / "m.yaml", as_store(llamas[0]), [as_store(llamas[1]), llamas[2]], prompts=False)
    rows = [row.split(maxsplit=2) for row in run("plan", config, "--quiet")[1].splitlines()]
    assert [row[:2] for row in rows if row[:1] == ["to"]] == [["to", "read"]]


def test_pickles_are_refused_since_ranges_do_not_tell_what_is_in_them(tmp_path, llamas, run):
    pickled = shutil.copytree(llamas[0], tmp_path / "pickled")
    (pickled / SINGLE).rename(pickled / "pytorch_model.bin")
    code, _, said = run("inspect", as_store(pickled))
    assert (code, said.splitlines()[-1]) == (
        1,
        f"error: {as_store(pickled)}: its weights are pickles (pytorch_model.bin), which cannot be read by ranges. Copy "
        "the folder here, and name the copy.",
    )

"""The small Hub of the tests, as the real client sees it."""

import hashlib
import json
import os
import random
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest

from tests.support.hub_server import Hub, User
from tests.support.hub_server.hub import MEGABYTE
from tests.support.hub_server.state import CHUNK

ROOT = Path(__file__).parents[2]

# Runs one expression or statement after the other in one process; waiting is written down and not done.
CLIENT = """
import json, os, sys, time
from pathlib import Path
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download

slept = []
time.sleep = lambda seconds: slept.append(seconds) if seconds >= 0.2 else None
answers, sys.stdout = sys.stdout, sys.stderr
api = HfApi()
for line in sys.stdin:
    code, token = json.loads(line)
    os.environ["HF_TOKEN"] = token
    slept.clear()
    try:
        try:
            value = eval(compile(code, "client", "eval"))
        except SyntaxError:
            value = exec(compile(code, "client", "exec"))
        answer = {"value": value}
    except Exception as error:
        answer = {"error": type(error).__name__, "text": str(error), "status": None}
        while error and not hasattr(error, "response"):
            error = error.__cause__
        if error and error.response is not None:
            answer["status"] = error.response.status_code
            answer["text"] += str(error)
    print(json.dumps(answer | {"slept": slept}, default=str), file=answers, flush=True)
"""
REPO = "ann/model"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NEW = int(huggingface_hub.__version__.partition(".")[0]) >= 1
"""Whether the client waits and retries in more places."""
ANN, BOB, READER, FINE, NOBODY = "hf_ann", "hf_bob", "hf_reader", "hf_fine", ""


@dataclass
class Answer:
    """What the client made of it."""

    value: Any = None
    error: str = ""
    text: str = ""
    status: int | None = None
    slept: tuple[float, ...] = ()


@dataclass
class Client:
    """A process with the real client, without Xet."""

    process: subprocess.Popen
    folder: Path
    errors: Path

    def ask(self, code: str, token: str = ANN) -> Answer:
        self.process.stdin.write(json.dumps([code, token]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        return Answer(**json.loads(line))

    def get(self, code: str, token: str = ANN) -> Any:
        answer = self.ask(code, token)
        assert not answer.error, answer
        return answer.value


@contextmanager
def running_client(folder: Path, url: str, **environment: str) -> Iterator[Client]:
    ours = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
    hub = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    errors = folder / "errors"
    with errors.open("w") as file, subprocess.Popen(
        [sys.executable, "-c", CLIENT], cwd=folder, env=kept | hub | environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
    ) as process:  # fmt: skip
        try:
            yield Client(process, folder, errors)
        finally:
            process.kill()


def fetch(
    url: str, method: str = "GET", data: bytes | None = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of an answer, without any client's help."""
    request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310  its address is the test's own
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[Hub, Client]]:
    hub = Hub(tmp_path_factory.mktemp("store"))
    hub.users = {
        ANN: User("ann", {"acme": "write", "library": "read"}),
        BOB: User("bob"),
        READER: User("ann", role="read"),
        FINE: User("ann", {"acme": "admin"}, role="fineGrained", scopes={REPO: ["repo.content.read", "repo.write"]}),
    }
    hub.multipart_above, hub.part_size = 2_000_000, 300_000
    with hub.running() as url, running_client(tmp_path_factory.mktemp("client"), url) as client:
        yield hub, client


@pytest.fixture
def hub(served) -> Iterator[Hub]:
    """The Hub, without what earlier tests left in it."""
    hub, _ = served
    hub.repositories.clear()
    hub.forget_faults()
    hub.reset()
    yield hub
    hub.forget_faults()


@pytest.fixture
def client(served) -> Client:
    return served[1]


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with a model in two shards, one of which is uploaded in parts."""
    folder, rng = tmp_path / "model", random.Random(0)
    folder.mkdir()
    for name, size in (
        ("model-00001-of-00002.safetensors", 1_500_000),
        ("model-00002-of-00002.safetensors", 2_300_000),
    ):
        (folder / name).write_bytes(rng.randbytes(size))
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [merge]\n---\n# A model\n")
    return folder


@pytest.fixture
def uploaded(hub, client, model) -> str:
    """The commit of the model on the Hub."""
    client.get(f"api.create_repo({REPO!r})")
    commit = client.get(upload(model))
    hub.reset()
    return commit


def upload(folder: Path) -> str:
    return f"api.upload_folder(repo_id={REPO!r}, folder_path={str(folder)!r}).oid"


def download(folder: Path) -> str:
    return f"snapshot_download({REPO!r}, cache_dir={str(folder / 'cache')!r}, max_workers=1)"


def same_files(folder: str, model: Path) -> bool:
    return all(
        (Path(folder) / path.name).read_bytes() == path.read_bytes() for path in model.iterdir() if path.is_file()
    )


def test_who_a_token_belongs_to_and_what_it_may_do(hub, client):
    facts = client.get("api.whoami()")
    assert (facts["name"], facts["auth"]["accessToken"]["role"]) == ("ann", "write")
    assert [(org["name"], org["roleInOrg"]) for org in facts["orgs"]] == [("acme", "write"), ("library", "read")]
    assert client.get("api.whoami()['auth']['accessToken']['role']", READER) == "read"
    (scope,) = client.get("api.whoami()['auth']['accessToken']['fineGrained']['scoped']", FINE)
    assert (scope["entity"]["name"], scope["permissions"]) == (REPO, ["repo.content.read", "repo.write"])
    assert client.ask("api.whoami()", "hf_wrong").status == 401
    assert client.ask("api.repo_info('a/b')", "hf_wrong").status == 401


def test_a_folder_is_uploaded_read_back_and_not_sent_again(hub, client, model):
    assert client.get(f"str(api.create_repo({REPO!r}))") == f"{hub.url}/{REPO}"
    assert client.ask(f"api.create_repo({REPO!r})").status == 409
    client.get(f"api.create_repo({REPO!r}, exist_ok=True)")
    commit = client.get(upload(model))
    assert hub.repositories[REPO].refs["main"].hash == commit
    sizes = {path.name: path.stat().st_size for path in model.iterdir()}
    assert hub.received_bytes() == sizes[SHARDS[0]] + sizes[SHARDS[1]]
    assert sum(call.method == "PUT" for call in hub.calls) == 1 + 8
    assert {call.host for call in hub.calls if call.has_token} == {"hub"}

    folder = Path(client.get(f"snapshot_download({REPO!r})"))
    assert folder.name == commit
    assert {path.name for path in folder.iterdir()} == {*sizes, ".gitattributes"}
    assert same_files(folder, model)
    assert hub.sent_bytes(REPO, ".safetensors") == hub.received_bytes()
    assert hub.ranges(REPO, SHARDS[0]) == [(0, sizes[SHARDS[0]])]
    assert {call.host for call in hub.calls} == {"hub", "cdn", "uploads"}
    assert {call.host for call in hub.calls if call.has_token} == {"hub"}

    hub.reset()
    assert client.get(upload(model)) == commit
    (model / "config.json").write_text('{"a": 1}')
    assert client.get(upload(model)) != commit
    assert hub.received_bytes() == 0
    assert client.get(f"api.model_info({REPO!r}, revision={commit!r}).sha") == commit
    old = client.get(f"Path(api.hf_hub_download({REPO!r}, 'config.json', revision={commit!r})).read_text()")
    assert (old, client.get(f"Path(api.hf_hub_download({REPO!r}, 'config.json')).read_text()")) == ("{}", '{"a": 1}')


def test_files_are_listed_with_sizes_hashes_and_metadata(hub, client, model, uploaded):
    (model / "sub").mkdir()
    (model / "sub" / "notes.txt").write_text("notes")
    client.get(upload(model))
    sha256 = hashlib.sha256((model / SHARDS[0]).read_bytes()).hexdigest()
    found = f"[i.path for i in api.list_repo_tree({REPO!r}, %s)]"
    assert set(client.get(found % "recursive=True")) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "sub",
        "sub/notes.txt",
        *SHARDS,
    }
    assert client.get(found % "'sub'") == ["sub/notes.txt"]
    hub.page_entries = 2
    assert len(client.get(found % "recursive=True, expand=True")) == 7
    hub.page_entries = 1000
    paths = [SHARDS[0], "config.json", "sub", "none"]
    expected = [[SHARDS[0], 1_500_000, sha256], ["config.json", 2, None], ["sub", None, None]]
    told = "[[i.path, getattr(i, 'size', None), i.lfs.sha256 if getattr(i, 'lfs', None) else None] for i in %s]"
    assert client.get(told % f"api.get_paths_info({REPO!r}, {paths!r}, expand=True)") == expected
    facts = client.get(
        f"(lambda i: [i.sha, i.private, i.gated, i.card_data.license, i.tags, {{s.rfilename: s.size for s in i.siblings}}])"
        f"(api.model_info({REPO!r}, files_metadata=True))"
    )
    assert facts[1:5] == [False, False, "mit", ["merge"]]
    assert facts[5][SHARDS[1]] == 2_300_000
    assert client.get(f"len(api.list_repo_commits({REPO!r}))") == 3


def test_branches_and_commits_on_them(hub, client, uploaded):
    client.get(f"api.create_branch({REPO!r}, branch='dev/v2')")
    assert client.ask(f"api.create_branch({REPO!r}, branch='dev/v2')").status == 409
    client.get(f"api.create_branch({REPO!r}, branch='dev/v2', exist_ok=True)")
    assert client.ask(f"api.create_branch({REPO!r}, branch='x', revision='none')").error == "RevisionNotFoundError"
    assert client.ask(f"api.create_branch({REPO!r}, branch='refs/pr/9')").error == "BadRequestError"
    commit = (
        "api.create_commit(%r, [CommitOperationDelete('config.json'), CommitOperationAdd('a/b.txt', b'1')],"
        " commit_message='m', revision='dev/v2', parent_commit=%r).oid"
    )
    second = client.get(commit % (REPO, uploaded))
    refs = client.get(f"{{r.name: r.target_commit for r in api.list_repo_refs({REPO!r}).branches}}")
    assert refs == {"main": uploaded, "dev/v2": second}
    names = client.get(f"api.list_repo_files({REPO!r}, revision='dev/v2')")
    assert ("a/b.txt" in names, "config.json" in names) == (True, False)
    assert client.ask(commit % (REPO, uploaded)).status == 412
    assert client.ask(commit % (REPO, second)).error in {"RemoteEntryNotFoundError", "EntryNotFoundError"}
    client.get(f"api.delete_folder('a', {REPO!r}, revision='dev/v2')")
    assert "a/b.txt" not in client.get(f"api.list_repo_files({REPO!r}, revision='dev/v2')")


def test_who_may_not_write_may_open_pull_requests(hub, client, model, uploaded):
    add = f"api.create_commit({REPO!r}, [CommitOperationAdd('new.%s', b'new')], commit_message='m', create_pr=%s)"
    refused = client.ask(add % ("txt", False), BOB)
    assert (refused.status, "create_pr=1" in refused.text) == (403, True)
    assert client.ask(add % ("txt", False), READER).status == 403
    assert client.ask(add % ("txt", False), NOBODY).status == 401
    opened = client.get(f"(lambda c: [c.pr_num, c.pr_revision, c.oid])({add % ('txt', True)})", BOB)
    assert opened[:2] == [1, "refs/pr/1"]
    assert client.ask(add % ("bin", True), BOB).status == 403  # what is in LFS needs the right to write
    assert client.get(f"api.file_exists({REPO!r}, 'new.txt', revision='refs/pr/1')")
    assert not client.get(f"api.file_exists({REPO!r}, 'new.txt')")
    assert client.get(f"api.model_info({REPO!r}, revision='refs/pr/1').sha") == opened[2]
    more = (add % ("md", False)).replace("commit_message", "revision='refs/pr/1', commit_message")
    assert client.get(f"{more}.oid", BOB) == hub.repositories[REPO].refs["refs/pr/1"].hash
    request = client.get(
        f"(lambda p: [p.num, p.git_reference, p.status])(api.create_pull_request({REPO!r}, title='t'))"
    )
    assert request == [2, "refs/pr/2", "draft"]
    (model / "config.json").write_text("[]")
    client.get(upload(model).replace("folder_path", "revision='refs/pr/2', folder_path"))
    refs = client.get(f"[r.ref for r in api.list_repo_refs({REPO!r}, include_pull_requests=True).pull_requests]")
    assert refs == ["refs/pr/1", "refs/pr/2"]
    assert client.get(f"api.model_info({REPO!r}).sha") == uploaded


def test_private_repositories_are_there_for_their_owners_alone(hub, client, model, uploaded):
    hub.repositories[REPO].private = True
    assert client.get(f"api.model_info({REPO!r}).private") is True
    for token, status in ((BOB, 404), (NOBODY, 401)):
        for code in (
            f"api.model_info({REPO!r})",
            f"api.hf_hub_download({REPO!r}, 'new.txt')",
            upload(model),
        ):
            answer = client.ask(code, token)
            assert (answer.error, answer.status) == ("RepositoryNotFoundError", status), code
    client.get("api.create_repo('acme/secret', private=True)")
    assert hub.repositories["acme/secret"].private
    assert client.ask("api.model_info('acme/secret')", FINE).status == 404
    assert client.get(f"api.model_info({REPO!r}).private", FINE) is True
    for namespace in ("library", "bob", "nobody"):
        answer = client.ask(f"api.create_repo('{namespace}/new')")
        assert (answer.status, f'under the namespace "{namespace}"' in answer.text) == (403, True)
    assert client.ask("api.create_repo('ann/new')", READER).status == 403
    assert client.ask("api.create_repo('ann/new')", FINE).status == 403
    hub.add("library/gated", {"config.json": b"{}"}, gated=True)
    hub.add("zoo/gated", {"config.json": b"{}"}, gated=True)
    client.get("api.auth_check('library/gated')")
    assert client.ask("api.auth_check('zoo/gated')").error == "GatedRepoError"
    hub.users[ANN].accepted.add("zoo/gated")
    client.get("api.auth_check('zoo/gated')")


@pytest.mark.parametrize("in_memory", [False, True])
def test_large_files_ahead_of_their_commit(hub, client, model, monkeypatch, in_memory):
    if in_memory:
        monkeypatch.setattr(hub, "store", None)
    client.get(f"api.create_repo({REPO!r})")
    client.get(f"adds = [CommitOperationAdd(n, Path({str(model)!r}) / n) for n in {SHARDS!r}]")
    for number in range(2):
        client.get(f"api.preupload_lfs_files({REPO!r}, adds[{number}:{number + 1}])")
    assert hub.received_bytes() == 3_800_000
    assert not client.get(f"api.file_exists({REPO!r}, {SHARDS[0]!r})")
    client.get(f"api.create_commit({REPO!r}, adds, commit_message='m')")
    assert hub.received_bytes() == 3_800_000
    content = hub.repositories[REPO].find("main")[1][SHARDS[1]]
    assert isinstance(content, bytes) == in_memory
    assert (content if in_memory else content.read_bytes()) == (model / SHARDS[1]).read_bytes()


def test_a_commit_needs_its_objects_and_a_valid_card(hub, client):
    client.get(f"api.create_repo({REPO!r})")
    lines = [{"summary": "m"}, {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}]
    data = "\n".join(
        json.dumps({"key": k, "value": v}) for k, v in zip(("header", "lfsFile"), lines, strict=True)
    ).encode()
    status, text, _ = fetch(f"{hub.url}/api/models/{REPO}/commit/main", "POST", data, Authorization=f"Bearer {ANN}")
    assert (status, b"an LFS pointer pointed to a file that does not exist" in text) == (400, True)
    card = f"api.upload_file(path_or_fileobj=%r, path_in_repo='README.md', repo_id={REPO!r})"
    assert "Invalid metadata" in client.ask(card % b"---\na: [\n---\n").text
    assert len(hub.repositories[REPO].commits) == 1


def test_what_is_in_lfs_and_what_is_ignored(hub, client, tmp_path):
    hub.regular_up_to = 1000
    (tmp_path / ".gitignore").write_text("*.log\ntmp/\n")
    (tmp_path / "tmp").mkdir()
    for name in ("a.log", "tmp/b.txt", "c.txt", "big.txt", "code.dat", "d.safetensors"):
        (tmp_path / name).write_bytes(b"\0\1" if name == "code.dat" else b"x" * (2000 if name == "big.txt" else 10))
    client.get(f"api.create_repo({REPO!r})")
    client.get(upload(tmp_path))
    hub.regular_up_to = 10 * MEGABYTE
    blobs = hub.repositories[REPO].commit("main").blobs
    assert {name: blob.in_lfs for name, blob in blobs.items()} == {
        ".gitattributes": False,
        ".gitignore": False,
        "c.txt": False,
        "big.txt": True,
        "code.dat": True,
        "d.safetensors": True,
    }
    assert blobs[".gitattributes"].read().count(b"big.txt filter=lfs") == 1


def test_an_address_on_another_host_needs_its_signature_and_no_token(hub, client, model, uploaded):
    address = f"{hub.url}/{REPO}/resolve/main/{SHARDS[0]}"

    def locate() -> str:
        return client.get(f"huggingface_hub.get_hf_file_metadata({address!r}).location")

    first = locate()
    assert fetch(first, Range="bytes=10-19")[:2] == (206, (model / SHARDS[0]).read_bytes()[10:20])
    assert fetch(first, Range="bytes=-5")[:2] == (206, (model / SHARDS[0]).read_bytes()[-5:])
    assert fetch(first, Range="bytes=1500000-")[0] == 416
    assert hub.ranges(REPO, SHARDS[0])[:2] == [(10, 20), (1_499_995, 1_500_000)]
    assert fetch(first, Authorization=f"Bearer {ANN}")[0] == 400
    assert fetch(first.partition("?")[0])[0] == 403
    hub.expire_locations()
    assert fetch(first)[0] == 403
    assert fetch(locate())[0] == 200
    place = f"{hub.uploads_url}/ann%2Fmodel/{'0' * 64}/none"
    assert fetch(f"{place}?X-Amz-Signature={hub.sign(urlsplit(place).path)}", "PUT", b"1")[0] == 404
    assert fetch(place, "PUT", b"1")[0] == 403


def test_refusals_that_pass(hub, client, model, tmp_path):
    client.get(f"api.create_repo({REPO!r})")
    hub.fail("/ann/model/*", 503, 2, method="PUT")
    answer = client.ask(upload(model))
    assert (answer.error, len(answer.slept)) == ("", 2)
    hub.fail("*/commit/*", 500)
    (model / "config.json").write_text("[]")
    assert client.ask(upload(model)).status == 500
    assert client.ask(upload(model)).error == ""
    hub.limit_rate("*/preupload/*", 7)
    answer = client.ask(upload(model))
    if NEW:
        assert (answer.error, answer.slept) == ("", [8.0])
        hub.limit_rate("*.safetensors", 7, method="GET")
    else:  # older clients do not wait
        assert answer.status == 429
    answer = client.ask(download(tmp_path))
    assert (same_files(answer.value, model), answer.slept) == (True, [8.0] * NEW)
    hub.fail("/api/models/*", 500)
    assert client.ask(f"api.model_info({REPO!r})").status == 500


def test_downloads_that_end_early(hub, client, model, tmp_path, uploaded):
    hub.break_off(f"*/{SHARDS[0]}", 2, after=100_000)
    answers = [client.ask(download(tmp_path)) for _ in range(3)]
    assert [answer.error for answer in answers] == ([""] * 3 if NEW else ["ChunkedEncodingError"] * 2 + [""])
    assert same_files(answers[2].value, model)
    assert hub.sent[REPO, SHARDS[0]] == 1_700_000


@pytest.mark.parametrize(("wrong", "length"), [("short", 1_500_000 // 2), ("long", 1_500_016)])
@pytest.mark.usefixtures("uploaded")
def test_files_of_another_length_are_noticed(hub, client, tmp_path, wrong, length):
    hub.misanswer(f"*/{SHARDS[0]}", wrong)
    answer = client.ask(download(tmp_path))
    assert (answer.error, f"but has size {length}" in answer.text) == ("OSError", True)


def test_ranges_other_than_asked(hub, model, uploaded):
    content = (model / "README.md").read_bytes()
    address = f"{hub.url}/{REPO}/resolve/main/README.md"
    size = len(content)
    expected = {
        "short": (206, content[4:7], f"bytes 4-6/{size}"),
        "long": (206, content[4:10] + bytes(16), f"bytes 4-9/{size}"),
        "shifted": (206, content[3:9], f"bytes 3-8/{size}"),
        "whole": (200, content, None),
    }
    for wrong, answer in expected.items():
        hub.misanswer("*/README.md", wrong)
        status, text, headers = fetch(address, Range="bytes=4-9")
        assert (status, text, headers.get("Content-Range")) == answer
        assert headers["Content-Length"] == str(len(answer[1]))
    assert fetch(address, Range="bytes=4-9")[1] == content[4:10]


def test_a_branch_that_is_rewritten_while_it_is_read(hub, client, tmp_path, uploaded):
    hub.before(f"*/resolve/*/{SHARDS[1]}", lambda: hub.rewrite(REPO, {"config.json": b"[]"}))
    answer = client.ask(download(tmp_path))
    assert (answer.error, answer.status) == ("RevisionNotFoundError", 404)
    assert client.get(f"os.listdir({download(tmp_path)})") == ["config.json"]


def test_a_file_that_is_replaced_in_its_commit(hub, client, uploaded):
    etag = f"huggingface_hub.get_hf_file_metadata('{hub.url}/{REPO}/resolve/{uploaded}/{SHARDS[0]}').etag"
    before = client.get(etag)
    hub.replace(REPO, SHARDS[0], b"another", uploaded)
    assert client.get(etag) == hashlib.sha256(b"another").hexdigest() != before


def test_an_upload_that_arrives_wrong_or_finds_no_room(hub, client, model):
    client.get(f"api.create_repo({REPO!r})")
    hub.corrupts_uploads = 1
    assert client.ask(upload(model)).status == 422
    hub.storage_limits["ann"] = 3_799_999
    answer = client.ask(upload(model))
    assert (answer.status, "storage patterns" in answer.text) == (403, True)
    hub.repositories[REPO].private = True
    assert "Private repository storage limit reached" in client.ask(upload(model)).text
    hub.storage_limits["ann"] = 3_800_000
    client.get(upload(model))


def test_an_upload_that_ends_early_is_resumed_with_the_objects_that_are_whole(hub, client, model):
    client.get(f"api.create_repo({REPO!r})")
    commit = (
        f"api.create_commit({REPO!r}, [CommitOperationAdd(n, Path({str(model)!r}) / n) for n in {SHARDS!r}],"
        " commit_message='m', num_threads=1).oid"
    )
    hub.uploads_end_after = 2_000_000
    answer = client.ask(commit)
    assert (answer.error, answer.slept) == ("RuntimeError", [1, 2, 4, 8, 8])
    assert 2_000_000 <= hub.received_bytes() <= 2_000_000 + CHUNK
    hub.accept_uploads()
    hub.reset()
    client.get(commit)
    assert hub.received_bytes() == 2_300_000


def test_the_server_runs_by_itself_and_reads_files_where_they_lie(tmp_path):
    folder = tmp_path / "models" / "acme" / "base"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 10_000)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.hub_server", str(tmp_path / "models")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        url, token, _ = (pair.partition("=")[2] for pair in process.stdout.readline().split())
        headers = {"Authorization": f"Bearer {token}"}
        facts = json.loads(fetch(f"{url}/api/whoami-v2", **headers)[1])
        part = fetch(f"{url}/acme/base/resolve/main/model.safetensors", Range="bytes=1000-1999")
        process.kill()
    assert [org["name"] for org in facts["orgs"]] == ["acme"]
    assert part[:2] == (206, (bytes(range(256)) * 10)[1000:2000])

"""The small Hub of the tests, as the real client sees it."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import Hub, User

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


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[Hub, Client]]:
    hub = Hub(tmp_path_factory.mktemp("store"))
    hub.users = {
        "hf_ann": User("ann", {"acme": "write", "readers": "read"}),
        "hf_bob": User("bob"),
        "hf_reader": User("ann", role="read"),
        "hf_fine": User(
            "ann", {"acme": "admin"}, role="fineGrained", scopes={"ann/model": ["repo.content.read", "repo.write"]}
        ),
    }
    hub.multipart_above, hub.part_size = 2_000_000, 300_000
    with hub.running() as url, running_client(tmp_path_factory.mktemp("client"), url) as client:
        yield hub, client


@pytest.fixture
def hub(served) -> Iterator[Hub]:
    """The Hub, without what earlier tests left in it."""
    hub, _ = served
    hub.repositories.clear()
    hub.storage_limits.clear()
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
    rng = random.Random(0)
    for name, size in (
        ("model-00001-of-00002.safetensors", 1_500_000),
        ("model-00002-of-00002.safetensors", 2_300_000),
    ):
        (tmp_path / name).write_bytes(rng.randbytes(size))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [merge]\n---\n# A model\n")
    return tmp_path


def test_a_folder_is_uploaded_read_back_and_not_sent_again(hub, client, model):
    assert client.get(f"str(api.create_repo({REPO!r}))") == f"{hub.url}/{REPO}"
    assert client.ask(f"api.create_repo({REPO!r})").status == 409
    client.get(f"api.create_repo({REPO!r}, exist_ok=True)")
    upload = f"api.upload_folder(repo_id={REPO!r}, folder_path={str(model)!r}).oid"
    commit = client.get(upload)
    assert hub.repositories[REPO].refs["main"].hash == commit
    sizes = {path.name: path.stat().st_size for path in model.iterdir()}
    weights = [name for name in sizes if name.endswith(".safetensors")]
    assert hub.received_bytes() == sum(sizes[name] for name in weights)
    assert sum(call.method == "PUT" for call in hub.calls) == 1 + 8
    assert not any(call.has_token for call in hub.calls if call.host != "hub")

    folder = Path(client.get(f"snapshot_download({REPO!r})"))
    assert folder.name == commit
    assert {path.name for path in folder.iterdir()} == {*sizes, ".gitattributes"}
    assert all((folder / name).read_bytes() == (model / name).read_bytes() for name in sizes)
    assert hub.sent_bytes(REPO, ".safetensors") == hub.received_bytes()
    assert hub.ranges(REPO, weights[0]) == [(0, sizes[weights[0]])]
    assert not any(call.has_token for call in hub.calls if call.host != "hub")

    hub.reset()
    assert client.get(upload) == commit
    assert hub.received_bytes() == 0
    (model / "config.json").write_text('{"a": 1}')
    assert client.get(upload) != commit
    assert hub.received_bytes() == 0
    assert client.get(f"api.model_info({REPO!r}, revision={commit!r}).sha") == commit

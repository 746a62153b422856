"""Pushing to the Hub: the real client against a Hub on this machine, each command line in its own process."""

import hashlib
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from huggingface_hub import ModelCard, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moemerge.checkpoint.index import read_json
from moemerge.config.loading import load_config
from moemerge.errors import PublishError, RefusedError
from moemerge.merging.merger import merge
from moemerge.planning.options import PlanOptions
from moemerge.planning.planner import plan_merge
from moemerge.publish.hub_errors import explain
from moemerge.publish.publisher import Publisher, checkpoint_files
from moemerge.publish.repository import Account, Repository
from tests.sources.test_hub import INDEX, SHARDS, llama
from tests.support.hub_server import Hub, User
from tests.support.machine import SINGLE, Machine, Result
from tests.support.models import assert_close, logits, make_model, write_config

if TYPE_CHECKING:
    from collections.abc import Callable

TOKEN = "hf_alice_writes"  # noqa: S105  of the test's own Hub
CARD = b"---\nlicense: mit\n---\n# A mixture\n"
OLD = {
    ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n",
    "pytorch_model.bin": b"old weights",
    "adapter_config.json": b"{}",
    "merges.txt": b"old",
    "notes.txt": b"kept",
    "gguf/old.safetensors": b"kept",
}
COMPLETE = "\nThe model is complete in {}: `moemerge push {} {}` sends what is missing."


def make_hub() -> Hub:
    hub = Hub()
    hub.users = {
        TOKEN: User("alice", {"acme": "write", "club": "read", "guild": "admin"}),
        "hf_bob": User("bob"),
        "hf_reader": User("alice", role="read"),
        "hf_fine": User("alice", role="fineGrained", scopes={"acme": ["repo.write"], "alice/one": ["repo.write"]}),
        "hf_looks": User("alice", role="fineGrained", scopes={"acme": ["repo.content.read"]}),
        "hf_talks": User("alice", role="fineGrained", scopes={"alice": ["discussion.write"]}),
    }
    return hub


class Author(Machine):
    """A machine whose user is logged in."""

    def python(self, *arguments: str, **environment: str) -> Result:
        return super().python(*arguments, **{"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"} | environment)

    def checkpoint(self, name: str = "out", seed: int = 1, *, sharded: bool = False, card: bytes = CARD) -> Path:
        """A small complete model in a folder."""
        folder = self.folder / name
        folder.mkdir()
        for path, content in (llama(seed, sharded=sharded) | {"README.md": card, "tokenizer.json": b"{}"}).items():
            (folder / path).write_bytes(content)
        return folder

    def stream(self, *lines: str, **environment: str) -> Result:
        """Run lines with a publisher `p` of the repository that was named first, and `out`, a folder."""
        return self.python("-c", "\n".join([STREAM, *(f"    {line}" for line in lines), CAUGHT]), **environment)


NOTED = """
import os
from pathlib import Path
from moemerge.cli import main

Path("pid").write_text(str(os.getpid()))
main()
"""
STREAM = """
import sys
from pathlib import Path
from moemerge.errors import MoemergeError
from moemerge.publish.repository import Repository
from moemerge.publish.publisher import Publisher

def publisher(*arguments, **options):
    p = Publisher(Repository(*arguments, **options), print)
    p.open()
    p.create()
    return p

out = Path("out")
try:
"""
CAUGHT = """
except MoemergeError as error:
    print(f"{type(error).__name__}: {error}")
"""


def files(hub: Hub, repo: str, revision: str = "main") -> dict[str, bytes]:
    return {
        name: content if isinstance(content, bytes) else content.read_bytes()
        for name, content in hub.repositories[repo].find(revision)[1].items()
    }


def local(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def without_attributes(content: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in content.items() if name != ".gitattributes"}


def history(hub: Hub, repo: str, revision: str = "main") -> list[str]:
    return [commit.title for commit in hub.repositories[repo].commit(revision).history()]


def test_what_was_pushed_is_read_back_and_computes_the_same(tmp_path, llamas):
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        path = write_config(tmp_path / "c.yaml", llamas[0], llamas[1:], gate_mode="random")
        merge(plan_merge(load_config(path), PlanOptions(max_shard_bytes=60_000)), tmp_path / "out")
        done = machine.moemerge("push", "out", "alice/mix", "--license", "apache-2.0")
        assert (done.code, done.out) == (0, f"{url}/alice/mix\n")
        count = len(local(tmp_path / "out"))
        assert done.err.splitlines() == [
            "alice/mix: created",
            f"alice/mix: reading {count} files, and sending what is not there",
        ]
        folder = snapshot_download("alice/mix", endpoint=url, cache_dir=tmp_path / "read", token=False)
    assert without_attributes(local(Path(folder))) == local(tmp_path / "out")
    assert len(read_json(Path(folder) / INDEX)["weight_map"]) > 0
    found, expected = (AutoModelForCausalLM.from_pretrained(place) for place in (folder, tmp_path / "out"))
    assert_close(logits(found), logits(expected))
    card = ModelCard.load(Path(folder) / "README.md")
    assert (card.data.license, card.data.tags[0]) == ("apache-2.0", "moe")
    assert history(hub, "alice/mix") == ["Upload mix", "initial commit"]


def test_a_second_push_sends_no_weights_and_makes_no_commit(tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        out = machine.checkpoint(sharded=True)
        first = machine.moemerge("push", "out", "acme/mix", "--quiet")
        sent = hub.received_bytes()
        again, elsewhere = machine.session(
            ["push", "out", "acme/mix", "--quiet"], ["push", "out", "acme/mix", "--revision", "copy", "--quiet"]
        )
    assert first == again == Result(0, f"{url}/acme/mix\n", "")
    assert elsewhere == Result(0, f"{url}/acme/mix/tree/copy\n", "")
    assert sent == sum((out / name).stat().st_size for name in (*SHARDS, "tokenizer.json") if name in files_in_lfs(hub))
    assert hub.received_bytes() == sent
    assert history(hub, "acme/mix") == ["Upload mix", "initial commit"]


def files_in_lfs(hub: Hub, repo: str = "acme/mix") -> set[str]:
    return {name for name, blob in hub.repositories[repo].commit("main").blobs.items() if blob.in_lfs}


def test_a_push_that_was_cut_off_sends_only_what_is_missing(tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        out = machine.checkpoint(sharded=True)
        hub.add("acme/mix", OLD)
        before = files(hub, "acme/mix")
        arrived = threading.Event()
        hub.before("*/objects/verify", arrived.set)
        hub.before("*", lambda: arrived.wait(20), method="PUT")  # the other shard's
        hub.fail("*", 400, host="uploads", method="PUT", message="Told to fail")
        broken = machine.moemerge("push", "out", "acme/mix", "--quiet")
        assert files(hub, "acme/mix") == before
        sent = {name: hub.received_bytes(sha256(out / name)) for name in SHARDS}
        hub.reset()
        again = machine.moemerge("push", "out", "acme/mix", "--quiet")
        sent_again = {name: hub.received_bytes(sha256(out / name)) for name in SHARDS}
    assert broken == Result(
        1,
        "",
        "error: acme/mix: the Hub's storage answered with status 400: Told to fail. Try again later."
        + COMPLETE.format("out", "out", "acme/mix")
        + "\n",
    )
    assert again == Result(0, f"{url}/acme/mix\n", "")
    sizes = {name: (out / name).stat().st_size for name in SHARDS}
    whole = [name for name in SHARDS if sent[name] == sizes[name]]
    assert len(whole) >= 1
    assert sum(sent_again[name] > 0 for name in SHARDS) == 1
    assert sum(sent_again.values()) in sizes.values()


def test_a_push_that_was_killed_leaves_the_old_model_and_sends_only_what_is_missing(tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        out = machine.checkpoint(sharded=True)
        hub.add("acme/mix", OLD)
        before = files(hub, "acme/mix")
        arrived = []

        def is_held(name: str) -> bool:
            return sha256(out / name) in hub.repositories["acme/mix"].objects

        def kill_at_the_second() -> None:
            arrived.append(1)
            if len(arrived) == 2:
                deadline = time.monotonic() + 20
                while not any(map(is_held, SHARDS)) and time.monotonic() < deadline:
                    time.sleep(0.01)  # the first is answered meanwhile, by another thread
                os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

        hub.before("*/objects/verify", kill_at_the_second, times=2)
        killed = machine.python("-c", NOTED, "push", "out", "acme/mix", "--quiet")
        assert (killed.code, files(hub, "acme/mix")) == (-signal.SIGKILL, before)
        sizes = {name: (out / name).stat().st_size for name in (*SHARDS, "tokenizer.json")}
        held = [name for name in sizes if is_held(name)]
        assert held
        hub.reset()
        done = machine.moemerge("push", "out", "acme/mix", "--quiet")
        sent = {name: hub.received_bytes(sha256(out / name)) for name in sizes}
    assert done == Result(0, f"{url}/acme/mix\n", "")
    in_lfs = files_in_lfs(hub)
    assert sent == {name: 0 if name in held or name not in in_lfs else size for name, size in sizes.items()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_of_an_older_model_go_in_the_same_commit(tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        hub.add("acme/mix", OLD | llama(5, sharded=True))
        out = machine.checkpoint()
        done = machine.moemerge("push", "out", "acme/mix")
    assert done.out == f"{url}/acme/mix\n"
    assert done.err.splitlines() == [
        f"acme/mix: removing files of an older model: adapter_config.json, merges.txt, {SHARDS[0]} ...",
        "acme/mix: reading 4 files, and sending what is not there",
    ]
    kept = {name: OLD[name] for name in (".gitattributes", "notes.txt", "gguf/old.safetensors")}
    assert without_attributes(files(hub, "acme/mix")) == without_attributes(local(out) | kept)
    assert history(hub, "acme/mix") == ["Upload mix", ""]


def test_private_branch_and_pull_request(tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        out = machine.checkpoint()
        hub.add("bob/mix", OLD)
        private, branch, proposed, none, more, same = machine.session(
            ["push", "out", "alice/mine", "--private"],
            ["push", "out", "alice/mine", "--revision", "dev/v2", "--private"],
            ["push", "out", "acme/mine", "--quiet"],
            ["push", "out", "acme/mine", "--create-pr"],
            ["push", "out", "acme/mine", "--create-pr", "--license", "other acme https://acme.com/x"],
            ["push", "out", "acme/mine", "--revision", "refs/pr/1", "--quiet", "--license", "mit"],
        )
    assert private == Result(
        0,
        f"{url}/alice/mine\n",
        "alice/mine: created, private\nalice/mine: reading 4 files, and sending what is not there\n",
    )
    assert hub.repositories["alice/mine"].private
    assert branch == Result(
        0,
        f"{url}/alice/mine/tree/dev/v2\n",
        "alice/mine: created the branch dev/v2\nalice/mine: reading 4 files, and sending what is not there\n",
    )
    assert proposed == Result(0, f"{url}/acme/mine\n", "")
    assert not hub.repositories["acme/mine"].private
    assert none == Result(
        0,
        f"{url}/acme/mine\n",
        "acme/mine: reading 4 files, and sending what is not there\n"
        "acme/mine: holds these files already, so there is nothing to propose\n",
    )
    assert more.out == f"{url}/acme/mine/discussions/1\n"
    assert same == Result(0, f"{url}/acme/mine/discussions/1\n", "")
    assert history(hub, "acme/mine", "refs/pr/1") == ["Upload mine", "Upload mine", "Upload mine", "initial commit"]
    assert history(hub, "acme/mine") == ["Upload mine", "initial commit"]
    assert without_attributes(files(hub, "acme/mine", "refs/pr/1")) == local(out)


def test_the_token_of_the_login_is_taken_and_shown_nowhere(tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        out = machine.checkpoint(sharded=True)
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "token").write_text(TOKEN)
        environment = {"HF_TOKEN": "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_DEBUG": "1"}
        done = machine.moemerge("push", "out", "acme/mix", "--debug", **environment)
        refused = machine.moemerge("push", "out", "club/mix", "--debug", **environment)
    assert (done.code, done.out) == (0, f"{url}/acme/mix\n")
    assert refused.code == 1
    assert "moemerge.errors.RefusedError: club/mix: alice may not write there. " in refused.err
    shown = [done.out, done.err, refused.out, refused.err, *(path.read_text("latin1") for path in out.iterdir())]
    assert [text for text in shown if TOKEN in text] == []
    assert [call for call in hub.calls if call.has_token and call.host != "hub"] == []
    assert {call.host for call in hub.calls} == {"hub", "uploads"}


def test_what_the_hub_does_not_take_is_refused_before_anything_is_sent(tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        machine.checkpoint()
        for repo, private in (("acme/there", False), ("club/there", False), ("bob/secret", True)):
            hub.add(repo, OLD, private=private)
        commit = hub.repositories["acme/there"].commit("main").hash
        settings = f"{url}/settings/tokens"
        cases: list[tuple[list[str], dict[str, str], int, str]] = [
            (["acme/mix"], {"HF_TOKEN": ""}, 1,
             "acme/mix: pushing needs a token of the Hub, and there is none. Log in with `hf auth login`, or set HF_TOKEN."),
            (["acme/mix"], {"HF_TOKEN": "hf_nobody"}, 1,
             "acme/mix: the Hub does not accept the token. Log in again with `hf auth login`, or set HF_TOKEN to one that is valid."),
            (["acme/mix"], {"HF_TOKEN": "hf_reader"}, 1,
             f"acme/mix: the token of alice may only read. Make one that may write at {settings}, and log in with "
             "`hf auth login`, or set HF_TOKEN."),
            (["acme/mix"], {"HF_TOKEN": "hf_looks"}, 1,
             f"acme/mix: the fine-grained token of alice has no permission repo.write. Give it one at {settings}."),
            (["acme/there", "--create-pr"], {"HF_TOKEN": "hf_looks"}, 1,
             "acme/there: the fine-grained token of alice has no permission discussion.write or repo.write. "
             f"Give it one at {settings}."),
            (["alice/mix"], {"HF_TOKEN": "hf_fine"}, 2,
             "alice/mix: alice may not write there. "
             "The token may write to acme/... or alice/one."),
            (["club/mix"], {}, 2,
             "club/mix: alice may not write there. "
             "The token may write to alice/... or acme/... or guild/...."),
            (["club/there"], {}, 2,
             "club/there: alice may not write there: Forbidden: pass `create_pr=1` as a query parameter to create a Pull "
             "Request. The token may write to alice/... or acme/... or guild/...."),
            (["club/there", "--revision", "dev"], {}, 2,
             "club/there: alice may not write there: Forbidden: pass `create_pr=1` as a query parameter to create a Pull "
             "Request. The token may write to alice/... or acme/... or guild/...."),
            (["bob/secret"], {}, 2,
             "bob/secret: alice may not write there. "
             "The token may write to alice/... or acme/... or guild/...."),
            (["acme/there", "--private"], {}, 2,
             "acme/there: exists and is public. Make it private in its settings, or leave out --private."),
            (["acme/none", "--create-pr"], {}, 2,
             "acme/none: there is no such repository, so nothing can be proposed to it. "
             "Check the name, or leave out --create-pr and --revision refs/pr/N to create it."),
            (["acme/there", "--revision", "refs/pr/7"], {}, 2,
             "acme/there: there is no pull request refs/pr/7. Open one with --create-pr."),
            (["acme/there", "--revision", "refs/heads/x"], {}, 2,
             "--revision: 'refs/heads/x' is not a branch. Write its name alone, or refs/pr/N."),
            (["acme/there", "--revision", commit], {}, 2,
             f"--revision: {commit} is a commit, which cannot change. Name a branch."),
            (["acme/there", "--revision", "dev", "--create-pr"], {}, 2,
             "--create-pr, --revision: give one of them, not both; an open pull request is --revision refs/pr/N."),
            (["mix"], {}, 2, "mix: is not a repository's name. Write user/name, or organisation/name."),
            (["acme/no--such"], {}, 2,
             "acme/no--such: is not a repository's name: Cannot have -- or .. in repo_id: 'acme/no--such'."),
        ]  # fmt: skip
        results = machine.session(
            *((["push", "out", *arguments, "-q"], {"HF_TOKEN": TOKEN} | changes) for arguments, changes, _, _ in cases)
        )
        assert hub.received_bytes() == 0
        assert {name: history(hub, name) for name in hub.repositories} == {
            "acme/there": [""],
            "club/there": [""],
            "bob/secret": [""],
        }
    assert results == [Result(code, "", f"error: {message}\n") for _, _, code, message in cases]


def test_a_busy_hub_is_waited_for_as_it_says(tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        machine.checkpoint()
        hub.limit_rate("/api/whoami-v2", 1)
        hub.limit_rate("*/commit/main", 1)
        hub.fail("/api/models/acme/mix/revision/main", 429, RateLimit='"api";r=0;t=1')
        done = machine.moemerge("push", "out", "acme/mix")
    assert (done.code, done.out) == (0, f"{url}/acme/mix\n")
    assert done.err.count("acme/mix: the Hub asks to wait for 1 s (too many requests)\n") == 3


def test_what_fails_on_the_way_says_what_and_how_to_go_on(tmp_path):
    """One command line each, with what goes wrong before it."""
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        machine.checkpoint()
        hub.add("acme/mix", OLD)
        before = files(hub, "acme/mix")
        repository = hub.repositories["acme/mix"]
        cases: list[tuple[Callable[[], None], int, str]] = [
            (lambda: hub.fail("/api/whoami-v2", 500), 1, "the Hub answered with status 500: Told to fail. Try again later."),
            (lambda: hub.fail("/api/models/acme/mix", 403, code="GatedRepo", message="Access is restricted."), 2,
             "alice may not write there: Access is restricted. The token may write to alice/... or acme/... or guild/...."),
            (lambda: hub.fail("*/commit/main", 503), 1, "the Hub answered with status 503: Told to fail. Try again later." + COMPLETE),
            (lambda: hub.fail("*/commit/main", 400), 2, "the Hub refuses it: Told to fail." + COMPLETE),
            (lambda: hub.fail("*/validate-yaml", 400), 2, "the Hub refuses it: Told to fail." + COMPLETE),
            (lambda: hub.before("*/commit/main", lambda: hub.add("acme/mix", OLD)), 1,
             "somebody changed the repository in the meantime." + COMPLETE),
            (lambda: hub.storage_limits.update(acme=1000), 1,
             "the Hub has no room for it: Your storage patterns tripped our internal systems! Please contact us so we can "
             "verify your account. Make room, or push to another account." + COMPLETE),
        ]  # fmt: skip
        # The first weights arrive wrong, later runs find them.
        hub.corrupts_uploads = 1
        corrupt = machine.moemerge("push", "out", "acme/mix", "-q")
        for fail, code, message in cases:
            fail()
            if "room" in message:
                repository.objects.clear()
            done = machine.in_a_hurry("push", "out", "acme/mix", "-q")
            text = message.replace(COMPLETE, COMPLETE.format("out", "out", "acme/mix"))
            assert done == Result(code, "", f"error: acme/mix: {text}\n")
            hub.forget_faults()
        assert files(hub, "acme/mix") == before
    assert corrupt == Result(
        1,
        "",
        "error: acme/mix: the Hub answered with status 422: The object's size or hash is not what was announced. "
        f"Try again later.{COMPLETE.format('out', 'out', 'acme/mix')}\n",
    )
    unreachable = machine.moemerge("push", "out", "acme/mix", "-q")
    offline = machine.moemerge("push", "out", "acme/mix", "-q", HF_HUB_OFFLINE="1")
    assert (
        unreachable
        == offline
        == Result(
            1, "", "error: acme/mix: the Hub cannot be reached. Check the network and HF_HUB_OFFLINE, and try again.\n"
        )
    )


def test_a_folder_that_is_no_complete_checkpoint_or_has_no_licence_is_refused(tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        lost = machine.checkpoint("lost", sharded=True)
        (lost / SHARDS[1]).unlink()
        cut = machine.checkpoint("cut")
        (cut / SINGLE).write_bytes((cut / SINGLE).read_bytes()[:-1])
        machine.checkpoint("bare", card=b"# A mixture\n")
        headless = machine.checkpoint("headless")
        (headless / "README.md").unlink()
        linked = machine.checkpoint("linked")
        (tmp_path / "secret").write_text("private")
        (linked / "vocab.json").symlink_to(tmp_path / "secret")
        (tmp_path / "empty").mkdir()
        odd = machine.checkpoint("odd")
        (odd / ".env").write_text("private")
        (odd / "consolidated.safetensors").write_bytes(b"other")
        (odd / "gguf").mkdir()
        results = machine.session(
            *(["push", name, "alice/mix"] for name in ("lost", "cut", "bare", "headless", "linked", "empty", "none")),
            ["push", "headless", "alice/mix", "--license", "mit", "-q"],
            ["push", "odd", "alice/odd"],
        )
    refusals = [
        (1, f"error: {lost}: {INDEX} names 1 file(s) that are not there: {SHARDS[1]}. Download the model again."),
        (1, f"error: {cut / SINGLE}: tensor 'lm_head.weight': ends at byte 7560, but the file is 7559 bytes long: it was cut off."),
        (2, "error: bare/README.md: names no licence, and nobody may use a model that has none. Name it with --license NAME."),
        (2, "error: headless/README.md: names no licence, and nobody may use a model that has none. Name it with --license NAME."),
        (1, f"error: {linked / 'vocab.json'}: is a link to {tmp_path / 'secret'}, outside the model's folder. "
            "Copy or hard-link the file instead."),
        (2, f"error: {tmp_path / 'empty'}: has no config.json, so it is not a model that moemerge can read."),
        (2, "error: none: there is no such folder. Name the folder that holds the merged model."),
    ]  # fmt: skip
    assert results[:7] == [Result(code, "", message + "\n") for code, message in refusals]
    assert results[7] == Result(0, f"{url}/alice/mix\n", "")
    assert files(hub, "alice/mix")["README.md"] == b"---\nlicense: mit\n---\n"
    assert results[8].err.splitlines() == [
        "alice/odd: created",
        "odd: not sent, since no reader of the model needs it: consolidated.safetensors, gguf",
        "alice/odd: reading 4 files, and sending what is not there",
    ]
    assert without_attributes(files(hub, "alice/odd")).keys() == {"config.json", "README.md", SINGLE, "tokenizer.json"}


def looks_finished(hub: Hub, repo: str, revision: str = "main") -> list[bool]:
    """Of each commit from the first to the last, whether a reader would take it for a model."""
    commits = [*hub.repositories[repo].commit(revision).history()][::-1]
    return [bool({"config.json", INDEX} & commit.blobs.keys()) for commit in commits]


def test_shards_are_sent_one_by_one_and_the_model_is_finished_last(tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        out = machine.checkpoint(sharded=True)
        whole = local(out)
        sums = {name: (sha256(out / name), (out / name).stat().st_size) for name in SHARDS}
        done = machine.stream(
            "p = publisher('acme/mix')",
            "p.check_streaming(overwrite=False)",
            "p.begin_streaming()",
            f"for name in {SHARDS}:",
            "    print(p.send(out / name))",
            "    (out / name).unlink()",
            "print({name: held for name, held in p.held().items() if name != 'tokenizer.json'})",
            "print(p.finish(out))",
        )
    assert done.code == 0
    assert done.out.splitlines() == [
        "acme/mix: created",
        *(line for name, (sum_, _) in sums.items() for line in (f"acme/mix: holds {name}", sum_)),
        str(sums),
        f"{url}/acme/mix",
    ]
    assert without_attributes(files(hub, "acme/mix")) == whole
    assert history(hub, "acme/mix")[::-1] == ["initial commit", *(f"Add {n}" for n in SHARDS), "Complete the model"]
    assert looks_finished(hub, "acme/mix") == [False, False, False, True]


def test_streaming_over_a_model_needs_a_word_and_goes_on_where_it_was_cut_off(tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        out = machine.checkpoint(sharded=True)
        hub.add("acme/mix", OLD | llama(5, sharded=True))
        start = ("p = publisher('acme/mix')", "p.check_streaming(overwrite=True)", "p.begin_streaming()")
        refused = machine.stream("publisher('acme/mix').check_streaming(overwrite=False)")
        first = machine.stream(*start, f"p.send(out / '{SHARDS[0]}')")
        early = machine.stream(*start, f"(out / '{SHARDS[1]}').rename('later')", "p.finish(out)")
        (tmp_path / "later").rename(out / SHARDS[1])
        hub.reset()
        second = machine.stream(*start, "print([*p.held()])", f"p.send(out / '{SHARDS[1]}')", "print(p.finish(out))")
        assert hub.received_bytes(sha256(out / SHARDS[0])) == 0
        again = machine.stream("publisher('acme/mix').check_streaming(overwrite=False)")
    assert (
        refused.out
        == again.out
        == (
            f"RefusedError: acme/mix: main holds a model already (config.json, {INDEX}). "
            "Name another repository or --revision, or replace the model with --overwrite.\n"
        )
    )
    assert first.out.splitlines() == [
        "acme/mix: removing files of an older model: adapter_config.json, config.json, merges.txt ...",
        f"acme/mix: holds {SHARDS[0]}",
    ]
    assert early.out == (
        f"PublishError: acme/mix: main has no {SHARDS[1]}, so the model is not complete. "
        "Run the same command again: it sends what is missing.\n"
    )
    assert second.out.splitlines() == [f"['{SHARDS[0]}']", f"acme/mix: holds {SHARDS[1]}", f"{url}/acme/mix"]
    kept = {name: OLD[name] for name in ("notes.txt", "gguf/old.safetensors")}
    assert without_attributes(files(hub, "acme/mix")) == local(out) | kept
    assert looks_finished(hub, "acme/mix") == [True, False, False, False, True]


def test_shards_for_a_pull_request_leave_main_as_it_is(tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        out = machine.checkpoint(sharded=True)
        hub.add("guild/mix", OLD)
        first = machine.stream(
            "p = publisher('guild/mix', create_pr=True)",
            "p.check_streaming(overwrite=False)",
            "p.begin_streaming()",
            f"p.send(out / '{SHARDS[0]}')",
        )
        second = machine.stream(
            "p = publisher('guild/mix', revision='refs/pr/1')",
            "p.check_streaming(overwrite=False)",
            "p.begin_streaming()",
            "print(*[name for name in p.held() if name.startswith('model')])",
            f"p.send(out / '{SHARDS[1]}')",
            "print(p.finish(out))",
        )
    page = f"{url}/guild/mix/discussions/1"
    assert first.out.splitlines() == [
        f"guild/mix: opened {page}; --revision refs/pr/1 continues it",
        f"guild/mix: holds {SHARDS[0]}",
    ]
    assert second.out.splitlines() == [
        SHARDS[0],
        f"guild/mix: holds {SHARDS[1]}",
        "guild/mix: removing files of an older model: adapter_config.json, merges.txt, pytorch_model.bin",
        page,
    ]
    assert files(hub, "guild/mix") == OLD
    kept = {name: OLD[name] for name in ("notes.txt", "gguf/old.safetensors")}
    assert without_attributes(files(hub, "guild/mix", "refs/pr/1")) == local(out) | kept
    assert looks_finished(hub, "guild/mix", "refs/pr/1") == [False, False, False, True]


def test_a_shard_that_the_hub_holds_otherwise_is_an_error(tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = Author(tmp_path, url)
        out = machine.checkpoint()
        start = ("p = publisher('acme/mix')", "p.check_streaming(overwrite=False)", "p.begin_streaming()")
        hub.before("*/paths-info/*", lambda: hub.replace("acme/mix", SINGLE, b"other"))
        done = machine.stream(*start, f"p.send(out / '{SINGLE}')")
        hub.fail("*/commit/main", 503)
        failed = machine.stream(*start, f"p.send(out / '{SINGLE}')")
    other = hashlib.sha256(b"other").hexdigest()
    assert done.out.splitlines()[1:] == [
        f"PublishError: acme/mix: {SINGLE}: expected {(out / SINGLE).stat().st_size} bytes with SHA-256 {sha256(out / SINGLE)}, "
        f"the Hub holds 5 bytes with SHA-256 {other}. Send it again."
    ]
    assert failed.out == "PublishError: acme/mix: the Hub answered with status 503: Told to fail. Try again later.\n"


def test_the_card_says_where_each_model_comes_from_and_under_which_licence(tmp_path):
    hub = make_hub()
    for repo, seed, licence in (("acme/base", 0, "mit"), ("acme/fox", 1, "apache-2.0"), ("acme/code", 2, "llama3")):
        hub.add(repo, llama(seed) | {"README.md": f"---\nlicense: {licence}\n---\n".encode()})
    with hub.running() as url:
        machine = Author(tmp_path, url)
        # As a merge will: the cards of the sources lie beside their configs.
        machine.python(
            "-c",
            "from huggingface_hub import snapshot_download as get; import sys\nfor r in sys.argv[1:]: get(r)",
            "acme/base",
            "acme/fox",
            "acme/code",
        )
        config = machine.write_config("acme/base", "acme/fox", "acme/code")
        done, pushed = machine.session([config, "out", "-q"], ["push", "out", "alice/mix"])
    assert done == Result(0, "", "")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["acme/base", "acme/fox", "acme/code"]
    assert (card.data.to_dict()["base_model_relation"], card.data.license) == ("merge", "llama3")
    commits = {name: hub.repositories[f"acme/{name}"].commit("main").hash for name in ("base", "fox", "code")}
    assert f"norms come from `acme/base` at `{commits['base']}`, each" in card.text
    assert f"| fox | `acme/fox` at `{commits['fox']}` |" in card.text
    assert f"| code | `acme/code` at `{commits['code']}` |" in card.text
    assert str(tmp_path) not in card.content
    assert (pushed.code, pushed.out) == (0, f"{url}/alice/mix\n")


def answered(kind: type[Exception], status: int, **headers: str) -> Exception:
    """An error of the client with the Hub's answer, made without the response of either HTTP library."""
    error = kind.__new__(kind, "no words")
    error.response = SimpleNamespace(status_code=status, headers=headers, url=f"{constants.ENDPOINT}/api")
    error.server_message = None
    return error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (answered(HfHubHTTPError, 429), PublishError, "the Hub asks for fewer requests. Try again later."),
        (answered(HfHubHTTPError, 429, **{"Retry-After": "7"}), PublishError, "the Hub asks for fewer requests. Try again in 7 s."),
        (answered(RevisionNotFoundError, 404), RefusedError, "the repository has no revision 'dev'."),
        (RuntimeError("an odd\n thing."), PublishError, "could not be sent: an odd thing."),
        (RuntimeError(), PublishError, "could not be sent: RuntimeError."),
    ],
)  # fmt: skip
def test_errors_are_explained(error, kind, message):
    assert explain(error, Repository("acme/mix", revision="dev"), Account("alice", ())) == (kind, message)


def test_of_an_error_with_a_cause_the_cause_is_told():
    error = RuntimeError("wrapped")
    error.__cause__ = ValueError("the xet service is gone")
    to = Repository("acme/mix")
    assert explain(error, to, Account("", ())) == (PublishError, "could not be sent: the xet service is gone.")


@pytest.mark.parametrize(
    "ask", [Publisher.create, Publisher.held, lambda p: p.check_replaced("mixtral", overwrite=False)]
)
def test_a_repository_that_is_gated_is_not_taken_for_one_that_is_not_there(ask):
    """The client's error for the one is a kind of its error for the other."""

    def refuse(*_, **__):
        raise answered(GatedRepoError, 403)

    publisher = Publisher(Repository("acme/mix"), print)
    publisher._api = SimpleNamespace(model_info=refuse, list_repo_tree=refuse)
    publisher._account = Account("alice", ("alice/...",))
    with pytest.raises(RefusedError) as caught:
        ask(publisher)
    assert str(caught.value) == "acme/mix: alice may not write there. The token may write to alice/...."


def test_an_interrupt_says_that_not_everything_was_sent():
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    publisher = Publisher(Repository("acme/mix"), print)
    publisher._api = SimpleNamespace(list_repo_tree=interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"^not everything was sent to acme/mix\.$"):
        publisher.held()


def test_pickles_are_not_sent(tmp_path):
    weights = make_model(tmp_path / "out") / SINGLE
    torch.save(load_file(weights), tmp_path / "out" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(RefusedError) as caught:
        checkpoint_files(tmp_path / "out", print)
    told = f"{tmp_path / 'out'}: pytorch_model.bin: only safetensors are sent. Merge or convert the model first."
    assert str(caught.value) == told

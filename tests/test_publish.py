"""Pushing to the Hub: the real client against a Hub on this machine, each command line in its own process."""

import hashlib
from pathlib import Path

from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForCausalLM

from moemerge.checkpoint.index import read_json
from moemerge.config import load_config
from moemerge.merging import merge
from moemerge.planning import plan_merge
from tests.hub_server import Hub, User
from tests.models import assert_close, logits, write_config
from tests.test_hub import INDEX, SHARDS, Machine, Result, llama

TOKEN = "hf_alice_writes"  # noqa: S105  of the test's own Hub
CARD = b"---\nlicense: mit\n---\n# A mixture\n"
OLD = {
    ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n",
    "pytorch_model.bin": b"old weights", "adapter_config.json": b"{}", "merges.txt": b"old", "notes.txt": b"kept",
    "gguf/old.safetensors": b"kept",
}  # fmt: skip
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


STREAM = """
import sys
from pathlib import Path
from moemerge.errors import MoemergeError
from moemerge.publish import Destination, Publisher

def publisher(*arguments, **options):
    p = Publisher(Destination(*arguments, **options), print)
    p.open()
    return p

out = Path("out")
try:
"""
CAUGHT = """
except MoemergeError as error:
    print(f"{type(error).__name__}: {error}")
"""


def files(hub: Hub, repo: str, revision: str = "main") -> dict[str, bytes]:
    return {name: content if isinstance(content, bytes) else content.read_bytes()
            for name, content in hub.repositories[repo].find(revision)[1].items()}  # fmt: skip


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
        merge(plan_merge(load_config(path), max_shard_bytes=60_000), tmp_path / "out")
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
        hub.fail("*", 400, host="uploads", method="PUT", message="Told to fail")
        broken = machine.moemerge("push", "out", "acme/mix", "--quiet")
        assert files(hub, "acme/mix") == before
        sent = {name: hub.received_bytes(sha256(out / name)) for name in SHARDS}
        hub.reset()
        again = machine.moemerge("push", "out", "acme/mix", "--quiet")
        sent_again = {name: hub.received_bytes(sha256(out / name)) for name in SHARDS}
    assert broken == Result(
        1, "", "error: acme/mix: the Hub's storage answered with status 400: Told to fail. Try again later."
        + COMPLETE.format("out", "out", "acme/mix") + "\n",
    )  # fmt: skip
    assert again == Result(0, f"{url}/acme/mix\n", "")
    sizes = {name: (out / name).stat().st_size for name in SHARDS}
    whole = [name for name in SHARDS if sent[name] == sizes[name]]
    assert len(whole) >= 1
    assert sum(sent_again[name] > 0 for name in SHARDS) == 1
    assert sum(sent_again.values()) in sizes.values()


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
    stale = ["adapter_config.json", "merges.txt", *SHARDS, INDEX, "pytorch_model.bin"]
    assert done.err.splitlines() == [
        "acme/mix: reading 4 files, and sending what is not there",
        f"acme/mix: removing {', '.join(stale)} of an older model",
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
        private, branch, proposed, more, same = machine.session(
            ["push", "out", "alice/mine", "--private"],
            ["push", "out", "alice/mine", "--revision", "dev/v2", "--private"],
            ["push", "out", "acme/mine", "--quiet"],
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
    assert (
        refused.err.rstrip().splitlines()[-1].startswith("moemerge.errors.RefusedError: club/mix: alice may not write")
    )
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
             'alice/mix: alice may not write there: You don\'t have the rights to create a model under the namespace "alice". '
             "The token may write to acme/... or alice/one."),
            (["club/mix"], {}, 2,
             'club/mix: alice may not write there: You don\'t have the rights to create a model under the namespace "club". '
             "The token may write to alice/... or acme/... or guild/...."),
            (["club/there"], {}, 2,
             "club/there: alice may not write there: Forbidden: pass `create_pr=1` as a query parameter to create a Pull "
             "Request. The token may write to alice/... or acme/... or guild/...."),
            (["club/there", "--revision", "dev"], {}, 2,
             "club/there: alice may not write there: Forbidden: pass `create_pr=1` as a query parameter to create a Pull "
             "Request. The token may write to alice/... or acme/... or guild/...."),
            (["bob/secret"], {}, 2,
             'bob/secret: alice may not write there: You don\'t have the rights to create a model under the namespace "bob". '
             "The token may write to alice/... or acme/... or guild/...."),
            (["acme/there", "--private"], {}, 2,
             "acme/there: exists and is public. Make it private in its settings, or leave out --private."),
            (["acme/none", "--create-pr"], {}, 2,
             "acme/none: there is no such repository, so nothing can be proposed to it. "
             "Check the name, or leave out --create-pr and --revision refs/pr/N to create it."),
            (["acme/there", "--revision", "refs/pr/7"], {}, 2,
             "acme/there: there is no pull request refs/pr/7. Open one with --create-pr."),
            (["acme/there", "--revision", "refs/heads/x"], {}, 2,
             "--revision: 'refs/heads/x' is no branch. Write its name alone, or refs/pr/N."),
            (["acme/there", "--revision", commit], {}, 2,
             f"--revision: {commit} is a commit, which cannot change. Name a branch."),
            (["acme/there", "--revision", "dev", "--create-pr"], {}, 2,
             "--create-pr, --revision: give one of them, not both; an open pull request is --revision refs/pr/N."),
            (["mix"], {}, 2, "mix: is no repository's name. Write user/name, or organisation/name."),
            (["acme/no--such"], {}, 2,
             "acme/no--such: is no repository's name: Cannot have -- or .. in repo_id: 'acme/no--such'."),
        ]  # fmt: skip
        results = machine.session(*((["push", "out", *arguments, "-q"], changes) for arguments, changes, _, _ in cases))
        assert hub.received_bytes() == 0
        assert {name: history(hub, name) for name in hub.repositories} == {
            "acme/there": [""], "club/there": [""], "bob/secret": [""],
        }  # fmt: skip
    assert results == [Result(code, "", f"error: {message}\n") for _, _, code, message in cases]

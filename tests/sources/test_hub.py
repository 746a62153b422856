"""Models on the Hub: the real client against a Hub on this machine, each command line in its own process."""

import hashlib
import json
import os
import random
import shutil
import ssl
import struct
import urllib.request
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import pytest
import yaml

from moemerge.checkpoint.header import TensorInfo, build_header, read_header
from moemerge.checkpoint.index import PICKLE_INDEX, build_index
from moemerge.config.loading import parse_config
from moemerge.errors import CheckpointError, SourceError
from moemerge.planning.planner import plan_merge
from moemerge.planning.tokenizer_files import COPIED_FILES
from moemerge.sources.hub import SMALL_FILES
from moemerge.sources.local import resolve_file, weights_named
from moemerge.sources.model_folder import open_model
from moemerge.sources.reference import local_folders, parse_reference
from moemerge.sources.retries import _may_pass
from moemerge.sources.tensor_tables import read_tensor_table
from tests.support.hub_server import Files, Hub
from tests.support.machine import SINGLE, Machine, Result
from tests.support.models import tokenizer

LAYERS = 2
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
BRANCH = "acme/code@dev/v2"
TOKENIZER: Files = {
    "tokenizer.json": tokenizer().backend_tokenizer.to_str().encode(),
    "tokenizer_config.json": b'{"bos_token": "<s>"}',
    "tekken.json": b'{"vocab": []}',
    "special_tokens_map.json": b'{"eos_token": "</s>"}',
    "chat_template.jinja": b"{{ messages }}",
    "chat_template.json": b'{"chat_template": ""}',
    "generation_config.json": b'{"eos_token_id": 2}',
}
STRANGERS: Files = {
    "README.md": b"# A model",
    ".gitattributes": b"*.bin filter=lfs",
    "consolidated.safetensors": b"the same again",
    "pytorch_model.bin": b"the same again",
    "consolidated.safetensors.index.json": b"{}",
    "original/params.json": b"{}",
    "original/tokenizer.model": b"",
    "onnx/model.onnx": b"the same again",
    "training_args.bin": b"",
}
ABSENT = (
    "there is no such folder here, it is not in the Hub's cache, and the Hub cannot be reached. "
    "Check the name, the network, and HF_HUB_OFFLINE."
)
PARTIAL = (
    "only a part of it is in the Hub's cache, and the Hub cannot be reached. Check the network and HF_HUB_OFFLINE."
)
NOT_FOUND = (
    "there is no such folder here and no such repository on the Hub, or it is private. "
    "Check the name; for a private one log in with `hf auth login`."
)
GATED = (
    "is gated. Accept its terms on HUB/acme/gated, then log in with `hf auth login`; who has done both may have to wait "
    "for the authors."
)
FETCH = """
import sys
from moemerge.sources.reference import parse_reference
from moemerge.sources.hub import fetch_small_files, fetch_weights

for text in sys.argv[1:]:
    reference = parse_reference(text)
    fetch_weights(reference, fetch_small_files(reference, print), print)
"""


def shapes(hidden: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(LAYERS):
        found |= {f"model.layers.{layer}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        found |= {f"model.layers.{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        found |= {f"model.layers.{layer}.mlp.{name}_proj.weight": (12, hidden) for name in ("gate", "up")}
        found |= {f"model.layers.{layer}.mlp.down_proj.weight": (hidden, 12)}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def llama(seed: int, *, hidden: int = 8, vocab: int = 16, sharded: bool = False) -> Files:
    """The files of a random model; those of all seeds are near to each other, as fine-tunes are."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": 12,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": vocab,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    }  # fmt: skip
    first, rng = random.Random(0), random.Random(seed)
    tensors = shapes(hidden, vocab)
    stored = {
        name: struct.pack("<f", first.choice((-1, 1)) * (1 + 0.1 * rng.uniform(-1, 1))) * prod(shape)
        for name, shape in tensors.items()
    }
    homes = {name: SHARDS["layers.1" in name] if sharded else SINGLE for name in tensors}
    files: Files = {"config.json": json.dumps(config).encode()}
    for home in sorted(set(homes.values())):
        names = [name for name in tensors if homes[name] == home]
        header = build_header(((name, "F32", tensors[name], len(stored[name])) for name in names), {"format": "pt"})
        files[home] = header + b"".join(stored[name] for name in names)
    if sharded:
        files[INDEX] = build_index(homes, sum(map(len, stored.values()))).encode()
    return files


def make_hub() -> Hub:
    """A base in two shards, an expert in one file, and one whose `main` does not fit but whose branch does."""
    hub = Hub()
    hub.add("acme/base", llama(0, sharded=True) | TOKENIZER | STRANGERS)
    hub.add("acme/fox", llama(1) | STRANGERS)
    hub.add("acme/code", llama(2, hidden=16) | STRANGERS)
    hub.add("acme/code", llama(3) | STRANGERS, "dev/v2")
    return hub


def weights(files: set[str] | list[str]) -> list[str]:
    return [name for name in files if name.endswith((".safetensors", ".bin"))]


def facts(result: Result) -> dict[str, Any]:
    """The plan that was printed, without what depends on the disk."""
    assert (result.code, result.err.count("error")) == (0, 0), result.err
    return json.loads(result.out) | {"free_bytes": None}


@dataclass(frozen=True)
class Planned:
    """A merge over the Hub, which stopped thereafter, and the plan that is made of what the cache holds since."""

    hub: Hub
    machine: Machine
    config: str
    merged: Result
    result: Result

    def copy(self, folder: Path, hub_url: str = "") -> Machine:
        """Another machine with the same cache; its Hub is the one that stopped."""
        shutil.copytree(self.machine.cache, folder / "cache", symlinks=True)
        return Machine(folder, hub_url or self.machine.hub_url)


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Planned:
    hub = make_hub()
    hub.page_entries = 3
    with hub.running() as url:
        machine = Machine(tmp_path_factory.mktemp("machine"), url)
        config = machine.write_config("acme/base", "acme/fox", BRANCH)
        merged = machine.moemerge(config, "out", "--cache-dir", str(machine.cache), HF_HUB_CACHE="/dev/null")
        result = machine.moemerge("plan", config, "--json", "--quiet")
    return Planned(hub, machine, config, merged, result)


def test_only_config_tokenizer_index_and_the_shards_it_names_are_requested(planned):
    assert planned.merged.err.splitlines()[:9] == [
        "acme/base: looking it up on the Hub",
        "acme/fox: looking it up on the Hub",
        f"{BRANCH}: looking it up on the Hub",
        "acme/base: reading the headers of 2 file(s) on the Hub",
        "acme/fox: reading the headers of 1 file(s) on the Hub",
        f"{BRANCH}: reading the headers of 1 file(s) on the Hub",
        f"acme/base: downloading {SHARDS[0]}, {SHARDS[1]}",
        f"acme/fox: downloading {SINGLE}",
        f"{BRANCH}: downloading {SINGLE}",
    ]
    assert planned.hub.requested("acme/base") == {"README.md", "config.json", INDEX, *SHARDS, *TOKENIZER}
    assert planned.hub.requested("acme/fox") == {"README.md", "config.json", SINGLE}
    assert planned.hub.requested("acme/code") == {"README.md", "config.json", SINGLE}
    for repo in planned.hub.repositories:
        # Of a file of weights, the length of its header, its header, some rows of three matrices of each of its layers,
        # and the whole; of any other, the whole.
        times = Counter(planned.hub.downloaded(repo))
        rows = {path: 3 if path in SHARDS else 3 * LAYERS for path in planned.hub.requested(repo)}
        assert times == {path: 3 + rows[path] if path in weights([path]) else 1 for path in rows}


def test_the_revision_is_the_one_that_was_named_and_files_keep_their_names(planned):
    plan = facts(planned.result)
    assert [source["reference"] for source in plan["sources"]] == ["acme/base", "acme/fox", BRANCH]
    commits = [planned.hub.repositories[r].find(b)[0] for r, b in (("acme/base", "main"), ("acme/code", "dev/v2"))]
    base, fox, code = (Path(source["folder"]) for source in plan["sources"])
    assert [base.name, code.name] == commits
    assert plan["copied_files"] == [name for name in COPIED_FILES if name in TOKENIZER]
    origins = {tensor["from"] for tensor in plan["tensors"]} - {"router"}
    assert origins == {str(base / SHARDS[0]), str(base / SHARDS[1]), str(fox / SINGLE), str(code / SINGLE)}


def test_a_file_that_is_copied_is_downloaded():
    assert [name for name in COPIED_FILES if not any(fnmatch(name, pattern) for pattern in SMALL_FILES)] == []


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "unreachable"])
def test_without_the_hub_the_same_plan_comes_from_the_cache(planned, environment):
    again = planned.machine.moemerge("plan", planned.config, "--json", "--quiet", **environment)
    assert again.err == ""
    assert facts(again) == facts(planned.result)


def test_a_model_that_is_not_complete_in_the_cache_is_one_clear_error(planned, tmp_path):
    machine = planned.copy(tmp_path)
    (machine.snapshot("acme/fox") / SINGLE).unlink()
    (machine.snapshot("acme/code") / SINGLE).resolve().unlink()
    (machine.snapshot("acme/base") / SHARDS[1]).unlink()
    config = machine.write_config("acme/base", "acme/fox", BRANCH)
    commands = [["plan", config, "-q"], ["inspect", "acme/base"], ["inspect", "acme/fox"], ["inspect", BRANCH]]
    results = machine.session(*commands, ["inspect", "acme/none"], HF_HUB_OFFLINE="1")
    assert results[0] == Result(1, "", f"error: acme/base: {PARTIAL}\n")
    for result, reference in zip(results[1:4], ("acme/base", "acme/fox", BRANCH), strict=True):
        assert (result.code, result.err.splitlines()[1:]) == (1, [f"error: {reference}: {PARTIAL}"])
    assert results[4].err.splitlines()[1:] == [f"error: acme/none: {ABSENT}"]


@pytest.mark.skipif(
    not hasattr(huggingface_hub.errors, "IncompleteSnapshotError"), reason="older clients do not know what is missing"
)
def test_a_tokenizer_that_is_not_in_the_cache_is_missed(planned, tmp_path):
    machine = planned.copy(tmp_path)
    (machine.snapshot("acme/base") / "tokenizer.json").unlink()
    result = machine.moemerge("inspect", "acme/base", HF_HUB_OFFLINE="1")
    assert (result.code, result.err.splitlines()[1:]) == (1, [f"error: acme/base: {PARTIAL}"])


def test_what_the_hub_does_not_give_is_one_clear_error(planned, tmp_path):
    hub = make_hub()
    hub.tokens = {"hf_reader": {"acme/mine"}}
    hub.add("acme/gated", llama(4), gated=True)
    hub.add("acme/mine", llama(4), gated=True)
    hub.add("acme/busy", llama(4), status=503)
    hub.add("acme/forbidden", llama(4), status=403)
    hub.add("acme/paper", {"config.json": b"{}", "README.md": b""})
    hub.add("acme/gguf", {"a-q8_0.gguf": b"", "a-q4_0.gguf": b"", "README.md": b"", "mmproj-a.gguf": b""})
    hub.add("acme/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    hub.add("acme/lost", {k: v for k, v in llama(4, sharded=True).items() if k != SHARDS[1]} | STRANGERS)
    del hub.repositories["acme/fox"]  # its small files are in the cache
    blobs = tmp_path / "cache" / "models--acme--blocked" / "blobs"
    hub.add("acme/blocked", llama(4))
    reader, stranger = {"HF_TOKEN": "hf_reader"}, {"HF_TOKEN": "hf_stranger"}
    expected: list[tuple[str, dict[str, str], str]] = [
        ("acme/none", {}, NOT_FOUND),
        ("acme/pape", {}, f"{NOT_FOUND} Did you mean acme/paper?"),
        ("none", {}, NOT_FOUND),
        ("acme/code@v9", {}, "the repository has no revision 'v9'. Did you mean main or dev/v2?"),
        ("acme/code@dev/v1", {}, "the repository has no revision 'dev/v1'. Did you mean dev/v2?"),
        ("acme/gated", {}, GATED),
        ("acme/busy", {}, "the Hub answered with status 503, Told to fail. Try again later, or check your token."),
        ("acme/forbidden", {}, "the Hub answered with status 403, Told to fail. Try again later, or check your token."),
        ("acme/no--such", {}, "could not be downloaded: Cannot have -- or .. in repo_id: 'acme/no--such'."),
        (
            "acme/paper",
            {},
            "the repository has no model.safetensors and no pytorch_model.bin, so it has no complete weights that moemerge "
            "can read.",
        ),
        (
            "acme/lost",
            {},
            f"the repository has no {SHARDS[1]}, so it has no complete weights that moemerge can read.",
        ),
        ("acme/fox", {}, NOT_FOUND),
        ("acme/blocked", {}, f"could not be downloaded: [Errno 17] File exists: '{blobs}'."),
        (
            "acme/gguf",
            {},
            "the repository holds 2 GGUF files. Write acme/gguf:NAME with one of these names, or with the end of one: "
            "a-q4_0.gguf, a-q8_0.gguf.",
        ),
        (
            "acme/gguf:q4_k_m",
            {},
            "the repository holds no GGUF file called q4_k_m. Write acme/gguf:NAME with one of these names, or with the end "
            "of one: a-q4_0.gguf, a-q8_0.gguf.",
        ),
        ("acme/adapter", {}, "is a LoRA adapter, not a model. Write it after its base model: model+acme/adapter."),
        ("acme/gated", reader, GATED),
        ("acme/none", reader, NOT_FOUND),
        (
            "acme/paper",
            stranger,
            "the Hub answered with status 401, Invalid credentials in Authorization header. Try again later, or check "
            "your token.",
        ),
    ]
    with hub.running() as url:
        machine = planned.copy(tmp_path, url)
        (machine.snapshot("acme/fox") / SINGLE).unlink()
        blobs.parent.mkdir()
        blobs.write_text("in the way")
        results = machine.session(
            *((["inspect", reference], environment) for reference, environment, _ in expected),
            (["inspect", "acme/mine"], reader),
        )
    for (reference, _, message), result in zip(expected, results, strict=False):
        passing = (" on the Hub", "; trying again in 2 s")
        said = [line.replace(url, "HUB") for line in result.err.splitlines() if not line.endswith(passing)]
        wrong = ("is a ", "the repository has no revision", "the repository holds ")
        is_wrong_name = NOT_FOUND in message or message.startswith(wrong)
        assert (result.code, said, result.out) == (1 + is_wrong_name, [f"error: {reference}: {message}"], "")
    assert results[-1].code == 0, results[-1].err
    assert weights(hub.requested("acme/lost")) == []
    assert hub.downloaded("acme/gated") == []


def test_an_unreachable_hub_is_one_clear_error(planned, tmp_path):
    machine = planned.copy(tmp_path)
    (machine.snapshot("acme/fox") / SINGLE).unlink()
    none = machine.write_config("acme/none", "acme/fox", BRANCH)
    named = Path(none).name
    part = machine.write_config("acme/base", "acme/fox", BRANCH)
    assert machine.session(["plan", none, "--quiet"], ["plan", part, "--quiet"]) == [
        Result(1, "", f"error: {named}: 1 problem:\n  - line 1: base_model: acme/none: {ABSENT}\n"),
        Result(1, "", f"error: acme/fox: {PARTIAL}\n"),
    ]


def test_models_that_do_not_fit_are_refused_before_any_weights_are_requested(tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = Machine(tmp_path, url)
        result = machine.moemerge("plan", machine.write_config("acme/base", "acme/fox", "acme/code"), "--quiet")
    assert result == Result(
        2,
        "",
        "error: These models cannot be merged:\n"
        "  - experts[1] acme/code: hidden_size is 16, but the base model's is 8\n",
    )
    for repo in hub.repositories:
        assert "config.json" in hub.downloaded(repo)
        assert weights(hub.requested(repo)) == []


def test_weights_are_those_that_a_folder_with_the_same_files_would_be_read_from(tmp_path):
    config, bins = {"config.json": b"{}"}, ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    pickles = {PICKLE_INDEX: build_index({"a": bins[0], "b": bins[1]}, 2).encode(), bins[0]: b"1", bins[1]: b"2"}
    hub = Hub()
    hub.add("acme/old", config | {"pytorch_model.bin": b"1", "training_args.bin": b"2"})
    hub.add("acme/older", config | pickles | {"training_args.bin": b"3"})
    hub.add("acme/converted", config | pickles | {SINGLE: b"4"})
    hub.add(
        "acme/odd",
        config
        | {INDEX: build_index({"a": "[m]*.safetensors"}, 1).encode(), "[m]*.safetensors": b"5", "m1.safetensors": b"6"},
    )
    hub.add(
        "acme/both",
        config | {INDEX: build_index({"a": "m1.safetensors"}, 1).encode(), "m1.safetensors": b"7", SINGLE: b"8"},
    )
    with hub.running() as url:
        done = Machine(tmp_path, url).python("-c", FETCH, *hub.repositories, HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert done == Result(
        0,
        "acme/old: downloading pytorch_model.bin\n"
        f"acme/older: downloading {bins[0]}, {bins[1]}\n"
        f"acme/converted: downloading {SINGLE}\n"
        "acme/odd: downloading [m]*.safetensors\n"
        f"acme/both: downloading {SINGLE}\n",
        "",
    )
    assert weights(hub.downloaded("acme/old")) == ["pytorch_model.bin"]
    assert weights(hub.downloaded("acme/older")) == bins
    assert weights(hub.downloaded("acme/converted")) == [SINGLE]
    assert weights(hub.downloaded("acme/odd")) == ["[m]*.safetensors"]
    assert weights(hub.downloaded("acme/both")) == [SINGLE]


def test_a_planted_link_is_refused(planned, tmp_path):
    machine = planned.copy(tmp_path)
    secret = tmp_path / "secret"
    secret.write_bytes(b"private")
    base, fox, code = (machine.snapshot(repo) for repo in ("acme/base", "acme/fox", "acme/code"))
    beside = machine.cache / "blobs"  # where blobs of all repositories lie, but this is none of them
    beside.mkdir()
    (beside / "secret").write_bytes(b"private")
    other = (fox / SINGLE).resolve()
    links = {
        "acme/fox": (fox / SINGLE, secret),
        BRANCH: (code / SINGLE, beside / "secret"),
        "acme/base": (base / SHARDS[0], other),
    }
    for link, target in links.values():
        plant(link, target)
    results = machine.session(*(["inspect", reference] for reference in links), HF_HUB_OFFLINE="1")
    for result, (link, target) in zip(results, links.values(), strict=True):
        assert (result.code, result.err.splitlines()[1:]) == (
            1,
            [
                f"error: {link}: is a link to {target}, out of the Hub's cache that it lies in. Download the model again."
            ],
        )


def plant(link: Path, target: Path) -> None:
    link.unlink()
    link.symlink_to(target)


def plan_of_folders(*folders: Path):
    base, *experts = map(str, folders)
    document = {"base_model": base, "gate_mode": "random", "experts": [{"source_model": expert} for expert in experts]}
    return plan_merge(parse_config(yaml.safe_dump(document), ""))


def test_a_planted_tokenizer_is_refused_and_a_lost_one_noticed(planned, tmp_path):
    machine = planned.copy(tmp_path)
    folders = [machine.snapshot(repo) for repo in ("acme/base", "acme/fox", "acme/code")]
    tokenizer = folders[0] / "tokenizer.json"
    assert tokenizer in plan_of_folders(*folders).copied_files.values()
    blob = tokenizer.resolve()
    (tmp_path / "secret").write_text("private")
    plant(blob, tmp_path / "secret")  # the snapshot's own link is as it was
    with pytest.raises(CheckpointError, match=r"tokenizer.json: is a link to .*/secret, out of the Hub's cache"):
        plan_of_folders(*folders)
    for target in (tmp_path / "gone", blob):
        plant(blob, target)  # to nowhere, then in a ring
        with pytest.raises(CheckpointError) as caught:
            plan_of_folders(*folders)
        assert str(caught.value) == f"{tokenizer}: there is no such file, or it is a link that leads nowhere."


def test_blobs_that_repositories_share_are_followed(planned, tmp_path):
    """huggingface_hub 2.4 puts files from Xet into `blobs` of the cache itself, with a link in the repository's."""
    machine = planned.copy(tmp_path)
    fox = machine.snapshot("acme/fox")
    blob = (fox / SINGLE).resolve()
    shared = machine.cache / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    model = open_model(str(fox), lambda _: None)
    assert {tensor.path for tensor in read_tensor_table(model, lambda _: None).values()} == {fox / SINGLE}
    assert resolve_file(fox, SINGLE).resolve() == shared


def test_a_download_that_broke_off_is_resumed(tmp_path):
    hub = Hub()
    hub.add("acme/large", llama(5, vocab=330_000))  # 21 MB: the client keeps what it has in pieces of 10 MiB
    hub.breaks_off = {SINGLE}
    with hub.running() as url:
        machine = Machine(tmp_path, url)
        first = machine.python("-c", FETCH, "acme/large")
        if first.code:  # older clients leave it to the next run
            assert "SourceError: acme/large: could not be downloaded" in first.err
            assert machine.python("-c", FETCH, "acme/large").code == 0
    starts = [request.start for request in hub.requests if request.path == SINGLE and request.method == "GET"]
    assert len(starts) == 2
    assert starts[0] == 0 < starts[1]
    assert (machine.snapshot("acme/large") / SINGLE).read_bytes() == llama(5, vocab=330_000)[SINGLE]


def stored_bytes(tensor: TensorInfo) -> bytes:
    return tensor.path.read_bytes()[tensor.start : tensor.start + tensor.nbytes]


def fingerprints(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and {"blobs", "snapshots"} & set(path.parts)
    }


def test_a_merge_from_the_hub_is_complete_and_leaves_the_cache_as_it_was(planned, tmp_path):
    hub = make_hub()
    with hub.running() as url:
        machine = planned.copy(tmp_path, url)
        before = fingerprints(machine.cache)
        config = machine.write_config("acme/base", "acme/fox", BRANCH)
        merged, inspected = machine.session([config, "out", "--quiet"], ["inspect", "out", "--json"])
    assert merged == Result(0, "", "")
    assert fingerprints(machine.cache) == before
    assert len(before) == 2 * (len(TOKENIZER) + 11)  # a blob and a link of each
    assert json.loads(inspected.out)["warnings"] == []
    out = tmp_path / "out"
    for name, content in TOKENIZER.items():
        assert (out / name).read_bytes() == content
    assert [repo in (out / "README.md").read_text() for repo in ("acme/base", "acme/fox", "acme/code")] == [True] * 3
    found = {name: tensor for path in out.glob("model*.safetensors") for name, tensor in read_header(path).items()}
    for expert, reference in enumerate(("acme/fox", "acme/code")):
        source = read_header(machine.snapshot(reference) / SINGLE)
        for layer in range(LAYERS):
            for ours, theirs in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
                merged_tensor = found[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{ours}.weight"]
                assert stored_bytes(merged_tensor) == stored_bytes(
                    source[f"model.layers.{layer}.mlp.{theirs}_proj.weight"]
                )


@pytest.mark.parametrize("text", ["~no-such-user/model", "x" * 5000])
def test_a_reference_that_cannot_be_looked_up_is_a_clear_error(text):
    with pytest.raises(SourceError, match=r": cannot be looked up: (Could not determine home|File name too long)"):
        parse_reference(text)


def test_the_server_sends_ranges_and_pages_as_the_hub_does():
    hub = make_hub()
    hub.page_entries = 4
    with hub.running() as url:
        part = urllib.request.Request(f"{url}/acme/base/resolve/main/config.json", headers={"Range": "bytes=1-9"})  # noqa: S310
        with urllib.request.urlopen(part, timeout=10) as answer:  # noqa: S310  its address is the test's own
            content = hub.repositories["acme/base"].find("main")[1]["config.json"]
            assert (answer.status, answer.read()) == (206, content[1:10])
            assert answer.headers["Content-Range"] == f"bytes 1-9/{len(content)}"
            assert answer.headers["X-Repo-Commit"] == hub.repositories["acme/base"].find("main")[0]
        api = huggingface_hub.HfApi(endpoint=url)
        listed = {entry.path for entry in api.list_repo_tree("acme/base", recursive=True)}
    assert listed == {*hub.repositories["acme/base"].find("main")[1], "original", "onnx"}


def test_what_is_no_reference_leads_to_no_folder():
    assert local_folders("no such/folder/here") == []


@pytest.mark.parametrize("named", [3, "../model.safetensors", "pytorch_model.bin"])
def test_weights_that_a_config_names_are_safetensors_beside_it(named):
    with pytest.raises(CheckpointError) as caught:
        weights_named({"transformers_weights": named})
    assert str(caught.value) == (
        f"config.json: transformers_weights is {named!r}, where a safetensors file beside it is expected."
    )


def test_a_certificate_that_is_wrong_is_not_asked_again():
    error = RuntimeError("while connecting")
    error.__cause__ = ssl.SSLCertVerificationError("self-signed certificate")
    assert not _may_pass(error)
    assert _may_pass(ConnectionResetError())

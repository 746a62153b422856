"""A merged model's tokenizer gives the base's ids, whichever class transformers takes for the new model type."""

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, normalizers
from transformers import AutoTokenizer

from moemerge.checks.repairing import repair
from moemerge.checks.verification import verify_merge
from moemerge.config.loading import load_config
from moemerge.errors import RefusedError, RouterError
from moemerge.families.dense import DENSE_FAMILIES
from moemerge.families.selection import MOE_FAMILIES
from moemerge.merging.merger import merge
from moemerge.model_card.markdown import as_text
from moemerge.passes import tokens
from moemerge.passes.proving import Proof
from moemerge.planning import tokenizer_proof
from moemerge.planning.options import PlanOptions
from moemerge.planning.planner import plan_merge
from moemerge.planning.tokenizer_files import TEMPLATES
from moemerge.publish.folder import checkpoint_files, name_in_repository
from tests.cli.test_cli import NO_TORCH, run
from tests.publish.test_publish import Author, make_hub
from tests.routers.test_routers import llama_2_tokenizer
from tests.support.models import edit_json, make_model, tokenizer, write_config

IN_5 = int(version("transformers").partition(".")[0]) >= 5
TEXTS = [
    "The quick  brown fox\n\n  jumps.",
    " a",
    "it's IT'S 12,5",
    "é 你 🙂 x\u0301",
    "a<s> fox </s>b<|user|> c<tool>d",
    "▁x",
    "",
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.fixture
def base(tmp_path, llamas) -> Path:
    """A base whose tokenizer may be replaced."""
    return shutil.copytree(llamas[0], tmp_path / "base")


def with_vocabulary(base: Path, name: str | None, **config: object) -> Path:
    """Have the base's tokenizer in vocab.json and merges.txt alone."""
    (base / "tokenizer.json").unlink()
    tokenizer().backend_tokenizer.model.save(str(base))
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **SPECIAL, **config}))
    return base


def plan_of(tmp_path: Path, base: Path, llamas: list[Path], **keys: object):
    prompts = keys.pop("prompts", False)
    keys = {"experts_per_token": 1, **keys}
    return plan_merge(load_config(write_config(tmp_path / "merge.yaml", base, llamas[1:3], prompts=prompts, **keys)))


def ids(folder: Path) -> list[list[int]]:
    read = AutoTokenizer.from_pretrained(folder)
    return [read(text)["input_ids"] for text in TEXTS] + [
        read(text, add_special_tokens=False)["input_ids"] for text in TEXTS
    ]


def merged(tmp_path: Path, base: Path, llamas: list[Path], **keys: object) -> tuple[Path, list[str]]:
    """A merged model, as planned, and what was said of its tokenizer."""
    out, said = tmp_path / "out", []
    plan = plan_of(tmp_path, base, llamas, **keys)
    merge(plan, out, warn=said.append)
    found = verify_merge(plan, out)
    assert found.differences == ()
    assert found.files == len({*plan.copied_files, *(name for name in plan.made_files if (out / name).exists())})
    card = (out / "README.md").read_text()
    assert all(f"> **Note:** {as_text(note)}." in card for note in said)
    return out, said


ADDED = {
    "added_tokens_decoder": {
        str(156 + place): {
            "content": token,
            "lstrip": False,
            "rstrip": place == 0,
            "normalized": False,
            "single_word": False,
            "special": place == 0,
        }
        for place, token in enumerate(["<|user|>", "<tool>"])
    },
    "additional_special_tokens": ["<|user|>"],
}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("GPT2Tokenizer", {"unk_token": "<pad>"}),
        ("GPT2Tokenizer", {"unk_token": "<pad>", "add_bos_token": True}),
        ("GPT2TokenizerFast", {"unk_token": "<pad>", "add_prefix_space": True}),
        ("Qwen2Tokenizer", {"unk_token": "<pad>"}),
        ("Qwen2Tokenizer", {"unk_token": "<pad>", **ADDED}),
    ],
)
def test_a_tokenizer_json_is_made_of_vocabulary_and_merges(tmp_path, llamas, base, name, config):
    with_vocabulary(base, name, **config)
    plan = plan_of(tmp_path, base, llamas)
    assert plan.notes == (
        "base_model: has no tokenizer.json; one is made of vocab.json, merges.txt as transformers converts it, if it can, "
        "and compared with the base's tokenizer before anything is written",
    )
    out, _ = merged(tmp_path, base, llamas)
    assert ids(out) == ids(base)
    assert Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size() >= 156
    assert (out / "vocab.json").read_bytes() == (base / "vocab.json").read_bytes()


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast", None])
def test_a_class_that_transformers_takes_for_the_bases_model_type_is_taken_for_the_output(tmp_path, name):
    """5.23 reads a qwen2 by Qwen2Tokenizer, whatever is named, and a qwen2_moe or a mixtral not."""
    models = [make_model(tmp_path / str(seed), seed, "qwen2") for seed in range(3)]
    edit_json(models[0] / "tokenizer_config.json", tokenizer_class=name)
    for architecture in ("qwen2_moe", "granitemoe"):
        out, _ = merged(tmp_path, models[0], models, architecture=architecture)
        assert ids(out) == ids(models[0])
        shutil.rmtree(out)


def test_a_class_that_overrides_tokenizer_json_is_written_into_it(tmp_path, llamas, base):
    """Llama 2's file puts a space before every part of a text; LlamaTokenizer of transformers 5 before the first."""
    made = llama_2_tokenizer().backend_tokenizer
    made.pre_tokenizer = None
    stored = json.loads(made.to_str()) | {"pre_tokenizer": None}
    made = Tokenizer.from_str(json.dumps(stored))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.save(str(base / "tokenizer.json"))
    edit_json(base / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", unk_token="<unk>", pad_token=None)
    out, said = merged(tmp_path, base, llamas)
    assert ids(out) == ids(base)
    same = (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert said == (
        [
            f"tokenizer.json is not the base's file but the base's tokenizer as transformers {version('transformers')} reads "
            "it, by LlamaTokenizer: the file itself it would read otherwise for mixtral. Programs that read the "
            "file as it is read the output otherwise than the base",
            f"tokenizer_config.json is not the base's in padding_side, so that transformers {version('transformers')} reads "
            "it alike",
        ]
        if IN_5
        else []
    )
    assert same != IN_5
    config = json.loads((base / "tokenizer_config.json").read_text()) | ({"padding_side": "left"} if IN_5 else {})
    assert json.loads((out / "tokenizer_config.json").read_text()) == config
    assert AutoTokenizer.from_pretrained(out).padding_side == AutoTokenizer.from_pretrained(base).padding_side
    # Another architecture's class does the same to the file.
    shutil.rmtree(out)
    out, said = merged(tmp_path, base, llamas, architecture="qwen2_moe", prompts=True)
    assert (ids(out), said) == (ids(base), [])


def test_verify_compares_what_was_made(tmp_path, llamas, base):
    with_vocabulary(base, "GPT2Tokenizer", unk_token="<pad>")
    out, _ = merged(tmp_path, base, llamas)
    content = (out / "tokenizer.json").read_text()
    (out / "tokenizer.json").write_text(content.replace("<s>", "<S>", 1))
    plan = plan_of(tmp_path, base, llamas)
    expected = f"what transformers {version('transformers')} makes of the tokenizer in {base}"
    (difference,) = verify_merge(plan, out).differences
    assert (difference.what, difference.expected) == ("tokenizer.json", expected)
    assert difference.found == "other bytes: changed, or made by another transformers"
    (out / "tokenizer.json").unlink()
    (difference,) = verify_merge(plan, out).differences
    assert (difference.expected, difference.found) == (expected, "absent")


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer"])
def test_what_every_model_type_reads_alike_is_not_proved(tmp_path, llamas, base, monkeypatch, name):
    monkeypatch.setattr(tokenizer_proof, "prove", None)
    monkeypatch.setattr(tokenizer_proof, "_prove_in_child", None)
    edit_json(base / "tokenizer_config.json", tokenizer_class=name)
    if name == "LlamaTokenizer":
        shutil.copy(make_model(tmp_path / "mistral", model_type="mistral", sliding_window=None) / "config.json", base)
    out, _ = merged(tmp_path, base, llamas)
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert plan_of(tmp_path, base, llamas).made_files == ()


@pytest.mark.parametrize("key", ["auto_map", "fix_mistral_regex", "tekken.json", "tokenizer_class"])
def test_what_makes_transformers_look_further_has_it_proved(tmp_path, llamas, base, key):
    if key.endswith(".json"):
        (base / key).write_text("{}")
    else:
        edit_json(base / "tokenizer_config.json", **{key: None if key == "tokenizer_class" else {}})
    assert plan_of(tmp_path, base, llamas).made_files == ("tokenizer.json", "tokenizer_config.json")


def test_what_is_not_proved_is_read_alike(tmp_path, base):
    """The rule, measured on every model type that moemerge reads or writes, against the file itself."""
    types = {*DENSE_FAMILIES, *MOE_FAMILIES}
    if not IN_5:
        # The others are newer than transformers 4, which then needs the class that is named alone.
        types = {"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "mixtral", "qwen2_moe", "olmoe"}
    file = Tokenizer.from_file(str(base / "tokenizer.json"))
    expected = [file.encode(text).ids for text in TEXTS]
    reclassed = set()
    for model_type in types:
        (base / "config.json").write_text(json.dumps({"model_type": model_type}))
        if ids(base)[: len(TEXTS)] != expected:
            reclassed.add(model_type)
    assert reclassed == ({"qwen2", "qwen3_5_moe_text"} if IN_5 else set())
    for name in ("LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "CohereTokenizerFast"):
        edit_json(base / "tokenizer_config.json", tokenizer_class=name)
        found = []
        for model_type in ("mistral", "mixtral"):
            (base / "config.json").write_text(json.dumps({"model_type": model_type}))
            found.append(ids(base))
        assert found[0] == found[1]


@pytest.mark.skipif(not IN_5, reason="transformers 4 reads it by the class that is named")
def test_a_tokenizer_that_no_file_can_hold_is_refused_before_anything_is_written(tmp_path, llamas, base):
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    plan = plan_of(tmp_path, base, llamas)
    before = sorted(tmp_path.rglob("*"))
    message = (
        rf"base_model: transformers {version('transformers')} would not read text for a mixtral as it does for the base, by "
        r"ByT5Tokenizer: it cannot be loaded \(ValueError: Couldn't instantiate the backend tokenizer from one of: .*\)\. "
        r"Choose another architecture, or merge from a copy of the base without tokenizer files\."
    )
    with pytest.raises(RefusedError, match=f"^{message}$"):
        merge(plan, tmp_path / "out")
    with pytest.raises(RefusedError, match=f"^{message}$"):
        plan_merge(
            plan.config, PlanOptions(proves_tokenizer=True), approve=lambda _: pytest.fail("asked for what is refused")
        )
    assert sorted(tmp_path.rglob("*")) == before
    for name in plan.copied_files:
        (base / name).unlink()
    merge(plan_of(tmp_path, base, llamas), tmp_path / "out")


@pytest.mark.skipif(not IN_5, reason="transformers 4 has no such model")
def test_a_class_that_cannot_be_overridden_is_refused_with_its_name(tmp_path):
    models = [
        make_model(tmp_path / str(seed), seed, "qwen3_5_text", layer_types=["full_attention"] * 3) for seed in range(3)
    ]
    merge(plan_of(tmp_path, models[0], models), tmp_path / "out")
    edit_json(models[0] / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", add_prefix_space=True)
    with pytest.raises(RefusedError) as caught:
        merge(plan_of(tmp_path, models[0], models), tmp_path / "two")
    assert str(caught.value).startswith("base_model: transformers 5")
    assert str(caught.value).endswith(
        "by the base's GPT2Tokenizer. If Qwen3_5Tokenizer is right, name it as tokenizer_class in a copy of the base; else "
        "choose another architecture, or merge from a copy of the base without tokenizer files."
    )


def test_a_tokenizer_that_cannot_be_read_here_is_copied_and_named(tmp_path, llamas, base, monkeypatch):
    monkeypatch.setattr(tokens, "_is_installed", lambda _: False)
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.model").write_bytes(b"\n\x01")
    edit_json(base / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    out, said = merged(tmp_path, base, llamas)
    assert said == [
        "the base's tokenizer is a tokenizer.model, and sentencepiece and protobuf to read it are not installed; its files are copied, "
        "but nothing proves that the output reads text as the base does. To have it proved, pip install sentencepiece "
        "protobuf and merge again"
    ]
    assert (out / "tokenizer.model").exists()
    assert not (out / "tokenizer.json").exists()
    with pytest.raises(RouterError) as caught:
        merge(plan_of(tmp_path, base, llamas, prompts=True), tmp_path / "text")
    assert str(caught.value) == (
        f"{base}: the model's tokenizer is a tokenizer.model, and sentencepiece and protobuf to read it are not installed. Text needs "
        "it: pip install sentencepiece protobuf, or, to merge without prompts, choose gate_mode random."
    )


def test_without_torch_and_transformers_a_child_proves_it_and_imports_nothing_from_here(tmp_path, llamas, base):
    with_vocabulary(base, "GPT2Tokenizer", unk_token="<pad>")
    for name in ("transformers", "tokenizers", "regex"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w')\n")
    config = write_config(tmp_path / "merge.yaml", base, llamas[1:3], prompts=False)
    result = run(config, "out", "-q", cwd=tmp_path, after=NO_TORCH)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not (tmp_path / "executed").exists()
    assert ids(tmp_path / "out") == ids(base)


def test_a_child_that_dies_is_said(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    found = tokenizer_proof._prove_in_child(tmp_path, tmp_path / "out")
    assert found == Proof(problem="ends the process that reads it (1)", step="save it anew")


def test_a_child_that_dies_leaves_nothing_half_made_in_the_output(tmp_path, llamas, base, monkeypatch):
    with_vocabulary(base, "GPT2Tokenizer", unk_token="<pad>")
    child = tmp_path / "child"
    child.write_text("""#!/bin/sh\nprintf '{"half' > "$4/tokenizer.json"\nkill -9 $$\n""")
    child.chmod(0o755)
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(sys, "executable", str(child))
    out, said = merged(tmp_path, base, llamas)
    assert [line.partition(" (")[0] for line in said] == ["the base's tokenizer ends the process that reads it"]
    assert sorted(path.name for path in out.iterdir() if "vocab" in path.name or "token" in path.name) == sorted(
        path.name for path in base.iterdir() if "vocab" in path.name or "token" in path.name
    )


CODE = """
from .helper_words import split
from .helper_lost import nothing
VOCAB_FILES_NAMES = {"vocab_file": "words.tiktoken", "other": "model.safetensors"}
open(MARKER, "w")
class Words: pass
"""


def with_code(base: Path, marker: Path) -> Path:
    """Have the base's tokenizer in code alone."""
    (base / "tokenizer.json").unlink()
    (base / "tokenization_words.py").write_text(CODE.replace("MARKER", repr(str(marker))))
    (base / "helper_words.py").write_text("from .tokenization_words import Words\n")
    (base / "words.tiktoken").write_bytes(b"YQ== 0\n")
    (base / "train.py").write_text("")
    classes = {"AutoTokenizer": ["tokenization_words.Words", None], "AutoProcessor": "acme/other--processing.Words"}
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Words", "auto_map": classes}))
    return base


CODE_NOTE = (
    "the tokenizer is code (tokenization_words.py, helper_words.py), copied and never run by moemerge: AutoTokenizer runs it "
    "with trust_remote_code=True alone; not copied, since it is of another repository: acme/other--processing.Words; the base has no "
    "helper_lost.py"
)


def test_a_tokenizers_code_is_copied_with_what_it_names_and_never_run(tmp_path, llamas, base):
    marker = tmp_path / "executed"
    with_code(base, marker)
    plan = plan_of(tmp_path, base, llamas)
    assert plan.notes == ("base_model: has no tokenizer.json and no tokenizer.model to copy", CODE_NOTE)
    out, (said,) = merged(tmp_path, base, llamas)
    assert said == (
        "the base's tokenizer is code of its repository (tokenization_words.Words, acme/other--processing.Words), which "
        "moemerge never runs; its files are copied, but nothing proves that the output reads text as the base does. To have "
        "it proved, save it as a tokenizer.json in a copy of the model and merge again"
    )
    for name in ("tokenization_words.py", "helper_words.py", "words.tiktoken", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not (out / "train.py").exists()
    assert f"> **Note:** {as_text(CODE_NOTE)}." in (out / "README.md").read_text()
    (base / "vocab.json").write_text("{}")
    with pytest.raises(RouterError) as caught:
        merge(plan_of(tmp_path, base, llamas, prompts=True), tmp_path / "text")
    assert str(caught.value) == (
        f"{base}: the model's tokenizer is code of its repository (tokenization_words.Words, acme/other--processing.Words), "
        "which moemerge never runs. Text needs it: save it as a tokenizer.json in a copy of the model, or, to merge without "
        "prompts, choose gate_mode random."
    )
    assert not marker.exists()


def with_templates(base: Path) -> Path:
    """Give the base two more chat templates."""
    (base / TEMPLATES).mkdir()
    for name in ("rag.jinja", "tool_use.jinja"):
        (base / TEMPLATES / name).write_text(f"{{{{ messages }}}} {name}")
    (base / TEMPLATES / "notes.txt").write_text("not read by transformers")
    return base


def test_additional_chat_templates_and_other_versions_of_tokenizer_json_are_copied(tmp_path, llamas, base):
    with_templates(base)
    shutil.copy(base / "tokenizer.json", base / "tokenizer.4.0.0.json")
    edit_json(base / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json", "../secret"])
    out, _ = merged(tmp_path, base, llamas)
    copied = ["tokenizer.4.0.0.json", f"{TEMPLATES}/rag.jinja", f"{TEMPLATES}/tool_use.jinja"]
    assert list(plan_of(tmp_path, base, llamas).copied_files)[-3:] == copied
    assert {path.name for path in (out / TEMPLATES).iterdir()} == {"rag.jinja", "tool_use.jinja"}
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    sent = {name_in_repository(path) for path in checkpoint_files(out, pytest.fail)}
    assert sent >= {*copied, "config.json", "tokenizer.json"}
    (out / copied[1]).write_text("changed")
    (out / TEMPLATES / "new.jinja").write_text("")
    found = verify_merge(plan_of(tmp_path, base, llamas), out).differences
    assert [difference.what for difference in found] == [copied[1], f"{TEMPLATES}/new.jinja"]


def saved_by_5(base: Path, extra: list[str] | None = None) -> None:
    """Give a base a tokenizer's config in words that transformers 4 does not read."""
    edit_json(base / "tokenizer_config.json", tokenizer_class="TokenizersBackend", extra_special_tokens=extra)


@pytest.mark.parametrize("extra", [None, ["<|a|>"]])
def test_what_transformers_4_cannot_read_is_written_for_both(tmp_path, llamas, base, extra):
    saved_by_5(base, extra)
    plan = plan_of(tmp_path, base, llamas)
    assert plan.notes == ()
    out, warnings = merged(tmp_path, base, llamas)
    assert warnings == []
    written, expected = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (out, base))
    expected.pop("extra_special_tokens", None)
    expected["tokenizer_class"] = "PreTrainedTokenizerFast"
    assert written == expected | ({"additional_special_tokens": extra} if extra else {})
    assert ids(out) == ids(base if IN_5 else llamas[0])
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|a|>") == (156 if extra else None)
    found = verify_merge(plan, out)
    assert (found.differences, found.notes) == ((), ())


@pytest.mark.skipif(not IN_5, reason="transformers 4 does not read the base")
def test_a_proof_reads_what_is_written_for_both(tmp_path):
    base, *others = [make_model(tmp_path / f"qwen{seed}", seed, "qwen2") for seed in range(3)]
    qwens = [base, *others]
    saved_by_5(base)
    plan = plan_of(tmp_path, base, qwens)
    assert plan.made_files == ("tokenizer.json", "tokenizer_config.json")
    out, warnings = merged(tmp_path, base, qwens)
    assert not any("transformers 4" in warning or "tokenizer_class" in warning for warning in warnings)
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert verify_merge(plan, out).differences == ()


def test_what_repair_writes_is_as_planned_and_what_it_would_write_a_note(tmp_path, llamas, base):
    saved_by_5(base, ["<|a|>"])
    plan = plan_of(tmp_path, base, llamas)
    out, _ = merged(tmp_path, base, llamas)
    shutil.copy(base / "tokenizer_config.json", out)
    found = verify_merge(plan, out)
    assert found.differences == ()
    assert found.notes == (
        "tokenizer_config.json: transformers 4 does not read it, for transformers 5 has saved it; else it is as "
        "planned. `moemerge repair` writes it for both",
    )
    assert [difference.what for difference in repair(out)] == [
        "tokenizer_config.json: additional_special_tokens",
        "tokenizer_config.json: extra_special_tokens",
        "tokenizer_config.json: tokenizer_class",
    ]
    found = verify_merge(plan, out)
    assert (found.differences, found.notes) == ((), ())
    edit_json(out / "tokenizer_config.json", add_bos_token=True)
    assert [difference.what for difference in verify_merge(plan, out).differences] == ["tokenizer_config.json"]


def test_what_cannot_be_proved_stays_in_the_words_of_its_base_with_a_note(tmp_path, llamas, base):
    saved_by_5(base, ["<|a|>"])
    (base / "tekken.json").write_text("{}")
    (base / "tokenizer.json").write_text("{}")
    out, warnings = merged(tmp_path, base, llamas)
    plan = plan_of(tmp_path, base, llamas)
    proved = tokenizer_proof.prove_tokenizer(plan.base_files, plan.output_config, in_process=True)
    assert proved.doubts == (warnings[0],)
    assert warnings[1:] == [
        "transformers 4 does not read this tokenizer_config.json, which transformers 5 has saved: for both, it needs "
        '"tokenizer_class": "PreTrainedTokenizerFast" and "additional_special_tokens" as the name of '
        '"extra_special_tokens", which `moemerge repair` writes'
    ]
    assert f"> **Note:** {as_text(warnings[1])}." in (out / "README.md").read_text()
    assert (out / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()


FIND = """
from moemerge.sources.model_folder import open_model
from moemerge.planning.tokenizer_files import find_base_files
print(*find_base_files(open_model({!r}, lambda _: None), lambda _: None, needed=False).copied)
"""


def test_from_the_hub_come_code_and_templates_and_to_it_go_templates(tmp_path, llamas):
    """An older model's templates are removed there; of a merge that is sent by shards they are sent too."""
    with_code(shutil.copytree(llamas[0], tmp_path / "coded"), tmp_path / "executed")
    with_templates(shutil.copytree(llamas[0], tmp_path / "spoken"))
    hub, templates = make_hub(), {f"{TEMPLATES}/rag.jinja", f"{TEMPLATES}/tool_use.jinja"}
    for folder in (tmp_path / "coded", tmp_path / "spoken", *llamas[1:3]):
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        hub.add(f"acme/{folder.name}", files)
    hub.add("alice/old", {f"{TEMPLATES}/old.jinja": b"", "notes/old.jinja": b""})
    with hub.running() as url:
        author = Author(tmp_path, url)
        coded, spoken = (author.write_config(f"acme/{name}", "acme/fox", "acme/code") for name in ("coded", "spoken"))
        planned, *pushed = author.session(
            ["plan", coded, "--json", "--quiet"],
            [spoken, "out", "--push", "alice/old", "--license", "mit", "--quiet"],
            [spoken, "out2", "--push", "alice/new", "--push-streaming", "--license", "mit", "--quiet"],
        )
        again = author.python("-c", FIND.format("acme/coded"), HF_HUB_OFFLINE="1")
    assert [(result.code, result.err) for result in pushed] == [(0, ""), (0, "")]
    facts = json.loads(planned.out)
    assert again.out.split() == facts["copied_files"]
    assert facts["copied_files"][-3:] == ["tokenization_words.py", "helper_words.py", "words.tiktoken"]
    assert (facts["made_files"], facts["notes"][-2]) == (["tokenizer.json", "tokenizer_config.json"], CODE_NOTE)
    assert "train.py" not in hub.requested("acme/coded")
    for repo in ("alice/old", "alice/new"):
        held = set(hub.repositories[repo].find("main")[1])
        assert {name for name in held if name.startswith(TEMPLATES)} == templates
        assert "tokenizer.json" in held
    assert "notes/old.jinja" in hub.repositories["alice/old"].find("main")[1]


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer_class": "\ud800"},
        {"tokenizer_class": ["x"]},
        {"auto_map": ["\ud800\x1b[2J" * 999, 7, ["x"]]},
        {"auto_map": {"AutoTokenizer": {"x": 1}}, "fast_tokenizer_files": {"x": 1}},
        {"extra_special_tokens": [["x"]]},
        {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": "\ud800", "fast_tokenizer_files": []},
    ],
)
def test_no_tokenizer_config_stops_a_merge_that_reads_no_text(tmp_path, llamas, base, keys):
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    out, said = merged(tmp_path, base, llamas)
    assert (out / "tokenizer.json").is_file()
    assert all(line.isprintable() and len(line) < 1200 for line in (*said, *plan_of(tmp_path, base, llamas).notes))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("generation_config.json", b"[]", "expected a JSON object, found []"),
        ("added_tokens.json", b'{"a": 1', "is not valid JSON: "),
        ("special_tokens_map.json", "{}".encode("utf-16"), "is not valid JSON: "),
    ],
)
def test_small_files_that_no_program_reads_are_noted(  # noqa: PLR0917
    tmp_path, base, llamas, name, content, told
):
    (base / name).write_bytes(content)
    notes = plan_of(tmp_path, base, llamas).notes
    assert sum(note.startswith(f"base_model: its {name} is copied, but {told}") for note in notes) == 1


@pytest.mark.parametrize("text", ["", '{"version": "1.0", "model": {"type": "BPE"'])
def test_a_tokenizer_json_that_is_empty_or_cut_is_noted(tmp_path, base, llamas, text):
    (base / "tokenizer.json").write_text(text)
    assert (
        "base_model: its tokenizer.json is empty or cut off: no program can load it, nor the output's"
        in plan_of(tmp_path, base, llamas).notes
    )

"""Routers tuned: the gates and nothing else, never worse, resumable, crash-safe, in every family and with two processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from safetensors.torch import load_file, save_file

from moemerge import merge, plan_merge
from moemerge.checkpoint.disk import shown_bytes
from moemerge.checkpoint.header import read_header
from moemerge.cli import main
from moemerge.config.loading import parse_config
from moemerge.errors import BusyError, CheckpointError, OutputError, RefusedError
from moemerge.evaluation.evaluator import evaluate, read_domains
from moemerge.evaluation.figures import estimate
from moemerge.evaluation.runnable import open_dense, open_mixture
from moemerge.evaluation.running import run_model
from moemerge.merging.options import MergeOptions
from moemerge.model_card.card import with_section, without_section
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.decoder import group
from moemerge.passes.tokens import Window
from moemerge.planning.options import PlanOptions
from moemerge.progress import Task
from moemerge.routers.scoring import lowering
from moemerge.sources.bin_files import read_pickle
from moemerge.tuning import batches, phatgoose, resume_folder, running, teachers, training, tuner, whole_model, writing
from moemerge.tuning.batches import Batches
from moemerge.tuning.context import TuningContext
from moemerge.tuning.judging import judge
from moemerge.tuning.phatgoose import standardised_rows
from moemerge.tuning.processes import open_processes
from moemerge.tuning.settings import HeldOutScores, Settings, distillation_weight, split_documents
from moemerge.tuning.student import Student, cross_entropy
from moemerge.tuning.teachers import Predictions, predict
from moemerge.tuning.training import Training, schedule
from moemerge.tuning.tuner import tune
from tests.families.test_families import pairs
from tests.passes.test_passes import IS_V4, in_words_of_4, is_known
from tests.support.families import DENSE
from tests.support.models import TEXT, VOCAB, load, make_model, tokenizer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
COMPUTE = Compute(CPU, torch.float32)
FEW = Settings(steps=4, tokens_per_step=96)
# Shared experts without neurons, where a family has to have one.


def merged(root: Path, folders: list[Path], *, shard_bytes: int = 10**9, **keys) -> Path:
    document = {
        "base_model": str(folders[0]),
        "gate_mode": "random",
        "experts": [{"source_model": str(folder)} for folder in folders[1:]],
        **keys,
    }
    merge(
        plan_merge(parse_config(json.dumps(document)), PlanOptions(max_shard_bytes=shard_bytes)),
        root / "out",
        MergeOptions(seed=3),
    )
    return root / "out"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, list[str]]:
    """Twelve documents for each expert, of words of its own; five are held out."""
    folder = tmp_path_factory.mktemp("texts")
    words = TEXT.split()
    parts = {"fox": words[:9], "code": words[9:20], "chat": words[20:]}
    for name, mine in parts.items():
        shuffled = random.Random(name)
        documents = [" ".join(shuffled.choices(mine, k=30)) for _ in range(12)]
        (folder / f"{name}.txt").write_text("\n<|document|>\n".join(documents))
    return {name: [str(folder / f"{name}.txt")] for name in parts}


@pytest.fixture(scope="module")
def specialists(tmp_path_factory, data) -> list[Path]:
    """A base and three experts whose FFNs have learnt the words of one domain each."""
    root = tmp_path_factory.mktemp("specialists")
    folders = [make_model(root / name, 0) for name in ("base", *data)]
    for folder, name in zip(folders[1:], data, strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        ids = [
            tokenizer()(text, return_tensors="pt")["input_ids"]
            for text in Path(data[name][0]).read_text().split("<|document|>")
        ]
        ffns = [parameter for path, parameter in model.named_parameters() if ".mlp." in path]
        optimiser = torch.optim.Adam(ffns, lr=5e-3)
        for step in range(60):
            text = ids[step % len(ids)]
            model(text, labels=text).loss.backward()
            optimiser.step()
            model.zero_grad()
        model.save_pretrained(folder)
    return folders


@pytest.fixture
def out(tmp_path, specialists) -> Path:
    return merged(tmp_path, specialists, shard_bytes=40_000)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def changed(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> set[str]:
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name].view(torch.uint8), new[name].view(torch.uint8))}


def routers(folder: Path) -> set[str]:
    mixture = open_mixture(folder)
    return {mixture.router(layer) for layer in mixture.moe_layers}


def arguments(data: dict[str, list[str]]) -> list[str]:
    return [part for name, paths in data.items() for part in ("--data", f"{name}={paths[0]}")]


def run(words: list[object], monkeypatch, capsys) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["moemerge", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0, *capsys.readouterr()


# ---- what it does


@pytest.mark.parametrize("distil", [True, False])
def test_gates_change_and_nothing_else_does_and_held_out_text_gains(tmp_path, specialists, data, distil):
    out = merged(tmp_path, specialists, shard_bytes=20_000, dtype="bfloat16")
    old, files = tensors(out), contents(out)
    found = tune(out, data, Settings(steps=12, tokens_per_step=96, distil=distil))
    assert found.improved
    assert found.after.mean_loss < found.before.mean_loss - 0.2
    assert sum(found.after.accuracy.values()) > sum(found.before.accuracy.values()) + 0.2
    assert changed(old, tensors(out)) == routers(out)
    assert {name for name, text in contents(out).items() if files[name] != text} == {
        "README.md",
        *(p.name for p in out.glob("*.safetensors") if any(n.endswith("gate.weight") for n in load_file(p))),
    }
    assert not list(out.parent.glob(".out*"))
    load(out)
    # Judged by the rows as they are stored.
    assert tune(out, data, Settings(steps=1, tokens_per_step=96, distil=distil)).before == found.after


@pytest.mark.skipif(IS_V4, reason="transformers 4 has no other names in memory")
def test_gates_are_written_where_they_are_stored_whatever_their_names(tmp_path, specialists, data):
    out = merged(tmp_path, specialists)
    old = {name: values.clone() for name, values in load(out).state_dict().items()}
    for path in out.glob("*.safetensors*"):
        path.unlink()
    save_file(old, out / "model.safetensors", {"format": "pt"})
    found = tune(out, data, Settings(steps=12, tokens_per_step=96))
    assert found.improved
    assert changed(old, tensors(out)) == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)}
    assert tune(out, data, Settings(steps=1, tokens_per_step=96)).before == found.after


def made_of_lines(model):
    """The card's paragraphs on where embeddings, attention, norms and FFNs come from."""
    return [line for line in (model / "README.md").read_text().splitlines() if "attention and norms come from" in line]


@pytest.mark.parametrize("copied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_norms_are_trained_beside_gates_on_request(tmp_path, specialists, data, copied):
    out = merged(tmp_path, specialists, shard_bytes=20_000, dtype="bfloat16")
    (made_of,) = made_of_lines(out)
    old, alone = tensors(out), tune(out, data, Settings(steps=8, tokens_per_step=96), copy=tmp_path / "alone")
    assert made_of_lines(Path(alone.model)) == [made_of]
    settings = Settings(steps=8, tokens_per_step=96, train="gates,norms")
    found = tune(out, data, settings, copy=tmp_path / "copy" if copied else None)
    assert found.improved
    assert found.after.mean_loss < alone.after.mean_loss
    assert found.before == alone.before
    layers = [f"layers.{layer}.{norm}_layernorm" for layer in range(3) for norm in ("input", "post_attention")]
    norms = {f"model.{norm}.weight" for norm in (*layers, "norm")}
    new = tensors(Path(found.model))
    assert changed(old, new) == routers(out) | norms
    assert all(new[name].dtype == old[name].dtype for name in old)
    assert max((new[name] / old[name] - 1).abs().max() for name in norms) < 0.5
    card = (Path(found.model) / "README.md").read_text()
    assert "`moemerge tune` trained gates and the norms that experts share; the best of 8 steps was step " in card
    assert made_of_lines(Path(found.model)) == [f"{made_of} The norms were trained by `moemerge tune` after the merge."]
    load(Path(found.model))
    assert tune(found.model, data, Settings(steps=1, tokens_per_step=96)).before == found.after


def test_a_copy_is_a_whole_model_and_the_original_stays(out, data, tmp_path):
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (out / ".cache").mkdir()
    (out / ".cache" / "x").write_text("")
    files = contents(out)
    assert "additional_chat_templates/tool_use.jinja" in files
    found = tune(out, data, FEW, copy=tmp_path / "copy")
    assert (found.improved, found.model) == (True, str(tmp_path / "copy"))
    assert contents(out) == files
    assert contents(tmp_path / "copy").keys() == files.keys() - {".cache/x"}
    assert changed(tensors(out), tensors(tmp_path / "copy")) == routers(out)
    load(tmp_path / "copy")
    linked = [path for path in out.glob("*.safetensors") if path.samefile(tmp_path / "copy" / path.name)]
    assert linked
    tune(out, data, FEW)
    assert contents(out).keys() == files.keys()
    with pytest.raises(RefusedError) as caught:
        tune(out, data, FEW, copy=tmp_path / "copy")
    assert str(caught.value) == (
        f"{tmp_path / 'copy'}: is not empty ({len(list((tmp_path / 'copy').iterdir()))} entries, among them 'README.md'). Choose another output folder, "
        "or remove this one."
    )


def test_links_are_copies_where_there_are_none(out, data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    tune(out, data, FEW, copy=tmp_path / "copy")
    assert changed(tensors(out), tensors(tmp_path / "copy")) == routers(out)


def test_what_is_no_better_is_not_written(out, data, monkeypatch, capsys):
    files = contents(out)
    words = ["tune", out, *arguments(data), "--steps", 4, "--tokens-per-step", 96, "--lr", "1e-30"]
    code, printed, errors = run(words, monkeypatch, capsys)
    assert code == 0
    assert contents(out) == files
    assert "none of 3 steps was better; " in printed  # and then given up
    assert "note: nothing was better on held-out text than the routers that were there\n" in errors
    assert f"{out}: not touched\n" in errors


def judged_as(monkeypatch, gains: dict[str, list[float]]) -> None:
    """The training finds, at its end, gates with which each held-out document's loss per token is lower by so much."""

    def trained(context, cut, _teachers):
        student = Student.load(context)
        before, _ = judge(context, student, cut.held_out)
        documents = {
            name: [[loss - gain * tokens, tokens] for (loss, tokens), gain in zip(found, gains[name], strict=True)]
            for name, found in before.documents.items()
        }
        losses = {name: estimate(np.array(found)) for name, found in documents.items()}
        after = replace(before, documents=documents, losses=losses, mean_loss=before.mean_loss - 0.01)
        start = student.values()
        return resume_folder.State(4, 4, 0, 1.0, before, after, start, {n: 2 * mine for n, mine in start.items()}, {})

    monkeypatch.setattr(running, "train", trained)


UNSURE = {"fox": [0.9, -0.1, -0.1, -0.1, -0.1], "code": [0.0] * 5, "chat": [0.0] * 5}


def test_a_gain_that_may_be_chance_is_not_written(out, data, tmp_path, monkeypatch, capsys):
    files = contents(out)
    judged_as(monkeypatch, UNSURE)
    words = ["tune", out, *arguments(data), "--steps", 4, "--tokens-per-step", 96]
    code, printed, errors = run([*words, "--out", tmp_path / "copy"], monkeypatch, capsys)
    assert code == 0
    assert printed.splitlines()[0] == "Held-out loss in nats per token, with 95 % intervals over documents:"
    assert "best after step 4 of 4, which may be chance; " in printed
    assert errors.splitlines()[-3:] == [
        "note: the gain may be chance, for its interval reaches down to 0: more documents make it narrower",
        f"note: {tmp_path / 'copy'}: not written",
        f"{out}: not touched",
    ]
    code, printed, _ = run([*words, "--json"], monkeypatch, capsys)
    facts = json.loads(printed)
    assert (code, facts["improved"], facts["step"]) == (0, False, 4)
    assert facts["gain"]["low"] < 0 < facts["gain"]["value"]
    assert contents(out) == files
    assert not (tmp_path / "copy").exists()
    # With a gain in all documents the same state is written.
    judged_as(monkeypatch, UNSURE | {"fox": [0.9, 0.1, 0.1, 0.1, 0.1]})
    assert run(words, monkeypatch, capsys)[0] == 0
    assert changed({n: t for n, t in tensors(out).items() if n in routers(out)}, tensors_of(files, out)) == routers(out)


def tensors_of(files: dict[str, bytes], out: Path) -> dict[str, torch.Tensor]:
    """The routers among what `contents` gave."""
    found = {}
    for name, data in files.items():
        if name.endswith(".safetensors"):
            found |= safetensors.torch.load(data)
    return {name: found[name] for name in routers(out)}


def scores(**losses: list[float]) -> HeldOutScores:
    """Scores of documents of 100 tokens each, from their losses per token."""
    documents = {name: [[100 * loss, 100] for loss in mine] for name, mine in losses.items()}
    found = {name: estimate(np.array(mine)) for name, mine in documents.items()}
    mean = sum(one.value for one in found.values()) / len(found)
    return HeldOutScores(found, mean, dict.fromkeys(found), documents)


def test_no_domain_may_get_worse():
    start = scores(fox=[3.0] * 5, code=[2.0] * 5)
    state = resume_folder.State(1, 0, 0, 0.0, start, start, {}, {}, {})
    for step, (found, kept) in enumerate(
        (
            (scores(fox=[2.0] * 5, code=[2.01] * 5), False),  # surely higher
            (scores(fox=[2.0] * 5, code=[2.2, 1.9, 2.2, 1.9, 2.0]), True),  # higher, but perhaps by chance
            (scores(fox=[1.9] * 5, code=[2.001] * 5), True),  # surely higher, by next to nothing
            (scores(fox=[1.8] * 5, code=[2.1] * 5), False),
        ),
        start=1,
    ):
        state.step = step
        state.judge(found, {"gate": torch.tensor(step)})
        assert (state.best_step == step) == kept
        assert (state.note, state.without_gain) == (
            ("", 0)
            if kept
            else (
                f"after step {step} the mean loss was lower, but code's is higher by {found.losses['code'].value - 2:.4f} "
                f"({found.losses['code'].value - 2:.4f} to {found.losses['code'].value - 2:.4f}): that state was not kept",
                1,
            )
        )
    assert state.best_values == {"gate": torch.tensor(3)}


def test_a_training_that_worsens_a_domain_writes_nothing(out, data, monkeypatch, capsys):
    files = contents(out)
    monkeypatch.setattr(HeldOutScores, "worsened", lambda *_: ["code's is higher by 0.5"])
    code, _, errors = run(["tune", out, *arguments(data), "--steps", 4, "--tokens-per-step", 96], monkeypatch, capsys)
    assert (code, contents(out)) == (0, files)
    assert (
        "note: after step 3 the mean loss was lower, but code's is higher by 0.5: that state was not kept\n"
        "note: nothing was better on held-out text than the routers that were there\n"
    ) in errors


def test_every_domain_that_loses_is_named(out, data, monkeypatch, capsys):
    judged_as(monkeypatch, {"fox": [0.5] * 5, "code": [-0.125] * 5, "chat": [0.0] * 5})
    words = ["tune", out, *arguments(data), "--steps", 4, "--tokens-per-step", 96]
    code, printed, errors = run(words, monkeypatch, capsys)
    loss = "code loses: its held-out loss is higher by 0.1250 (0.1250 to 0.1250)"
    assert (code, f"note: {loss}\n{out}: written\n" in errors) == (0, True)
    row = next(line.strip() for line in printed.splitlines() if line.startswith("lower by"))
    assert row.split("  ")[1:] == [
        "0.5000 (0.5000 to 0.5000)",
        "-0.1250 (-0.1250 to -0.1250)",
        "0.0000 (0.0000 to 0.0000)",
        "0.1250 (0.1250 to 0.1250)",
    ]
    assert f"> **Note:** {loss}." in (out / "README.md").read_text()
    code, printed, _ = run([*words, "--json"], monkeypatch, capsys)
    facts = json.loads(printed)
    assert facts["gains"]["code"]["value"] == pytest.approx(-0.125)
    assert facts["notes"] == [loss]


def test_an_expert_without_text_is_accepted_on_request_and_named(out, data, monkeypatch, capsys):
    words = ["tune", out, "--data", f"fox={data['fox'][0]}", "--steps", 4, "--tokens-per-step", 96]
    code, printed, errors = run([*words, "--allow-missing-domains", "--json"], monkeypatch, capsys)
    facts = json.loads(printed)
    assert (code, facts["improved"], facts["missing"]) == (0, True, ["code", "chat"])
    note = "what tuned gates do to the text of code, chat is not known: none was given"
    assert facts["notes"] == [note]
    assert f"note: {note}\n{out}: written\n" in errors
    assert f"> **Note:** {note}." in (out / "README.md").read_text()


def test_the_card_has_the_last_tuning(out, data, monkeypatch, capsys):
    words = ["tune", out, *arguments(data), "--steps", 3, "--tokens-per-step", 96, "--json"]
    code, printed, errors = run(words, monkeypatch, capsys)
    assert code == 0, errors
    first = json.loads(printed)
    assert errors.startswith(f"{out}: 0 M parameters in float32: about 1.0 GB of memory")
    assert "step 3 of 3: held-out loss " in errors
    card = (out / "README.md").read_text()
    assert card.count("## Router tuning") == 1
    assert card.index("<!-- tuning -->") < card.index("## Configuration")
    assert f"| after | {first['after']['losses']['fox']['value']:.3f} (" in card
    assert f"| before | {first['before']['accuracy']['fox']:.1%} | " in card
    assert "`moemerge tune` trained gates alone; the best of 3 steps was step " in card
    assert tune(out, data, FEW).improved
    assert (out / "README.md").read_text().count("## Router tuning") == 1
    assert first["held_out_documents"] == {"fox": 5, "code": 5, "chat": 5}
    assert first["missing"] == []
    assert sum(gain["value"] for gain in first["gains"].values()) / 3 == pytest.approx(first["gain"]["value"])
    (out / "README.md").unlink()
    assert tune(out, data, Settings(steps=2, tokens_per_step=96, seed=1))
    assert not (out / "README.md").exists()


def test_the_commits_of_data_sets_are_on_the_card(out, data, monkeypatch):
    """As `eval --update-card` writes them."""
    said = "fox is text of acme/for-fox at 0123456"
    monkeypatch.setattr(tuner, "revision_notes", lambda given: [said] if given == data else [])
    found = tune(out, data, FEW)
    assert (found.sources, found.notes) == ((said,), (said,))
    assert f"> **Note:** {said}." in (out / "README.md").read_text()


def test_noise_changes_the_training_and_is_seeded(specialists, data, tmp_path):
    found = []
    for number, noise in enumerate((0.0, 0.5, 0.5)):
        (tmp_path / str(number)).mkdir()
        model = merged(tmp_path / str(number), specialists)
        tune(model, data, Settings(steps=2, tokens_per_step=96, noise=noise))
        found.append(tensors(model))
    assert changed(found[0], found[1])
    assert not changed(found[1], found[2])


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_phatgoose_makes_rows_of_sigmoid_gates(out, data, monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    old = tensors(out)
    found = tune(out, data, Settings(steps=12, tokens_per_step=64, method="phatgoose"))
    assert (found.method, found.improved) == ("phatgoose", True)
    assert found.after.mean_loss < found.before.mean_loss - 0.1
    assert sum(found.after.accuracy.values()) > sum(found.before.accuracy.values()) + 0.2
    assert changed(old, tensors(out)) == routers(out)
    assert "trained a sigmoid gate for each expert (PHATGOOSE)" in (out / "README.md").read_text()
    rows = tensors(out)[open_mixture(out).router(0)].float()
    assert rows.mean(dim=0).abs().max() < 0.01 * rows.abs().max()  # centred


def test_phatgoose_lowers_sigmoids_at_first_tokens_too(specialists, data, tmp_path, monkeypatch):
    model, seen = merged(tmp_path, specialists, architecture="glm4_moe"), []
    monkeypatch.setattr(phatgoose, "lowering", lambda states: seen.append(states) or lowering(states))
    tune(model, data, Settings(steps=1, tokens_per_step=48, method="phatgoose"))
    first = seen[0]  # of layer 0, where the state at BOS is the same in every window
    assert torch.allclose(first[-1], first[-2], atol=1e-5)
    assert not torch.allclose(first[0], first[-1], atol=1e-2)


def test_an_evaluation_of_the_old_routers_leaves_the_card(out, data):
    card = out / "README.md"
    text = card.read_text()
    card.write_text(with_section(text, "evaluation", "## Evaluation\n\nof yesterday"))
    tune(out, data, FEW)
    assert "## Evaluation" not in card.read_text()
    assert without_section(card.read_text(), "tuning") == text


@pytest.mark.parametrize("method", ["gates", pytest.param("phatgoose", marks=pytest.mark.slow)])
def test_a_model_that_does_not_fit_is_read_from_the_disk_and_tuned_alike(
    specialists, data, tmp_path, monkeypatch, method
):
    out, settings = merged(tmp_path, specialists), Settings(steps=4, tokens_per_step=96, method=method)
    expected, lines, held = tune(out, data, settings, copy=tmp_path / "held"), [], []
    given, release = whole_model.plan_memory, whole_model.from_disk
    monkeypatch.setattr(whole_model, "from_disk", lambda *args, **kwargs: (held.append(1), release(*args, **kwargs))[1])
    monkeypatch.setattr(running, "plan_memory", lambda *args: replace(given(*args), streamed=True))
    found = tune(out, data, settings, announce=lines.append)
    assert len(held) > 3 * 4
    assert (found.before, found.after) == (expected.before, expected.after)
    assert not changed(tensors(tmp_path / "held"), tensors(out))


def test_whether_a_model_fits(out):
    shapes = {"model.embed_tokens.weight": (VOCAB, 32)} | {f"model.layers.{n}.x": (10**6,) for n in range(30)}
    model = open_mixture(out).runnable
    model = replace(model, keys={**model.keys, "num_hidden_layers": 30}, shapes=shapes)
    passing = 4 * ((30 + 64) * 32 + 3 * VOCAB)
    held = 10**9 + 4 * (VOCAB * 32 + 31 * 10**6) + 1040 * passing
    streamed = 10**9 + 4 * (VOCAB * 32 + 3 * 10**6) + 4160 * passing
    for free, is_streamed in ((held, False), (held - 1, True), (streamed, True), (None, False)):
        assert whole_model.plan_memory(model, CPU, torch.float32, free, 1).streamed == is_streamed
    assert whole_model.plan_memory(model, CPU, torch.float32, streamed, 1).needs == (
        "30 M parameters in float32 would take about 1.1 GB of memory, and 1.1 GB are free: its layers, 0.1 GB, are read "
        "twice in each step, and about 1.1 GB of memory taken"
    )
    for free, processes in ((streamed - 1, 1), (streamed, 2)):
        with pytest.raises(RefusedError):
            whole_model.plan_memory(model, CPU, torch.float32, free, processes)


# ---- every family


def families() -> list:
    """Each output family once; those that differ most in their routers, and with `make test-families` all."""
    found = {moe: (name, moe) for name, moe in reversed(pairs())}
    few = {"mixtral", "qwen3_moe", "granitemoe", "deepseek_v3"}
    return [pytest.param(*pair, marks=() if moe in few else pytest.mark.slow) for moe, pair in found.items()]


@pytest.mark.parametrize(("name", "moe"), families(), ids=lambda value: value)
def test_every_family_is_tuned(tmp_path, data, name, moe):
    model_type, sizes = DENSE[name]
    for known in (model_type, moe):
        if not is_known(known):
            pytest.skip(f"transformers {transformers.__version__} does not know {known}")
    sizes = in_words_of_4(sizes) if IS_V4 else sizes
    names = ("base", "fox", "code", "chat")
    folders = [make_model(tmp_path / name, seed, model_type, **sizes) for seed, name in enumerate(names)]
    model = merged(tmp_path, folders, architecture=moe)
    mixture = open_mixture(model)
    norms = replace(FEW, train="gates,norms")
    held = Student.load(context_of(model, norms))
    streamed = Student.load(replace(context_of(model, norms), memory=whole_model.MemoryPlan(streamed=True)))
    window = Window(0, (1, *range(5, 30)), (False, *[True] * 25))
    logits, same = held.logits([window]), streamed.logits([window])
    assert torch.allclose(cross_entropy([window], logits).double(), run_model(mixture.runnable, [window], COMPUTE))
    assert torch.equal(logits, same)
    for student, found in ((held, logits), (streamed, same)):
        found.square().mean().backward()
        assert all(gate.grad.abs().max() > 0 for gate in student.gates.values())
        trainable = {p for p in student.model.parameters() if p.requires_grad}
        assert trainable == set(student.trained.values())
        assert len(trainable) > len(mixture.moe_layers) + mixture.runnable.layers  # cohere2 has one in a layer
        assert len({*Student.load(context_of(model, FEW)).trained}) == len(mixture.moe_layers)
    assert all(torch.equal(held.trained[name].grad, streamed.trained[name].grad) for name in held.trained)
    in_memory = {
        parameter for layer in streamed.model.model.layers for parameter in layer.parameters() if not parameter.is_meta
    }
    assert in_memory == {held for name, held in streamed.trained.items() if ".layers." in name}
    with torch.no_grad():
        quiet = held.logits([window])
        with held.noisy(3.0, seed=0):
            assert not torch.equal(held.logits([window]), quiet)
        assert torch.equal(held.logits([window]), quiet)
    old = tensors(model)
    found = tune(model, data, norms)
    assert changed(old, tensors(model)) <= (set(held.trained) if found.improved else set())
    assert found.after.mean_loss <= found.before.mean_loss
    if found.improved and not IS_V4:
        load(model)


def test_experts_that_are_absent_stay_absent(tmp_path, data):
    folders = [make_model(tmp_path / name, seed, "qwen3") for seed, name in enumerate(("base", "fox", "code", "chat"))]
    experts = [{"source_model": str(folder)} for folder in folders[1:]]
    experts[2]["layers"] = [0]
    model = merged(tmp_path, folders, experts=experts, architecture="glm4_moe")
    for method in ("gates", "phatgoose"):
        found = tune(model, data, Settings(steps=3, tokens_per_step=96, method=method))
        assert found.after.mean_loss <= found.before.mean_loss
    mixture = open_mixture(model)
    assert [mixture.absent(layer) for layer in range(3)] == [[], [2], [2]]


def test_phatgoose_is_refused_where_the_router_sees_something_else(tmp_path, data):
    model_type, sizes = DENSE["gemma4_text"]
    if not is_known(model_type):
        pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
    names = ("base", "fox", "code", "chat")
    model = merged(tmp_path, [make_model(tmp_path / name, n, model_type, **sizes) for n, name in enumerate(names)])
    with pytest.raises(RefusedError) as caught:
        tune(model, data, Settings(steps=2, tokens_per_step=64, method="phatgoose"))
    assert str(caught.value) == (
        "--method phatgoose: the routers of gemma4_text do not see what enters the base's mlp. Use --method gates."
    )


# ---- its parts


def test_the_divergence_from_a_teacher_is_that_of_whole_distributions(tmp_path, llamas, monkeypatch):
    """With as many kept as there are tokens; with fewer, the rest is one class, and there is less to tell apart."""
    monkeypatch.setattr(teachers, "_TOP", VOCAB - 1)
    windows = [Window(n, (1, *range(4, 9 + n)), (False, *[True] * (5 + n))) for n in range(2)]
    model, other = load(llamas[1]), load(llamas[2])
    predict(open_dense(str(llamas[1]), "fox", print), windows, tmp_path / "t", VOCAB, COMPUTE, lambda _d, _t: None)
    found = Predictions(tmp_path / "t", windows)
    for window in windows:
        ids = torch.tensor([window.ids])
        with torch.no_grad():
            taught, learnt = model(ids).logits[0], other(ids).logits[0]
            assert found.divergence(window, taught).abs().max() < 1e-3
            by_token = torch.nn.functional.kl_div(
                learnt.log_softmax(-1), taught.log_softmax(-1), reduction="none", log_target=True
            )
            expected = by_token.sum(-1)[:-1]
            assert (found.divergence(window, learnt) <= expected + 1e-4).all()
            assert torch.allclose(found.divergence(window, learnt), expected, rtol=1e-3)


def context_of(model: Path, settings: Settings) -> TuningContext:
    beside, memory = resume_folder.WorkFolder(model, model), whole_model.MemoryPlan(streamed=False)
    context = TuningContext(
        open_mixture(model), settings, open_processes("cpu"), memory, beside, lambda *_: None, lambda _: None
    )
    context.work.begin({}, resume=False)
    return context


def training_of(model: Path, data, settings: Settings) -> Training:
    context = context_of(model, settings)
    batches = Batches.cut(context.mixture, split_documents(read_domains(data), settings.seed), settings)
    predictions = {}
    if settings.distil:
        predictions = teachers.teach(context, batches, teachers.open_teachers(context, batches, resume=False))
    return Training(context, batches, Student.load(context), predictions)


@pytest.mark.parametrize("at_once", [1040, 60])
def test_a_step_has_the_gradients_of_the_documented_loss(out, specialists, data, monkeypatch, at_once):
    """Computed again with transformers' whole models and the formula of docs/tuning.md, in one pass and in several."""
    top, step, settings = 5, 1, Settings(steps=4, tokens_per_step=192, distil=True)
    monkeypatch.setattr(teachers, "_TOP", top)
    monkeypatch.setattr(whole_model.MemoryPlan, "tokens_at_once", at_once)
    monkeypatch.setattr(batches, "_LONGEST", 20)
    tuned = training_of(out, data, settings)
    student, windows = tuned.student, tuned.batches.step(step)
    start = student.values()
    student.place({name: values + 0.1 * torch.randn(values.shape) for name, values in start.items()})
    tuned.set_gradients(step)

    model, dense = load(out), [load(folder) for folder in specialists[1:]]
    model.requires_grad_(False)
    gates = [
        (module, module.weight)
        for name, module in model.named_modules()
        if name.endswith("gate") and hasattr(module, "weight")
    ]
    for layer, (_, weight) in enumerate(gates):
        weight.requires_grad_(True).data.copy_(student.gates[layer])
    scored = sum(len(window.ids) - 1 for window, _ in windows)
    parts = list(group(windows, lambda one: len(one[0].ids), at_once))
    assert len(windows) > 6
    assert (len(parts) == 1) == (at_once == 1040)
    weight, loss = 1 - step / (0.6 * settings.steps), 0
    for part in parts:
        for window, domain in part:
            ids = torch.tensor([window.ids])
            found = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            loss = loss - found.gather(1, ids[0, 1:, None]).sum() / scored
            with torch.no_grad():
                taught = dense[domain](ids).logits[0, :-1].log_softmax(-1).topk(top)
            log_q, log_p = found.gather(1, taught.indices), taught.values
            p_rest, q_rest = 1 - log_p.exp().sum(1), 1 - log_q.exp().sum(1)
            kl = (log_p.exp() * (log_p - log_q)).sum(1) + p_rest * (p_rest / q_rest).log()
            loss = loss + weight * kl.sum() / scored
    loss.backward()
    for layer, (_, gate) in enumerate(gates):
        torch.testing.assert_close(student.gates[layer].grad, gate.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("moe", ["mixtral", pytest.param("glm4_moe", marks=pytest.mark.slow)])
def test_bfloat16_has_nearly_the_same_gradients(tmp_path, data, monkeypatch, moe):
    model_type, sizes = DENSE[next(name for name, of in pairs() if of == moe)]
    names = ("base", *data)
    model = merged(
        tmp_path,
        [make_model(tmp_path / name, n, model_type, **sizes) for n, name in enumerate(names)],
        architecture=moe,
    )
    gradients = []
    for precision in ("no", "bf16", "no"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        tuned = training_of(model, data, FEW)
        assert tuned.context.processes.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        tuned.set_gradients(0)
        gradients.append(torch.cat([gate.grad.flatten() for gate in tuned.student.gates.values()]))
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.95  # some tokens go to other experts
    assert torch.equal(gradients[0], gradients[2])
    assert tune(model, data, FEW).before.mean_loss > 0


def test_steps_read_the_tokens_that_they_are_asked_for(out, data):
    documents = split_documents(read_domains(data), 0)
    for asked in (96, 200, 1000):
        settings = Settings(steps=10, tokens_per_step=asked)
        cut = Batches.cut(open_mixture(out), documents, settings)
        read = [sum(len(window.ids) for window, _ in cut.step(step)) for step in range(10)]
        assert asked - 3 <= sum(read) / 10 <= asked + 3 * 12
        for step in range(10):
            domains = [domain for _, domain in cut.step(step)]
            assert set(domains[:3]) == {0, 1, 2}  # in turns
    with pytest.raises(RefusedError) as caught:
        Batches.cut(open_mixture(out), documents, Settings(tokens_per_step=40))
    assert str(caught.value) == (
        "--tokens-per-step: expected 16 or more for each of 3 domains, so at least 48, found 40."
    )


def test_documents_are_trained_on_or_held_out(data):
    documents = read_domains(data)
    training_documents, held, _ = split_documents(documents, 0)
    for name, texts in documents.items():
        assert (len(training_documents[name]), len(held[name])) == (7, 5)
        assert sorted([*training_documents[name], *held[name]]) == sorted(texts)
    assert split_documents(documents, 0) == (training_documents, held, ())
    assert split_documents(documents, 1) != (training_documents, held, ())
    many = [f"text {number}" for number in range(40)]
    assert len(split_documents({"fox": many}, 0)[1]["fox"]) == 10


def test_a_document_that_comes_again_is_not_held_out_from_itself():
    texts = [f"text {number % 12}" for number in range(36)]
    training_documents, held, _ = split_documents({"fox": texts}, 0)
    assert sorted([*training_documents["fox"], *held["fox"]]) == sorted(set(texts))
    with pytest.raises(RefusedError, match="10 different ones are needed, found 9. Divide it"):
        split_documents({"fox": [f"text {number % 9}" for number in range(36)]}, 0)


def after_a_step(tuned: Training) -> resume_folder.State:
    """Stop a training after its first step; gives what it has kept."""

    def stop(_task, done, _total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(tuned, context=replace(tuned.context, progress=stop)).run()
    return tuned.context.work.load()


def test_the_first_step_moves_each_weight_by_its_layers_rate(out, data, monkeypatch):
    """As Adam does: by the learning rate, half of it in a warm-up of two, over the length of what enters the layer."""
    monkeypatch.setattr(training, "_CLIP", 1e-3)
    tuned = training_of(out, data, Settings(steps=20, tokens_per_step=96, lr=0.4))
    _, lengths = judge(tuned.context, tuned.student, tuned.batches.held_out)
    start = tuned.student.values()
    state = after_a_step(tuned)
    for layer, length in lengths.items():
        gate = tuned.context.mixture.router(layer)
        moved = (state.values[gate] - start[gate]).abs()
        assert moved.median() == pytest.approx(0.5 * 0.4 / length, rel=1e-2)
    assert len({round(length, 2) for length in lengths.values()}) > 1
    means = torch.cat([of["exp_avg"].flatten() for of in state.optimiser["state"].values()])
    assert float(means.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)  # a tenth of gradients that were clipped


@pytest.mark.parametrize(("model_type", "offset"), [("llama", 0), ("qwen3_5_text", 1)])
def test_a_step_moves_norms_by_their_scale(tmp_path, data, model_type, offset):
    """That of what they multiply with: Qwen3.5 stores one less."""
    if not is_known(model_type):
        pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
    names = ("base", "fox", "code", "chat")
    folders = [make_model(tmp_path / name, n, model_type, **DENSE[model_type][1]) for n, name in enumerate(names)]
    out = merged(tmp_path, folders)
    tuned = training_of(out, data, Settings(steps=20, tokens_per_step=96, lr=0.4, train="gates,norms"))
    start, state = tuned.student.values(), after_a_step(tuned)
    norms = [name for name in start if "norm" in name]
    assert len(norms) == 7
    for name in norms:
        moved, scale = (state.values[name] - start[name]).abs(), (start[name] + offset).square().mean().sqrt()
        assert moved.median() == pytest.approx(0.5 * 0.4 * 0.06 * float(scale), rel=1e-2)


def test_rows_of_gates_depend_on_their_directions_alone():
    generator = torch.Generator().manual_seed(0)
    gates, labels = torch.randn(3, 64, generator=generator), torch.arange(300) % 3
    states = gates[labels] + 0.5 * torch.randn(300, 64, generator=generator)
    given = states, torch.nn.functional.one_hot(labels, 3).float(), torch.ones(300)
    rows = standardised_rows(gates, *given)
    assert ((states @ rows.T).argmax(dim=1) == labels).all()
    assert torch.allclose(standardised_rows(gates * torch.tensor([[1.0], [10], [0.1]]), *given), rows, atol=1e-5)
    assert torch.allclose(rows.mean(dim=0), torch.zeros(64), atol=1e-6)


def test_schedules():
    assert [distillation_weight(step, 10) for step in (0, 3, 6, 9)] == [1, 0.5, 0, 0]
    assert [round(schedule(step, 20), 3) for step in (0, 1, 2, 11, 19)] == [0.5, 1.0, 1.0, 0.5, 0.008]
    assert schedule(0, 1) == 1


# ---- cut off


def interrupted(out: Path, data, settings: Settings, after: int) -> None:
    def stop(task: Task, done: int, _total: int) -> None:
        if (str(task), done) == ("steps", after):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(out, data, settings, progress=stop)


@pytest.mark.parametrize(
    ("distil", "train"), [(True, "gates"), pytest.param(False, "gates,norms", marks=pytest.mark.slow)]
)
def test_a_resumed_run_gives_the_same_bytes(specialists, data, tmp_path, distil, train):
    settings = Settings(steps=8, tokens_per_step=96, distil=distil, noise=0.1, train=train)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight, cut = merged(tmp_path / "a", specialists), merged(tmp_path / "b", specialists)
    files = contents(cut)
    expected = tune(straight, data, settings)
    interrupted(cut, data, settings, 3)
    assert contents(cut) == files
    with pytest.raises(RefusedError) as caught:
        tune(cut, data, replace(settings, steps=9), resume=True)
    assert str(caught.value) == (
        "--resume: the tuning that was cut off was not this one; what differs: options.steps. Undo the change, or start "
        "over without --resume."
    )
    lines = []
    found = tune(cut, data, settings, resume=True, announce=lines.append)
    assert not any(line.startswith("step 2 ") for line in lines)
    assert (found.before, found.after, found.step) == (expected.before, expected.after, expected.step)
    assert contents(cut) == contents(straight)
    assert not list(cut.parent.glob(".out*"))


def test_without_resume_it_starts_over(out, data):
    interrupted(out, data, FEW, 2)
    lines = []
    assert tune(out, data, FEW, announce=lines.append).steps == 4
    assert any(line.startswith("step 1 of 4: ") for line in lines)


def test_an_interrupt_before_the_first_step_keeps_the_teachers(out, data, monkeypatch, capsys):
    monkeypatch.setattr(training.Training, "run", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    words = ["tune", out, *arguments(data), "--steps", 2, "--tokens-per-step", 96, "--distil"]
    code, _, errors = run(words, monkeypatch, capsys)
    assert (code, errors.splitlines()[-2:]) == (
        130,
        [
            "what was done so far is kept: the same command with --resume goes on",
            "interrupted: the output is as it was before",
        ],
    )
    monkeypatch.undo()
    seen = []
    settings = Settings(steps=2, tokens_per_step=96, distil=True)
    tune(out, data, settings, resume=True, progress=lambda task, _done, _total: seen.append(str(task)))
    assert set(seen) == {"load", "steps"}


def fail_between_renames(out: Path, monkeypatch, error: BaseException) -> None:
    """The second file that is moved into `out` is not."""
    given, moved = Path.replace, []

    def move(self, target):
        if Path(target).parent == out:
            moved.append(target)
            if len(moved) == 2:
                raise error
        return given(self, target)

    monkeypatch.setattr(Path, "replace", move)


def test_an_interrupt_between_the_renames_says_so(specialists, data, tmp_path, monkeypatch, capsys):
    out = merged(tmp_path, specialists, shard_bytes=300)
    fail_between_renames(out, monkeypatch, KeyboardInterrupt())
    words = ["tune", out, *arguments(data), "--steps", 4, "--tokens-per-step", 96]
    code, _, errors = run(words, monkeypatch, capsys)
    assert (code, errors.splitlines()[-1]) == (
        130,
        f"interrupted: some files of {out} are replaced; the next `moemerge tune` on it replaces the others",
    )
    monkeypatch.undo()
    code, printed, errors = run([*words, "--resume", "--json"], monkeypatch, capsys)
    assert (code, printed) == (0, "null\n")
    assert not list(out.parent.glob(".out*"))
    assert "## Router tuning" in (out / "README.md").read_text()


def test_what_is_left_to_move_does_not_go_into_another_model(specialists, data, tmp_path, monkeypatch):
    out = merged(tmp_path, specialists, shard_bytes=300)
    fail_between_renames(out, monkeypatch, OSError(1, "Operation not permitted"))
    with pytest.raises(OutputError) as caught:
        tune(out, data, FEW)
    assert str(caught.value) == (
        f"{out}: not all files could be replaced (Operation not permitted); the next `moemerge tune` on it replaces the "
        "others."
    )
    monkeypatch.undo()
    assert list(out.parent.glob(".out*/ready"))
    shutil.rmtree(out)
    merged(tmp_path, [specialists[0], *reversed(specialists[1:])], shard_bytes=300)
    files, lines = contents(out), []
    tune(out, data, Settings(steps=1, tokens_per_step=96, lr=1e-30), announce=lines.append)
    assert contents(out) == files
    assert lines[0] == (
        "an earlier tuning had been cut off while its files were moved, and the model was written anew since: what was "
        "left of it is removed"
    )
    assert not list(out.parent.glob(".out*"))


def test_a_copy_is_not_made_of_a_model_that_is_half_tuned(specialists, data, tmp_path):
    out = merged(tmp_path, specialists, shard_bytes=300)
    ready = resume_folder.WorkFolder(out, out).folder / "ready"
    ready.mkdir(parents=True)
    with pytest.raises(RefusedError) as caught:
        tune(out, data, FEW, copy=tmp_path / "copy")
    assert str(caught.value) == (
        f"{out}: an earlier tuning of it was cut off while its files were moved. End that first, by `moemerge tune` with "
        "--resume and without --out."
    )
    ready.parent.rename(
        resume_folder.WorkFolder(out, tmp_path / "copy").folder
    )  # of a model that was there: it is gone
    files = contents(out)
    tune(out, data, FEW, copy=tmp_path / "copy")
    assert contents(out) == files
    with pytest.raises(RefusedError) as caught:
        tune(out, data, FEW, copy=out / "sub" / "copy")
    assert not (out / "sub").exists()


def test_what_is_kept_is_not_lost_to_a_refusal_and_not_mixed_up(out, data):
    interrupted(out, data, FEW, 2)
    folder = next(out.parent.glob(".out*"))
    kept = contents(folder)
    with pytest.raises(RefusedError) as caught:
        tune(out, dict(reversed(data.items())), FEW, resume=True)
    assert "what differs: order of --data[0], order of --data[2]." in str(caught.value)
    config = (out / "moemerge_config.yaml").read_text()
    (out / "moemerge_config.yaml").write_text(config.replace("/fox", "/gone"))
    renamed = {"gone" if name == "fox" else name: paths for name, paths in data.items()}
    for settings in (Settings(steps=1, distil=True), Settings(steps=1, method="phatgoose")):
        with pytest.raises(RefusedError):
            tune(out, renamed, settings)
    with pytest.raises(RefusedError) as caught:
        tune(out, renamed, FEW, resume=True)
    assert "experts[0]" in str(caught.value)
    assert contents(folder) == kept
    (out / "moemerge_config.yaml").write_text(config)
    lines = []
    tune(out, data, FEW, announce=lines.append)
    assert "what an earlier tuning had kept is removed: this one starts over, without --resume" in lines


def test_a_copy_is_made_without_touching_the_models_place(out, data, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tune(out, data, FEW, copy=tmp_path / "else" / "copy", progress=stop)
        assert not list(out.parent.glob(".out*"))
    assert list(tmp_path.glob("else/.copy.moemerge-tune*")) == []  # nothing was done yet


def test_a_model_that_cannot_be_written_is_refused_at_first(out, data, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(writing.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError) as caught:
        tune(out, data, FEW)
    assert str(caught.value) == (
        f"{out}: cannot be written to (Read-only file system). Write a copy elsewhere with --out."
    )


def test_a_model_that_is_written_meanwhile_is_left_alone(out, data, tmp_path):
    shard = next(path for path in out.glob("*.safetensors") if any(n.endswith("gate.weight") for n in load_file(path)))
    files = contents(out)
    with pytest.raises(OutputError) as caught:
        tune(out, data, FEW, announce=lambda line: os.utime(shard, (1, 1)) if line.startswith("step 2 ") else None)
    assert str(caught.value) == (
        f"{out}: its files were written anew while it was tuned, so this tuning is not for it. Tune it again."
    )
    assert contents(out) == files


def test_losses_that_overflow_end_the_run(out, data, monkeypatch, capsys):
    words = ["tune", out, *arguments(data), "--steps", 8, "--tokens-per-step", 96, "--lr", "1e38"]
    files = contents(out)
    code, _, errors = run(words, monkeypatch, capsys)
    assert code == 0
    assert "note: after step 2 losses were not finite, so it ended there: give a lower --lr\n" in errors
    assert contents(out) == files


def test_memory_that_runs_out_is_a_clear_error(out, data, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Student, "logits", full)
    code, _, errors = run(["tune", out, *arguments(data)], monkeypatch, capsys)
    assert (code, errors.splitlines()[-1]) == (
        1,
        "error: memory ran out while tuning. Give fewer --tokens-per-step, or another --device; --resume goes on",
    )


def test_phatgoose_goes_on_with_the_next_expert(out, data):
    settings = Settings(steps=2, tokens_per_step=64, method="phatgoose")

    def stop(task: Task, done: int, _total: int) -> None:
        if (str(task), done) == ("gate of code", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(out, data, settings, progress=stop)
    seen = []
    tune(out, data, settings, resume=True, progress=lambda task, _done, _total: seen.append(str(task)))
    assert "gate of fox" not in seen
    assert {"gate of code", "gate of chat"} <= set(seen)


KILLED = """
import os, signal, sys
from pathlib import Path
from moemerge.tuning.settings import Settings
from moemerge.tuning.tuner import tune
out, *data = sys.argv[1:]
given, count = Path.replace, 0
def replace(self, target):
    global count
    if Path(target).parent == Path(out):
        count += 1
        if count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    return given(self, target)
Path.replace = replace
tune(out, dict((name, [path]) for name, path in (d.split("=") for d in data)), Settings(4, 96))
"""


def test_a_kill_between_the_renames_leaves_a_model_and_the_next_run_ends_it(
    specialists, data, tmp_path, monkeypatch, capsys
):
    out = merged(tmp_path, specialists, shard_bytes=300)
    old, straight = tensors(out), tmp_path / "straight"
    tune(out, data, FEW, copy=straight)
    words = [sys.executable, "-c", KILLED, str(out), *(f"{name}={paths[0]}" for name, paths in data.items())]
    killed = subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    load(out)
    some = changed(old, tensors(out))
    assert some
    assert some < routers(out)
    capsys.readouterr()
    code, _, errors = run(["tune", out, *arguments(data), "--resume"], monkeypatch, capsys)
    assert (code, errors) == (0, "an earlier tuning had been cut off while its files were moved: it is complete now\n")
    assert contents(out) == contents(straight)
    assert not list(out.parent.glob(".out*"))


def test_two_cannot_tune_the_same_model(out, data):
    with resume_folder.WorkFolder(out, out).held(), pytest.raises(BusyError) as caught:
        tune(out, data, FEW)
    assert str(caught.value) == f"{out}: another moemerge is tuning it. Wait for it to end."


def in_two_processes(*words: str) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*launch, *words], cwd=ROOT, env=environment, check=False, capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes_do_what_one_does(out, data, tmp_path):
    """Data-parallel: each reads half of every step, one of them writes."""
    alone = tmp_path / "alone"
    options = ["--steps", "3", "--tokens-per-step", "96", "--device", "cpu", "--distil"]
    expected = tune(out, data, Settings(steps=3, tokens_per_step=96, distil=True), copy=alone, device="cpu")
    found = in_two_processes("-m", "moemerge", "tune", str(out), *arguments(data), *options, "--json")
    assert found.returncode == 0, found.stderr
    facts = json.loads(found.stdout)  # printed once
    assert facts["improved"]
    assert found.stderr.count("that are free, in 2 processes\n") == 1
    assert found.stderr.count("step 3 of 3: ") == 1
    assert facts["before"]["mean_loss"] == pytest.approx(expected.before.mean_loss, abs=1e-6)
    assert facts["after"]["mean_loss"] == pytest.approx(expected.after.mean_loss, abs=1e-3)
    one, two = tensors(alone), tensors(out)
    assert changed(one, two) <= routers(out)
    assert all(torch.allclose(one[name], two[name], atol=2e-3) for name in routers(out))


ONE_FAILS = """
import os, sys
from moemerge.cli import main
from moemerge.errors import SourceError
from moemerge.tuning import training
given, count = training.judge, 0
def judge(*arguments):
    global count
    count += 1
    if os.environ["RANK"] == "1" and count == 2:
        raise SourceError("the disk of the second process has gone.")
    return given(*arguments)
training.judge = judge
main()
"""


@pytest.mark.slow
def test_one_of_two_processes_that_fails_ends_both(out, data, tmp_path):
    (tmp_path / "one_fails.py").write_text(ONE_FAILS)
    files = contents(out)
    options = ["--steps", "3", "--tokens-per-step", "96", "--device", "cpu"]
    found = in_two_processes(str(tmp_path / "one_fails.py"), "tune", str(out), *arguments(data), *options)
    assert found.returncode == 1
    assert "error: the disk of the second process has gone.\n" in found.stderr
    assert "fault in moemerge" not in found.stderr
    assert contents(out) == files


ONE_PROCESS = "--method phatgoose: runs in one process. Start it without accelerate launch."


@pytest.mark.slow
def test_a_refusal_of_two_processes_is_said_once(out, data):
    refused = in_two_processes("-m", "moemerge", "tune", str(out), *arguments(data), "--method", "phatgoose")
    assert refused.stderr.count(f"error: {ONE_PROCESS}\n") == 1


def test_phatgoose_is_refused_in_two_processes(out, data, monkeypatch):
    monkeypatch.setattr(running, "open_processes", lambda *asked: replace(open_processes(*asked), count=2))
    with pytest.raises(RefusedError) as caught:
        tune(out, data, replace(FEW, method="phatgoose"))
    assert str(caught.value) == ONE_PROCESS


# ---- what it refuses


def test_messages(  # noqa: PLR0917
    out, data, llamas, tmp_path, monkeypatch, capsys
):
    (tmp_path / "one.txt").write_text("The quick brown fox")
    fox, single = data["fox"][0], tmp_path / "one.txt"
    cases = {
        (f"fox={single}",): (
            "--data fox=: 5 of its documents are held out to judge by, and at least as many trained on: 10 different ones "
            "are needed, found 1. Divide it by lines <|document|>, or give more text."
        ),
        (f"coed={fox}",): (
            "--data coed=: is not an expert's name, did you mean code? Experts: fox, code, chat. A domain that is for none of "
            "them needs a name that is less like theirs."
        ),
        (f"fox={fox}",): (
            "--data: there is no text for code, chat. Gates that learn from the others' text alone send tokens away from "
            "what has none: add --data code=PATH --data chat=PATH, or accept that with --allow-missing-domains."
        ),
        (f"other={fox}",): (
            "--data: there is no text for fox, code, chat. Gates that learn from the others' text alone send tokens away "
            "from what has none: add --data fox=PATH --data code=PATH --data chat=PATH, or accept that with "
            "--allow-missing-domains."
        ),
        (f"other={fox}", "--distil"): (
            "--data other=: is not an expert's name, so it has no teacher; experts: fox, code, chat. Call the domain like "
            "its expert, or leave out --distil."
        ),
        ("fox",): "--data: expected NAME=PATH, such as code=code.txt, found 'fox'.",
        (f"fox={fox}", "--steps", "0"): "--steps: expected 1 or more, found 0.",
        (f"fox={fox}", "--lr", "-1"): "--lr: expected a number above 0, found -1.0.",
        (f"fox={fox}", "--noise", "nan"): "--noise: expected 0 or more, found nan.",
        (f"fox={fox}", "--method", "phatgoose", "--train", "gates,norms"): (
            "--method phatgoose: trains gates alone, found --train gates,norms."
        ),
        (f"fox={fox}", "--method", "phatgoose", "--train", "norms,gates"): (
            "--method phatgoose: trains gates alone, found --train gates,norms."
        ),
        (f"fox={fox}", "--method", "phatgoose", "--allow-missing-domains"): (
            "--method phatgoose: every expert's gate is trained on its own text, and code has none: add "
            "--data code=PATH."
        ),
    }
    files = contents(out)
    for words, message in cases.items():
        code, printed, errors = run(["tune", out, "--data", *words], monkeypatch, capsys)
        assert (code, printed, errors.splitlines()[-1]) == (2, "", f"error: {message}")
    code, _, errors = run(["tune", llamas[0], "--data", f"fox={fox}"], monkeypatch, capsys)
    assert (code, "is a dense model, a llama, and a mixture is wanted." in errors) == (2, True)
    code, _, errors = run(["tune", out], monkeypatch, capsys)
    assert (code, "Missing option '--data'" in errors) == (2, True)
    assert contents(out) == files
    assert not list(out.parent.glob(".out*"))


def test_one_expert_per_token_has_no_slope(tmp_path, llamas, data):
    model = merged(tmp_path, llamas, experts_per_token=1)
    with pytest.raises(RefusedError) as caught:
        tune(model, data, FEW)
    assert str(caught.value) == (
        f"{model}: one expert takes each token, with a weight of 1 whatever the gates are: its loss has no slope to "
        "follow. Merge with experts_per_token: 2, tune, and set num_experts_per_tok to 1 in config.json."
    )


def test_a_quantised_model_is_refused(out, data):
    shard = next(path for path in out.glob("*.safetensors") if any("w1" in name for name in load_file(path)))
    stored = load_file(shard)
    name = next(name for name in stored if "w1" in name)
    save_file({**stored, name: stored[name].to(torch.int8)}, shard, {"format": "pt"})
    with pytest.raises(RefusedError) as caught:
        tune(out, data, FEW)
    assert str(caught.value) == (
        f"{out}: {name} is stored as I8: a quantised model is not tuned. Tune the model that it was made from."
    )


def test_what_does_not_fit_is_refused_before_it_is_loaded(out, data, monkeypatch):
    monkeypatch.setattr(running, "free_memory", lambda _: 100_000)
    with pytest.raises(RefusedError) as caught:
        tune(out, data, FEW)
    assert str(caught.value) == (
        f"{out}: tuning a layer of the model at a time needs about 1.0 GB of memory, but 0.0 GB are free on cpu. Use "
        "another machine or device, or make routers without it: `gate_mode: ridge`."
    )
    monkeypatch.undo()
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: _Disk(10))
    shards = {tensor.path for tensor in writing.trained_tensors(open_mixture(out), "gates").values()}
    need = shown_bytes(sum(path.stat().st_size for path in shards))
    with pytest.raises(OutputError) as caught:
        tune(out, data, FEW)
    assert str(caught.value) == (
        f"{out}: writing what is tuned takes {need} beside it for a while, but the disk has 10 B free. Free some "
        "space, or write a copy to another disk with --out."
    )


class _Disk:
    def __init__(self, free):
        self.free = free


def test_experts_that_are_gone_are_named(out, data):
    config = out / "moemerge_config.yaml"
    config.write_text(config.read_text().replace("/fox", "/gone"))
    named = {"gone": data["fox"], "code": data["code"], "chat": data["chat"]}
    with pytest.raises(RefusedError) as caught:
        tune(out, named, Settings(steps=1, tokens_per_step=96, distil=True))
    assert str(caught.value).startswith("--distil needs the dense experts, and one cannot be had: ")
    assert str(caught.value).endswith(
        "Paths in moemerge_config.yaml count from its folder, else from the current one; without that option none is needed."
    )
    assert tune(out, named, FEW).improved
    config.unlink()
    with pytest.raises(RefusedError) as caught:
        tune(out, {"0": data["fox"]}, Settings(steps=1, tokens_per_step=96, distil=True, allow_missing_domains=True))
    assert str(caught.value) == (
        f"{out}: does not say what it was merged from, and --distil needs the dense experts. Leave that option out."
    )
    nameless = replace(FEW, allow_missing_domains=True)
    assert tune(out, data, nameless).before.accuracy == {"fox": None, "code": None, "chat": None}


def test_what_phatgoose_does_not_train_in_is_refused(tmp_path, specialists, data):
    model = merged(tmp_path, specialists, shared_weights="average", fold_norms=True)
    with pytest.raises(RefusedError) as caught:
        tune(model, data, Settings(method="phatgoose"))
    assert str(caught.value) == (
        "--method phatgoose: trains in the base model with experts as they are, and shared_weights: average and "
        "fold_norms made something else of them here. Use --method gates."
    )


def test_settings_of_accelerate_that_do_not_serve_are_refused(out, data, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(RefusedError) as caught:
        tune(out, data, FEW)
    assert str(caught.value) == "accelerate: mixed precision 'fp16': tuning computes in bf16, or in float32 with no."
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RefusedError) as caught:
        tune(out, data, FEW)
    assert str(caught.value) == (
        "4 processes, 2 of them on this machine: all have to be on one, since what the first writes for the others lies "
        "beside the model."
    )


def test_a_copy_on_another_disk_is_of_everything(out, data, tmp_path, monkeypatch):
    disk = Path("/dev/shm")  # noqa: S108  the one second file system that most machines have
    if not disk.is_dir() or disk.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    copy = disk / f"moemerge-{os.getpid()}"
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    try:
        monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: _Disk(size - 1))
        with pytest.raises(OutputError) as caught:
            tune(out, data, FEW, copy=copy)
        assert str(caught.value).startswith(
            f"{copy}: writing what is tuned takes {shown_bytes(size)} there, but the disk has "
        )
        monkeypatch.undo()
        tune(out, data, FEW, copy=copy)
        assert contents(copy).keys() == contents(out).keys()
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def test_documents_of_one_token_are_passed_over(out, data, tmp_path):
    """Of tokenizers that put nothing in front, such as Qwen's: nothing is predicted there."""
    words = json.loads((out / "tokenizer.json").read_text())
    (out / "tokenizer.json").write_text(json.dumps({**words, "post_processor": None}))
    text = Path(data["fox"][0]).read_text()
    (tmp_path / "fox.txt").write_text(f"T\n<|document|>\n{text}\n<|document|>\na\n<|document|>\nb")
    given = {**data, "fox": [str(tmp_path / "fox.txt")]}
    seed = next(n for n in range(99) if not {"T", "a", "b"} & set(split_documents(read_domains(given), n)[1]["fox"]))
    assert tune(out, given, replace(FEW, seed=seed)).held_out_documents["fox"] == 5
    assert evaluate(out, given).domains[0].tokens > 0
    seed = next(n for n in range(99) if {"T", "a"} < set(split_documents(read_domains(given), n)[1]["fox"]))
    files = contents(out)
    with pytest.raises(RefusedError) as caught:
        tune(out, given, replace(FEW, seed=seed))
    assert str(caught.value) == (
        "--data fox=: 3 of the documents that are held out have a token to predict, and 5 are needed to judge by. Give "
        "more documents, or longer ones."
    )
    assert contents(out) == files


def damaged(folder: Path, name: str, place: tuple[int, ...]) -> str:
    """Put a NaN into a tensor of a model; gives how messages tell of it."""
    shard = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    stored = load_file(shard)
    stored[name][place] = float("nan")
    save_file(stored, shard, {"format": "pt"})
    return f"{name} holds 1 number that is infinite or NaN, at {list(place)}"


@pytest.mark.parametrize("method", ["gates", "phatgoose"])
def test_a_damaged_expert_is_named(specialists, data, tmp_path, method):
    """Its NaN is in the mixture, too, which a merge copies as it is."""
    folders = [*specialists[:2], shutil.copytree(specialists[2], tmp_path / "code"), specialists[3]]
    told = damaged(folders[2], "model.layers.1.mlp.up_proj.weight", (3, 5))
    out = merged(tmp_path, folders)
    files = contents(out)
    with pytest.raises(CheckpointError) as caught:
        tune(out, data, Settings(steps=4, tokens_per_step=96, method=method))
    place = "its numbers are not finite from layer 1 on: "
    mixed = told.replace("mlp.up_proj", "block_sparse_moe.experts.1.w3")
    assert str(caught.value) == (f"{out}: {place}{mixed}." if method == "gates" else f"{folders[2]}: {place}{told}.")
    with pytest.raises(CheckpointError) as caught:
        tune(out, data, Settings(steps=4, tokens_per_step=96, method=method, distil=True))
    assert str(caught.value) == f"{folders[2]}: {place}{told}."  # as a teacher
    assert contents(out) == files


def test_a_weight_that_only_training_meets_is_named(out, data, tmp_path):
    documents = read_domains(data)["fox"]
    place = documents.index(split_documents({"fox": documents}, 0)[0]["fox"][0])
    documents[place] = "0 1 2 3 4 5 6 7 8 9 " * 9
    (tmp_path / "fox.txt").write_text("\n<|document|>\n".join(documents))
    nine = tokenizer()("9")["input_ids"][-1]
    told = damaged(out, "model.embed_tokens.weight", (nine, 7))
    with pytest.raises(CheckpointError) as caught:
        tune(out, {**data, "fox": [str(tmp_path / "fox.txt")]}, replace(FEW, steps=20))
    assert str(caught.value) == f"{out}: its numbers are not finite from the embeddings on: {told}."


def test_weights_that_are_no_numbers_are_refused(out, data):
    told = damaged(out, "model.norm.weight", (0,))
    with pytest.raises(CheckpointError) as caught:
        tune(out, data, FEW)
    assert str(caught.value) == f"{out}: its numbers are not finite from the norm and the head on: {told}."


def test_gates_of_other_sizes_are_not_written(tmp_path):
    save_file({"gate": torch.ones(4)}, tmp_path / "model.safetensors")
    gates = read_header(tmp_path / "model.safetensors")
    (tmp_path / "copy").mkdir()
    with pytest.raises(ValueError, match="^gate: 8 bytes for 16$"):
        writing.patch_shards(tmp_path, gates, {"gate": bytes(8)}, tmp_path / "copy")
    assert torch.equal(load_file(tmp_path / "model.safetensors")["gate"], torch.ones(4))
    assert writing.stamp(tmp_path / "gone") == []


def test_gates_in_a_pickle_are_not_written_to(tmp_path):
    torch.save({"gate": torch.ones(4)}, tmp_path / "pytorch_model.bin")
    tensors = read_pickle(tmp_path / "pytorch_model.bin")
    mixture = SimpleNamespace(folder=tmp_path, tensors=tensors, moe_layers=[0], router=lambda _layer: "gate")
    with pytest.raises(RefusedError) as caught:
        writing.trained_tensors(mixture, "gates")
    told = f"{tmp_path}: gate is in {tmp_path / 'pytorch_model.bin'}, a pickle: only *.safetensors are written to."
    assert str(caught.value) == told

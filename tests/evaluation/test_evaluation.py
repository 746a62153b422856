"""Evaluation and routes against whole models, as transformers computes them."""

import copy
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from moemerge import merge, plan_merge
from moemerge.config.loading import parse_config
from moemerge.errors import CheckpointError, IncompatibleError, RefusedError
from moemerge.evaluation import figures, head, running, text_pass
from moemerge.evaluation.baselines import average, forced, uniform
from moemerge.evaluation.evaluator import evaluate
from moemerge.evaluation.routes.tracing import trace
from moemerge.evaluation.runnable import open_dense, open_mixture
from moemerge.evaluation.running import run_model
from moemerge.evaluation.settings import EvaluationSettings, TraceSettings
from moemerge.families.dense import read_dense
from moemerge.families.selection import MOE_FAMILIES
from moemerge.merging.options import MergeOptions
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window
from tests.passes.test_passes import IS_V4, change_buffers, in_words_of_4, is_known
from tests.support.families import DENSE, reference, wrong_in_v4
from tests.support.models import TEXT, VOCAB, load, load_weights, make_model, save_weights

CPU = Compute(torch.device("cpu"), torch.float32)
# Shared experts without neurons, where a family has to have one.
LINES = TEXT.split("\n")


def windows() -> list[Window]:
    """Of unequal length, the first token of each a BOS."""
    generator = torch.Generator().manual_seed(5)
    ids = [(1, *torch.randint(3, VOCAB, (length,), generator=generator).tolist()) for length in (5, 14, 9)]
    return [Window(n, tokens, (False,) + (True,) * (len(tokens) - 1)) for n, tokens in enumerate(ids)]


def losses_of(model) -> torch.Tensor:
    """The same by a whole model."""
    found = []
    for window in windows():
        ids = torch.tensor([window.ids])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    return torch.stack(found)


def merged(root: Path, folders: list[Path], **keys) -> Path:
    document = {
        "base_model": str(folders[0]),
        "gate_mode": "random",
        "experts": [{"source_model": str(folder)} for folder in folders[1:]],
        **keys,
    }
    plan = plan_merge(parse_config(json.dumps(document)))
    merge(plan, root / "out", MergeOptions(seed=3))
    return root / "out"


# Every kind of attention, norm and router input; all others with what is slow.
_KINDS = {
    "llama",
    "qwen2",
    "smollm3, layers without positions",
    "phi3",
    "granitemoehybrid",
    "qwen3_5_text",
    "gemma4_text",
    "lfm2",
    "cohere2",
    "youtu",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _KINDS else pytest.mark.slow) for name in DENSE]
)
def test_losses_of_every_family_are_those_of_the_whole_model(tmp_path, monkeypatch, name):
    """Of a dense model, and of the mixture that it becomes; nearly so in bfloat16, as on a GPU."""
    model_type, sizes = DENSE[name]
    if not is_known(model_type):
        pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
    sizes = in_words_of_4(sizes) if IS_V4 else sizes
    folders = [make_model(tmp_path / str(seed), seed, model_type, **sizes) for seed in range(3)]
    for folder in folders:
        change_buffers(folder)
    dense = run_model(open_dense(str(folders[1]), "expert", print), windows(), CPU)
    assert torch.allclose(dense.float(), losses_of(load(folders[1])), rtol=1e-4)
    out = merged(tmp_path, folders)
    family = MOE_FAMILIES[json.loads((out / "config.json").read_text())["model_type"]]
    base = read_dense(json.loads((folders[0] / "config.json").read_text()))
    if not is_known(family.model_type) or (IS_V4 and wrong_in_v4(base, family.model_type)):
        pytest.skip(
            f"transformers {transformers.__version__} does not know {family.model_type}, or computes it wrongly"
        )
    found = run_model(open_mixture(out).runnable, windows(), CPU)
    assert torch.allclose(found.float(), losses_of(load(out)), rtol=1e-4)
    check, dtypes = text_pass.check_complete, set()

    def note_dtypes(layer, path):
        check(layer, path)
        kept = (family.router.removesuffix(".weight"), "moe_statics")  # of some classes in float32 always
        dtypes.update(p.dtype for n, p in layer.named_parameters() if not any(part in n for part in kept))

    monkeypatch.setattr(text_pass, "check_complete", note_dtypes)
    narrow = run_model(open_mixture(out).runnable, windows(), Compute(CPU.device, torch.bfloat16))
    assert torch.allclose(narrow, found, rtol=2e-2)
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("llama", {}),
        ("granite", {"architecture": "granitemoe"}),
        ("qwen3", {"architecture": "glm4_moe"}),
        ("qwen3", {"architecture": "hy_v3"}),
        ("ernie4_5", {}),
    ],
)
def test_choices_are_those_of_the_model(tmp_path, model_type, keys):
    """Fused and separate experts, softmax and sigmoid routers: what is recorded is what the model did."""
    folders = [make_model(tmp_path / str(seed), seed, model_type) for seed in range(4)]
    document = {
        "base_model": str(folders[0]),
        "gate_mode": "random",
        **keys,
        "experts": [{"source_model": str(folder)} for folder in folders[1:]],
    }
    plan = plan_merge(parse_config(json.dumps(document)))
    if not is_known(plan.family.model_type):
        pytest.skip(f"transformers {transformers.__version__} does not know {plan.family.model_type}")
    out = tmp_path / "out"
    merge(plan, out, MergeOptions(seed=3))
    mixture, seen = open_mixture(out), []
    run_model(mixture.runnable, windows(), CPU, mixture=mixture, chosen=seen.append)
    model = reference(plan, out)
    by_layer = [layer.get_submodule(plan.base.family.ffn_module) for layer in model.model.layers]
    expected = []
    for index, module in enumerate(by_layer):
        module.register_forward_pre_hook(
            lambda m, inputs, index=index: expected.append((index, inputs[0][0] @ m.rows.T))
        )
    for number, window in enumerate(windows()):
        expected.clear()
        with torch.no_grad():
            model(torch.tensor([window.ids]), use_cache=False)
        for layer, logits in expected:
            choice = next(c for c in seen if (c.layer, c.window) == (layer, number))
            assert torch.allclose(choice.logits, logits, atol=1e-4)
            scores = logits.softmax(-1) if plan.family.scoring == "softmax" else logits.sigmoid()
            weights, experts = scores.topk(2)
            assert torch.equal(choice.experts, experts)
            assert torch.allclose(choice.weights, weights / weights.sum(-1, keepdim=True), atol=1e-4)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("evaluated")
    return [make_model(root / name, seed) for seed, name in enumerate(("base", "fox", "code", "chat"))]


@pytest.fixture(scope="module")
def out(tmp_path_factory, models) -> Path:
    return merged(tmp_path_factory.mktemp("merged"), models)


def with_ffns(model, others) -> torch.nn.Module:
    """A model whose FFNs are the mean of other models'."""

    class Mean(torch.nn.Module):
        def __init__(self, ffns) -> None:
            super().__init__()
            self.ffns = torch.nn.ModuleList(ffns)

        def forward(self, states):
            return sum(ffn(states) for ffn in self.ffns) / len(self.ffns)

    for index, layer in enumerate(model.model.layers):
        layer.mlp = Mean([copy.deepcopy(other.model.layers[index].mlp) for other in others])
    return model


def test_baselines_are_what_they_say(out, models):
    mixture = open_mixture(out)
    experts = [load(folder) for folder in models[1:]]
    base = load(models[0])
    even = run_model(uniform(mixture), windows(), CPU)
    assert torch.allclose(even.float(), losses_of(with_ffns(copy.deepcopy(base), experts)), rtol=1e-4)
    for number, expert in enumerate(experts):
        found = run_model(forced(mixture, number), windows(), CPU)
        assert torch.allclose(found.float(), losses_of(with_ffns(copy.deepcopy(base), [expert])), rtol=1e-4)
    soup = average("soup", [open_dense(str(folder), "x", print) for folder in models[1:]])
    states = [expert.state_dict() for expert in experts]
    base.load_state_dict({name: sum(state[name] for state in states) / 3 for name in states[0]})
    assert torch.allclose(run_model(soup, windows(), CPU).float(), losses_of(base), rtol=1e-4)


def test_the_oracle_of_stacked_experts(tmp_path):
    folders = [make_model(tmp_path / str(seed), seed, "granite") for seed in range(3)]
    out = merged(tmp_path, folders, architecture="granitemoe")
    found = run_model(forced(open_mixture(out), 1), windows(), CPU)
    assert torch.allclose(found.float(), losses_of(with_ffns(load(folders[0]), [load(folders[2])])), rtol=1e-4)


def test_models_of_different_shapes_have_no_average(tmp_path, models):
    wide = make_model(tmp_path / "wide", 1, intermediate_size=64)
    opened = [open_dense(str(folder), folder.name, print) for folder in (models[1], wide)]
    assert average("soup", opened) == "wide and fox differ in their tensors, so their weights have no average"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("data")
    texts = {"fox": LINES[0][:44], "code": LINES[0][45:], "other": LINES[1]}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text("\n<|document|>\n".join([text, text[::2], text[5:]]))
    return {name: [str(folder / f"{name}.txt")] for name in texts}


def test_an_evaluation_holds_every_model_and_says_what_it_left_out(out, data):
    found = evaluate(out, data, EvaluationSettings(baselines=True, tokens=200, window=32))
    assert list(found.losses) == [
        "merged", "base", "expert fox", "expert code", "expert chat", "uniform mixture", "weight average", "label oracle",
    ]  # fmt: skip
    assert [(d.name, d.expert, d.documents) for d in found.domains] == [
        ("fox", 0, 3),
        ("code", 1, 3),
        ("other", None, 3),
    ]
    assert set(found.losses["label oracle"]) == {"fox", "code"}
    assert "label oracle" not in found.mean_losses
    assert found.mean_losses["merged"] == pytest.approx(np.mean([e.value for e in found.losses["merged"].values()]))
    assert "other is not an expert's name, so there is no oracle for it" in found.notes
    for name in data:
        loss, routing = found.losses["merged"][name], found.routing[name]
        assert (loss.low, loss.high) == (None, None)  # of three documents
        assert sum(routing.load) == pytest.approx(2)
        assert np.mean(routing.load_by_layer, axis=0) == pytest.approx(routing.load)
        assert 0 < routing.entropy <= 1
        assert 0.5 <= routing.top_weight <= 1
        worse = loss.value >= found.losses["base"][name].value
        assert worse == any("no better than the base" in note and f"{name} (" in note for note in found.notes)
    assert found.routing["other"].accuracy is None
    assert 0 <= found.routing["fox"].accuracy <= found.routing["fox"].hit_rate <= 1


def test_recovered_is_one_for_the_oracle_and_nought_for_the_uniform_mixture():
    generator = np.random.default_rng(0)
    tokens = generator.integers(10, 50, 20).astype(float)
    uniform_sums = np.stack([tokens * 3 + generator.normal(size=20), tokens], axis=1)
    better = uniform_sums - np.stack([tokens * 0.5, 0 * tokens], axis=1)
    half = (uniform_sums + better) / 2

    def recovered(sums):
        losses = {figures.MERGED: sums, figures.UNIFORM: uniform_sums, figures.ORACLE: better}
        return figures.recovered({name: {"a": found, "b": found} for name, found in losses.items()}, ["a", "b"])

    assert recovered(better).value == pytest.approx(1)
    assert recovered(uniform_sums).value == pytest.approx(0)
    found = recovered(half)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))  # the same documents for all three
    same = {figures.MERGED: {"a": half}, figures.UNIFORM: {"a": half}, figures.ORACLE: {"a": half}}
    assert figures.recovered(same, ["a"]) is None


def test_an_interval_covers_the_mean_of_documents():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        losses = generator.normal(2.0, 0.5, 40)
        found = figures.estimate(np.stack([losses * 10, np.full(40, 10.0)], axis=1))
        covered += found.low <= 2.0 <= found.high
    assert 50 <= covered <= 60


def run(arguments: list[object], monkeypatch, capsys) -> tuple[int, str, str]:
    from moemerge.cli import main

    monkeypatch.setattr("sys.argv", ["moemerge", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    return end.value.code, printed.out, printed.err


def test_eval_prints_and_updates_the_card(tmp_path, out, data, monkeypatch, capsys):
    copied = shutil.copytree(out, tmp_path / "out")
    given = [argument for name, (path,) in data.items() for argument in ("--data", f"{name}={path}")]
    code, printed, errors = run(["eval", copied, *given, "--max-tokens", 60, "--baselines", "-v"], monkeypatch, capsys)
    assert code == 0
    verdict, heading, *_ = printed.splitlines()
    assert re.fullmatch(
        r"merged \d\.\d{3} nats per token: too few documents were read to be sure what it is better than \(\d documents "
        r"of \w+, and 5 are needed: --max-tokens reads more, and a smaller --window more of them\)\.",
        verdict,
    )
    assert heading == "Loss in nats per token (perplexity) in float32; * is the lowest, label oracle aside:"
    assert re.search(r"merged +\d\.\d{3} \(\d+\.\d\d\)", printed)
    assert len(re.findall(r"\)\*", printed)) == 4  # each text, and their mean
    assert re.search(
        r"\nMean loss of merged above that of others, on the same documents: base [+-]\d\.\d{3}, expert fox ", printed
    )
    assert "Text that was read: fox: " in printed
    assert "Load by layer, fox:" in printed
    assert "note: other is not an expert's name" in errors
    before = (copied / "README.md").read_text()
    for _ in range(2):
        code, printed, _ = run(
            ["eval", copied, *given, "--max-tokens", 60, "--json", "--update-card"], monkeypatch, capsys
        )
        assert code == 0
    facts, card = json.loads(printed), (copied / "README.md").read_text()
    assert card.count("## Evaluation") == 1
    assert "Loss in nats per token, computed in float32, on held-out text (" in card
    assert f"| merged | {facts['losses']['merged']['fox']['value']:.3f}" in card
    gap = facts["differences"]["base"]
    means = facts["mean_losses"]
    assert gap == {"value": pytest.approx(means["merged"] - means["base"]), "low": None, "high": None}
    shown = f"Mean loss of merged above that of others, on the same documents: base {gap['value']:+.3f}, expert fox "
    assert shown in card
    assert card.index("## Evaluation") < card.index("## Configuration")
    assert re.sub(r"<!-- evaluation -->.*<!-- /evaluation -->\n\n", "", card, flags=re.DOTALL) == before
    (copied / "README.md.new").mkdir()
    code, _, errors = run(["eval", copied, *given, "--max-tokens", 60, "--update-card"], monkeypatch, capsys)
    assert (code, errors.splitlines()[-1]) == (1, f"error: {copied / 'README.md'}: cannot be written (Is a directory).")
    assert (copied / "README.md").read_text() == card


def test_rerun_replaces_kept_losses(tmp_path, out, data, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = ["eval", out, "--data", f"fox={data['fox'][0]}", "--max-tokens", 60, "--json", "-q"]
    _, first, _ = run(given, monkeypatch, capsys)
    for path in (tmp_path / "moemerge" / "losses").iterdir():
        path.write_text(json.dumps([9.0] * len(json.loads(path.read_text()))))
    _, wrong, _ = run(given, monkeypatch, capsys)
    assert json.loads(wrong)["losses"]["base"] != json.loads(first)["losses"]["base"]
    assert run([*given, "--rerun"], monkeypatch, capsys)[1] == first
    assert run(given, monkeypatch, capsys)[1] == first


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--data", "fox"], "error: --data: expected NAME=PATH, such as code=code.txt, found 'fox'.", 2),
        (["--data", "a=nowhere.txt"], "--data a[0]: 'nowhere.txt' leads to no .txt, .jsonl or .parquet file.", 2),
        (["--data", "a=empty.txt"], "error: --data a=: its files hold no text.", 2),
    ],
)
def test_data_that_is_not_there_is_refused(  # noqa: PLR0917
    out, tmp_path, monkeypatch, capsys, arguments, message, code
):
    (tmp_path / "empty.txt").write_text("\n\n")
    monkeypatch.chdir(tmp_path)
    found, _, errors = run(["eval", out, *arguments], monkeypatch, capsys)
    assert (found, message in errors) == (code, True), errors


def test_documents_without_a_token_to_predict_are_refused(tmp_path, out):
    copied = shutil.copytree(out, tmp_path / "out")
    tokenizer = json.loads((copied / "tokenizer.json").read_text()) | {"post_processor": None}  # no BOS
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "short.jsonl").write_text('"f"\n"d"\n')
    with pytest.raises(RefusedError) as caught:
        evaluate(copied, {"fox": [str(tmp_path / "short.jsonl")]})
    assert str(caught.value) == "--data fox=: its documents have no token that another one precedes."


@pytest.mark.parametrize(
    ("card", "message"), [(None, "there is no model card to update"), (b"\xff", "is not text in UTF-8")]
)
def test_a_card_that_cannot_be_updated_is_refused_before_the_evaluation(  # noqa: PLR0917
    tmp_path, out, data, monkeypatch, capsys, card, message
):
    copied = shutil.copytree(out, tmp_path / "out")
    (copied / "README.md").unlink()
    if card:
        (copied / "README.md").write_bytes(card)
    monkeypatch.setattr("moemerge.evaluation.evaluator.evaluate", None)
    code, _, errors = run(["eval", copied, "--data", f"fox={data['fox'][0]}", "--update-card"], monkeypatch, capsys)
    assert (code, message in errors) == (2, True), errors


def test_a_model_without_its_sources_is_evaluated_alone(tmp_path, out, data, monkeypatch):
    copied = shutil.copytree(out, tmp_path / "out")
    config = copied / "moemerge_config.yaml"
    config.write_text(
        config.read_text().replace(str(Path(json.loads(config.read_text())["base_model"]).parent), "/gone")
    )
    found = evaluate(copied, data, EvaluationSettings(tokens=40))
    assert list(found.losses) == ["merged"]
    assert found.notes[0].startswith("base, experts and their average are left out: /gone/base")
    config.unlink()
    os.mkfifo(config)  # which is not waited for
    assert evaluate(copied, data, EvaluationSettings(tokens=40)).experts == ("0", "1", "2")
    config.unlink()
    found = evaluate(copied, data, EvaluationSettings(tokens=40))
    assert found.experts == ("0", "1", "2")
    assert f"{copied} does not say what it was merged from: base and experts are left out" in found.notes


def test_what_is_no_mixture_is_refused(tmp_path, models, data, monkeypatch, capsys):
    code, _, errors = run(["eval", models[0], "--data", "a=b"], monkeypatch, capsys)
    assert code == 2
    given = ["--data", f"fox={data['fox'][0]}"]
    code, _, errors = run(["eval", models[0], *given], monkeypatch, capsys)
    assert (code, "is a dense model, a llama, and a mixture is wanted." in errors) == (2, True)
    code, _, errors = run(["routes", tmp_path / "nowhere", "--text", "x"], monkeypatch, capsys)
    assert (code, "there is no such folder" in errors) == (2, True)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path, out):
    mixture = open_mixture(out)
    shapes = {name: shape for name, shape in mixture.runnable.shapes.items() if "layers.1.self_attn.q_proj" not in name}
    broken = mixture.runnable.__class__(**{**vars(mixture.runnable), "shapes": shapes})
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight: no tensor of the checkpoint"
    ):
        run_model(broken, windows(), CPU)


@pytest.mark.parametrize(
    ("lacking", "problem"),
    [
        ("model.norm", "no tensor is the norm after the layers"),
        ("layers.2.", r"model\.layers\.2\.\S+: no tensor of the checkpoint"),
    ],
)
def test_a_checkpoint_without_a_norm_or_a_layer_is_refused(tmp_path, out, data, lacking, problem):
    copied = shutil.copytree(out, tmp_path / "out")
    tensors = {n: t for n, t in load_weights(copied).items() if lacking not in n}
    save_weights(copied, tensors)
    with pytest.raises(CheckpointError, match=problem):
        evaluate(copied, data, EvaluationSettings(tokens=40))


def test_a_router_that_is_not_finite_is_refused(tmp_path, out, data):
    copied = shutil.copytree(out, tmp_path / "out")
    tensors = load_weights(copied)
    tensors["model.layers.1.block_sparse_moe.gate.weight"][2, 3] = math.nan
    save_weights(copied, tensors)
    with pytest.raises(CheckpointError) as caught:
        evaluate(copied, data, EvaluationSettings(tokens=40))
    assert str(caught.value) == (
        f"{copied}: model.layers.1.block_sparse_moe.gate.weight holds 1 number that is infinite or NaN, at [2, 3]."
    )


# ---- routes


def test_tokens_give_the_text_back(out):
    texts = {"a": LINES[0], "b": "Le  chat\n\tdort "}
    routes = trace(out, texts, TraceSettings(500, device="cpu"))
    for text, traced in zip(texts.values(), routes.texts, strict=True):
        assert "".join(traced.tokens) == text.rstrip(" ") or "".join(traced.tokens) == text
        assert traced.experts.shape == traced.weights.shape == (3, len(traced.tokens), 2)
        assert np.allclose(traced.weights.sum(axis=2), 1, atol=1e-5)
    assert routes.layers == (0, 1, 2)
    cut = trace(out, texts, TraceSettings(6, device="cpu"))
    assert cut.texts[0].tokens == routes.texts[0].tokens[:5]  # and BOS


def test_routes_are_those_of_the_model(out):
    routes = trace(out, {"a": LINES[0]}, TraceSettings(500, device="cpu"))
    model = load(out)
    ids = transformers.AutoTokenizer.from_pretrained(out)(LINES[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    rows = load_weights(out)
    assert len([name for name in rows if name.endswith(".gate.weight")]) == 3
    for layer in range(3):
        # transformers 5 gives softmax scores in their place: the order is the same.
        expected = logits[layer].reshape(ids.shape[1], -1)[1:].topk(2, dim=1).indices.numpy()
        assert (routes.texts[0].experts[layer] == expected).all()


def test_routes_prints_names_where_there_are_no_colours(tmp_path, out, monkeypatch, capsys):
    page = tmp_path / "routes.html"
    code, printed, errors = run(["routes", out, "--text", LINES[0], "--html", page], monkeypatch, capsys)
    assert (code, printed) == (0, "")  # the page has the text
    assert page.read_text().lower().startswith("<!doctype html>")
    assert f"{page}: written" in errors
    assert run(["routes", out, "--text", LINES[1], "--html", page], monkeypatch, capsys)[0] == 0  # its own is replaced
    mine = tmp_path / "thesis.html"
    mine.write_text("<!doctype html>\n<html>mine")
    code, _, errors = run(["routes", out, "--text", LINES[0], "--html", mine], monkeypatch, capsys)
    assert (code, mine.read_text()) == (2, "<!doctype html>\n<html>mine")
    assert f"{mine}: holds something else than a page of routes, and is not replaced. Choose another name." in errors
    code, printed, _ = run(["routes", out, "--text", LINES[0]], monkeypatch, capsys)
    assert printed.startswith(
        "Percentages: tokens that choose the expert first, averaged over 3 layers. Tokens: the expert with the largest "
        "weight summed over layers.\ntext 1: fox "
    )
    assert re.sub(r"\[(fox|code|chat)\]", "", printed.split("\n", 2)[2].strip()) == LINES[0]
    (tmp_path / "f.txt").write_text(LINES[1])
    code, printed, _ = run(["routes", out, "--file", tmp_path / "f.txt", "--layer", 1], monkeypatch, capsys)
    assert printed.startswith(
        "Percentages: tokens that choose the expert first, in layer 1. Tokens: the expert with the largest weight.\nf.txt: "
    )
    code, printed, _ = run(["routes", out, "--text", LINES[0], "--json"], monkeypatch, capsys)
    facts = json.loads(printed)
    assert np.array(facts["texts"][0]["experts"]).shape == (3, len(facts["texts"][0]["tokens"]), 2)
    assert math.isclose(sum(facts["texts"][0]["shares"]), 1)


def test_routes_prints_names_on_a_terminal_without_colours(out, monkeypatch, capsys):
    plain = run(["routes", out, "--text", LINES[0]], monkeypatch, capsys)
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = run(["routes", out, "--text", LINES[0]], monkeypatch, capsys)
    assert "\x1b[94m" in coloured[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(["routes", out, "--text", LINES[0]], monkeypatch, capsys)[:2] == plain[:2]


def test_routes_reads_every_document_of_a_file(tmp_path, out, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    Path("notes/a.txt").write_text(f"{LINES[0]}\n<|document|>\n{LINES[1]}")
    Path("notes/b.jsonl").write_text(json.dumps({"text": "Le chat dort"}) + "\n\n" + '"def main"\n')
    Path("main.py").write_text("def main(argv):\n<|document|>\n")
    Path("text 1").write_text("The fox")

    def texts(*words: str) -> dict[str, str]:
        code, printed, errors = run(["routes", out, *words, "--json", "--max-tokens", 8], monkeypatch, capsys)
        assert code == 0, errors
        return {text["name"]: "".join(text["tokens"]) for text in json.loads(printed)["texts"]}

    found = texts("--file", "notes/a.txt", "--file", "notes/b.jsonl", "--file", "main.py")
    assert list(found) == ["a.txt:1", "a.txt:2", "b.jsonl:1", "b.jsonl:2", "main.py"]
    assert found["b.jsonl:2"] == "def main"
    assert LINES[1].startswith(found["a.txt:2"])  # each text has its own --max-tokens
    assert LINES[0].startswith(found["a.txt:1"])
    assert texts("--file", "notes/*.txt").keys() == {"a.txt:1", "a.txt:2"}
    assert texts("--file", "notes").keys() == {"a.txt:1", "a.txt:2", "b.jsonl:1", "b.jsonl:2"}
    assert texts("--text", "Le chat", "--file", "text 1") == {"text 1": "Le chat", "text 1 (file)": "The fox"}


def test_routes_says_how_many_documents_it_leaves_out(tmp_path, out, monkeypatch, capsys):
    (tmp_path / "many.jsonl").write_text("".join(f'"item {number}"\n' for number in range(60)))
    words = ["routes", out, "--text", "The fox", "--file", tmp_path / "many.jsonl", "--json", "--quiet"]
    code, printed, errors = run(words, monkeypatch, capsys)
    assert (code, errors) == (0, "warning: of 60 documents, the first 50 are read\n")
    assert [text["name"] for text in json.loads(printed)["texts"]][-1] == "many.jsonl:50"


def test_of_a_long_text_no_more_is_tokenised_than_is_read(out):
    text = f"{LINES[0]}\n" * 2000
    whole = trace(out, {"a": text[:4000]}, TraceSettings(100, device="cpu")).texts[0]
    seen = []
    given = transformers.PreTrainedTokenizerFast.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transformers.PreTrainedTokenizerFast,
            "__call__",
            lambda self, text, **keys: (seen.append(len(text)), given(self, text, **keys))[1],
        )
        found = trace(out, {"a": text}, TraceSettings(100, device="cpu")).texts[0]
    assert found.tokens == whole.tokens
    assert seen == [6400]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to route: give --text or --file."),
        (["--file", "nowhere"], "--file: nowhere: cannot be read: No such file or directory."),
        (["--file", "x" * 300], f"--file: {'x' * 300}: cannot be read: File name too long."),
        (
            ["--file", "."],
            "--file[0]: '.' leads to no .txt, .jsonl or .parquet file. Paths count from the current folder.",
        ),
        (
            ["--file", "*.txt"],
            "--file[0]: '*.txt' leads to no .txt, .jsonl or .parquet file. Paths count from the current folder.",
        ),
        (["--file", "empty.md"], "--file: empty.md: holds no text."),
        (["--file", "pipe.txt"], "--file: pipe.txt: is not a file that can be read to an end. Name a file of text."),
        (["--text", "x", "--text", "caf\udce9"], "--text: text 2 holds bytes that are not UTF-8. Write it in UTF-8."),
        (["--file", "bytes.md"], "--file: bytes.md: cannot be read as text in UTF-8: "),
        (["--text", "x", "--html", "no/such/folder.html"], "no/such/folder.html: there is no such folder."),
        (["--text", "The fox", "--layer", "9"], "layer 9 has no router; those with one: 0, 1, 2."),
        (["--text", ""], "text 1: the model's tokenizer finds no tokens in it."),
    ],
)
def test_routes_refuses_what_it_cannot_show(  # noqa: PLR0917
    out, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("empty.md").write_text(" \n")
    Path("bytes.md").write_bytes(b"\xff\xfe\x00")
    os.mkfifo("pipe.txt")
    code, _, errors = run(["routes", out, *arguments], monkeypatch, capsys)
    assert (code, message in errors) == (2, True), errors


def test_a_difference_is_of_the_same_documents():
    documents = np.array(
        [[tokens * loss, tokens] for tokens, loss in ((10, 1.0), (30, 9.0), (20, 4.0), (10, 2.0), (50, 6.0))]
    )
    lower = documents - np.array([[0.1, 0]]) * documents[:, 1:]
    found = figures.difference({"a": documents, "b": documents}, {"a": lower, "b": lower})
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    found = figures.difference({"a": documents}, {"a": lower[::-1]})
    assert found.low < 0 < found.high
    assert figures.difference({"a": documents[:4]}, {"a": lower[:4]}).interval == ""


def test_every_output_family_says_how_many_experts_a_token_goes_to():
    from moemerge.families.stored_mixture import per_token_key

    assert all(per_token_key(family) for family in MOE_FAMILIES.values())


# ---- what cannot be run


def test_a_mixture_whose_experts_are_absent_somewhere_has_no_uniform_one(tmp_path):
    folders = [make_model(tmp_path / name, seed, "qwen3") for seed, name in enumerate(("base", "fox", "code", "chat"))]
    experts = [{"source_model": str(folder)} for folder in folders[1:]]
    experts[2]["layers"] = [0]
    document = {"base_model": str(folders[0]), "gate_mode": "random", "architecture": "glm4_moe", "experts": experts}
    merge(plan_merge(parse_config(json.dumps(document))), tmp_path / "out")
    (tmp_path / "fox.txt").write_text(LINES[0])
    found = evaluate(
        tmp_path / "out", {"fox": [str(tmp_path / "fox.txt")]}, EvaluationSettings(baselines=True, tokens=30)
    )
    assert "uniform mixture" not in found.losses
    assert "experts are absent from some layers, so there is no uniform mixture of all" in found.notes
    assert "label oracle" in found.losses
    assert found.recovered_mean is None
    mixture = open_mixture(tmp_path / "out")
    assert [mixture.absent(layer) for layer in range(3)] == [[], [2], [2]]


def test_an_expert_that_lacks_a_token_is_left_out(tmp_path, out, data, models):
    copied = shutil.copytree(out, tmp_path / "out")
    small = make_model(tmp_path / "small", 2, vocab_size=20)
    config = copied / "moemerge_config.yaml"
    config.write_text(config.read_text().replace(str(models[2]), str(small)))
    found = evaluate(copied, data, EvaluationSettings(tokens=40, baselines=True))
    assert "expert small" not in found.losses
    assert "expert chat" in found.losses
    assert any(note.startswith("expert small is left out: ") and "has 20 rows" in note for note in found.notes)
    assert "expert small and expert fox differ in their tensors, so their weights have no average" in found.notes


def damage(folder: Path, name: str, place: tuple[int, ...], value: float = math.nan) -> None:
    tensors = load_weights(folder)
    tensors[name][place] = value
    save_weights(folder, tensors)


FFN = "model.layers.1.block_sparse_moe.experts.0."


@pytest.mark.parametrize(("name", "place", "value", "where", "told"), [
    ("model.norm.weight", (0,), math.nan, "the norm and the head", "1 number that is infinite or NaN, at [0]"),
    ("lm_head.weight", (7, 2), math.inf, "the norm and the head", "1 number that is infinite or NaN, at [7, 2]"),
    ("model.embed_tokens.weight", (slice(5, None), 31), -math.inf, "the embeddings",
     "155 numbers that are infinite or NaN, the first at [5, 31]"),
    (f"{FFN}w3.weight", (3, 5), math.nan, "layer 1", "1 number that is infinite or NaN, at [3, 5]"),
    ("model.layers.2.self_attn.o_proj.weight", (1,), math.inf, "layer 2",
     "32 numbers that are infinite or NaN, the first at [1, 0]"),
])  # fmt: skip
def test_a_model_whose_numbers_are_not_finite_is_refused(  # noqa: PLR0917
    tmp_path, out, data, monkeypatch, capsys, name, place, value, where, told
):
    copied = shutil.copytree(out, tmp_path / "out")
    damage(copied, name, place, value)
    message = f"error: {copied}: its numbers are not finite from {where} on: {name} holds {told}."
    for words in (
        ["eval", copied, "--data", f"fox={data['fox'][0]}", "--quiet", "--json"],
        ["routes", copied, "--text", LINES[0], "--quiet", "--json"],
    ):
        code, printed, errors = run(words, monkeypatch, capsys)
        assert (code, printed, errors.splitlines()[-1]) == (1, "", message)


def test_finite_weights_that_overflow_are_refused(tmp_path, out, data):
    copied = shutil.copytree(out, tmp_path / "out")
    tensors = load_weights(copied)
    for expert in range(3):
        tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"] *= 1e38
    save_weights(copied, tensors)
    with pytest.raises(CheckpointError) as caught:
        evaluate(copied, data, EvaluationSettings(tokens=40))
    assert str(caught.value) == (
        f"{copied}: its numbers overflow in layer 1, whose weights are finite: they grow beyond 3.4e+38, the largest that "
        "float32 holds."
    )


def test_a_quantised_model_is_refused(tmp_path, out, data, monkeypatch, capsys):
    copied = shutil.copytree(out, tmp_path / "out")
    tensors = load_weights(copied)
    tensors[f"{FFN}w3.weight"] = tensors[f"{FFN}w3.weight"].to(torch.int8)
    save_weights(copied, tensors)
    code, _, errors = run(["eval", copied, "--data", f"fox={data['fox'][0]}", "--quiet"], monkeypatch, capsys)
    assert (code, errors) == (
        1,
        f"error: {copied}: {FFN}w3.weight is stored as I8: quantised models are not run. Name the model that it was made "
        "from.\n",
    )


def test_a_selection_bias_that_is_not_finite_is_refused(tmp_path):
    """It chooses nothing, and the layer's numbers stay finite all the same."""
    folders = [make_model(tmp_path / str(seed), seed, "qwen3") for seed in range(3)]
    out = merged(tmp_path, folders, architecture="glm4_moe")
    damage(out, "model.layers.1.mlp.gate.e_score_correction_bias", (1,))
    with pytest.raises(CheckpointError) as caught:
        trace(out, {"a": LINES[0]}, TraceSettings(50, device="cpu"))
    assert str(caught.value) == (
        f"{out}: model.layers.1.mlp.gate.e_score_correction_bias holds 1 number that is infinite or NaN, at [1]."
    )


def test_the_head_is_looked_at_a_few_tokens_at_a_time(out, monkeypatch):
    """Routes read longer texts than those whose logits have room."""
    seen, given = [], head.finish
    monkeypatch.setattr(running, "_TOKENS", 10)
    monkeypatch.setattr(head, "finish", lambda *args: (seen.append(args[3].states.shape[1]), given(*args))[1])
    routes = trace(out, {"a": LINES[0], "b": "Le chat"}, TraceSettings(50, device="cpu"))
    long, short = (1 + len(text.tokens) for text in routes.texts)  # with the BOS
    assert (long, short) == (26, 3)
    assert seen == [3, 10, 10, 6]


def test_baselines_that_are_damaged_are_left_out(tmp_path, data):
    """The merged model is sound: attention is the base's, and no token goes to the expert with a NaN in its FFN."""
    names = ("base", "fox", "code", "chat")
    models = [make_model(tmp_path / name, seed, "qwen3") for seed, name in enumerate(names)]
    out = merged(tmp_path, models, architecture="glm4_moe")
    attention, ffn = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.experts.0.up_proj.weight"
    damage(models[1], attention, (3, 5))
    damage(out, ffn, (3, 5))
    damage(out, "model.layers.1.mlp.gate.e_score_correction_bias", (0,), -100.0)
    found = evaluate(out, data, EvaluationSettings(tokens=40, baselines=True))
    assert set(found.losses) == {"merged", "base", "expert code", "expert chat", "label oracle"}
    place = "is left out: its numbers are not finite from layer 1 on:"
    told = "holds 1 number that is infinite or NaN, at [3, 5]"
    assert found.notes[:4] == (
        f"expert fox {place} {attention} {told}",
        f"uniform mixture {place} {ffn} {told}",
        f"weight average {place} {attention} {told}",
        f"label oracle of fox {place} {ffn} {told}",
    )
    assert set(found.losses["label oracle"]) == {"code"}
    assert found.recovered_mean is None


def test_a_perplexity_beyond_all_numbers_is_printed(tmp_path, out, data, monkeypatch, capsys):
    copied = shutil.copytree(out, tmp_path / "out")
    tensors = load_weights(copied)
    tensors["lm_head.weight"] *= 1e4
    save_weights(copied, tensors)
    code, printed, _ = run(["eval", copied, "--data", f"fox={data['fox'][0]}"], monkeypatch, capsys)
    assert code == 0
    assert re.search(r"merged +\d{4,}\.\d{3} \(over 1e6\)", printed)


@pytest.mark.parametrize(("name", "near"), [("coed", "code"), ("Code", "code"), ("foxx", "fox"), ("chatt", "chat")])
def test_a_misspelt_expert_is_refused(out, data, name, near):
    with pytest.raises(RefusedError) as caught:
        evaluate(out, {"fox": data["fox"], name: data["code"]}, EvaluationSettings(tokens=40))
    assert str(caught.value) == (
        f"--data {name}=: is not an expert's name, did you mean {near}? Experts: fox, code, chat. A domain that is for none of "
        "them needs a name that is less like theirs."
    )


def test_five_documents_have_an_interval_and_four_have_none():
    sums = np.stack([np.arange(5.0, 10.0), np.full(5, 2.0)], axis=1)
    found = figures.estimate(sums)
    assert found.low < found.value < found.high
    assert found.interval == f" ({found.low:.3f} to {found.high:.3f})"
    assert (figures.estimate(sums[:4]).low, figures.estimate(sums[:4]).interval) == (None, "")


def test_a_mixture_that_lacks_what_its_family_has_is_refused(tmp_path, llamas):
    folder = merged(tmp_path, llamas)
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_hidden_layers", "num_experts_per_tok"):
        (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != key}))
        with pytest.raises(IncompatibleError) as caught:
            open_mixture(folder)
        assert str(caught.value) == f"{folder}: its config.json has no {key}, which a mixtral has."
    (folder / "config.json").write_text(json.dumps(config))
    kept = {name: tensor for name, tensor in load_weights(folder).items() if ".gate." not in name}
    save_weights(folder, kept)
    with pytest.raises(IncompatibleError) as caught:
        open_mixture(folder)
    assert str(caught.value) == f"{folder}: has no router: no tensor is called *.block_sparse_moe.gate.weight."


def test_a_model_of_no_dense_family_is_not_run(tmp_path, llamas):
    folder = Path(shutil.copytree(llamas[0], tmp_path / "odd"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "odd"}))
    with pytest.raises(IncompatibleError, match=f"^{folder}: .*odd"):
        open_dense(str(folder), "odd", print)

"""Rows of experts that are added to a mixture, from what enters its own routers."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from moemerge import load_config, merge, plan_merge
from moemerge.config.schema import Expert
from moemerge.editing.added_routers import AddedExperts, EditedExpert, added_rows
from moemerge.editing.planner import plan_edit
from moemerge.editing.preview import preview
from moemerge.editing.router_inputs import RowPass, encode_documents, visit_router_inputs
from moemerge.editing.texts import readable_documents
from moemerge.evaluation.runnable import MixtureModel, open_mixture
from moemerge.families.dense import ModelTensors, read_dense
from moemerge.passes.compute_dtype import Compute
from moemerge.routers.added_rows import KeptRows, fit_added_rows, label_added, sharpened
from moemerge.routers.prompts import NEUTRAL, NEUTRAL_TEXT
from moemerge.sources.model_folder import open_model
from moemerge.sources.tensor_tables import read_tensor_table
from tests.passes.test_passes import IS_V4
from tests.support.models import load, load_weights, make_model, save_weights

CPU = Compute(torch.device("cpu"), torch.float32)
TEXTS = (["The quick fox jumps over", "The lazy dog sleeps"], ["def main(argv): return", "for item in argv: pass"],
         ["Le chat dort sur le tapis", "et la souris danse"])  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three fine-tunes of it."""
    root = tmp_path_factory.mktemp("added")
    return [make_model(root / "base", 0), *(make_model(root / f"e{n}", n, tuned_from=0) for n in (1, 2, 3))]


@pytest.fixture(scope="module")
def mixtures(models, tmp_path_factory):
    """Mixtures of the first two experts, by softmax and by sigmoids, with rows from their texts."""
    root = tmp_path_factory.mktemp("mixtures")
    made = {}
    for family in ("mixtral", "glm4_moe"):
        experts = [
            {"source_model": str(model), "positive_prompts": texts}
            for model, texts in zip(models[1:3], TEXTS[:2], strict=True)
        ]
        config = {"base_model": str(models[0]), "experts": experts, "architecture": family}
        merge(plan_merge(load_config(config)), root / family)
        made[family] = open_mixture(root / family)
    return made


def tensors_of(folder) -> ModelTensors:
    model = open_model(str(folder), lambda _: None)
    dense = read_dense(model.config)
    assert not isinstance(dense, str)
    return ModelTensors(dense, read_tensor_table(model, lambda _: None))


def request_of(mixture, models, texts=TEXTS, **keys) -> AddedExperts:
    """The two experts of a mixture, and the third model beside them."""
    experts = [
        EditedExpert(f"e{n}", tensors_of(models[n + 1]).projection, texts[n], dict.fromkeys(mixture.moe_layers, n))
        for n in (0, 1)
    ]
    new = EditedExpert("new", tensors_of(models[3]).projection, texts[2])
    return AddedExperts(mixture, (experts[0], new, experts[1]), 2, tensors_of(models[0]), **keys)


def result_of(mixture, models, rows=None) -> MixtureModel:
    """The mixture of `request_of`, with routers of zeros, or of rows by layer."""
    own = str(mixture.folder)
    experts = [{"source_model": source} for source in (f"{own}#0", str(models[3]), f"{own}#1")]
    plan = plan_edit(load_config({"base_model": own, "experts": experts}))
    unmade = np.zeros((3, 32), np.float32)
    return preview(mixture, plan, rows or dict.fromkeys(mixture.moe_layers, unmade))


def add(request: AddedExperts, models):
    reading = RowPass(result_of(request.mixture, models), "cpu", "float32", lambda *_: None)
    return added_rows(request, reading)


def inputs_of(mixture, documents):
    """Copies of the router inputs by layer."""
    prompts = encode_documents(mixture, documents, tokens=256, seed=0)
    found, layers = {}, []

    def visit(inputs):
        found[inputs.layer] = (inputs.states.clone(), inputs.beginnings.clone(), inputs)

    visit_router_inputs(mixture, prompts, CPU, visit, lambda done, total: layers.append((done, total)))
    assert layers == [(n + 1, 3) for n in range(3)]
    return found


def test_router_inputs_are_those_of_transformers_own_mixture(mixtures):
    mixture = mixtures["mixtral"]
    found = inputs_of(mixture, TEXTS[:2])
    model = load(mixture.folder)
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in mixture.moe_layers}
    for layer, kept in seen.items():
        gate = (model.model.layers[layer].block_sparse_moe if IS_V4 else model.model.layers[layer].mlp).gate
        gate.register_forward_pre_hook(lambda _module, inputs, kept=kept: kept.append(inputs[0].reshape(-1, 32)))
    prompts = found[0][2].prompts
    for prompt in prompts:
        with torch.no_grad():
            model(torch.tensor([prompt.ids]))
    counted = torch.tensor([counts for prompt in prompts for counts in prompt.counted])
    for layer, kept in seen.items():
        states, beginnings, inputs = found[layer]
        assert torch.allclose(states, torch.cat(kept)[counted], atol=1e-4)
        assert torch.allclose(beginnings, torch.stack([whole[0] for whole in kept]), atol=1e-4)
        assert inputs.expert.tolist() == [p.expert for p in prompts for counts in p.counted if counts]
    assert {prompt.expert for prompt in prompts} == {0, 1, NEUTRAL}
    assert len({prompt.document for prompt in prompts}) == len(TEXTS[0] + TEXTS[1]) + len(NEUTRAL_TEXT)


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_text_of_a_new_expert_goes_to_it(mixtures, models, family):
    mixture = mixtures[family]
    made = add(request_of(mixture, models, lambda_=0.01), models)
    assert list(made.rows) == mixture.moe_layers
    result = result_of(mixture, models, made.rows)
    for layer, (states, _, inputs) in inputs_of(result, TEXTS).items():
        assert torch.equal(
            torch.from_numpy(made.rows[layer][[0, 2]]), mixture.runnable.read(mixture.router(layer)).float()
        )
        logits = states @ torch.from_numpy(made.rows[layer]).T
        own = inputs.expert == 2
        assert float((logits[own].argmax(dim=1) == 1).float().mean()) > 0.9
        assert float((logits[(inputs.expert >= 0) & ~own].argmax(dim=1) == 1).float().mean()) < 0.2
    (report,) = made.report
    assert report.name == "new"
    assert 0 <= report.first <= report.chosen <= 1
    assert 0 <= report.taken <= 1


def test_figures_count_what_selection_biases_choose(mixtures, models, tmp_path):
    shutil.copytree(mixtures["glm4_moe"].folder, tmp_path, dirs_exist_ok=True)
    tensors = load_weights(tmp_path)
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.tensor([10.0, -10.0])
    save_weights(tmp_path, tensors)
    mixture = open_mixture(tmp_path)
    (report,) = add(replace(request_of(mixture, models), experts_per_token=1), models).report
    assert (report.first, report.chosen, report.taken) == (0, 0, 0)


def test_rows_are_made_of_what_enters_the_routers_of_the_result(mixtures, models):
    """Text that is labelled for the new expert passes through it in earlier layers."""
    mixture = mixtures["mixtral"]
    made = add(replace(request_of(mixture, models), base=None), models)
    result = result_of(mixture, models, made.rows)
    seen = {}

    def refit(inputs):
        kept = KeptRows(mixture.runnable.read(mixture.router(inputs.layer)).float(), "softmax")
        first = kept.rows.mean(dim=0)[None]
        data, _ = label_added(inputs, 2, None)
        seen[inputs.layer] = sharpened(kept, fit_added_rows(kept, first, data), data)[0]

    prompts = encode_documents(result, TEXTS, tokens=4096, seed=0)
    visit_router_inputs(result, prompts, CPU, refit, lambda *_: None)
    for layer, rows in made.rows.items():
        assert torch.allclose(torch.from_numpy(rows[1]), seen[layer], rtol=1e-2, atol=1e-2)


def test_a_new_expert_without_text_has_what_its_weights_say(mixtures, models):
    mixture = mixtures["mixtral"]
    made = add(request_of(mixture, models, texts=(*TEXTS[:2], [])), models)
    (report,) = made.report
    assert (report.first, report.chosen, report.taken) == (None, None, None)
    for layer, rows in made.rows.items():
        mean = mixture.runnable.read(mixture.router(layer)).float().mean(dim=0)
        assert rows.shape == (3, 32)
        assert not torch.allclose(torch.from_numpy(rows[1]), mean, atol=1e-3)


def test_an_expert_that_neither_text_nor_weights_describe_has_the_mean_of_the_kept_rows(mixtures, models):
    mixture = mixtures["mixtral"]
    made = add(replace(request_of(mixture, models, texts=(*TEXTS[:2], [])), base=None), models)
    for layer, rows in made.rows.items():
        mean = mixture.runnable.read(mixture.router(layer)).float().mean(dim=0)
        assert torch.allclose(torch.from_numpy(rows[1]), mean, atol=1e-6)


def test_one_document_is_not_judged(mixtures, models):
    made = add(request_of(mixtures["mixtral"], models, texts=(*TEXTS[:2], TEXTS[2][:1])), models)
    assert made.report[0].first is None


def test_texts_that_are_gone_are_left_out(tmp_path):
    (tmp_path / "there.txt").write_text("one\n<|document|>\ntwo\n")
    (tmp_path / "faulty.jsonl").write_text("{")
    texts = [str(tmp_path / name) for name in ("there.txt", "gone.txt", "faulty.jsonl")]
    expert = Expert(source_model="e", positive_prompts=["a prompt"], positive_texts=texts)
    assert [str(document).strip() for document in readable_documents(expert)] == ["a prompt", "one", "two"]

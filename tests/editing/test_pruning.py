"""Pruning: equal experts go without a loss, others by what was measured of them."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moemerge import merge, plan_merge
from moemerge.checkpoint.derived import read_values
from moemerge.cli.pruning_report import pruning_facts
from moemerge.config.loading import parse_config
from moemerge.config.yaml_text import write_yaml
from moemerge.editing.plan import EditPlan
from moemerge.editing.planner import plan_edit
from moemerge.editing.preview import preview, router_bands
from moemerge.editing.pruning.choice import PruneRequest, check_keep, choose_kept
from moemerge.editing.pruning.group_rows import row_of_group
from moemerge.editing.pruning.judging import Judged
from moemerge.editing.pruning.pruned_plan import plan_pruning
from moemerge.editing.pruning.pruner import Decision, decide
from moemerge.editing.pruning.saliency import Saliency
from moemerge.editing.upcycling import Copies, upcycled_dense, upcycled_mixture
from moemerge.editing.verifying import verify_edit
from moemerge.editing.writing import write_edit
from moemerge.errors import RefusedError
from moemerge.evaluation import runnable
from moemerge.evaluation.figures import Estimate
from moemerge.evaluation.runnable import open_mixture
from moemerge.evaluation.running import run_model
from moemerge.evaluation.settings import EvaluationSettings
from moemerge.families.choosing import Choosing
from moemerge.families.stored_mixture import StoredMixture
from moemerge.planning.options import PlanOptions
from moemerge.sources import stored_mixtures
from moemerge.sources.model_folder import ModelFolder, open_model
from moemerge.sources.stored_mixtures import kept_config, read_mixture, read_stored_mixture
from tests.editing.test_saliency import CPU, copy_expert, make_mixture, texts
from tests.support.mixtures import make_variant
from tests.support.models import TEXT, assert_close, load, logits

DOCUMENTS = {"one": TEXT.split("\n") * 2, "two": [TEXT[::-1], TEXT[20:]]}
SETTINGS = EvaluationSettings(tokens=200, window=50, device="cpu", compute_dtype="float32")


def duplicated(folder: Path, name: str = "mixtral, gelu") -> Path:
    """A mixture whose experts 2 and 3 are copies of 0 and 1, with their router rows."""
    make_mixture(folder, name)
    for source, target in ((0, 2), (1, 3)):
        copy_expert(folder, source, target)
    tensors = load_file(folder / "model.safetensors")
    for values in tensors.values():
        if values.shape == (4, 32):
            values[2:] = values[:2]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def stored_mixture(folder: Path) -> StoredMixture:
    """A folder's mixture as it is stored."""
    return read_stored_mixture(open_model(str(folder), lambda _: None), lambda _: None)


def plan_of(folder: Path, found: Decision) -> EditPlan:
    """Plan a pruned mixture."""
    opened = read_mixture(str(folder), lambda _: None)
    config = kept_config(opened[0], lambda _: None)
    return plan_pruning(opened, found.pruning, config, PlanOptions(), new_routers=bool(found.rows))


def written(folder: Path, out: Path, found: Decision) -> Path:
    """Write a pruned mixture."""
    plan = plan_of(folder, found)
    write_edit(plan, out, lambda: router_bands(plan, found.rows))
    return out


def pruned(tmp_path: Path, folder: Path, request: PruneRequest) -> tuple[Decision, Path]:
    """Decide on a pruning and write it."""
    found = decide(folder, DOCUMENTS, request, SETTINGS)
    return found, written(folder, tmp_path / "out", found)


def test_equal_experts_go_first_and_the_model_computes_the_same(tmp_path):
    """Each token chose both copies of one expert: one expert per token computes that exactly."""
    folder = duplicated(tmp_path / "mixture")
    found, out = pruned(tmp_path, folder, PruneRequest(2))
    assert found.similarity.groups_everywhere == ((0, 2), (1, 3))
    assert set(found.pruning.kept.values()) == {(0, 1)}
    assert found.pruning.experts_per_token == 1
    assert found.rows == {}
    assert [(loss.dropped, loss.saliency, loss.tokens) for loss in found.pruning.losses] == [((), 0, 0)] * 3
    given = re.fullmatch(
        r"experts_per_token is lowered from 2 to 1: tokens chose equal experts together, so that 1 different one made "
        r"their result\. With 2, (\d+\.\d)% of a token's weights would go to other FFNs than before, with 1 0\.0%",
        found.pruning.notes[0],
    )
    assert given
    assert float(given[1]) > 1
    assert_close(logits(load(out)), logits(load(folder)))


def test_a_copy_that_stays_alone_takes_over_the_weight_of_the_others():
    """A group of two has twice the weight of one: its logit grows by log 2, also for states that it is not fitted to."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(800, 32, generator=generator) + 2 * torch.randn(32, generator=generator)  # as norms give them
    rows = torch.randn(4, 32, generator=generator)
    rows[2] = rows[0]
    made = row_of_group(rows, [0, 2], torch.ones(4), states[:400], 1)
    grown = states[400:] @ (made - rows[0])
    assert grown.mean() == pytest.approx(math.log(2), rel=0.1)
    assert grown.std() < 0.3 * math.log(2)


def test_rows_that_differ_give_one_that_follows_the_larger_logit():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(800, 32, generator=generator) + 2 * torch.randn(32, generator=generator)
    rows = torch.randn(4, 32, generator=generator) / 10
    together = (states @ rows[[0, 2]].T).logsumexp(dim=1)
    made = row_of_group(rows, [0, 2], torch.ones(4), states[:400], 1)
    misses = (states[400:] @ torch.stack([made, rows[0]]).T - together[400:, None]).square().mean(dim=0)
    assert misses[0] < misses[1] / 4


def test_groups_of_one_size_keep_their_rows_bit_for_bit():
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    rows[2:] = rows[:2]
    states = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(row_of_group(rows, [1, 3], torch.tensor([5.0, 1, 2, 3]), states, 2), rows[1])


@pytest.mark.parametrize("name", ["mixtral, gelu", "granitemoe", "ernie4_5_moe"])
def test_what_stays_keeps_its_bytes_and_what_runs_is_what_is_written(tmp_path, name):
    folder = make_mixture(tmp_path / "mixture", name)
    found, out = pruned(tmp_path, folder, PruneRequest(2, by_layer=True))
    plan = plan_of(folder, found)
    mixture = open_mixture(out)
    assert mixture.experts_per_token == 2
    made = run_model(preview(found.mixture, plan, found.rows).runnable, texts().windows, CPU)
    assert torch.equal(made, run_model(mixture.runnable, texts().windows, CPU))
    logits(load(out))  # every tensor finds its place
    old, new = stored_mixture(folder), stored_mixture(out)
    for layer, kept in found.pruning.kept.items():
        assert len(kept) == 2
        np.testing.assert_array_equal(read_values(new.router(layer)), read_values(old.router(layer))[list(kept)])
        for place, expert in enumerate(kept):
            for role in ("gate", "up", "down"):
                one, other = new.projection(layer, place, role), old.projection(layer, expert, role)
                np.testing.assert_array_equal(read_values(one), read_values(other))


def test_merged_experts_are_averages_by_how_often_each_was_chosen(tmp_path):
    folder = make_mixture(tmp_path / "mixture", "mixtral, gelu")
    found, out = pruned(tmp_path, folder, PruneRequest(2, merge=True))
    old, new = stored_mixture(folder), stored_mixture(out)
    for place, (layer, kept) in enumerate(found.pruning.kept.items()):
        frequency, differences = found.saliency.frequency[place], found.saliency.differences[place]
        nearest = {expert: min(kept, key=lambda one: differences[expert, one]) for expert in {0, 1, 2, 3} - {*kept}}
        for number, expert in enumerate(kept):
            group = [expert, *(other for other, one in nearest.items() if one == expert)]
            assert sorted(found.pruning.members[layer][expert]) == sorted(group)
            share = frequency[group] / frequency[group].sum()
            for role in ("gate", "up", "down"):
                whole = [read_values(old.projection(layer, other, role)) for other in group]
                expected = sum(one * part for one, part in zip(share, whole, strict=True))
                np.testing.assert_allclose(read_values(new.projection(layer, number, role)), expected, atol=1e-6)
    assert any(len(group) > 1 for group in found.pruning.members[layer].values())


def never_chosen(folder: Path) -> Path:
    """A mixture whose expert 0 gives the most in layer 1, and is chosen by no token in layer 2, where all are like it."""
    make_variant(folder, "dots1")
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if match := re.match(r"(model\.layers\.2\.mlp\.experts\.)[123](\..*)", name):
            values.copy_(tensors[f"{match[1]}0{match[2]}"] + 0.3 * values)
    tensors["model.layers.1.mlp.experts.0.down_proj.weight"] *= 50
    tensors["model.layers.2.mlp.gate.e_score_correction_bias"][0] = -10
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("keep", [2, 3])
def test_an_expert_that_no_token_chooses_in_a_layer_becomes_the_average_of_the_others(tmp_path, run, keep):
    """It takes over the selection bias and the row of one that was chosen, so that tokens find it."""
    folder, out = never_chosen(tmp_path / "mixture"), tmp_path / "out"
    code, shown, errors = run(*prune(folder, out, "--keep", keep, "--merge", "--json"))
    assert code == 0, errors
    facts = json.loads(shown)
    place, layer = facts["layers"].index(2), 2
    assert facts["kept"][place][0] == 0
    shares = {int(expert): share for expert, share in facts["shares"][place]["0"].items()}
    frequency = facts["frequency"][place]
    assert frequency[0] == 0
    chosen = [expert for expert in facts["members"][place]["0"] if expert]
    assert shares == pytest.approx({expert: frequency[expert] / sum(frequency[e] for e in chosen) for expert in chosen})
    assert len(shares) == 4 - keep
    old, new = stored_mixture(folder), stored_mixture(out)
    for role in ("gate", "up", "down"):
        expected = sum(share * read_values(old.projection(layer, one, role)) for one, share in shares.items())
        np.testing.assert_allclose(read_values(new.projection(layer, 0, role)), expected, atol=1e-6)
    bias = "mlp.gate.e_score_correction_bias"
    assert read_values(new.layer(layer)[bias])[0] == read_values(old.layer(layer)[bias])[min(shares)]
    assert run("verify", out)[0] == 0


def test_a_router_that_does_not_normalise_is_named(tmp_path):
    folder = make_mixture(tmp_path, "qwen3_moe, unnormalised")
    found = decide(folder, DOCUMENTS, PruneRequest(2), SETTINGS)
    assert found.pruning.notes == (
        "its routers do not divide the weights of the chosen experts by their sum: what a softmax gave dropped experts "
        "goes to the kept ones, whose outputs all weigh more",
    )


def test_sigmoids_give_dropped_experts_nothing_that_others_could_get(tmp_path):
    folder = make_variant(tmp_path, "dots1", norm_topk_prob=False)
    found = decide(folder, DOCUMENTS, PruneRequest(2), SETTINGS)
    assert found.pruning.loses
    assert found.pruning.notes == ()


def twice(folder: Path, out: Path) -> Path:
    """A mixture with every expert twice, which computes the same."""
    document = upcycled_mixture(str(folder), stored_mixture(folder), Copies(8))
    write_edit(plan_edit(parse_config(write_yaml(document), allow_identical_experts=True)), out, dict)
    return out


MULTIPLIED = (
    "its routers do not divide the weights of the chosen experts by their sum: the outputs of kept experts are "
    "multiplied by how many of those that each stands for were chosen together, 2, 2, 2, 2"
)


@pytest.mark.parametrize(
    ("name", "settings", "notes"),
    [
        ("dots1", {}, ()),
        ("dots1", {"norm_topk_prob": False}, (MULTIPLIED,)),
        pytest.param("lfm2_moe, unnormalised", {}, (MULTIPLIED,), marks=pytest.mark.slow),
        ("cohere2_moe, average, sigmoids", {}, (MULTIPLIED,)),
        ("qwen3_moe", {}, ()),
        pytest.param("qwen3_moe, as released", {}, (), marks=pytest.mark.slow),
    ],
)
def test_one_of_two_copies_gives_what_both_gave(tmp_path, name, settings, notes):
    """Where sigmoids are not divided by their sum, the one that stays gives twice as much."""
    folder = twice(make_variant(tmp_path / "mixture", name, **settings), tmp_path / "twice")
    found, out = pruned(tmp_path, folder, PruneRequest(4))
    assert found.pruning.experts_per_token == 2
    assert found.pruning.notes[0].startswith("experts_per_token is lowered from 4 to 2: ")
    assert found.pruning.notes[1:] == notes
    assert not found.pruning.loses
    assert_close(logits(load(out)), logits(load(folder)))
    plan = plan_of(folder, found)
    assert verify_edit(plan, out).differences == ()
    made = run_model(preview(found.mixture, plan, found.rows).runnable, texts().windows, CPU)
    assert torch.equal(made, run_model(open_mixture(out).runnable, texts().windows, CPU))


@pytest.mark.parametrize("normalised", [True, False])
def test_copies_whose_router_rows_differ_are_said_not_to_be_exact(tmp_path, normalised):
    folder = twice(make_variant(tmp_path / "mixture", "dots1", norm_topk_prob=normalised), tmp_path / "twice")
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, values in tensors.items():
            if name.endswith("mlp.gate.weight"):
                values[1::2] = values[1::2].flip(0)
        save_file(tensors, shard, {"format": "pt"})
    found = decide(folder, DOCUMENTS, PruneRequest(4), SETTINGS)
    assert not found.pruning.loses
    given = re.fullmatch(
        r"(\d+\.\d)% of a token's weights change, although every dropped expert equals a kept one: one computes what "
        r"several did only where these have equal router rows and biases, and each kept expert stands for as many",
        found.pruning.notes[-1],
    )
    assert given
    assert 1 < float(given[1]) < 100


def test_of_copies_that_any_router_may_choose_none_is_missed(tmp_path, llamas):
    """All experts are equal: whichever are left, and whatever their rows, they compute the same."""
    document = upcycled_dense(str(llamas[0]), Copies(6), "random")
    folder = tmp_path / "mixture"
    merge(plan_merge(parse_config(write_yaml(document), allow_identical_experts=True)), folder)
    found, out = pruned(tmp_path, folder, PruneRequest(4))
    assert found.pruning.notes == ()
    assert_close(logits(load(out)), logits(load(folder)))


def saliency(**given) -> Saliency:
    """Two layers, four experts, four tokens of one domain."""
    choices = (
        np.array([[0, 1], [0, 1], [0, 2], [0, 3]], np.int16),
        np.array([[3, 2], [3, 2], [3, 1], [2, 1]], np.int16),
    )
    load = np.array([[np.bincount(one.ravel(), minlength=4) / 4 for one in choices]])
    reap = np.array([[4.0, 3, 2, 1], [10, 20, 30, 50]])
    return replace(
        Saliency(
            layers=(1, 2), domains=("one",), tokens=(4,), choices=choices, reap=reap, mass=reap * load[0] * 4, load=load,
            weight=np.array([[0.1, 0.2, 0.9, 0.3]] * 2), router_norm=np.array([[1.0, 1, 1, 2]] * 2),
            differences=np.array([1 - np.eye(4)] * 2),
        ),
        **given,
    )  # fmt: skip


def test_layers_that_text_does_not_pass_through_keep_what_the_last_one_keeps(tmp_path):
    """As those that predict further tokens, which released models have and transformers' classes leave out."""
    folder = make_mixture(tmp_path / "mixture", "mixtral, gelu")
    tensors = load_file(folder / "model.safetensors")
    further = {
        name.replace(".2.", ".3.", 1): tensors[name].clone() for name in tensors if name.startswith("model.layers.2.")
    }
    save_file(tensors | further, folder / "model.safetensors", {"format": "pt"})
    found, out = pruned(tmp_path, folder, PruneRequest(3, by_layer=True, merge=True))
    assert found.pruning.kept[3] == found.pruning.kept[2]
    assert found.pruning.notes == ("layer 3, which text does not pass through, keeps the experts that layer 2 keeps",)
    assert found.rows
    facts = pruning_facts(found, Judged({}, {}, Estimate(0.0, None, None), unseen=True))
    by_layer = ("layers", "kept", "members", "shares", "duplicates", "saliency", "output_differences", "lost")
    assert {key: len(facts[key]) for key in (*by_layer, "weight_distances")} == dict.fromkeys(
        (*by_layer, "weight_distances"), 3
    )
    before, after = stored_mixture(folder), stored_mixture(out)
    kept = list(found.pruning.kept[3])
    np.testing.assert_array_equal(read_values(after.router(3)), read_values(before.router(3))[kept])
    assert np.abs(read_values(after.router(2)) - read_values(before.router(2))[kept]).max() > 0


NONE = {1: (), 2: ()}
SOFTMAX = Choosing("softmax")


@pytest.mark.parametrize(
    ("request_", "kept"),
    [
        (PruneRequest(2, by_layer=True), {1: (0, 1), 2: (2, 3)}),
        (PruneRequest(1), {1: (3,), 2: (3,)}),
        (PruneRequest(2, by="frequency", by_layer=True), {1: (0, 1), 2: (2, 3)}),
        (PruneRequest(1, by="weight"), {1: (2,), 2: (2,)}),
        (PruneRequest(1, by="router"), {1: (3,), 2: (3,)}),
    ],
)
def test_experts_are_kept_by_what_is_asked_for(request_, kept):
    found = choose_kept(saliency(), NONE, request_, 2, SOFTMAX)
    assert found.kept == kept


def test_a_layer_loses_the_share_of_what_its_dropped_experts_gave():
    found = choose_kept(saliency(), NONE, PruneRequest(2, by_layer=True), 2, SOFTMAX)
    first = found.losses[0]
    mass = np.array([4.0 * 4, 3 * 2, 2, 1])
    assert first.dropped == (2, 3)
    assert first.saliency == pytest.approx(3 / mass.sum())
    assert first.tokens == 0.5


def test_of_equal_experts_the_copies_go_before_any_other():
    """Also before one that no token chooses; the copy that is chosen more often stays."""
    chosen = np.array([[0, 1], [0, 1], [1, 2], [1, 2]], np.int16)
    load = np.array([[np.bincount(chosen.ravel(), minlength=4) / 4] * 2])
    mass = np.array([[2.0, 4, 2, 0]] * 2)
    given = saliency(choices=(chosen, chosen), load=load, mass=mass, reap=mass)
    equal = {1: ((0, 1),), 2: ((0, 1),)}
    found = choose_kept(given, equal, PruneRequest(3), 2, SOFTMAX)
    assert found.kept == {1: (1, 2, 3), 2: (1, 2, 3)}
    assert found.members[1][1] == (1, 0)
    assert all(not loss.dropped for loss in found.losses)


def test_each_group_of_a_grouped_router_keeps_as_many():
    found = choose_kept(saliency(), NONE, PruneRequest(2, by_layer=True), 2, Choosing("softmax", groups=2))
    assert found.kept == {1: (0, 2), 2: (1, 3)}


@pytest.mark.parametrize(
    ("keep", "how", "message"),
    [
        (4, SOFTMAX, "--keep: 4 of 4 experts: expected 2 to 3."),
        (
            3,
            Choosing("sigmoid", groups=2, best_of_group=2),
            "--keep: its routers choose among 2 groups of experts of one size, which 3 do not fill; expected a multiple "
            "of 2.",
        ),
        (
            2,
            Choosing("sigmoid", groups=2, best_of_group=2),
            "--keep: its routers judge each group by the 2 best, so that at least 4 experts have to stay.",
        ),
        (
            1,
            Choosing("sigmoid", best_of_group=2),
            "--keep: 1 of 4 experts: expected 2 to 3. `moemerge densify` makes one model of all.",
        ),
    ],
)
def test_a_number_that_cannot_be_is_refused(keep, how, message):
    with pytest.raises(RefusedError, match=f"^{re.escape(message)}$"):
        check_keep(keep, 4, how)


def prune(folder: Path, out: Path, *options: object) -> list[object]:
    """The command line for two domains of text."""
    for name, documents in DOCUMENTS.items():
        (folder.parent / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    data = [part for name in DOCUMENTS for part in ("--data", f"{name}={folder.parent / name}.jsonl")]
    return ["prune", folder, out, *data, "--device", "cpu", *options]


def test_the_command_prints_what_goes_and_what_it_costs(tmp_path, run):
    folder, out = duplicated(tmp_path / "mixture"), tmp_path / "out"
    code, shown, errors = run(*prune(folder, out, "--keep", 2, "--dry-run"))
    assert code == 0, errors
    assert not out.exists()
    lines = shown.splitlines()
    assert lines[0] == "Equal in all layers, number for number: 0 = 2; 1 = 3"
    assert "No layer loses an FFN: every dropped expert equals a kept one." in lines
    assert "Loss in nats per token, on other documents than those it was chosen by:" in lines
    assert lines[-2:] == [
        "After against before: +0.0000",
        f"{out}: nothing was written, since this was a dry run.",
    ]
    code, shown, errors = run(*prune(folder, out, "--keep", 2, "--json"))
    assert code == 0, errors
    facts = json.loads(shown)
    assert facts["kept"] == [[0, 1]] * 3
    assert facts["experts_per_token"] == 1
    assert facts["before"] == facts["after"]
    assert open_mixture(out).experts_per_token == 1


def test_the_mixture_is_opened_once_beside_the_one_that_runs(tmp_path, run, monkeypatch):
    folder, opened = duplicated(tmp_path / "mixture"), []

    def watched(model: ModelFolder, *given: Any) -> StoredMixture:
        opened.append(model.folder)
        return read_stored_mixture(model, *given)

    for module in (stored_mixtures, runnable):
        monkeypatch.setattr(module, "read_stored_mixture", watched)
    assert run(*prune(folder, tmp_path / "out", "--keep", 2))[0] == 0
    assert opened.count(folder) == 2


def grouped(folder: Path) -> Path:
    """Two groups of four experts, of which a token takes all four of one."""
    chosen = {"n_group": 2, "topk_group": 1, "n_routed_experts": 8, "num_experts_per_tok": 4}
    return make_variant(folder, "deepseek_v3", **chosen)


def test_fewer_experts_per_token_are_no_problem_for_groups(tmp_path, run):
    """The option --top-k, which an edit would need, is not there."""
    folder, out = grouped(tmp_path / "mixture"), tmp_path / "out"
    lowered = "note: experts_per_token is lowered from 4 to 2: no more are left to choose from"
    for options in (("--dry-run",), ()):
        code, _, errors = run(*prune(folder, out, "--keep", 4, *options))
        assert code == 0, errors
        assert lowered in errors.splitlines()
    assert open_mixture(out).experts_per_token == 2


REFUSING = """
import json, sys
from moemerge.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["moemerge", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code == 2, end.code
    assert not {"torch", "transformers", "accelerate"} & set(sys.modules)
"""


def test_refusals_come_before_torch_is_imported(tmp_path):
    """Each with exit code 2 and one message."""
    folder, out = grouped(tmp_path / "mixture"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    too_many = "error: --keep: 8 of 8 experts: expected 2 to 7."
    refused = {
        ("--keep", 8): too_many,
        ("--keep", 8, "--dry-run"): too_many,
        ("--keep", 5): "error: --keep: its routers choose among 2 groups of experts of one size, which 5 do not fill; "
        "expected a multiple of 2.",
        ("--keep", 4, "--dry-run", "--data", "three=none.txt"): "error: --data three[0]: 'none.txt' leads to no .txt, "
        ".jsonl or .parquet file. Paths count from the current folder.",
        ("--keep", 4, "--max-shard-size", "5"): "error: --max-shard-size: '5' is 5 bytes: write a unit, as in 5GB or "
        "500MB.",
        ("--keep", 4): f"error: {out}: is not empty (1 entries, among them 'notes.txt'). Choose another "
        "output folder, or replace this one with --overwrite.",
    }
    lines = json.dumps([list(map(str, prune(folder, out, *options))) for options in refused])
    done = subprocess.run([sys.executable, "-c", REFUSING, lines], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == list(refused.values())
    assert done.returncode == 0
    assert [path.name for path in out.iterdir()] == ["notes.txt"]

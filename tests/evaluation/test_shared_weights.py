"""`shared_weights: auto`: between what it chooses, by what, and that the choice is kept."""

import json
import random
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moemerge import load_config, merge, plan_merge, verify
from moemerge.checkpoint.journal import Journal
from moemerge.checkpoint.staging import journal_of
from moemerge.cli import main
from moemerge.errors import CheckpointError, OutputError, RefusedError
from moemerge.evaluation import shared_weights
from moemerge.evaluation.shared_weights import best_of, choose, losses_of
from moemerge.merging.destinations import Folder
from moemerge.merging.gguf import merge_to_gguf
from moemerge.merging.options import MergeOptions
from moemerge.model_card import card
from moemerge.model_card.card import write_card
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window
from moemerge.planning import planner
from moemerge.planning.fingerprint import CHOSEN
from moemerge.planning.options import PlanOptions
from moemerge.planning.shared_choice import SharedChoice, settle
from moemerge.routers.report import RoutingReport
from tests.families.test_families import PAIRS, PLAINEST, readable
from tests.sources.test_lora import ATTENTION, FFN, make_adapter
from tests.support.families import DENSE, stored
from tests.support.machine import SINGLE
from tests.support.models import TEXT, edit_json, load, make_model, token_ids, tokenizer, write_config

CPU = Compute(torch.device("cpu"), torch.float32)
WORDS = TEXT.replace("\n", " ").split(" ")[:20]


def documents(seed):
    """Twelve short texts of sentences that are all alike."""
    rng = random.Random(seed)
    return [" ".join(" ".join(WORDS[at : at + 6]) for at in rng.choices(range(12), k=4)) for _ in range(12)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model that was trained on such texts, and a file of them."""
    folder = tmp_path_factory.mktemp("trained")
    model = AutoModelForCausalLM.from_pretrained(make_model(folder / "model", num_hidden_layers=2))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = tokenizer()(documents(0), return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(50):
        model(**batch, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n<|document|>\n".join(documents(2)))
    return folder


def changed(trained, folder, attention, ffn=0.01):
    """The trained model with noise on its attention, and a little on its FFNs; noise is drawn by its seed and scale."""
    seed, scale = attention
    made = make_model(folder, num_hidden_layers=2)
    tensors, noise = load_file(trained / "model" / SINGLE), torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        drawn = torch.randn(tensor.shape, generator=noise) * tensor.std()
        tensors[name] = tensor + drawn * (scale if "self_attn" in name else ffn if "mlp" in name else 0)
    save_file(tensors, made / SINGLE, {"format": "pt"})
    return made


def kind(trained, folder):
    """Experts on two sides of the trained attention, from which the base is as far: their mean is best."""
    folder.mkdir()
    base = changed(trained, folder / "base", (5, 0.4), ffn=0)
    return [base, changed(trained, folder / "one", (6, 0.4)), changed(trained, folder / "two", (6, -0.4), ffn=0.01)]


def hostile(trained, folder):
    """Experts whose attention is far from that of the base, which is the trained one."""
    folder.mkdir()
    base = changed(trained, folder / "base", (5, 0.0), ffn=0)
    return [base, changed(trained, folder / "one", (6, 1.0)), changed(trained, folder / "two", (7, 1.0))]


def config(path, trained, models, **keys):
    """A config whose experts all have the same text, which `random` routers do not read."""
    keys = {"shared_weights": "auto", **keys}
    write_config(path, models[0], models[1:], prompts=False, **keys)
    document = yaml.safe_load(path.read_text())
    for expert in document["experts"]:
        expert["positive_texts"] = str(trained / "text.txt")
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def merged(path, out, **keys):
    """Merge by a config's path; returns the lines about the choice."""
    lines = []
    merge(plan_merge(load_config(path, **keys)), out, announce=lines.append)
    return lines


def weights_of(out):
    return [path.read_bytes() for path in sorted(out.glob("*.safetensors"))]


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["moemerge", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.fixture(scope="module")
def compatible(trained, tmp_path_factory):
    """Models whose average is best, and what `auto` made of them: the models, the config, the output, its lines."""
    folder = tmp_path_factory.mktemp("compatible")
    models = kind(trained, folder / "models")
    path = config(folder / "auto.yaml", trained, models)
    return models, path, folder / "out", merged(path, folder / "out")


def test_a_mix_that_loses_less_is_chosen(trained, compatible, tmp_path):
    models, _, out, lines = compatible
    (line,) = lines
    assert re.fullmatch(
        r"note: shared_weights: auto chose average: on the experts' texts its loss is lower than the base's by "
        r"\d\.\d{4} \(\d\.\d{4} to \d\.\d{4}\) nats per token "
        r"\(base \d\.\d{4}, average \d\.\d{4}, ties \d\.\d{4}; \d+ tokens\)",
        line,
    )
    assert line.removeprefix("note: ").replace("_", r"\_") + ".\n" in (out / "README.md").read_text()
    merged(config(tmp_path / "average.yaml", trained, models, shared_weights="average"), tmp_path / "average")
    assert weights_of(out) == weights_of(tmp_path / "average")


def test_the_choice_is_kept_beside_the_model(compatible, tmp_path, monkeypatch, capsys):
    """Neither a merge by the kept config nor `verify` by any chooses again."""
    _, path, out, _ = compatible
    kept = out / "moemerge_config.yaml"
    assert yaml.safe_load(kept.read_text())["shared_weights"] == {"method": "average"}
    monkeypatch.setattr(shared_weights, "choose", None)
    assert merged(kept, tmp_path / "again") == []
    assert weights_of(tmp_path / "again") == weights_of(out)
    for against in (path, kept):
        assert run(monkeypatch, "verify", out, "--against", against) == 0
        shown = capsys.readouterr()
        assert "as planned" in shown.out
        assert "auto" not in shown.err
    kept_text = kept.read_text()
    kept.unlink()
    try:
        assert run(monkeypatch, "verify", out, "--against", path) == 2
    finally:
        kept.write_text(kept_text)
    assert "which says what `shared_weights: auto` was: name the method" in capsys.readouterr().err


def test_losses_are_those_of_dense_models_of_shared_weights_and_an_experts_ffns(trained, compatible):
    models, path, _, _ = compatible
    found = choose(plan_merge(load_config(path)), CPU, lambda *_: None)
    base, *experts = [load_file(model / SINGLE) for model in models]
    mean = {name: sum(expert[name] for expert in experts) / 2 for name in base}
    for method, shared in {"base": base, "average": mean}.items():
        losses = []
        for expert in experts:
            model = AutoModelForCausalLM.from_pretrained(models[0])
            model.load_state_dict({name: expert[name] if ".mlp." in name else shared[name] for name in base})
            lost = counted = 0
            for text in documents(2):
                ids = tokenizer()(text, return_tensors="pt")["input_ids"]
                with torch.no_grad():
                    logits = model(ids).logits[0, :-1]
                lost += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
                counted += ids.shape[1] - 1
            losses.append(lost / counted)
        assert found.losses[method] == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_base_stays_where_mixes_lose_more(trained, tmp_path):
    path = config(tmp_path / "auto.yaml", trained, hostile(trained, tmp_path / "models"))
    (line,) = merged(path, tmp_path / "out")
    assert line.startswith(
        "note: shared_weights: auto chose base: on the experts' texts no mix of the models loses less than it by more than "
        "chance (base "
    )
    assert yaml.safe_load((tmp_path / "out" / "moemerge_config.yaml").read_text())["shared_weights"] == "base"
    merged(config(tmp_path / "base.yaml", trained, [*models_in(path)], shared_weights="base"), tmp_path / "base")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "base")


def models_in(path):
    document = yaml.safe_load(path.read_text())
    return [Path(document["base_model"]), *(Path(expert["source_model"]) for expert in document["experts"])]


def sums(loss, seed=0, spread=0.0):
    """Losses of 20 documents of 100 tokens."""
    noise = np.random.default_rng(seed).normal(size=20) * spread
    return np.stack([100 * (loss + noise), np.full(20, 100.0)], axis=1)


@pytest.mark.parametrize(
    ("base", "average", "ties", "chosen"),
    [
        (sums(2.0), sums(1.9), sums(1.95), "average"),
        (sums(2.0), sums(1.9), sums(1.8), "ties"),
        (sums(2.0), sums(2.1), sums(1.9), "ties"),
        (sums(2.0), sums(2.0), sums(2.0), "base"),
        (sums(2.0), sums(1.99, 1, 0.3), sums(2.1), "base"),
        (sums(2.0), sums(1.9), sums(1.89, 1, 0.3), "average"),
    ],
)
def test_a_method_takes_a_simpler_ones_place_only_by_more_than_chance(base, average, ties, chosen):
    found = best_of({"base": {"0": base}, "average": {"0": average}, "ties": {"0": ties}})
    assert found.method == chosen
    assert found.tokens == 2000


def test_without_text_the_base_stays(llamas, tmp_path):
    path = write_config(tmp_path / "c.yaml", llamas[0], llamas[1:], prompts=False, shared_weights="auto")
    plan = plan_merge(load_config(path))
    assert plan.notes[-1] == (
        "shared_weights: auto chose base: experts[0] (fox) has neither positive_texts nor positive_prompts to compare losses on"
    )
    assert plan.config.shared_weights.method == "base"
    assert not [advice for advice in plan.advice if "average" in advice]


def test_a_few_prompts_say_too_little(llamas, tmp_path):
    path = write_config(tmp_path / "c.yaml", llamas[0], llamas[1:], shared_weights="auto", gate_mode="random")
    assert merged(path, tmp_path / "out") == [
        "note: shared_weights: auto chose base: experts[0] (fox) has 9 tokens of text to compare losses on, and at least "
        "256 are needed"
    ]


def test_prompts_that_say_enough_are_read(trained, compatible, tmp_path):
    _, path, out, _ = compatible
    document = yaml.safe_load(path.read_text())
    for expert in document["experts"]:
        expert["positive_prompts"] = documents(2)
        del expert["positive_texts"]
    document["experts"][1]["positive_prompts"] = documents(3)  # all alike would make no router
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(document))
    (line,) = merged(tmp_path / "c.yaml", tmp_path / "out")
    assert line.startswith("note: shared_weights: auto chose average")
    assert weights_of(tmp_path / "out") == weights_of(out)


def test_models_that_cannot_be_mixed_keep_the_bases(trained, llamas, tmp_path):
    other = make_model(tmp_path / "other", 7, tuned_from=0)
    edit_json(other / "config.json", rope_theta=5.0, rope_parameters=None)
    stranger = make_model(tmp_path / "stranger", 9)
    for experts, why in {
        (llamas[1], other): f"others are not possible, since experts[1] {other}: rope is ",
        (llamas[1], stranger): "not all experts are fine-tunes of the base model",
        (llamas[0], llamas[0]): "the models have all the same",
    }.items():
        path = config(tmp_path / "c.yaml", trained, [llamas[0], *experts])
        plan = plan_merge(load_config(path, allow_identical_experts=True))
        assert plan.notes[-1].startswith(f"shared_weights: auto chose base: {why}")
        assert plan.shared_choice.method == plan.config.shared_weights.method == "base"


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_what_adapters_change_beside_the_ffns_can_be_mixed(trained, tmp_path):
    base = changed(trained, tmp_path / "base", (5, 0.4), ffn=0)
    for seed, targets in enumerate((FFN, FFN + ATTENTION)):
        make_adapter(tmp_path / f"{seed}", base, seed, target_modules=targets)
    ffns, both = (f"{base}+{tmp_path / name}" for name in "01")
    plan = plan_merge(load_config(config(tmp_path / "c.yaml", trained, [base, ffns, both])))
    assert plan.config.shared_weights.method == "auto"
    assert choose(plan, CPU, lambda *_: None).losses.keys() == {"base", "average", "ties"}
    alone = plan_merge(load_config(config(tmp_path / "c.yaml", trained, [base, ffns, base])))
    assert alone.notes[-1] == "shared_weights: auto chose base: the models have all the same"


def test_a_method_that_is_not_possible_is_not_compared(trained, tmp_path):
    """TIES takes the change of one expert whole: a weight of a norm becomes 0, behind which the other cannot be folded."""
    base, one, two = kind(trained, tmp_path / "models")
    tensors = load_file(one / SINGLE)
    tensors["model.layers.0.post_attention_layernorm.weight"][0] = 0
    save_file(tensors, one / SINGLE, {"format": "pt"})
    path = config(tmp_path / "c.yaml", trained, [base, one, two], fold_norms=True)
    plan = plan_merge(load_config(path))
    assert "from base, average, by the losses" in plan.notes[-1]
    assert choose(plan, CPU, lambda *_: None).losses.keys() == {"base", "average"}


def test_an_expert_of_another_width_is_compared_too(trained, tmp_path):
    """Its FFN is the trained one's with neurons of zeros."""
    base, one, two = kind(trained, tmp_path / "models")
    tensors = load_file(two / SINGLE)
    for name, tensor in tensors.items():
        if ".mlp." in name:
            rows, columns = (0, 16) if "down_proj" in name else (16, 0)
            tensors[name] = torch.nn.functional.pad(tensor, (0, columns, 0, rows)).contiguous()
    save_file(tensors, two / SINGLE, {"format": "pt"})
    edit_json(two / "config.json", intermediate_size=64)
    plan = plan_merge(load_config(config(tmp_path / "c.yaml", trained, [base, one, two])))
    assert choose(plan, CPU, lambda *_: None).method == "average"
    some = plan_merge(load_config(config(tmp_path / "c.yaml", trained, [base, one, two], moe_layers=[1])))
    assert choose(some, CPU, lambda *_: None).why == (
        "others cannot be compared with it, since experts[1] (two) has FFNs of another width than the base model's"
    )


def test_texts_to_choose_by_are_checked_before_weights_are_fetched(trained, compatible, tmp_path):
    models, _, _, _ = compatible
    path = config(tmp_path / "c.yaml", trained, models)
    document = yaml.safe_load(path.read_text())
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "foxes"}]}))
    for text, why in {"gone.txt": "leads to no", str(chats): "chat template"}.items():
        document["experts"][1]["positive_texts"] = text
        path.write_text(yaml.safe_dump(document))
        with pytest.raises(RefusedError, match=why):
            plan_merge(load_config(path), approve=lambda _: pytest.fail("weights would be fetched next"))


def test_plan_says_that_it_will_be_chosen(compatible, monkeypatch, capsys):
    _, path, _, _ = compatible
    assert run(monkeypatch, "plan", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["shared_weights"], found["shared_choice"]) == ("auto", None)
    characters = sum(map(len, documents(2)))
    assert found["notes"][-1] == (
        "shared_weights: auto is chosen when the merge begins, from base, average, ties, by the losses on 256 to "
        f"2048 tokens of each expert's text, which has {characters} to {characters} characters; with fewer tokens it is "
        "base"
    )
    assert found["advice"] == []
    assert run(monkeypatch, "plan", path) == 0
    assert "base, average, ties: chosen when the merge begins, shown here as the base's" in capsys.readouterr().out


def test_each_method_is_planned_once(compatible, tmp_path, monkeypatch):
    _, path, _, _ = compatible
    planned, assemble = [], planner.assemble

    def counting(config, *parts):
        planned.append(config.shared_weights.method)
        return assemble(config, *parts)

    monkeypatch.setattr(planner, "assemble", counting)
    merge(plan_merge(load_config(path)), tmp_path / "out")
    assert planned == ["base", "average", "ties"]


def test_data_sets_that_only_the_choice_reads_are_named(compatible, tmp_path, monkeypatch):
    _, path, _, _ = compatible
    document = yaml.safe_load(path.read_text())
    for number, expert in enumerate(document["experts"]):
        expert["positive_texts"] = f"hf://datasets/acme/for-{number}"
    plan = plan_merge(load_config(document), PlanOptions(needs_texts=False))
    named = ["acme/for-0", "acme/for-1"]
    assert [data.repo for data in plan.data_sets] == named
    chosen = settle(plan, SharedChoice("average", "it loses less", {"base": 2.0, "average": 1.9}, 4096))
    assert [data.repo for data in chosen.data_sets] == named
    monkeypatch.setattr(card, "hub_revisions", lambda _: ["acme/for-0 at 1a", "acme/for-1 at 2b"])
    write_card(tmp_path, "mixture", chosen, RoutingReport(("one", "two"), 2, (), {}))
    text = (tmp_path / "README.md").read_text()
    assert "The shared weights were chosen by data sets on the Hub: `acme/for-0 at 1a`, `acme/for-1 at 2b`.\n" in text
    assert yaml.safe_load(text.split("---")[1])["datasets"] == named
    assert settle(plan, SharedChoice("base", "there is too little text")).data_sets == []


def test_a_resumed_merge_does_not_choose_again(compatible, tmp_path, monkeypatch):
    _, path, out, lines = compatible
    plan = plan_merge(load_config(path), PlanOptions(max_shard_bytes=20_000))

    def stop(journal, shard):
        record(journal, shard)
        raise CheckpointError("cut off")

    with monkeypatch.context() as patch:
        record = Journal.record
        patch.setattr(Journal, "record", stop)
        with pytest.raises(CheckpointError, match="cut off"):
            merge(plan, tmp_path / "out")
    monkeypatch.setattr(shared_weights, "choose", None)
    again = []
    merge(plan, tmp_path / "out", MergeOptions(resume=True), announce=again.append)
    assert again == lines
    kept = load_config(out / "moemerge_config.yaml")
    assert load_config(tmp_path / "out" / "moemerge_config.yaml").model_dump() == kept.model_dump()
    assert verify(plan, tmp_path / "out").differences == ()


def test_a_choice_is_taken_over_with_shards_alone(trained, tmp_path):
    """A merge that was killed before its first shard was complete may have been another one."""
    path = config(tmp_path / "c.yaml", trained, hostile(trained, tmp_path / "models"))
    stage = tmp_path / ".out.moemerge-partial"
    stage.mkdir()
    journal_of(stage).begin({CHOSEN: asdict(SharedChoice("ties", "of another config"))})
    lines = []
    merge(plan_merge(load_config(path)), tmp_path / "out", MergeOptions(resume=True), announce=lines.append)
    assert lines[0].startswith("note: shared_weights: auto chose base: on the experts' texts no mix")


def test_room_for_what_was_chosen_is_looked_for_before_it_is_written(compatible, tmp_path):
    """Where blocks are shared with the sources, mixed weights take more room than the base's."""

    class Full(Folder):
        def check(self, plan, options, made_bytes):
            super().check(plan, options, made_bytes)
            if plan.config.shared_weights.method == "average":
                raise OutputError("the disk is full")

        def write(self, *_):
            pytest.fail("it is written")

    _, path, _, _ = compatible
    with pytest.raises(OutputError, match="the disk is full"):
        merge(plan_merge(load_config(path)), Full(tmp_path / "out"))
    assert [entry.name for entry in tmp_path.iterdir()] == []


def test_a_gguf_file_has_the_chosen_weights(trained, compatible, tmp_path):
    models, path, _, _ = compatible
    lines = []
    merge_to_gguf(plan_merge(load_config(path)), tmp_path / "a" / "m.gguf", announce=lines.append)
    assert len(lines) == 1
    average = config(tmp_path / "average.yaml", trained, models, shared_weights="average")
    merge_to_gguf(plan_merge(load_config(average)), tmp_path / "b" / "m.gguf")
    assert (tmp_path / "a" / "m.gguf").read_bytes() == (tmp_path / "b" / "m.gguf").read_bytes()


def test_weights_that_are_left_on_the_hub_are_not_compared(world, machine):
    config = world.config(machine, shared_weights="auto")
    found = machine.moemerge(config, "out", "--stream", "--quiet")
    assert (found.code, found.err) == (
        2,
        "error: shared_weights: auto reads all models once more to choose, but weights are left on the Hub, or in a store. "
        "Name base, average or ties; or have them on this machine: from the Hub without --stream and with room in its "
        "cache, from a store by a copy.\n",
    )
    assert not (machine.folder / "out").exists()


# The others take half a minute.
SOME = [pytest.param(name, marks=[pytest.mark.slow] if at % 4 else []) for at, name in enumerate(PLAINEST)]


@pytest.mark.parametrize("name", SOME)
def test_every_family_is_compared_as_its_own_class_computes(tmp_path, name):
    model_type, keys = DENSE[name]
    moe = next(moe for dense, moe in PAIRS if dense == name)
    readable(name, moe)
    base, *experts = [
        make_model(tmp_path / str(n), n, model_type, tuned_from=0 if n else None, **keys) for n in range(3)
    ]
    path = write_config(tmp_path / "c.yaml", base, experts, architecture=moe, gate_mode="random", shared_weights="auto")
    plan = plan_merge(load_config(path))
    assert plan.config.shared_weights.method == "auto"
    ids = token_ids()
    windows = [[Window(number, tuple(ids[number].tolist()), (True,) * 24)] for number in range(2)]
    found = losses_of(plan, windows, CPU, lambda *_: None)
    kept = stored(base)
    for number, expert in enumerate(experts):
        ffn = {tensor for layer in range(plan.base.layers) for tensor in plan.base.ffn(layer)}
        own = {tensor: values if tensor in ffn else kept[tensor] for tensor, values in stored(expert).items()}
        save_file(own, expert / SINGLE, {"format": "pt"})
        logits = load(expert)(ids[number : number + 1], use_cache=False).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[number, 1:], reduction="sum").item()
        assert found["base"][str(number)][0] == pytest.approx([expected, 23], rel=1e-4)
        assert found["average"][str(number)][0] != pytest.approx([expected, 23], rel=1e-4)

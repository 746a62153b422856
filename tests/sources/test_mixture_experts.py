"""References to experts of mixtures: in folders, on the Hub, with an adapter, and those that lead to none."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.derived import read_values
from moemerge.checks.verification import verify_merge
from moemerge.config.schema import CONFIG_COPY
from moemerge.errors import ConfigError, IncompatibleError, MoemergeError, NoSuchModelError
from moemerge.evaluation.runnable import open_dense
from moemerge.sources.model_folder import ModelFolder, open_model
from moemerge.sources.reference import local_folders
from moemerge.sources.tensor_tables import read_tensor_table
from tests.sources.test_lora import make_adapter
from tests.support.hub_world import files_of
from tests.support.machine import SINGLE
from tests.support.models import edit_json, load_weights, make_model, write_config

NAMES = ("fox", "code", "chat")


@pytest.fixture(scope="module")
def mix(tmp_path_factory, llamas) -> Path:
    """A mixture of three experts."""
    folder = tmp_path_factory.mktemp("mixtures")
    path = write_config(folder / "merge.yaml", llamas[0], llamas[1:], gate_mode="random", prompts=False)
    merge(plan_merge(load_config(path)), folder / "mix")
    return folder / "mix"


def opened(reference: object) -> ModelFolder:
    return open_model(str(reference), lambda _: None)


def values(reference: object) -> dict[str, torch.Tensor]:
    table = read_tensor_table(opened(reference), lambda _: None)
    return {name: torch.from_numpy(read_values(tensor)) for name, tensor in table.items()}


def remade(folder: Path, base: object, experts: list, **keys) -> Path:
    path = write_config(folder / "again.yaml", str(base), experts, gate_mode="random", prompts=False, **keys)
    plan = plan_merge(load_config(path))
    merge(plan, folder / "again")
    assert verify_merge(plan, folder / "again").differences == ()
    return folder / "again"


def test_a_mixture_is_made_again_of_its_experts(tmp_path, llamas, mix):
    out = remade(tmp_path, llamas[0], [f"{mix}#fox", f"{mix}#1", f"{mix}#chat"])
    for path in mix.glob("model*"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    config = load_config(out / "moemerge_config.yaml")
    assert config.expert_names == ("fox", "mix-1", "chat")
    assert local_folders(config.experts[0].source_model) == [mix]


def test_an_expert_can_be_the_base(tmp_path, llamas, mix):
    ours = load_weights(remade(tmp_path, f"{mix}#fox", [llamas[1], llamas[2]]))
    theirs = load_weights(mix)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items() if ".gate." not in name)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_an_adapter_is_added_to_an_expert(tmp_path, llamas, mix):
    make_adapter(tmp_path / "adapter", llamas[2])
    ours, theirs = values(f"{mix}#code+{tmp_path / 'adapter'}"), values(f"{llamas[2]}+{tmp_path / 'adapter'}")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(ours[name], theirs[name])
    assert not torch.equal(ours[name], values(llamas[2])[name])


def test_an_expert_is_run_as_a_baseline(llamas, mix):
    runnable = open_dense(f"{mix}#code", "code", lambda _: None)
    assert runnable.name == "code"
    assert torch.equal(
        runnable.read("model.layers.0.mlp.up_proj.weight"),
        load_file(llamas[2] / SINGLE)["model.layers.0.mlp.up_proj.weight"],
    )


def test_a_name_wins_over_a_number(tmp_path, llamas, mix):
    shutil.copytree(mix, tmp_path / "mix")
    config = tmp_path / "mix" / CONFIG_COPY
    document = yaml.safe_load(config.read_text())
    for expert, name in zip(document["experts"], ("1", "2", "chat"), strict=True):
        expert["name"] = name
    config.write_text(yaml.safe_dump(document))
    name = "model.layers.0.mlp.up_proj.weight"
    for called, model in {"0": 1, "1": 1, "2": 2, "chat": 3}.items():
        assert torch.equal(values(f"{tmp_path / 'mix'}#{called}")[name], load_file(llamas[model] / SINGLE)[name])


def test_a_folder_s_own_name_may_hold_the_mark(tmp_path):
    folder = make_model(tmp_path / "mix#1")
    assert opened(folder).folder == folder


def refusal(reference: object, kind: type[MoemergeError]) -> str:
    with pytest.raises(kind) as error:
        opened(reference)
    return str(error.value)


def test_what_leads_to_no_expert_is_refused_with_what_there_is(tmp_path, llamas, mix):
    for name in ("3", "owl", "-1"):
        assert refusal(f"{mix}#{name}", NoSuchModelError) == (
            f"{mix}#{name}: the mixture has no expert {name!r}: name one by its number, 0 to 2, or fox, code, chat."
        )
    assert refusal(f"{mix}#shared", IncompatibleError) == (
        f"{mix}#shared: there is no dense model that computes like the shared expert of this mixture:\n"
        "  - it has no shared expert"
    )
    assert refusal(f"{llamas[0]}#0", IncompatibleError) == (
        f"{llamas[0]}: is a dense model, a llama, and a mixture is wanted. A config makes one of several dense models "
        "(`moemerge init`), `moemerge upcycle` one of copies of this."
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    assert refusal(f"{tmp_path / 'other'}#0", IncompatibleError).startswith(
        f"{tmp_path / 'other'}: its model_type is 'gpt2', no mixture that moemerge reads. Name the folder that a merge "
        "wrote, or a released mixture: mixtral, "
    )
    assert refusal(f"{llamas[0]}+{tmp_path}#1", NoSuchModelError) == (
        f"{llamas[0]}+{tmp_path}#1: an adapter has no experts; write MIXTURE#EXPERT+ADAPTER."
    )


def test_experts_without_names_are_called_by_their_numbers(tmp_path, llamas, mix):
    (tmp_path / "mix").mkdir()
    for path in mix.iterdir():
        if path.name != "moemerge_config.yaml":
            (tmp_path / "mix" / path.name).symlink_to(path)
    ours, theirs = values(f"{tmp_path / 'mix'}#2"), values(f"{mix}#chat")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert refusal(f"{tmp_path / 'mix'}#chat", NoSuchModelError) == (
        f"{tmp_path / 'mix'}#chat: the mixture has no expert 'chat': name one by its number, 0 to 2."
    )
    path = write_config(tmp_path / "merge.yaml", llamas[0], [tmp_path / "mix", llamas[1]], prompts=False)
    with pytest.raises(IncompatibleError) as error:
        plan_merge(load_config(path))
    assert error.value.problems == (
        f"experts[0] {tmp_path / 'mix'}: it is a mixture already (model_type 'mixtral'): see `moemerge edit`, or name one of its "
        "experts: " + ", ".join(f"{tmp_path / 'mix'}#{number}" for number in range(3)),
    )


def test_a_wrong_name_in_a_config_has_its_line(tmp_path, llamas, mix):
    path = write_config(tmp_path / "merge.yaml", llamas[0], [f"{mix}#owl", llamas[1]], prompts=False)
    with pytest.raises(ConfigError) as error:
        plan_merge(load_config(path))
    assert error.value.problems == (
        f"line 3: experts[0].source_model: {mix}#owl: the mixture has no expert 'owl': name one by its number, 0 to 2, "
        "or fox, code, chat.",
    )


def test_an_expert_that_cannot_be_had_is_refused_with_its_reference(tmp_path):
    base, *experts = [make_model(tmp_path / str(seed), seed, "qwen3", head_dim=16) for seed in range(3)]
    path = write_config(tmp_path / "merge.yaml", base, experts, prompts=False)
    merge(plan_merge(load_config(path)), out := tmp_path / "mix")
    edit_json(out / "config.json", norm_topk_prob=False)
    assert refusal(f"{out}#0", IncompatibleError) == (
        f"{out}#0: there is no dense model that computes like expert 0 of this mixture:\n"
        "  - its norm_topk_prob is False, expected True: the weights of the chosen experts do not add up to 1, so that "
        "no expert has a size of its own"
    )


@pytest.mark.parametrize("way", [[], ["--stream"]])
def test_an_expert_on_the_hub_is_read_as_from_a_folder(world, machine, mix, way):
    world.hub.add("acme/mix", files_of(mix))
    experts = ["acme/mix#code", "acme/mix@main#0"]
    path = write_config(machine.folder / "merge.yaml", "acme/base", experts, gate_mode="random", prompts=False)
    result = machine.moemerge(str(path), "out", "--quiet", *way)
    assert (result.code, result.err) == (0, "")
    local = write_config(
        machine.folder / "local.yaml", world.folder / "base", [f"{mix}#code", f"{mix}#fox"], gate_mode="random",
        prompts=False,
    )  # fmt: skip
    merge(plan_merge(load_config(local)), machine.folder / "local")
    for path in (machine.folder / "local").glob("model*"):
        assert (machine.folder / "out" / path.name).read_bytes() == path.read_bytes()
    assert bool(list(machine.cache.rglob("model.safetensors"))) == (not way)

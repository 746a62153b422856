"""A source that changes while it is merged: noticed, and nothing finished is there."""

import os
import shutil
from pathlib import Path

import pytest

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.journal import Journal
from moemerge.checkpoint.staging import kept_shards
from moemerge.errors import CheckpointError, RefusedError
from moemerge.merging.options import MergeOptions
from moemerge.planning.options import PlanOptions
from moemerge.progress import Task
from tests.sources.test_lora import make_adapter
from tests.support.models import edit_json, make_model, write_config


@pytest.fixture
def models(tmp_path, llamas) -> list[Path]:
    return [Path(shutil.copytree(llama, tmp_path / llama.name)) for llama in llamas[:3]]


def plan_of(tmp_path, models, **keys):
    config = write_config(tmp_path / "merge.yaml", models[0], models[1:], prompts=False, **keys)
    return plan_merge(load_config(config), PlanOptions(max_shard_bytes=40_000))


def replace_file(path: Path, *, keep_time: bool = False) -> None:
    """Another file of the same size in its place."""
    before = path.stat()
    new = path.with_name("new")
    new.write_bytes(path.read_bytes()[:-1] + b"x")
    new.replace(path)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rewrite(path: Path) -> None:
    """Other bytes in the same file, as old as before."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"12345678")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "replaced shard": lambda models: replace_file(models[1] / "model.safetensors", keep_time=True),
    "rewritten shard": lambda models: rewrite(models[1] / "model.safetensors"),
    "config.json": lambda models: edit_json(models[2] / "config.json", rope_theta=5.0),
    "tokenizer": lambda models: replace_file(models[0] / "tokenizer.json", keep_time=True),
    "removed": lambda models: (models[2] / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_during_the_copy_leaves_no_output(tmp_path, models, what):
    out, done = tmp_path / "out", []

    def change(task: Task, n: int, total: int) -> None:
        if task.stage == "weights" and 0.5 * total < n < total and not done:
            done.append(n)
            CHANGES[what](models)

    plan = plan_of(tmp_path, models)
    with pytest.raises(
        CheckpointError, match=r"was changed while it was read: another|is gone while it was read|cannot be read"
    ):
        merge(plan, out, progress=change)
    assert done
    assert not out.exists()
    assert kept_shards(out) == 0 or what == "removed"
    # A plan that is older than a change is not begun.
    with pytest.raises(CheckpointError, match="since the plan was made"):
        merge(plan, out)


def test_what_changed_is_said(tmp_path, models):
    plan = plan_of(tmp_path, models)
    rewrite(models[1] / "model.safetensors")
    with pytest.raises(CheckpointError) as noticed:
        merge(plan, tmp_path / "out")
    assert str(noticed.value) == (
        f"{models[1] / 'model.safetensors'}: was changed since the plan was made: another time of a change of content, links "
        "or permissions. The output would be of two models. Merge again."
    )


def test_a_restored_time_does_not_deceive_resume(tmp_path, models, monkeypatch):
    plan, out = plan_of(tmp_path, models), tmp_path / "out"
    with monkeypatch.context() as patch:
        record = Journal.record
        patch.setattr(
            Journal, "record", lambda journal, shard: _cut_off() if len(journal) == 2 else record(journal, shard)
        )
        with pytest.raises(CheckpointError, match="cut off"):
            merge(plan, out)
    assert kept_shards(out) == 2
    rewrite(models[1] / "model.safetensors")
    with pytest.raises(RefusedError, match=r"what differs: sources\..*fox/model.safetensors.changed\. Undo"):
        merge(plan_of(tmp_path, models), out, MergeOptions(resume=True))


def _cut_off() -> None:
    raise CheckpointError("cut off")


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_shards_and_adapters_are_watched_too(tmp_path, models):
    make_adapter(tmp_path / "adapter", models[0])
    plan = plan_of(tmp_path, [models[0], f"{models[0]}+{tmp_path / 'adapter'}", models[1]])
    files = {path.name for path in plan.origins.stamps if path.parent == tmp_path / "adapter"}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    for name in files:
        plan = plan_of(tmp_path, [models[0], f"{models[0]}+{tmp_path / 'adapter'}", models[1]])
        replace_file(tmp_path / "adapter" / name, keep_time=True)
        with pytest.raises(CheckpointError, match=f"{name}: was changed since the plan was made: another .* and inode"):
            merge(plan, tmp_path / "out")
        if name.endswith(".json"):
            (tmp_path / "adapter" / name).write_text((tmp_path / "adapter" / name).read_text()[:-1] + "}")
    experts = [make_model(tmp_path / "sharded", 5), models[1]]
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(experts[0]).save_pretrained(experts[0], max_shard_size="50KB")
    (experts[0] / "model.safetensors").unlink()
    plan = plan_of(tmp_path, [models[0], *experts])
    names = {path.name for path in plan.origins.stamps if path.parent == experts[0]}
    assert names == {"config.json", "model.safetensors.index.json"} | {path.name for path in experts[0].glob("model-*")}

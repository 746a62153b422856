"""--overwrite replaces a checkpoint and nothing else."""

import shutil
from pathlib import Path

import pytest

from moemerge import load_config, merge, plan_merge
from moemerge.errors import RefusedError
from moemerge.merging.options import MergeOptions
from moemerge.planning.options import PlanOptions
from tests.support.models import edit_json, write_config


@pytest.fixture
def config(tmp_path, llamas) -> Path:
    return write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:3], prompts=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory, llamas) -> Path:
    """A merged model in three shards."""
    root = tmp_path_factory.mktemp("made")
    config = write_config(root / "merge.yaml", llamas[0], llamas[1:3], prompts=False)
    merge(plan_merge(load_config(config), PlanOptions(max_shard_bytes=150_000)), root / "out")
    return root / "out"


@pytest.fixture
def out(tmp_path, made) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_merged_model_is_replaced_by_one_of_other_files(out, config):
    assert sum(name.endswith(".safetensors") for name in names(out)) == 3
    plan = plan_merge(load_config(config))
    merge(plan, out, MergeOptions(overwrite=True))
    weights = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    assert names(out) == {"README.md", "config.json", *weights, "moemerge_config.yaml", *plan.copied_files}


def test_of_files_that_no_merge_writes_a_gguf_file_is_named_first(out, config):
    for name in ("Modelfile", "a.txt", "mix.gguf"):
        (out / name).write_text("precious")
    with pytest.raises(RefusedError) as refused:
        merge(plan_merge(load_config(config)), out, MergeOptions(overwrite=True))
    assert str(refused.value) == (
        f"{out}: holds 'mix.gguf', which this merge does not write (3 such files), and --overwrite replaces "
        "the whole folder. Move it away, or choose another output folder."
    )


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt", "results.json", "eval.md", "model.gguf", "other.safetensors", "model-00007-of-00009.safetensors",
        "pytorch_model.bin", "adapter_model.safetensors", "mine.yaml", "LICENSE", ".gitattributes", "notes/thesis.md",
        "model-00001-of-00002.safetensors.bak", "empty/", "added_tokens.json", "additional_chat_templates/mine.jinja",
        "lost+found", ".moemerge-tune/notes", ".moemerge-partial/",
    ],
)  # fmt: skip
def test_a_file_that_no_merge_writes_is_named_and_stays(out, config, name):
    path = out / name
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if name.endswith("/") else path.write_text("precious")
    before = names(out)
    with pytest.raises(RefusedError) as refused:
        merge(plan_merge(load_config(config)), out, MergeOptions(overwrite=True))
    assert str(refused.value) == (
        f"{out}: holds {name.rstrip('/')!r}, which this merge does not write (1 such file), and --overwrite replaces "
        "the whole folder. Move it away, or choose another output folder."
    )
    assert names(out) == before
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def test_what_the_merge_reads_is_never_replaced(out, llamas, tmp_path):
    message = r"holds '{}', which this merge reads"
    inside = out / "moemerge_config.yaml"
    with pytest.raises(RefusedError, match=message.format("moemerge_config.yaml")):
        merge(plan_merge(load_config(inside)), out, MergeOptions(overwrite=True))
    experts = [{"source_model": str(llama), "positive_texts": [str(out / "*.txt")]} for llama in llamas[1:3]]
    experts[1] |= {"positive_prompts": ["x"]}
    (out / "all.txt").write_text("text of the fox")
    config = load_config({"base_model": str(llamas[0]), "experts": experts, "gate_mode": "ridge"})
    with pytest.raises(RefusedError, match=message.format("all.txt")):
        merge(plan_merge(config), out, MergeOptions(overwrite=True))
    (out / "all.txt").unlink()
    # A source whose folder lies elsewhere, and whose weights lie in OUT.
    linked = Path(shutil.copytree(llamas[1], tmp_path / "linked"))
    (out / "model.safetensors").write_bytes((linked / "model.safetensors").read_bytes())
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(out / "model.safetensors")
    plan = plan_merge(load_config(write_config(tmp_path / "c.yaml", llamas[0], [linked, llamas[2]], prompts=False)))
    with pytest.raises(RefusedError, match=message.format("model.safetensors")):
        merge(plan, out, MergeOptions(overwrite=True))


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja"])
def test_small_files_of_a_source_that_lie_in_the_output_are_never_replaced(out, llamas, tmp_path, name):
    source = Path(shutil.copytree(llamas[1 if name == "config.json" else 0], tmp_path / "linked"))
    (out / name).write_text((source / name).read_text() if (source / name).exists() else "{{ messages }}")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(out / name)
    base, expert = (llamas[0], source) if name == "config.json" else (source, llamas[1])
    plan = plan_merge(load_config(write_config(tmp_path / "c.yaml", base, [expert, llamas[2]], prompts=False)))
    with pytest.raises(RefusedError, match=f"holds '{name}', which this merge reads"):
        merge(plan, out, MergeOptions(overwrite=True))


def test_an_index_of_files_that_are_no_weights_makes_no_checkpoint(out, config):
    (out / "notes.txt").write_text("precious")
    (out / "moemerge_config.yaml").unlink()
    (out / "model.safetensors.index.json").write_text('{"weight_map": {"a": "notes.txt"}}')
    with pytest.raises(RefusedError, match="holds no complete checkpoint"):
        merge(plan_merge(load_config(config)), out, MergeOptions(overwrite=True))
    assert (out / "notes.txt").read_text() == "precious"


def test_what_is_no_whole_checkpoint_is_not_replaced(tmp_path, llamas, config):
    plan = plan_merge(load_config(config))
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "README.md").write_text("my site")
    (folder / "config.json").write_text('{"port": 80}')
    dense = Path(shutil.copytree(llamas[3], tmp_path / "dense"))
    merge(
        plan, Path(shutil.copytree(dense, tmp_path / "whole")), MergeOptions(overwrite=True)
    )  # another model, asked for
    (dense / "model.safetensors").unlink()
    for target in (folder, dense):
        before = names(target)
        with pytest.raises(RefusedError, match="holds no complete checkpoint"):
            merge(plan, target, MergeOptions(overwrite=True))
        assert names(target) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_what_cannot_be_read_makes_no_checkpoint(out, config, name):
    (out / "moemerge_config.yaml").unlink()
    (out / name).write_text("{")
    before = names(out)
    with pytest.raises(RefusedError, match="holds no complete checkpoint"):
        merge(plan_merge(load_config(config)), out, MergeOptions(overwrite=True))
    assert names(out) == before


def test_a_merged_model_that_lost_a_shard_is_replaced(out, config):
    (out / "model-00002-of-00003.safetensors").unlink()
    merge(plan_merge(load_config(config)), out, MergeOptions(overwrite=True))
    edit_json(out / "config.json", model_type=None)
    with pytest.raises(RefusedError, match="holds no complete checkpoint"):
        merge(plan_merge(load_config(config)), out, MergeOptions(overwrite=True))

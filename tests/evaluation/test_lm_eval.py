"""lm-eval on a merged model, with the command and the task of docs/evaluation.md, offline."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moemerge import merge, plan_merge
from moemerge.config.loading import parse_config
from moemerge.evaluation.runnable import open_mixture
from moemerge.evaluation.running import run_model
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window
from tests.support.models import TEXT, make_model, tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[lm-eval]'")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # for its imports
def test_lm_eval_finds_the_loss_that_we_find(tmp_path):
    folders = [make_model(tmp_path / name, seed) for seed, name in enumerate(("base", "fox", "code"))]
    document = {
        "base_model": str(folders[0]),
        "gate_mode": "random",
        "experts": [{"source_model": str(folder)} for folder in folders[1:]],
    }
    merge(plan_merge(parse_config(json.dumps(document))), tmp_path / "out")
    texts = TEXT.split("\n")
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    page = (ROOT / "docs" / "evaluation.md").read_text()
    command = re.search(r"^    lm-eval (run .*?[^\\])\n", page, re.MULTILINE | re.DOTALL)[1].replace("\\\n", " ")
    arguments = command.replace("docs/lm_eval", str(ROOT / "docs" / "lm_eval")).split()
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments, "--output_path", "found.json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(next(tmp_path.glob("found*.json")).read_text())["results"]["held_out"]
    # It puts a BOS before the tokenizer's own, which it scores too.
    ids = [(1, *tokenizer()(text)["input_ids"]) for text in texts]
    windows = [Window(n, tokens, (False,) + (True,) * (len(tokens) - 1)) for n, tokens in enumerate(ids)]
    losses = run_model(open_mixture(tmp_path / "out").runnable, windows, Compute(torch.device("cpu"), torch.float32))
    expected = float(losses.sum()) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)

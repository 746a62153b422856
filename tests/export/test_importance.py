"""Importance matrices against whole models, whose every product of a matrix and a state is watched."""

import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoTokenizer

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.gguf_contents import read_contents
from moemerge.config.schema import CONFIG_COPY
from moemerge.errors import RefusedError
from moemerge.export.importance import calibration_texts, importance_of
from tests.export.test_quantising import write
from tests.families.test_families import readable
from tests.support.families import DENSE
from tests.support.models import SIZES, TEXT, load, make_model, write_config

LINES = TEXT.split("\n")
# By a parameter's name within its layer, what it is called in a GGUF file; transformers 4 has a module for each expert.
NAMES = {
    **{f"self_attn.{one}_proj.weight": [f"attn_{one}"] for one in "qkv"},
    r"self_attn.(?:o|out)_proj.weight": ["attn_output"],
    **{f"conv.{one}_proj.weight": [f"shortconv.{one}_proj"] for one in ("in", "out")},
    r".*experts.gate_up_proj": ["ffn_gate_exps", "ffn_up_exps"],
    r".*experts.down_proj": ["ffn_down_exps"],
    r".*experts\.(\d+)\.(w1|w3|gate_proj|up_proj).weight": ["ffn_gate_exps", "ffn_up_exps"],
    r".*experts\.(\d+)\.(w2|down_proj).weight": ["ffn_down_exps"],
    r"block_sparse_moe.input_linear.weight": ["ffn_gate_exps", "ffn_up_exps"],
    r"block_sparse_moe.output_linear.weight": ["ffn_down_exps"],
    r"(mlp.shared_experts|shared_mlp)\.(gate_proj|up_proj|input_linear).weight": ["ffn_gate_shexp", "ffn_up_shexp"],
    r"(mlp.shared_experts|shared_mlp)\.(down_proj|output_linear).weight": ["ffn_down_shexp"],
}


class Products(TorchFunctionMode):
    """Keeps the sum of squares of what every matrix of a model is multiplied with, by the matrix's place in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[int, torch.Tensor] = {}
        self.counts: dict[int, int] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        if func is torch.nn.functional.linear:
            rows, place = args[0].flatten(0, -2).double(), args[1].data_ptr()
            self.sums[place] = self.sums.get(place, 0) + rows.square().sum(0)
            self.counts[place] = self.counts.get(place, 0) + len(rows)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def expected(folder: Path, windows: list[list[int]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sums (matrix, column) and counts (matrix,) by the tensor's name in a GGUF file."""
    model = load(folder)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with Products() as seen:
        for ids in windows:
            model.model(torch.tensor([ids]), use_cache=False)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, parameter in model.named_parameters():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        for pattern, names in NAMES.items() if layer else ():
            if not (match := re.fullmatch(pattern, layer[2])):
                continue
            stack = parameter if parameter.ndim == 3 else parameter[None]
            first = int(match[1]) if "(\\d+)" in pattern else 0
            for own in names:
                shape = 3 if "exps" in own else 1
                sums, counts = found.setdefault(
                    f"blk.{layer[1]}.{own}.weight", (np.zeros((shape, stack.shape[2])), np.zeros(shape, int))
                )
                for number, matrix in enumerate(stack):
                    place = matrix.data_ptr()
                    sums[first + number] = seen.sums.get(place, torch.zeros(stack.shape[2])).numpy()
                    counts[first + number] = seen.counts.get(place, 0)
    return found


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """From a kind of base, and a family with or without a shared expert, to a merged model of three experts."""

    @cache
    def of(name: str, moe: str, shared: bool) -> Path:
        readable(name, moe)
        root = tmp_path_factory.mktemp("importance")
        model_type, sizes = DENSE[name]
        base, *experts = (make_model(root / str(seed), seed, model_type, **sizes) for seed in range(5))
        keys = {"shared_experts": [{"source_model": str(experts.pop())}]} if shared else {}
        config = write_config(root / "c.yaml", base, experts[:3], prompts=False, architecture=moe, **keys)
        merge(plan_merge(load_config(config)), root / "out")
        return root / "out"

    return of


def described(path: Path, sizes: dict[str, tuple[int, ...]]) -> Path:
    """A GGUF file of such matrices, and others that are no importance matrix's."""
    others = {"token_embd.weight": (2, 32), "blk.0.attn_norm.weight": (32,), "blk.0.ffn_gate_inp.weight": (3, 32)}
    return write(path, {name: (shape, gguf.GGMLQuantizationType.F16) for name, shape in (sizes | others).items()})


@pytest.mark.parametrize(
    ("name", "moe", "shared"),
    [
        ("llama", "mixtral", False),
        ("granite", "granitemoeshared", True),
        ("qwen3", "dots1", True),
        ("qwen3", "qwen3_moe", False),
        ("granite", "granitemoe", False),
        ("lfm2", "lfm2_moe", False),
    ],
)
def test_what_reaches_every_matrix_is_counted(tmp_path, mixture, name, moe, shared):
    out = mixture(name, moe, shared)
    # Of unequal length: nothing is padded.
    (tmp_path / "a.txt").write_text("\n<|document|>\n".join([LINES[0], LINES[1] * 2, "if x: return"]))
    tokenizer = AutoTokenizer.from_pretrained(out)
    windows = [tokenizer(text).input_ids for text in (LINES[0], LINES[1] * 2, "if x: return")]
    told = expected(out, windows)
    model = described(
        tmp_path / "m.gguf",
        {
            name: ((len(sums), 2, sums.shape[1]) if len(sums) > 1 else (2, sums.shape[1]))
            for name, (sums, _) in told.items()
        },
    )
    steps = []
    found = importance_of(
        out, model, [str(tmp_path / "a.txt")], device="cpu", progress=lambda *step: steps.append(step)
    )
    assert found.tensors.keys() == told.keys()
    without_attention = 2 if name == "lfm2" else 0
    assert len(told) == SIZES["num_hidden_layers"] * (10 if shared else 7) - 2 * without_attention
    for tensor, (sums, counts) in told.items():
        assert found.tensors[tensor].counts.tolist() == counts.tolist(), tensor
        np.testing.assert_allclose(found.tensors[tensor].sums, sums, rtol=1e-4, atol=1e-7, err_msg=tensor)
    tokens = sum(map(len, windows))
    experts = found.tensors["blk.1.ffn_down_exps.weight"].counts
    assert experts.sum() == 2 * tokens
    assert {int(one.counts[0]) for one in found.tensors.values() if len(one.counts) == 1} == {tokens}
    assert found.texts == (str(tmp_path / "a.txt"),)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    found.check(read_contents(model))


def test_an_expert_that_no_token_reaches_is_named(tmp_path, mixture):
    out = mixture("llama", "mixtral", False)
    sizes = {f"blk.{layer}.ffn_up_exps.weight": (3, 2, 32) for layer in range(3)}
    (tmp_path / "a.txt").write_text("The")
    found = importance_of(out, described(tmp_path / "m.gguf", sizes), [str(tmp_path / "a.txt")], device="cpu")
    never = {
        name: [expert for expert, count in enumerate(one.counts) if count < 32] for name, one in found.tensors.items()
    }
    assert found.uncovered() == never
    assert all(np.isfinite(one.means()).all() and (one.means() > 0).all() for one in found.tensors.values())


def test_texts_are_those_that_routers_were_made_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("code.txt").write_text("def f(): pass\n<|document|>\nreturn 1")
    Path("all.jsonl").write_text('"Any text."\n')
    config = load_config(
        {
            "base_model": "base",
            "gate_mode": "ridge",
            "router": {"calibration_texts": ["all.jsonl"], "load_prior": [1, 1, 1]},
            "experts": [
                {"source_model": "a", "positive_prompts": ["One?", "Two?"], "negative_prompts": ["No."]},
                {"source_model": "b", "positive_texts": ["code.txt"], "positive_prompts": ["Three?"]},
                {"source_model": "c", "positive_texts": ["gone/*.txt"]},
            ],
        }
    )
    kinds, notes = calibration_texts(config)
    assert kinds == {
        "experts[0] a": ["One?\n\nTwo?"],
        "experts[1] b": ["def f(): pass", "return 1", "Three?"],
        "router.calibration_texts": ["Any text."],
    }
    assert notes == ["importance matrix: gone/*.txt of experts[2] c leads to no file from here: it is left out"]


def test_each_kind_of_text_has_its_share(tmp_path, mixture):
    out = Path(shutil.copytree(mixture("llama", "mixtral", False), tmp_path / "out"))
    model = described(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (2, 32)})
    copy = (out / CONFIG_COPY).read_text()
    for count, text in enumerate(("a b c d e f", "The quick brown fox " * 40, "def main(argv): " * 60)):
        (tmp_path / f"{count}.txt").write_text(text)
        copy = copy.replace("- source_model", f"- positive_texts: ['{tmp_path}/{count}.txt']\n  SOURCE", 1)
    (out / CONFIG_COPY).write_text(
        copy.replace("SOURCE", "source_model").replace("gate_mode: random", "gate_mode: ridge")
    )
    found = importance_of(out, model, tokens=200, device="cpu")
    assert len(found.texts) == 3
    assert 180 <= found.tensors["blk.0.attn_q.weight"].counts[0] <= 210


def test_a_model_that_says_nothing_of_texts_is_refused(tmp_path, mixture):
    out = Path(shutil.copytree(mixture("llama", "mixtral", False), tmp_path / "out"))
    model = described(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (2, 32)})
    with pytest.raises(RefusedError) as caught:
        importance_of(out, model)
    assert str(caught.value) == "--imatrix: there is no text to read. Name some with --imatrix-texts."
    (out / CONFIG_COPY).unlink()
    with pytest.raises(RefusedError) as caught:
        importance_of(out, model)
    assert str(caught.value) == (
        f"{out}: has no {CONFIG_COPY} that says what its routers were made from. Name text for the importance matrix "
        "with --imatrix-texts."
    )


def test_a_file_of_another_model_is_refused(tmp_path, mixture):
    out = mixture("llama", "mixtral", False)
    (tmp_path / "a.txt").write_text("The fox")
    for shape in ((3, 2, 31), (1, 2, 32)):
        model = described(tmp_path / "m.gguf", {"blk.0.ffn_up_exps.weight": shape})
        with pytest.raises(RefusedError) as caught:
            importance_of(out, model, [str(tmp_path / "a.txt")], device="cpu")
        number = r"\d"
        assert re.fullmatch(
            f"{re.escape(str(model))}: blk.0.ffn_up_exps.weight is of {shape[0]} x {shape[2]} columns, but the model's "
            f"expert {number} has 32: the file is another model's. Write it again.",
            str(caught.value),
        )

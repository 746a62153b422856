"""Merged checkpoints and their logits from one transformers, compared under another.

python -m tests.support.other_version write FOLDER      with transformers 5
python -m tests.support.other_version compare FOLDER    with transformers 4
"""

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from moemerge import load_config, merge, plan_merge
from moemerge.checks.repairing import repair
from moemerge.merging.options import MergeOptions
from tests.support.families import DENSE, VARIANTS
from tests.support.models import assert_close, load, logits, make_model, write_config

# Output families that transformers 4 reads too, each with a dense model whose settings transformers 5 saves otherwise.
SAVED_AGAIN = {
    "mixtral": "llama, tied, llama3 rope", "granitemoe": "llama, tied, llama3 rope", "qwen2_moe": "qwen2, tied, yarn",
    "granitemoeshared": "phi3, longrope", "granitemoehybrid": "granitemoehybrid", "glm4_moe": "ministral3",
    "qwen3_moe": "qwen3, tied, biases", "dots1": "qwen3, mixed windows, yarn", "ernie4_5_moe": "helium",
    "flex_olmo": "olmo2, biases, linear rope", "hunyuan_v1_moe": "hunyuan_v1_dense, biases, linear rope",
}  # fmt: skip


def write(folder: Path) -> None:
    """Merge different experts of every variant and keep the logits."""
    for name, (model_type, sizes) in VARIANTS.items():
        root = folder / name.replace(", ", "-").replace(" ", "-")
        base, *experts = [make_model(root / str(seed), seed, model_type, **sizes) for seed in range(4)]
        merge(
            plan_merge(load_config(write_config(root / "merge.yaml", base, experts))),
            root / "out",
            MergeOptions(overwrite=True),
        )
        torch.save(logits(load(root / "out")), root / "logits.pt")
    for moe, name in SAVED_AGAIN.items():
        root, (model_type, sizes) = folder / "saved-again" / moe, DENSE[name]
        base, *experts = [make_model(root / str(seed), seed, model_type, **sizes) for seed in range(4)]
        path = write_config(root / "merge.yaml", base, experts, prompts=False, architecture=moe)
        merge(plan_merge(load_config(path)), root / "out", MergeOptions(overwrite=True))
        torch.save(logits(load(root / "out")), root / "expected.pt")
        for saved in ("saved", "repaired"):
            AutoModelForCausalLM.from_pretrained(root / "out").save_pretrained(root / saved)
        assert repair(root / "repaired")


def compare(folder: Path) -> None:
    """Load every checkpoint, without missing or unexpected tensors, and compare."""
    roots = sorted(path.parent for path in folder.glob("*/logits.pt"))
    assert len(roots) == len(VARIANTS)
    for root in roots:
        assert_close(logits(load(root / "out")), torch.load(root / "logits.pt"))
        sys.stdout.write(f"{root.name}: equal logits in transformers {transformers.__version__}\n")
    for moe in SAVED_AGAIN:
        root = folder / "saved-again" / moe
        expected = torch.load(root / "expected.pt")
        assert_close(logits(load(root / "repaired")), expected)
        sys.stdout.write(f"{moe}, saved again: {_difference(root / 'saved', expected)}; repaired: equal logits\n")


def _difference(folder: Path, expected: torch.Tensor) -> str:
    """What comes of a checkpoint that is not repaired: an error or other logits, never the same."""
    try:
        found = logits(load(folder))
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}"
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference > 0.01
    return f"logits off by {difference:.2f} of the largest"


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))

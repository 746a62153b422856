"""Merged checkpoints and their logits from one transformers, compared under another.

python -m tests.other_version write FOLDER      with transformers 5
python -m tests.other_version compare FOLDER    with transformers 4
"""

import sys
from pathlib import Path

import torch
import transformers

from moemerge import load_config, merge, plan_merge
from tests.models import assert_close, load, logits, make_model, write_config
from tests.test_oracles import VARIANTS


def write(folder: Path) -> None:
    """Merge different experts of every variant and keep the logits."""
    for name, (model_type, sizes) in VARIANTS.items():
        root = folder / name.replace(", ", "-").replace(" ", "-")
        base, *experts = [make_model(root / str(seed), seed, model_type, **sizes) for seed in range(4)]
        merge(plan_merge(load_config(write_config(root / "merge.yaml", base, experts))), root / "out", overwrite=True)
        torch.save(logits(load(root / "out")), root / "logits.pt")


def compare(folder: Path) -> None:
    """Load every checkpoint, without missing or unexpected tensors, and compare."""
    roots = sorted(path.parent for path in folder.glob("*/logits.pt"))
    assert len(roots) == len(VARIANTS)
    for root in roots:
        assert_close(logits(load(root / "out")), torch.load(root / "logits.pt"))
        sys.stdout.write(f"{root.name}: equal logits in transformers {transformers.__version__}\n")


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))

"""Edits of mixtures that no merge wrote, in both layouts of their checkpoints."""

import sys

import pytest
import transformers

from moemerge.cli import main
from tests.support.mixtures import PLAINEST, VARIANTS, Layout, make_variant
from tests.support.models import assert_close, load, logits

# Of each kind of layout one, and settings that no merge writes; the others by `make test-all`.
QUICK = {
    "mixtral", "granitemoe", "gemma4_text", "deepseek_v3, groups", "olmoe, as released",
    "hunyuan_v1_moe, lists by layer",
}  # fmt: skip
LAST = {model_type: name for name, (model_type, _) in VARIANTS.items()}
NAMES = sorted({*PLAINEST.values(), *LAST.values()})


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 has no stacks of experts")
@pytest.mark.parametrize("layout", ["released", "in_memory"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_another_order_of_the_experts_computes_the_same(tmp_path, monkeypatch, capsys, name, layout: Layout):
    folder = make_variant(tmp_path / "made", name, layout=layout)
    order = ["edit", str(folder), str(tmp_path / "out"), "--order", "3,2,1,0", "-q"]
    monkeypatch.setattr(sys, "argv", ["moemerge", *order])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, capsys.readouterr().err
    assert_close(logits(load(tmp_path / "out")), logits(load(folder)))

"""Every output family in llama.cpp: computed as transformers computes it, or what happens instead."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from moemerge import load_config, merge, plan_merge
from moemerge.formats import MOE_FAMILIES
from tests.llamacpp.engine import logits as llamacpp_logits
from tests.llamacpp.kinds import EXPERTS, SENTENCEPIECE, TEXT_LENGTH, TOKENIZERS, Case, cases
from tests.llamacpp.readers import FOREIGN_VOCAB, OPTIONS, ROWS, TOLERANCE, WITHOUT_TOKENIZER, row_of
from tests.models import load, logits, make_model, token_ids, tokenizer, write_config

LAYERS = 3
CASES = {str(case): case for case in cases()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tokenizer_folder):
    """A base, experts and a shared expert of a kind, made once, with a tokenizer for the output family."""
    made: dict[tuple[str, object], list[Path]] = {}

    def of(case: Case) -> list[Path]:
        wanted = TOKENIZERS.get(case.moe)
        key = case.kind, wanted
        if key not in made:
            root = tmp_path_factory.mktemp("sources")
            made[key] = [
                make_model(root / str(seed), seed, case.model_type, **case.sizes) for seed in range(EXPERTS + 2)
            ]
            if wanted == SENTENCEPIECE:
                shutil.copytree(tokenizer_folder, made[key][0], dirs_exist_ok=True)
            elif wanted:
                special = PreTrainedTokenizerFast.from_pretrained(made[key][0])
                special.add_tokens(list(wanted), special_tokens=True)
                special.save_pretrained(made[key][0])
        return made[key]

    return of


def merged(folder: Path, case: Case, sources: list[Path]) -> Path:
    """Different experts, two of which take each token."""
    base, shared, *experts = sources
    keys: dict[str, Any] = {"shared_experts": [{"source_model": str(shared)}]} if case.shared else {}
    if len(case.moe_layers) < LAYERS:
        keys["moe_layers"] = list(case.moe_layers)
    config = write_config(folder / "merge.yaml", base, experts, prompts=False, architecture=case.moe, **keys)
    merge(plan_merge(load_config(config)), folder / "out")
    return folder / "out"


def computed(case: Case, out: Path) -> np.ndarray | str:
    return llamacpp_logits(out, tokens(), OPTIONS.get(case.moe, ()), own_vocab=case.moe not in FOREIGN_VOCAB)


def tokens() -> list[list[int]]:
    return token_ids(TEXT_LENGTH).tolist()


def distance(found: np.ndarray, out: Path, **keys) -> float:
    """Between logits, in parts of the largest."""
    expected = logits(load(out, **keys), TEXT_LENGTH).numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_llamacpp_computes_what_transformers_computes_or_what_the_table_says(tmp_path, sources, case):
    out = merged(tmp_path, case, sources(case))
    answer = computed(case, out)
    row = row_of(case.moe, case.words)
    if row is not None and isinstance(row.happens, str):
        assert isinstance(answer, str), f"{distance(answer, out):.1e} of the largest logit apart: mended?"
        assert re.match(row.happens, answer)
        return
    assert not isinstance(answer, str), answer
    found = distance(answer, out)
    if row is None:
        assert found <= TOLERANCE
    elif math.isnan(row.happens):
        assert math.isnan(found)
    else:
        assert row.happens / 2 < found < row.happens * 2


def test_every_row_of_the_table_is_seen_to_hold():
    met = [(case.moe, row) for case in CASES.values() if (row := row_of(case.moe, case.words))]
    assert set(met) == {(moe, row) for row in ROWS for moe in row.families}


@pytest.mark.parametrize("moe", WITHOUT_TOKENIZER)
def test_converters_say_what_they_miss_in_a_tokenizer(tmp_path, sources, moe):
    case = next(case for case in CASES.values() if case.moe == moe)
    out = merged(tmp_path, case, sources(case))
    for file in out.glob("tokenizer*"):
        file.unlink()
    tokenizer().save_pretrained(out)
    answer = llamacpp_logits(out, tokens())
    assert isinstance(answer, str)
    assert re.match(WITHOUT_TOKENIZER[moe], answer)


@pytest.mark.parametrize("moe", OPTIONS)
def test_without_its_options_a_converter_stops(tmp_path, sources, moe):
    case = next(case for case in CASES.values() if case.moe == moe)
    answer = llamacpp_logits(merged(tmp_path, case, sources(case)), tokens())
    assert isinstance(answer, str)
    assert re.match("converter: AssertionError", answer)


def test_qwen2_moe_is_wrong_without_zeros_in_gates_too_as_its_weights_are_not_renormalised(tmp_path, sources):
    case = Case("qwen2", "qwen2_moe", shared=True)
    out = merged(tmp_path, case, sources(case))
    # Its sigmoid is silu(x) / x, which is no number where x is 0.
    stored = load_file(out / "model.safetensors")
    gates = {name: torch.full_like(value, 1e-6) for name, value in stored.items() if "shared_expert_gate" in name}
    save_file(stored | gates, out / "model.safetensors", {"format": "pt"})
    answer = computed(case, out)
    assert not isinstance(answer, str), answer
    assert distance(answer, out) > 0.05
    assert distance(answer, out, norm_topk_prob=False) <= TOLERANCE


def test_notes_name_exactly_the_families_that_llamacpp_has_trouble_with():
    # Every Gemma brings the tokenizer that its converter wants.
    troubled = {moe for row in ROWS for moe in row.families} | set(WITHOUT_TOKENIZER) - {"gemma4_text"} | set(OPTIONS)
    told = {moe for moe, family in MOE_FAMILIES.items() if any("llama.cpp" in text for _, text in family.notes)}
    assert told == troubled

"""Experts that are no fine-tunes of the base, or the base itself, and what is lost of those that differ from it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moemerge import MergeConfig, load_config, merge, plan_merge
from moemerge.errors import IncompatibleError, RefusedError, SourceError
from tests.sources.test_lora import make_adapter
from tests.support.families import DENSE, LLAMA3, YARN
from tests.support.models import edit_json, make_model, write_config

SINGLE = "model.safetensors"


def plan_of(tmp_path, base, experts, **keys):
    return plan_merge(load_config(write_config(tmp_path / "c.yaml", base, experts, prompts=False, **keys)))


@pytest.fixture
def copies(tmp_path, llamas) -> list[Path]:
    return [Path(shutil.copytree(llama, tmp_path / llama.name)) for llama in llamas[:3]]


def test_a_stranger_is_named_in_plan_and_card_and_its_like_alone(tmp_path, llamas):
    stranger = make_model(tmp_path / "stranger", 9)
    plan = plan_of(tmp_path, llamas[0], [stranger, llamas[1]])
    (warning,) = plan.warnings
    assert warning.startswith(f"experts[0] {stranger}: its FFNs differ from the base's by 1")
    assert warning.endswith(
        "% in 36 rows of 3 layers, where fine-tunes of one model differ by a few percent: it is hardly a fine-tune of "
        f"{llamas[0]}, whose attention its FFNs were not trained with. Name the model that it was trained from as base_model, "
        "or leave it out"
    )
    assert 130 < int(warning.partition("differ from the base's by ")[2].partition("%")[0]) < 150
    assert plan.advice == ()
    merge(plan, tmp_path / "out")
    assert "> **Warning:** experts\\[0\\] " in (tmp_path / "out" / "README.md").read_text()
    assert plan_of(tmp_path, llamas[0], llamas[1:3]).warnings == ()


def test_a_stranger_among_shared_experts_is_named_too(tmp_path, llamas):
    stranger = make_model(tmp_path / "stranger", 9)
    plan = plan_of(
        tmp_path, llamas[0], llamas[1:3], shared_experts=[{"source_model": str(stranger)}], architecture="qwen2_moe"
    )
    told = [warning for warning in plan.warnings if "as measured with" not in warning]
    assert [warning.partition(":")[0] for warning in told] == [f"shared_experts[0] {stranger}"]


def test_the_base_under_another_name_is_named(tmp_path, llamas, copies):
    copy = Path(shutil.copytree(llamas[0], tmp_path / "copy"))
    plan = plan_of(tmp_path, llamas[0], [copy, llamas[1]])
    assert plan.warnings == (
        f"experts[0] {copy}: its FFNs are the base's, unchanged (a difference of 0 % in 36 rows of 3 layers): if they "
        "are so everywhere, it is no expert of anything. Was it trained as an adapter? That is written model+adapter",
    )
    # The base as an expert is meant so.
    assert plan_of(tmp_path, llamas[0], [llamas[0], llamas[1]]).warnings == ()


@pytest.mark.parametrize(
    ("kept", "other"),
    [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float16"), ("bfloat16", "float32")],
)
def test_the_base_in_another_dtype_is_named_and_tells_no_change(tmp_path, llamas, kept, other):
    base = make_model(tmp_path / "base", 0, dtype=getattr(torch, kept))
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    save_file(
        {k: v.to(getattr(torch, other)) for k, v in load_file(base / SINGLE).items()}, copy / SINGLE, {"format": "pt"}
    )
    plan = plan_of(tmp_path, base, [copy, llamas[1]])
    assert [warning.partition(", unchanged")[0] for warning in plan.warnings] == [
        f"experts[0] {copy}: its FFNs are the base's"
    ]
    # Of an expert that is the base cast up, and of one that the base was cast from.
    for one, two in ((base, copy), (copy, base)):
        plan = plan_of(tmp_path, one, [two, llamas[1]], gate_mode="delta")
        with pytest.raises(RefusedError, match=r"experts\[0\]: its FFN is the base model's own in layer 0"):
            merge(plan, tmp_path / "out")


def test_rows_are_of_layers_that_are_taken(tmp_path, llamas, copies):
    base, fox, code = copies
    random = load_file(make_model(tmp_path / "random", 9) / SINGLE)
    tensors = load_file(fox / SINGLE)
    tensors |= {name: tensor for name, tensor in random.items() if "layers.0." in name}
    save_file(tensors, fox / SINGLE, {"format": "pt"})
    assert len(plan_of(tmp_path, base, [fox, code]).warnings) == 1
    config = {
        "base_model": str(base),
        "experts": [{"source_model": str(fox), "layers": [1]}, {"source_model": str(code)}],
    }
    for plan in (
        plan_of(tmp_path, base, [fox, code], moe_layers=[1, 2]),
        plan_merge(MergeConfig(**config, gate_mode="random", experts_per_token=1)),
    ):
        assert plan.warnings == ()


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_what_adapters_add_is_compared(tmp_path, llamas):
    base = llamas[0]

    def warnings(name: str, **keys: Any) -> list[str]:
        make_adapter(tmp_path / name, base, **keys)
        return [
            w.partition(": ")[2] for w in plan_of(tmp_path, base, [f"{base}+{tmp_path / name}", llamas[1]]).warnings
        ]

    assert warnings("good", lora_alpha=2) == []
    assert warnings("lengths", lora_alpha=2, use_dora=True) == []
    assert warnings("one layer", lora_alpha=2, layers_to_transform=[1]) == []
    (nothing,) = warnings("nothing", lora_alpha=0)
    assert nothing == (
        "its adapter adds nothing to the base's FFNs (a difference of 0 % in 36 rows of 3 layers): if it is so everywhere, "
        "it is no expert of anything. Is the adapter's training finished, and its lora_alpha not 0?"
    )
    (blown,) = warnings("blown", lora_alpha=80000)
    assert blown.startswith("its FFNs differ from the base's by far more than their own size in 36 rows")
    for alpha in (float("nan"), float("inf"), 10**290, 1e38):
        edit_json(tmp_path / "good" / "adapter_config.json", lora_alpha=alpha)
        with pytest.raises(SourceError, match=r"adapter_config\.json: .*lora_alpha"):
            plan_of(tmp_path, base, [f"{base}+{tmp_path / 'good'}", llamas[1]])


def test_what_cannot_be_compared_is_no_stranger(tmp_path, llamas):
    wide = make_model(tmp_path / "wide", 3, intermediate_size=64)
    plan = plan_of(tmp_path, llamas[0], [wide, llamas[1]])
    assert plan.warnings == ()
    assert (
        f"experts[0] {wide}: whether it is a fine-tune of the base model is not known: its FFNs are 64 wide, the base's 48"
    ) in plan.notes
    empty = Path(shutil.copytree(llamas[0], tmp_path / "empty"))
    save_file({k: torch.zeros_like(v) for k, v in load_file(empty / SINGLE).items()}, empty / SINGLE, {"format": "pt"})
    plan = plan_of(tmp_path, empty, llamas[1:3])
    assert plan.warnings == ()
    assert sum("have no finite numbers to compare, or the base has none or zeros" in note for note in plan.notes) == 2


@pytest.mark.parametrize("keys", [{}, {"shared_weights": "average", "fold_norms": True}])
def test_a_base_that_lacks_ffns_is_not_compared(tmp_path, llamas, keys):
    base = Path(shutil.copytree(llamas[0], tmp_path / "base"))
    tensors = {name: tensor for name, tensor in load_file(base / SINGLE).items() if ".mlp." not in name}
    save_file(tensors, base / SINGLE, {"format": "pt"})
    plan = plan_of(tmp_path, base, llamas[1:3], **keys)
    assert plan.warnings == ()
    assert sum("or the base has none or zeros" in note for note in plan.notes) == 2
    merge(plan, tmp_path / "out")
    # Where routers are made of them, they have to be there.
    for mode in ("delta", "hidden"):
        config = write_config(tmp_path / "c.yaml", base, llamas[1:3], prompts=mode == "hidden", gate_mode=mode, **keys)
        with pytest.raises(IncompatibleError, match=r"base_model: .*model\.layers\.0\.mlp\.gate_proj\.weight"):
            plan_merge(load_config(config))


def test_weights_that_tell_nothing_are_refused_where_routers_are_made_of_them(tmp_path, llamas):
    stranger = make_model(tmp_path / "stranger", 9)
    with pytest.raises(
        IncompatibleError, match=r"experts\[0\]: its FFN differs from the base model's by 1\d\d% in layer 0"
    ):
        plan_of(tmp_path, llamas[0], [stranger, llamas[1]], gate_mode="delta")
    with pytest.raises(
        IncompatibleError, match=r"experts\[1\]: its FFNs are the base model's own, so its weights do not"
    ):
        plan_of(tmp_path, llamas[0], [llamas[1], llamas[0]], gate_mode="delta")


def lost(plan) -> list[str]:
    return [note for note in plan.notes if "not used of it" in note or note.startswith("base_model: ")]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"max_position_embeddings": 64}, "context of 64 tokens (base: 128)"),
        ({"rope_theta": 5000.0, "rope_parameters": None}, "rotary positions, rope_theta 5000.0 (base: 10000.0)"),
        (
            {**LLAMA3, "rope_parameters": None},
            "rotary positions, rope_type llama3 (base: default), rope_theta 500000.0 (base: 10000.0), factor 8.0 (base: None), ...",
        ),
        (
            {**YARN, "rope_parameters": None},
            "rotary positions, rope_type yarn (base: default), factor 4.0 (base: None), original_max_position_embeddings 32 (base: None)",
        ),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 (base: 1e-06)"),
        ({"eos_token_id": 7}, "eos_token_id 7 (base: 2)"),
    ],
)
def test_what_the_bases_config_takes_the_place_of_is_told(tmp_path, copies, keys, told):
    edit_json(copies[1] / "config.json", **keys)
    plan = plan_of(tmp_path, copies[0], copies[1:])
    assert lost(plan) == [f"experts[0] {copies[1]}: not used of it, since the base model's own is kept: {told}"]


def test_windows_and_scales_are_told(tmp_path):
    base = make_model(tmp_path / "base", 0, "mistral", sliding_window=None)
    expert = make_model(tmp_path / "expert", 1, "mistral", tuned_from=0, sliding_window=16)
    plan = plan_of(tmp_path, base, [base, expert])
    assert lost(plan) == [
        f"experts[1] {expert}: not used of it, since the base model's own is kept: sliding window 16 (base: none)"
    ]
    base, expert = (make_model(tmp_path / f"granite{s}", 0, "granite", logits_scaling=s) for s in (1.0, 8.0))
    (note,) = lost(plan_of(tmp_path, base, [base, expert]))
    assert note.endswith("logits_scaling 8.0 (base: 1.0)")


def test_templates_and_tokens_are_told_and_who_would_be_the_better_base(tmp_path, copies):
    base, fox, code = copies
    edit_json(fox / "tokenizer_config.json", chat_template="{{ messages }}")
    edit_json(fox / "config.json", max_position_embeddings=512)
    tokenizer = json.loads((code / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 160, "content": "<|im_start|>"})
    (code / "tokenizer.json").write_text(json.dumps(tokenizer))
    plan = plan_of(tmp_path, base, [fox, code])
    kept = "not used of it, since the base model's own is kept:"
    assert lost(plan) == [
        f"experts[0] {fox}: {kept} context of 512 tokens (base: 128); chat template (base: none)",
        f"experts[1] {code}: {kept} tokens '<|im_start|>'",
        f"base_model: {fox} would be the better base: it has a context of 512 tokens, not 128 and a chat template, which the "
        "base lacks",
    ]
    (base / "chat_template.jinja").write_text("{{ other }}")
    assert "chat template (base: another)" in lost(plan_of(tmp_path, base, [fox, code]))[0]


def test_of_another_tokenizer_it_is_told_whether_ids_differ(tmp_path, copies):
    base, _, code = copies
    own = json.loads((base / "tokenizer.json").read_text())

    def told() -> str:
        (code / "tokenizer.json").write_text(json.dumps(own))
        return lost(plan_of(tmp_path, base, [base, code]))[0].partition("kept: tokenizer, ")[2]

    own["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    assert told() == "whose file is another than the base's, though every token has the same id"
    ids = own["model"]["vocab"]
    one, other = [token for token in ids if token.isalpha()][:2]
    ids[one], ids[other] = ids[other], ids[one]
    assert told() == (
        f"whose ids are others than the base's: {one!r} is {ids[one]} in its vocabulary, {ids[other]} in the base's"
    )
    ids[one], ids[other] = ids[other], ids[one]
    own["added_tokens"] = [entry for entry in own["added_tokens"] if entry["content"] != "<pad>"]
    del ids["<pad>"]
    assert told() == "whose ids are others than the base's: it lacks added tokens of the base"


@pytest.mark.parametrize(
    "listed", ['[{"content": "x", "id": 1e999}]', '[{"content": "x", "id": NaN}]', "[1", "{}", "5"]
)
def test_added_tokens_that_make_no_sense_are_passed_over(tmp_path, copies, listed):
    tokenizer = (copies[1] / "tokenizer.json").read_text()
    (copies[1] / "tokenizer.json").write_text(f'{{"added_tokens": {listed}, "x": {tokenizer}}}')
    plan = plan_of(tmp_path, copies[0], copies[1:])
    assert lost(plan)[0].endswith("kept: tokenizer, whose file is another than the base's")


def test_the_same_words_in_other_files_are_the_same(tmp_path, copies):
    base, fox, code = copies
    (base / "chat_template.jinja").write_text("{{ messages }}\n")
    edit_json(fox / "tokenizer_config.json", chat_template="{{ messages }}")
    edit_json(code / "tokenizer_config.json", chat_template=[{"name": "default", "template": "{{ messages }}"}])
    edit_json(fox / "config.json", eos_token_id=[2])
    # A tokenizer in another kind of file cannot be compared.
    (code / "tokenizer.model").write_bytes(b"sentences")
    (code / "tokenizer.json").unlink()
    assert lost(plan_of(tmp_path, base, [fox, code])) == []
    edit_json(
        code / "tokenizer_config.json",
        chat_template=[
            {"name": "default", "template": "{{ messages }}"},
            {"name": "tool_use", "template": "{{ tools }}"},
        ],
    )
    (note,) = lost(plan_of(tmp_path, base, [fox, code]))
    assert note.endswith("chat template (base: another)")


LONGROPE = DENSE["phi3, longrope"][1]


def test_notes_go_by_the_rope_type(tmp_path):
    def notes(model_type, keys):
        folder = tmp_path / f"{model_type}{len(list(tmp_path.iterdir()))}"
        base = make_model(folder, 0, model_type, **keys)
        plan = plan_of(
            tmp_path,
            base,
            [base, make_model(folder.with_name(f"{folder.name}-1"), 1, model_type, tuned_from=0, **keys)],
        )
        return plan, [note for note in plan.family_notes if "as measured with" not in note]

    plan, told = notes("phi3", LONGROPE)
    assert told == [
        "transformers' phi3 computes its cache anew when generation crosses position 16, where longrope's factors change; "
        "granitemoe does not, and from there on says something else than phi3 would. Texts that stay below, or that begin beyond, "
        "are not concerned",
    ]
    assert set(told) <= set(plan.notes)
    assert notes("llama", LLAMA3)[1] == []
    assert notes("llama", YARN)[1] == []


def test_what_is_said_of_longropes_cache_is_so(tmp_path):
    """A mixture of one model twice: beyond the switch it goes on with keys of the short factors, phi3 does not."""
    keys = LONGROPE | {"rope_scaling": LONGROPE["rope_scaling"] | {"long_factor": [4.0, 9.0, 16.0, 25.0]}}
    base = make_model(tmp_path / "base", 0, "phi3", **keys)
    config = write_config(tmp_path / "c.yaml", base, [base, base], prompts=False)
    merge(plan_merge(load_config(config, allow_identical_experts=True)), tmp_path / "out")
    dense, mixture = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (base, tmp_path / "out"))
    prompt = torch.tensor([[5, 9, 13, 17]])

    def scores(model):
        made = model.generate(
            prompt,
            max_new_tokens=20,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            eos_token_id=None,
        )
        return torch.stack(made.scores)

    expected, found = scores(dense), scores(mixture)
    before = 16 - prompt.shape[1] + 1  # the token at position 16 is made of the 16 before it
    assert torch.allclose(found[:before], expected[:before], atol=1e-3)
    assert not torch.allclose(found[before], expected[before], atol=1e-1)

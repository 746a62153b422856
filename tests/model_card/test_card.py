"""The model card as a whole."""

from pathlib import Path

from moemerge.config.loading import load_config
from moemerge.model_card.card import with_trained_norms, write_card
from moemerge.model_card.markdown import as_text
from moemerge.model_card.usage import use_it
from moemerge.planning.planner import plan_merge
from moemerge.routers.report import LayerRouting, RoutingReport


def test_a_card_holds_all_parts_and_prompts_are_no_templates(tmp_path, llamas):
    base, fox, code, chat = map(Path, llamas)
    document = {
        "base_model": str(base),
        "gate_mode": "ridge",
        "experts_per_token": 1,
        "moe_layers": "1-",
        "experts": [
            {"source_model": str(fox), "positive_prompts": ["{{ 7 * 7 }} {% raw %} | <b>"]},
            {"source_model": str(code), "name": "c|d", "positive_prompts": ["x" * 100 + "```"]},
        ],
        "shared_weights": "average",
        "fold_norms": True,
        "shared_experts": [{"source_model": str(chat), "positive_prompts": ["`hello`"]}],
    }
    plan = plan_merge(load_config(document))
    layer = LayerRouting(1, (0.9, 0.8), (0.7, 0.6), (0.55, 0.45), 0.875, (0.4, 0.7))
    report = RoutingReport(("fox", "c|d"), 1, (layer,), {(0, 1): 0.01})
    write_card(tmp_path, "my *model*", plan, report, notes=["a <note>"])
    body = (tmp_path / "README.md").read_text().split("\n---\n\n")[1]
    notes = "".join(f"> **Note:** {as_text(text)}.\n" for text in plan.family_notes)
    assert notes
    expected = f"""\
# my \\*model\\*

A glm4_moe of 2 experts in 2 of 3 layers, 1 per token, made with moemerge: embeddings, attention and norms are the mean of the experts', embeddings where vocabularies agree (else, and the tokenizer: `{base}`), each expert's FFNs with its own norms folded in, from its own model, routers from `gate_mode: ridge`.

**0.1 M parameters, 0.0 M active per token, float32.**

| expert | model | made for prompts such as |
|---|---|---|
| fox | `{fox}` | `{{{{ 7 * 7 }}}} {{% raw %}} \\| <b>` |
| c\\|d | `{code}` | `{"x" * 57}...` |
| shared | `{chat}` | `` `hello` `` |

{notes}> **Note:** a &lt;note&gt;.

## Use

{use_it("my *model*", "glm4_moe", plan.right_in)}

## Routing

Unseen text: each expert is the first choice for this share of its own tokens, by routers that were made without their document (chance 50%): fox 40% (weak: give it texts, or more prompts), c\\|d 70%.

> **Warning:** the router can hardly tell fox from c\\|d: their rows are almost parallel.

<details><summary>The text that the routers were made from</summary>

Of the tokens of each expert's own positive prompts and texts, the share that reaches it among the 1 chosen, or as the first choice, and its share of all tokens (chance: 50%). Other text routes less clearly. The first choice has a mean weight of 0.88.

| expert | own text | own text, first choice | all text |
|---|---|---|---|
| fox | 90.0% | 70.0% | 55.0% |
| c\\|d | 80.0% | 60.0% | 45.0% |

By layer, own text:

| layer | fox | c\\|d | first choice's weight |
|---|---|---|---|
| 1 | 90% | 80% | 0.88 |

</details>

## Configuration

````yaml
{plan.config.text.rstrip()}
````
"""
    assert body == expected


def test_that_norms_were_trained_is_said_once():
    paragraph = (
        "A mixtral of 2 experts, 2 per token, made with moemerge: embeddings, attention and norms come from `x`, each "
        "expert's FFNs from its own model, routers from `gate_mode: delta`."
    )
    text = f"# Title\n\n{paragraph}\n\nMore.\n"
    said = with_trained_norms(text)
    assert said == f"# Title\n\n{paragraph} The norms were trained by `moemerge tune` after the merge.\n\nMore.\n"
    assert with_trained_norms(said) == said
    assert with_trained_norms("# My own card\n") == "# My own card\n"

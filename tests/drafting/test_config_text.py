"""The YAML that is written for a draft: it reads back as it was meant, whatever names and prompts hold."""

from dataclasses import replace

import pytest
import yaml
from jsonschema import Draft202012Validator

from moemerge.config.json_schema import config_schema
from moemerge.config.loading import parse_config
from moemerge.drafting.config_text import config_text
from moemerge.drafting.domains import all_domains
from moemerge.drafting.draft import Draft, DraftExpert

FOX = DraftExpert("models/fox", "fox", None, prompts=("The fox.", "A long\n  text\n\n# with lines"))
CODE = DraftExpert("acme/code+acme/lora", "code", None).of_domain("code", "its name is code")
PLAIN = Draft(
    "base",
    (FOX, CODE),
    "bfloat16",
    1,
    averages=True,
    chats=True,
    unites=False,
    needs_prompts=False,
    remarks=(),
    warnings=(),
)


def read(draft: Draft) -> dict[str, object]:
    text = config_text(draft, "merge.yaml")
    document = yaml.safe_load(text)
    Draft202012Validator(config_schema()).validate(document)
    parse_config(text)
    return document


def test_a_config_is_written_with_comments():
    text = config_text(
        replace(PLAIN, experts=(replace(FOX, prompts=("The fox.",)), replace(CODE, prompts=("def",)))), "m.yaml"
    )
    assert (
        text
        == """\
# yaml-language-server: $schema=moemerge.schema.json
# A mixture of 2 experts, begun by `moemerge init`. Change what you like, then:
#   moemerge plan m.yaml    # what a merge would do
#   moemerge m.yaml merged/
base_model: base                  # gives attention, embeddings, norms and the tokenizer
dtype: bfloat16                   # as the base is stored
experts_per_token: 1              # of 2; each token costs what one model does
shared_weights: average           # attention and norms are the experts' mean, which measured better
                                  # than the base's for fine-tunes of one model; where one of them
                                  # changed attention much, base is better (docs/quality.md)
# router: {chat_prompts: auto}  # if the mixture will mostly be asked in chats
experts:
  # Prompts say what should be routed to an expert; its weights are read, too. Replace these by what
  # your users write. Real text of its kind, some thousand tokens in `positive_texts: FILE`,
  # measured better (docs/routers.md).
  - source_model: models/fox
    name: fox
    positive_prompts:
      - "The fox."
  - source_model: acme/code+acme/lora
    name: code
    # domain code (its name is code)
    positive_prompts:
      - "def"
"""
    )


def test_towers_that_could_be_kept_are_a_comment():
    line = "# keep_vision: true  # keeps the base's towers for images, too, in a qwen3_vl_moe"
    assert line not in config_text(PLAIN, "m.yaml").splitlines()
    assert line in config_text(replace(PLAIN, vision="qwen3_vl_moe"), "m.yaml").splitlines()


def test_every_built_in_prompt_is_read_back():
    experts = tuple(DraftExpert(f"m/{name}", name, None).of_domain(name) for name in all_domains())
    document = read(replace(PLAIN, experts=experts, experts_per_token=2))
    for expert, written in zip(experts, document["experts"], strict=True):
        assert tuple(written["positive_prompts"]) == expert.prompts, expert.name


@pytest.mark.parametrize(
    "text",
    ["a: b", "# no comment", "- x", "true", "1e5", ".inf", "null", "~", "it's \"so\"", "tab\there", "\n\nlines", " a\nb", "a \nb",
     "a\n\n", "\\", "party \U0001f389", "a\x85b", "zero\u200bwidth", "word " * 60, "x" * 200, "two  spaces " * 20, "%TAG", "{a: 1}",
     "'''", "a\n   b\n c", "a\r\nb", "line # one\nline: two"],
)  # fmt: skip
def test_whatever_a_name_or_prompt_holds_is_read_back(text):
    document = read(
        replace(PLAIN, base=text, experts=(replace(FOX, prompts=(text, "x")), replace(CODE, reference=text)))
    )
    assert document["base_model"] == document["experts"][1]["source_model"] == text
    assert document["experts"][0]["positive_prompts"] == [text, "x"]


def test_without_prompts_for_all_they_are_comments_that_can_be_uncommented():
    draft = replace(PLAIN, experts=(replace(FOX, prompts=()), CODE, replace(FOX, name="cub", domain="law")))
    text = config_text(draft, "merge.yaml")
    words = " ".join(text.replace("#", " ").split())
    assert "Every expert needs prompts or none has any, and fox: none that only it should answer." in words
    assert "gate_mode" not in text
    assert [set(expert) for expert in read(draft)["experts"]] == [{"source_model", "name"}] * 3
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line == "    # positive_prompts:"]
    assert len(starts) == 3
    for start in starts:
        for number in range(start, len(lines)):
            if not lines[number].startswith("    #"):
                break
            lines[number] = "    " + lines[number].removeprefix("    #").removeprefix(" ")
    experts = yaml.safe_load("\n".join(lines))["experts"]
    assert tuple(experts[1]["positive_prompts"]) == CODE.prompts
    assert tuple(experts[2]["positive_prompts"]) == FOX.prompts
    assert experts[0]["positive_prompts"] == ["..."]


def test_where_the_weights_make_no_routers_they_are_random_until_all_have_prompts():
    draft = replace(PLAIN, needs_prompts=True)
    assert "gate_mode" not in read(draft)
    assert read(replace(draft, experts=(FOX, replace(CODE, prompts=()))))["gate_mode"] == "random"


@pytest.mark.parametrize(
    ("per_token", "count", "comment"),
    [
        (1, 3, "of 3; each token costs what one model does"),
        (2, 3, "of 3; 1 measured as well on small models, at half of their FFNs' work (docs/recipes.md)"),
        (3, 3, "all 3: the router only weighs them, and each token costs what all of them do"),
    ],
)
def test_experts_per_token_are_explained(per_token, count, comment):
    experts = tuple(replace(FOX, name=f"fox{n}", prompts=(f"fox {n}",)) for n in range(count))
    text = config_text(replace(PLAIN, experts=experts, experts_per_token=per_token), "merge.yaml")
    assert comment in " ".join(text.replace("#", " ").split())

"""What is proposed for real tiny models: names, domains, settings, and what speaks for another base."""

from pathlib import Path

import pytest

from moemerge.drafting.bases import base_remarks
from moemerge.drafting.cards import CardMetadata
from moemerge.drafting.config_text import config_text
from moemerge.drafting.draft import Draft, draft_merge
from moemerge.errors import IncompatibleError
from moemerge.sources.model_folder import ModelFolder
from moemerge.sources.reference import Reference
from tests.support.models import make_model
from tests.support.vocabularies import with_tokens


def drafted(base: Path, *experts: Path) -> Draft:
    return draft_merge(str(base), [str(expert) for expert in experts], lambda _: None)


def test_names_domains_and_settings_are_proposed(llamas):
    base, fox, code, chat = llamas
    draft = drafted(base, fox, code, chat)
    assert [(expert.name, expert.domain) for expert in draft.experts] == [
        ("fox", None),
        ("code", "code"),
        ("chat", "assistant"),
    ]
    assert all(0 < expert.distance.mean < 0.3 for expert in draft.experts)
    assert (draft.dtype, draft.experts_per_token, draft.averages, draft.chats) == ("float32", 2, True, False)
    assert (draft.remarks, draft.warnings, draft.needs_prompts) == ((), (), False)
    assert [expert.name for expert in draft.undescribed] == ["fox"]


def test_of_two_experts_each_token_takes_one(llamas):
    draft = drafted(*llamas[:3])
    assert draft.experts_per_token == 1


def test_experts_of_one_domain_are_not_told_apart_by_it(llamas, tmp_path):
    other = make_model(tmp_path / "coder", 7, tuned_from=0)
    draft = drafted(llamas[0], llamas[2], other)
    assert [expert.domain for expert in draft.experts] == ["code", "code"]
    assert [expert.name for expert in draft.undescribed] == ["coder"]
    assert not draft.is_random


def test_an_expert_that_was_given_as_base_is_noticed_by_the_weights(llamas):
    base, fox, code, chat = llamas
    (remark,) = drafted(fox, base, code, chat).remarks
    assert remark.startswith(f"{base} is nearer to every other model than the base {fox} is (")
    assert remark.endswith(
        " of their FFNs differ), so it may be the model that they were trained from. If it is, give it as BASE"
    )


def test_the_base_among_the_experts_is_a_general_one(llamas):
    base, _, code, chat = llamas
    draft = drafted(base, base, code)
    assert [(expert.domain, expert.distance is None) for expert in draft.experts] == [
        ("assistant", True),
        ("code", False),
    ]
    assert draft.needs_prompts
    assert not draft.is_random
    same = drafted(base, base, chat)
    assert same.is_random
    assert [expert.name for expert in same.undescribed] == ["chat"]


def test_the_base_under_another_path_is_the_base(llamas, monkeypatch):
    base, _, code, _ = llamas
    monkeypatch.chdir(base.parent)
    draft = draft_merge("base", [str(base), str(code)], lambda _: None)
    assert draft.experts[0].distance is None


def test_strangers_need_prompts_and_are_not_averaged(llamas, tmp_path):
    base, _, code, _ = llamas
    stranger = make_model(tmp_path / "math", 9)
    draft = drafted(base, code, stranger)
    assert draft.needs_prompts
    assert not draft.averages
    assert not draft.is_random  # both have prompts
    (warning,) = draft.warnings
    assert f"experts[1] {stranger}: its FFNs differ from the base's by " in warning


def test_models_that_cannot_be_merged_are_refused_as_by_a_plan(llamas, tmp_path):
    other = make_model(tmp_path / "wide", hidden_size=64)
    with pytest.raises(IncompatibleError, match="These models cannot be merged"):
        drafted(llamas[0], llamas[1], other)


def test_a_base_that_chats_is_said_to(llamas, tmp_path):
    bases = [make_model(tmp_path / name) for name in ("base", "base-Instruct")]
    (bases[0] / "chat_template.jinja").write_text("{{ messages }}")
    for base, why in zip(bases, ("it has a chat template", "its name is base-Instruct"), strict=True):
        draft = drafted(base, *llamas[1:3])
        assert draft.remarks == (
            f"the base {base} is a chat model itself ({why}): right if the experts were trained from it, and not from "
            "its pretrained model",
        )
        assert not draft.chats


def test_cards_that_name_another_base_are_told_of():
    base = ModelFolder("acme/base@main", Reference("acme/base", "main"), Path(), {})
    of, other = CardMetadata("a", bases=("acme/Base",)), CardMetadata("b", bases=("acme/other",))

    def told(*experts: CardMetadata) -> list[str]:
        return list(base_remarks(base, CardMetadata("base"), experts, templates=False))

    assert told(other, other) == [
        "the cards of all experts name acme/other as the model that they were trained from, not acme/base@main"
    ]
    assert told(of, of) == told(of, other) == told(other, CardMetadata("c")) == []


def test_tokens_that_experts_added_for_chats_are_kept(llamas, tmp_path):
    base, fox, code, _ = llamas
    chat = with_tokens(code, tmp_path / "chat")
    text = config_text(drafted(base, fox, chat), "m.yaml")
    comment = "# with the tokens that experts added to the base's, and their rows"
    assert f"\ntokenizer: union                  {comment}\n" in text
    assert not drafted(base, fox, with_tokens(code, tmp_path / "padded", ["<|pad|>"], template=None)).unites

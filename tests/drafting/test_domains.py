"""What models are for, by their names and cards, and the built-in prompts."""

import json

import pytest

from moemerge.config.yaml_text import read_yaml
from moemerge.drafting.cards import CardMetadata, read_card
from moemerge.drafting.domains import all_domains, domain_named, guess_domain
from moemerge.sources.model_folder import open_model

NOBODY = CardMetadata("Mistral-7B-v0.1", tags=("text-generation", "pretrained"), languages=frozenset({"en"}))


def test_the_built_in_domains_have_five_prompts_of_different_lengths_that_no_other_has():
    domains = all_domains()
    assert 30 <= len(domains) <= 45
    for name, domain in domains.items():
        lengths = sorted(map(len, domain.prompts))
        assert len(domain.prompts) == 5, name
        assert lengths[0] * 2 < lengths[-1], name
    prompts = [prompt for domain in domains.values() for prompt in domain.prompts]
    assert len(set(prompts)) == len(prompts)
    words = [word for domain in domains.values() for word in domain.words]
    assert sorted({word for word in words if words.count(word) > 1}) == []
    assert all(word == word.lower() and word.strip() for word in words)


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("CodeNinja-1.0-OpenChat-7B", "code"),
        ("Qwen2.5-Coder-1.5B-Instruct", "code"),
        ("deepseek-coder-6.7b-base", "code"),
        ("sqlcoder-7b-2", "sql"),
        ("defog-SQLCoder", "sql"),
        ("Codestral-7B", "code"),
        ("MetaMath-Mistral-7B", "math"),
        ("mathstral-7B", "math"),
        ("BioMistral-7B", "medicine"),
        ("Saul-7B-Instruct", "law"),
        ("Llama-3-Finance", "finance"),
        ("Kunoichi-DPO-v2-7B", "roleplay"),
        ("OpenHermes-2.5-Mistral-7B", "assistant"),
        ("Qwen3-4B-Thinking-2507", "reasoning"),
        ("javascript-expert", "javascript"),
        ("javaExpert", "java"),
        ("pt-br", "portuguese"),
        ("chat_options", "assistant"),
        ("elisp", "lisp"),
        ("NeuralDaredevil-7B", None),
        ("decapoda-7b", None),
    ],
)
def test_names_give_domains_away(name, domain):
    guess = guess_domain(CardMetadata(name), NOBODY)
    assert (guess and guess.domain) == domain
    assert guess is None or guess.reason == f"its name is {name}"


@pytest.mark.parametrize(
    ("card", "domain", "reason"),
    [
        (CardMetadata("x-7B", tags=("code", "trl")), "code", "its card has the tag code"),
        (CardMetadata("x-7B", tags=("summarization",)), "summaries", "its card has the tag summarization"),
        (CardMetadata("x-7B", data_sets=("openai/gsm8k",)), "math", "its card names the data set openai/gsm8k"),
        (CardMetadata("x-7B", languages=frozenset({"en", "fr"})), "french", "its card names the language fr"),
        (CardMetadata("x-chat", tags=("math",)), "math", "its card has the tag math"),
        (CardMetadata("x-7B", tags=("chat",)), "assistant", "its card has the tag chat"),
    ],
)
def test_cards_give_domains_away(card, domain, reason):
    guess = guess_domain(card, NOBODY)
    assert guess is not None
    assert (guess.domain, guess.reason) == (domain, reason)


def test_what_the_base_says_of_itself_says_nothing_of_an_expert():
    base = CardMetadata("deepseek-coder-6.7b", tags=("code",), languages=frozenset({"zh"}))
    assert (
        guess_domain(CardMetadata("deepseek-coder-finance", ("code",), (), frozenset({"zh"})), base).domain == "finance"
    )
    assert guess_domain(CardMetadata("deepseek-coder-x", ("code",), (), frozenset({"zh"})), base) is None
    assert guess_domain(base, None).domain == "code"


def test_a_card_of_many_languages_is_for_none_of_them():
    assert guess_domain(CardMetadata("x-7B", languages=frozenset({"fr", "de", "es"})), NOBODY) is None


def test_metadata_is_read_from_the_card_of_a_model_or_of_its_adapter(tmp_path, llamas):
    model = tmp_path / "mine"
    model.mkdir()
    (model / "config.json").write_text((llamas[0] / "config.json").read_text())
    (model / "README.md").write_text(
        "---\ntags: [code, 3]\nlanguage: EN\ndatasets:\n- a/b\npipeline_tag: translation\nbase_model: acme/base\n---\n# x\n"
    )
    card = read_card(open_model(str(model), lambda _: None))
    assert card == CardMetadata("mine", ("code", "translation"), ("a/b",), frozenset({"en"}), ("acme/base",))
    (model / "README.md").write_text("---\n- no table\n---\n")
    assert read_card(open_model(str(model), lambda _: None)) == CardMetadata("mine")
    adapter = tmp_path / "french-lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    (adapter / "README.md").write_text("---\ntags: law\n---\n")
    assert read_card(open_model(f"{model}+{adapter}", lambda _: None)) == CardMetadata("french-lora", ("law",))


def test_a_domain_is_named_in_any_case_or_refused_with_the_nearest():
    assert domain_named(" French ") == "french"
    assert domain_named("none") is None
    with pytest.raises(ValueError, match=r"^'maht' is not a domain\. Did you mean math\?$"):
        domain_named("maht")
    with pytest.raises(ValueError, match=r"^'zzz' is not a domain\. Known: assistant, code, .*, hindi, none\.$"):
        domain_named("zzz")


def test_the_file_of_domains_is_read_within_the_bounds_of_any_yaml():
    from importlib.resources import files

    table, _ = read_yaml((files("moemerge.drafting") / "domains.yaml").read_text(encoding="utf-8"))
    assert list(table) == list(all_domains())

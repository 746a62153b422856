"""The strictest of several licences, and how model cards name one."""

from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from hypothesis import given
from hypothesis import strategies as st

from moemerge.errors import RefusedError
from moemerge.model_card.card import with_section
from moemerge.model_card.licences import _CHAINS, _above, strictest
from moemerge.model_card.metadata import read_licence, set_licence

KNOWN = sorted({licence for chain in _CHAINS for licence in chain})
SOURCES = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(KNOWN), min_size=1)


def outcome(licences: dict[str, str]) -> str | None:
    try:
        return strictest(licences)
    except RefusedError:
        return None


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("mit", "mit"),
        ("mit apache-2.0", "apache-2.0"),
        ("cc0-1.0 bsd-3-clause mit", "bsd-3-clause"),
        ("apache-2.0 mpl-2.0 mit", "mpl-2.0"),
        ("apache-2.0 gpl-3.0 lgpl-3.0", "gpl-3.0"),
        ("lgpl-2.1 gpl-2.0", "gpl-2.0"),
        ("agpl-3.0 cc-by-sa-4.0 gpl-3.0", "agpl-3.0"),
        ("apache-2.0 cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-3.0", "cc-by-nc-sa-4.0"),
        ("apache-2.0 llama3.1 mit", "llama3.1"),
        ("gemma gemma", "gemma"),
        ("h-research h-research", "h-research"),
        ("other", "other"),
    ],
)
def test_the_licence_that_contains_the_others_is_chosen(found, expected):
    assert strictest({f"acme/{number}": licence for number, licence in enumerate(found.split())}) == expected


@pytest.mark.parametrize(
    ("licences", "reason"),
    [
        (("gpl-3.0", "cc-by-nc-4.0"), "neither cc-by-nc-4.0 nor gpl-3.0 contains the other"),
        (("gpl-2.0", "apache-2.0"), "neither apache-2.0 nor gpl-2.0 contains the other"),
        (("gpl-2.0", "gpl-3.0"), "neither gpl-2.0 nor gpl-3.0 contains the other"),
        (("apache-2.0", "lgpl-2.1"), "neither apache-2.0 nor lgpl-2.1 contains the other"),
        (("llama3", "gemma"), "neither gemma nor llama3 contains the other"),
        (("llama3", "llama3.1"), "neither llama3 nor llama3.1 contains the other"),
        (("cc-by-nc-4.0", "cc-by-sa-4.0"), "neither cc-by-nc-4.0 nor cc-by-sa-4.0 contains the other"),
        (("mit", "h-research"), "neither h-research nor mit contains the other"),
        (("other", "other"), "'other' without a name may be any licence"),
        (("other a", "other b"), "neither other a nor other b contains the other"),
        (("mit", None), "acme/1 has none in its model card"),
        ((None, None), "acme/0 has none in its model card"),
        (("cc-by-nd-4.0", "cc-by-nd-4.0"), "cc-by-nd-4.0 forbids to share what is made of it"),
        (("mit", "cc-by-nc-nd-3.0"), "cc-by-nc-nd-3.0 forbids to share what is made of it"),
    ],
)
def test_what_cannot_be_told_is_refused_with_every_sources_licence(licences, reason):
    with pytest.raises(RefusedError) as caught:
        strictest({f"acme/{number}": licence for number, licence in enumerate(licences)})
    assert str(caught.value) == (
        f"the sources' licences do not say which one the merged model has: {reason}.\n"
        f"  - acme/0: {licences[0] or 'none'}\n"
        f"  - acme/1: {licences[1] or 'none'}\n"
        "Read their terms, then name the merged model's with --license NAME."
    )


@given(SOURCES, st.randoms())
def test_the_order_of_the_sources_does_not_matter(licences, rng):
    shuffled = list(licences.items())
    rng.shuffle(shuffled)
    assert outcome(dict(shuffled)) == outcome(licences)


@given(SOURCES)
def test_what_is_chosen_is_a_sources_own_and_contains_all_others(licences):
    chosen = outcome(licences)
    if chosen:
        assert chosen in licences.values()
        assert all(licence == chosen or chosen in _above(licence) for licence in licences.values())
    else:
        assert len(set(licences.values())) > 1


@given(SOURCES, SOURCES)
def test_a_merge_of_merges_is_the_merge_of_all(first, second):
    parts = [outcome(first), outcome(second)]
    if all(parts):
        together = first | {f"second {name}": licence for name, licence in second.items()}
        assert outcome(dict(zip("xy", parts, strict=True))) == outcome(together)


@pytest.mark.parametrize("licence", KNOWN)
def test_no_licence_is_stricter_than_itself(licence):
    assert licence not in _above(licence)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("license: MIT", "mit"),
        ("license: [mit]", "mit"),
        ("license: [mit, apache-2.0]", "apache-2.0"),
        ("license: [gpl-3.0, cc-by-nc-4.0]", "cc-by-nc-4.0+gpl-3.0"),
        ("license: [mit, cc-by-nd-4.0]", "cc-by-nd-4.0+mit"),
        ("license: other", "other"),
        ("license: other\nlicense_name: Acme Research\nlicense_link: LICENSE", "other Acme-Research"),
        ("license: other\nlicense_name: acme\nlicense_link: https://acme.com/x", "other acme https://acme.com/x"),
        ("license: other\nlicense_link: https://acme.com/x", "other"),
        ("license: unknown", None),
        ('license: "mit\\nbase_model: evil"', None),
        ("license: <img src=x>", None),
        ('license: "mit\\u202e"', None),
        ('license: other\nlicense_name: "a\\u202eb"', "other"),
        ("license: other\nlicense_name: acme\nlicense_link: javascript://x", "other acme"),
        ("license:", None),
        ("tags: [a]", None),
        ("- a list", None),
        ("license: [", None),
    ],
)
def test_a_card_names_its_licence(tmp_path, metadata, expected):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")
    assert read_licence(tmp_path) == expected


def test_without_a_card_there_is_no_licence(tmp_path):
    assert read_licence(tmp_path) is None
    (tmp_path / "README.md").write_text("# A model\n")
    assert read_licence(tmp_path) is None


@pytest.mark.parametrize("licence", ["mit", "other acme", "other acme https://acme.com/x"])
def test_a_licence_is_put_into_a_card_and_nothing_else_changes(tmp_path, licence):
    card = tmp_path / "README.md"
    card.write_text(
        "---\ntags:\n- moe\nlicense: other\nlicense_name: old\nlicense_link: LICENSE\n---\n\n# Ä model\n", "utf-8"
    )
    set_licence(tmp_path, licence)
    assert read_licence(tmp_path) == licence
    assert metadata_load(card)["tags"] == ["moe"]
    assert card.read_text("utf-8").endswith("---\n\n# Ä model\n")
    assert len(metadata_load(card)) == 1 + len(licence.split())
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_licence_begins_a_card_where_there_is_none(tmp_path):
    set_licence(tmp_path, "mit")
    assert (tmp_path / "README.md").read_text() == "---\nlicense: mit\n---\n"


def test_a_card_that_cannot_be_read_is_not_written_to(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: [\n---\n")
    with pytest.raises(RefusedError) as caught:
        set_licence(tmp_path, "mit")
    assert str(caught.value) == (
        f"{card}: its metadata is not a table in YAML. Correct what stands between its --- lines."
    )
    assert [path.name for path in Path(tmp_path).iterdir()] == ["README.md"]


def test_a_section_is_put_at_the_end_of_a_card_without_a_configuration():
    text = with_section("# A model\n\n", "evaluation", "losses")
    assert text == "# A model\n\n<!-- evaluation -->\nlosses\n<!-- /evaluation -->\n"
    assert with_section(text, "evaluation", "other losses") == text.replace("losses", "other losses")

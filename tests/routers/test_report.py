"""What a routing report says of text that the routers were not made from."""

from moemerge.routers.report import LayerRouting, RoutingReport


def report(**changes):
    layer = LayerRouting(0, (0.9, 0.9), (0.9, 0.9), (0.5, 0.5), 0.9, held_out=(0.8, 0.55))
    return RoutingReport(("fox", "code"), 1, (layer,), {}, **changes)


def test_texts_say_what_unseen_text_gets():
    assert report().on_unseen_text() == (
        "Unseen text: each expert is the first choice for this share of its own tokens, by routers that were made "
        "without their document (chance 50%): fox 80%, code 55% (weak: give it texts, or more prompts)"
    )


def test_prompts_speak_of_prompts_alone():
    assert report(from_prompts=True).on_unseen_text() == (
        "Held-out prompts: each expert is the first choice for this share of the tokens of its own prompts, by routers "
        "that were made without them (chance 50%): fox 80%, code 55% (weak: give it texts, or more prompts). Longer "
        "text is routed less well; `moemerge eval` measures it"
    )


def test_what_experts_wrote_is_text():
    found = report(from_prompts=True, writers=frozenset({0})).on_unseen_text()
    assert found.startswith("Unseen text: ")
    assert "fox 80% of what it wrote, code 55%" in found

"""The Space's functions, where Gradio is installed: plans, merges into the visitor's repository, and refusals."""

import importlib.util
from types import ModuleType
from typing import Any

import pytest

from tests.support.hub_server import User
from tests.support.machine import ROOT

gr = pytest.importorskip("gradio")
EXPERTS = "acme/fox | The fox jumps. | The lazy dog\n\n acme/code|def main(argv): return argv| item 1 |"


@pytest.fixture(scope="module")
def app() -> ModuleType:
    spec = importlib.util.spec_from_file_location("space", ROOT / "spaces" / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(world, monkeypatch) -> Any:
    """A Hub with an account, which the Space's process knows; the Space has a token of its own."""
    world.hub.users = {"hf_alice": User("alice"), "hf_space": User("space")}
    world.hub.reset()
    for name, value in {"HF_ENDPOINT": world.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_space"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return world.hub


def signed_in() -> Any:
    return gr.OAuthToken(token="hf_alice", scope="manage-repos", expires_at=0)


def test_a_plan_needs_no_token_and_takes_none_of_the_space(app, hub):
    *_, said = app.plan("acme/base", EXPERTS, None)
    assert "2 experts, 2 per token" in said
    assert {call.has_token for call in hub.calls} == {False}


def test_a_merge_goes_to_the_repository_of_the_visitor(app, hub):
    *earlier, said = app.merge(" acme/base", EXPERTS, "alice/mix", True, signed_in())
    assert said.splitlines()[-1] == f"{hub.url}/alice/mix"
    assert all(said.startswith(part) for part in earlier)
    assert hub.repositories["alice/mix"].private
    assert {"README.md", "config.json", "model.safetensors.index.json"} <= hub.repositories["alice/mix"].find("main")[
        1
    ].keys()


@pytest.mark.parametrize(
    ("base", "experts", "message"),
    [
        ("../models/base", EXPERTS, "'../models/base' is no repository of the Hub: expected user/name."),
        ("acme/base", "acme/fox | a\n/etc | b", "'/etc' is no repository of the Hub: expected user/name."),
        ("acme/base", "acme/fox |", "acme/fox: has no prompts; expected: user/name | a prompt | another prompt"),
    ],
)
def test_what_is_no_config_is_refused(app, base, experts, message):
    with pytest.raises(gr.Error) as refused:
        next(app.plan(base, experts, None))
    assert refused.value.message == message


def test_a_merge_needs_a_visitor_and_a_repository(app):
    with pytest.raises(gr.Error) as refused:
        next(app.merge("acme/base", EXPERTS, "alice/mix", False, None))
    assert refused.value.message == "Sign in first: the mixture goes to a repository of yours."
    with pytest.raises(gr.Error) as refused:
        next(app.merge("acme/base", EXPERTS, "--help", False, signed_in()))
    assert refused.value.message == "'--help' is no repository of the Hub: expected user/name."

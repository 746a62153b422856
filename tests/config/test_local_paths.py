"""Paths in a config: variables, the folder they count from, and the copy of the config beside a merged model."""

import os

import pytest
import yaml

from moemerge import ConfigError, load_config
from moemerge.config.config_copy import text_for

TEXT = """\
# Kept: a comment, é, 𝄞.
base_model: models/base
experts:
  - source_model: 'models/fox'   # the animal
    positive_texts: texts/*.txt
  - {source_model: acme/owl+models/poems, positive_texts: [texts, "hf://datasets/acme/owls:train#text"]}
router: {calibration_texts: texts/**/*.txt, load_prior: [1, 1]}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with models, texts and a config, beside the current one."""
    home = tmp_path / "project"
    for name in ("base", "fox", "poems"):
        (home / "models" / name).mkdir(parents=True)
    (home / "texts").mkdir()
    (home / "texts" / "a.txt").write_text("fox")
    (home / "merge.yaml").write_text(TEXT, encoding="utf-8")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return home


def paths(config):
    return [
        config.base_model,
        *(expert.source_model for expert in config.experts),
        *(text for expert in config.experts for text in expert.positive_texts),
        *config.router.calibration_texts,
    ]


def test_relative_paths_count_from_the_config_s_folder_if_they_lead_somewhere_there(project):
    assert paths(load_config("../project/merge.yaml")) == [
        "../project/models/base",
        "../project/models/fox",
        "acme/owl+../project/models/poems",
        "../project/texts/*.txt",
        "../project/texts",
        "hf://datasets/acme/owls:train#text",
        "../project/texts/**/*.txt",
    ]


def test_a_file_in_the_config_s_folder_is_no_repository(project):
    for name in ("fox.gguf", "adapter.safetensors"):
        (project / name).write_text("fox")
    text = TEXT.replace("'models/fox'", "fox.gguf").replace("acme/owl+models/poems", "acme/owl+adapter.safetensors")
    (project / "merge.yaml").write_text(text, encoding="utf-8")
    assert paths(load_config("../project/merge.yaml"))[1:3] == [
        "../project/fox.gguf",
        "acme/owl+../project/adapter.safetensors",
    ]


def test_else_from_the_current_folder(project, tmp_path):
    (project / "models").rename(project / "moved")
    (tmp_path / "here" / "models").symlink_to(project / "moved")
    config = load_config(project / "merge.yaml")
    assert (config.base_model, config.experts[1].source_model) == ("models/base", "acme/owl+models/poems")
    assert config.experts[0].positive_texts == ["../project/texts/*.txt"]


def test_a_config_in_the_current_folder_keeps_its_paths_as_they_are_written(project, monkeypatch):
    monkeypatch.chdir(project)
    assert paths(load_config("merge.yaml"))[:3] == ["models/base", "models/fox", "acme/owl+models/poems"]


def test_a_folder_with_brackets_is_no_pattern(project, tmp_path):
    (tmp_path / "[x]").mkdir()
    (project / "texts").rename(tmp_path / "[x]" / "texts")
    (tmp_path / "[x]" / "merge.yaml").write_text(TEXT, encoding="utf-8")
    assert load_config("../[x]/merge.yaml").experts[1].positive_texts[0] == "../[x]/texts"


def test_variables_and_home_are_replaced(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project))
    monkeypatch.setenv("MODELS", str(project / "models"))
    text = "base_model: ~/models/base\nexperts: [{source_model: $MODELS/fox}, {source_model: '${MODELS}/poems'}]\n"
    assert paths(load_config(text)) == [str(project / "models" / name) for name in ("base", "fox", "poems")]


def test_a_variable_that_is_not_set_is_named_with_its_line(project):
    (project / "merge.yaml").write_text(TEXT.replace("'models/fox'", "$FOXES/fox"), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config("../project/merge.yaml")
    assert error.value.problems == (
        "line 4: experts[0].source_model: the variable $FOXES is not set, found '$FOXES/fox'",
    )


def test_the_copy_leads_to_the_same_models_from_anywhere(project, monkeypatch):
    config = load_config("../project/merge.yaml")
    out = project / "results" / "out"
    out.mkdir(parents=True)
    text = text_for(config, out)
    assert text == (
        TEXT.replace("models/base", '"../../models/base"')
        .replace("'models/fox'", '"../../models/fox"')
        .replace("acme/owl+models/poems", '"acme/owl+../../models/poems"')
        .replace("texts/*.txt", '"../../texts/*.txt"')
        .replace("[texts,", '["../../texts",')
        .replace("texts/**/*.txt", '"../../texts/**/*.txt"')
    )
    (out / "copy.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir("/")
    found = paths(load_config(out / "copy.yaml"))
    places = [path.rpartition("+")[2] for path in found if not path.startswith("hf")]
    assert [os.path.realpath(path) for path in places] == [
        os.path.realpath(project / path)
        for path in ("models/base", "models/fox", "models/poems", "texts/*.txt", "texts", "texts/**/*.txt")
    ]


def test_what_leads_nowhere_here_is_copied_as_it_is(project):
    text = "base_model: acme/base\nexperts: [{source_model: /nowhere/fox}, {source_model: owl}]\n"
    assert text_for(load_config(text), project) == text


def test_a_copy_whose_paths_stand_in_anchors_is_written_anew(project, monkeypatch):
    monkeypatch.chdir(project)
    text = "base_model: &m models/base\nexperts:\n  - source_model: *m\n  - source_model: >\n      models/fox\n"
    text += "    positive_prompts: '\u201ca fox\u201d'\n"
    text = text.replace("*m\n", "*m\n    positive_prompts: all\n")
    (project / "merge.yaml").write_text(text.replace(">\n", ">-\n"))
    copy = text_for(load_config("merge.yaml"), project / "texts")
    assert yaml.safe_load(copy) == {
        "base_model": "../models/base",
        "experts": [
            {"source_model": "../models/base", "positive_prompts": "all"},
            {"source_model": "../models/fox", "positive_prompts": "\u201ca fox\u201d"},
        ],
    }
    assert '"\u201ca fox\u201d"' in copy  # without straight quotes, it would be refused


def test_a_step_up_after_a_link_leads_where_the_system_says(tmp_path, monkeypatch):
    """`current/../base` is beside what the link leads to, not beside the link."""
    for name in ("real/v1", "real/base", "real/code", "cfg/base"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "cfg" / "current").symlink_to(tmp_path / "real" / "v1")
    (tmp_path / "cfg" / "a.yaml").write_text(
        "base_model: current/../base\nexperts: [{source_model: current/../code}, {source_model: current}]\n"
    )
    monkeypatch.chdir(tmp_path)
    config = load_config("cfg/a.yaml")
    assert paths(config) == ["real/base", "real/code", "cfg/current"]
    monkeypatch.chdir(tmp_path / "cfg")
    text = text_for(load_config("a.yaml"), tmp_path / "real" / "v1")
    assert yaml.safe_load(text)["base_model"] == "../base"
    assert yaml.safe_load(text)["experts"][1]["source_model"] == "../../cfg/current"


def test_keys_with_values_have_variables_and_home_too(project, monkeypatch):
    monkeypatch.setenv("MODELS", "/models")
    experts = [{"source_model": "$MODELS/fox"}, {"source_model": "${MODELS}/owl"}]
    assert paths(load_config({"base_model": "$MODELS/base", "experts": experts})) == [
        "/models/base",
        "/models/fox",
        "/models/owl",
    ]
    with pytest.raises(ConfigError, match=r"base_model: the variable \$NONE is not set, found '\$NONE/base'"):
        load_config({"base_model": "$NONE/base", "experts": experts})


def test_the_hub_gets_the_config_as_it_was_written(project):
    config = load_config("../project/merge.yaml")
    assert text_for(config, None) == TEXT


def test_a_copy_keeps_its_comments_beside_a_merge_key(project, monkeypatch):
    monkeypatch.chdir(project)
    text = (
        "base_model: models/base  # kept\nexperts:\n  - &one {source_model: models/fox, noise_scale: 0.1}\n"
        "  - {<<: *one, source_model: models/poems}\n"
    )
    (project / "merge.yaml").write_text(text)
    copy = text_for(load_config("merge.yaml"), project / "texts")
    assert copy == (
        text.replace("models/base", '"../models/base"')
        .replace("models/fox", '"../models/fox"')
        .replace("models/poems", '"../models/poems"')
    )


def test_the_mixture_before_an_expert_s_name_is_a_path(project, tmp_path):
    text = """\
base_model: models/base
experts:
  - source_model: models/fox#code
  - source_model: acme/owl#1+models/poems
  - source_model: models/fox#2+models/poems
  - source_model: models/c#
"""
    (project / "models" / "c#").mkdir()
    (project / "merge.yaml").write_text(text)
    config = load_config("../project/merge.yaml")
    moved = [
        "../project/models/fox#code",
        "acme/owl#1+../project/models/poems",
        "../project/models/fox#2+../project/models/poems",
        "../project/models/c#",
    ]
    assert [expert.source_model for expert in config.experts] == moved
    copied = yaml.safe_load(text_for(config, tmp_path / "out"))
    assert [expert["source_model"] for expert in copied["experts"]] == moved

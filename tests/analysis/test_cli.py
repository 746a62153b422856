"""`moemerge analyze` as it is typed, over tiny mixtures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moemerge.analysis import analyzer, plots
from tests.support.machine import ROOT
from tests.support.mixtures import make_mixture
from tests.support.models import TEXT, make_model, write_config

QUICK = ("--device", "cpu", "--compute-dtype", "float32", "--max-tokens", 60, "--window", 20, "-q")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two mixtures, a dense model of their sizes, and text."""
    folder = tmp_path_factory.mktemp("analysis")
    make_mixture(folder / "one", "mixtral")
    make_mixture(folder / "two", "mixtral", seed=1)
    make_model(folder / "dense", 3, "mistral", num_hidden_layers=3)
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text(TEXT[::-1])
    return folder


@pytest.fixture
def analyze(run, place, monkeypatch, tmp_path):
    """Runs `moemerge analyze` beside the models; files that are named without a folder are of the test's own."""
    monkeypatch.chdir(tmp_path)
    for model in ("one", "two", "dense", "a.txt", "b.txt"):
        (tmp_path / model).symlink_to(place / model)
    return lambda *words: run("analyze", *words)


def test_help_imports_nothing_slow():
    code = (
        "import sys\nsys.argv = ['moemerge', 'analyze', '--help']\nfrom moemerge.cli import main\ntry:\n    main()\n"
        "finally:\n    assert not {'torch', 'numpy', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_weights_alone(analyze):
    code, shown, errors = analyze("one", "-q")
    assert (code, errors) == (0, "")
    assert shown.startswith(
        "one is a mixtral of 4 experts, 2 per token, in 3 layers; their weights have a mean cosine of "
    )
    assert "Mean cosine of each expert's weights with the others', by layer from 0 to 2;" in shown
    code, shown, _ = analyze("one", "--beside", "dense", "--json", "-q")
    facts = json.loads(shown)
    assert (code, facts["beside"], facts["text"]) == (0, ["dense"], None)
    assert np.shape(facts["weights"]["similarity"]["gate"]) == (3, 5, 5)


def test_text_and_every_file(analyze, monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "_DPI", 20)
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    words = ("--data", "a=a.txt", "--data", "b=b.txt", "--generate", 2, "--html", "page.html", "--plots", "plots")
    code, shown, errors = analyze("one", *words, "--load", "load.npy", "--json", *QUICK)
    assert (code, errors) == (0, "")
    facts = json.loads(shown)
    text = facts["text"]
    assert (facts["experts_per_token"], text["domains"], text["layers"]) == (2, ["a", "b"], [0, 1, 2])
    np.testing.assert_allclose(np.sum(text["load"], axis=2), 2)
    np.testing.assert_allclose(np.sum(text["generated"], axis=1), 2)
    np.testing.assert_allclose(np.sum(text["choice_weight"], axis=1), 1)
    assert np.diff(text["choice_weight"], axis=1).max() < 0
    counts = np.tensordot(text["tokens"], text["load"], 1)
    np.testing.assert_allclose(np.load(tmp_path / "load.npy"), counts)
    assert "<title>Analysis" in (tmp_path / "page.html").read_text("utf-8")
    assert (tmp_path / "plots" / "load.png").is_file()


def test_a_dense_model_that_an_expert_was_made_of_is_named(run, tmp_path, llamas, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:], prompts=False)
    assert run(config, "out", "-q")[0] == 0
    (tmp_path / "mine").symlink_to(llamas[2])
    _, shown, _ = run("analyze", "out", "--beside", "mine", "-q")
    assert shown.splitlines()[1] == (
        "mine is a copy of code: their matrices are equal in 3 of 3 layers, number for number."
    )
    _, shown, _ = run("analyze", "out", "--beside", llamas[0], "-q")
    assert shown.splitlines()[1].startswith("base is most like ")


def test_a_shared_expert_is_told_of(run, tmp_path):
    make_mixture(tmp_path / "mixture", "deepseek_v3")
    assert (
        "The shared expert has another width than the experts; by the means over neurons, it is most like "
        in (run("analyze", tmp_path / "mixture", "-q")[1])
    )


def test_two_models_side_by_side(analyze, tmp_path):
    code, shown, _ = analyze("one", "--compare", "two", "--html", "page.html", "-q")
    assert code == 0
    assert "\ntwo is a mixtral of 4 experts" in shown
    assert "Means over the layers that both have, and how much higher two is than one:" in shown
    facts = json.loads(analyze("one", "--compare", "two", "--json", "-q")[1])
    other = json.loads(analyze("two", "--json", "-q")[1])
    assert facts["compared_with"] == other
    assert {fact["group"] for fact in facts["differences"]} == {"Similarity of weights", "Router rows"}
    same = json.loads(analyze("one", "--compare", "one", "--json", "-q")[1])
    assert {value for fact in same["differences"] for value in fact["differences"].values()} == {0.0}


def test_an_analysis_is_printed_before_its_files_are_written(analyze, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "moemerge.cli.analysis._check", lambda *_: (tmp_path / "page.html.new").mkdir()
    )  # in the place of the draft
    code, shown, errors = analyze("one", "--html", "page.html", "-q")
    assert (code, errors) == (1, "error: page.html: cannot be written: Is a directory.\n")
    assert shown.startswith("one is a mixtral of 4 experts")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("option", ["--compare", "--beside"])
def test_a_misspelt_model_is_found_before_weights_are_downloaded(analyze, monkeypatch, option):
    read = analyzer.read_stored_mixture
    monkeypatch.setattr(
        analyzer,
        "read_stored_mixture",
        lambda folder, announce, weights="stream": (
            read(folder, announce) if weights == "stream" else pytest.fail("too early")
        ),
    )
    code, shown, errors = analyze("one", option, "./twoo", "--data", "a=a.txt", *QUICK)
    assert (code, shown, errors) == (
        2,
        "",
        "error: ./twoo: there is no such folder, and it cannot be a Hub repository (user/name).\n",
    )


def test_files_that_are_written_are_named(analyze):
    assert analyze("one", "--html", "page.html")[2].splitlines()[-1] == "page.html: written"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("one", "--generate", 3), "--generate: needs text to run the mixture over. Give --data NAME=PATH."),
        (("one", "--load", "load.npy"), "--load: needs text to run the mixture over. Give --data NAME=PATH."),
        (("one", "--max-tokens", 30), "--max-tokens: needs text to run the mixture over. Give --data NAME=PATH."),
        (
            ("one", "--device", "cuda:9", "--window", 8),
            "--window: needs text to run the mixture over. Give --data NAME=PATH.",
        ),
        (("/nope",), "/nope: there is no such folder, and it cannot be a Hub repository (user/name)."),
        (
            ("one", "--data", "a=a.txt", "--load", "load.csv"),
            "load.csv: expected a name that ends in .json, for SGLang, or in .npy, for EPLB.",
        ),
        (("one", "--data", "a=a.txt", "--load", "no/load.npy"), "no/load.npy: there is no such folder."),
        (
            ("one", "--data", "a=a.txt", "--load", "there.npy"),
            "there.npy: is there already, and is not replaced. Choose another name.",
        ),
        (
            ("one", "--html", "there.npy"),
            "there.npy: holds something else than a page of analysis, and is not replaced. Choose another name.",
        ),
        (("one", "--html", "no/page.html"), "no/page.html: there is no such folder."),
        (("one", "--plots", "there.npy"), "there.npy: is no folder. Choose another name."),
        (("one", "--data", "a.txt"), "--data: expected NAME=PATH, such as code=code.txt, found 'a.txt'."),
        (
            ("one", "--chat-roles", "nobody", "--data", "a=a.txt"),
            "--chat-roles: 'nobody' is not a role; known: system, developer, user, assistant, tool.",
        ),
        (
            ("dense",),
            "dense: is a dense model (mistral), without experts to analyse. Name a mixture, and give this one beside it: "
            "moemerge analyze MIXTURE --beside dense",
        ),
        (
            ("one", "--compare", "dense"),
            "dense: is a dense model (mistral), without experts to analyse. Name a mixture, and give this one beside it: "
            "moemerge analyze MIXTURE --beside dense",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_slow(analyze, tmp_path, monkeypatch, words, message):
    (tmp_path / "there.npy").write_text("mine")
    monkeypatch.setattr("moemerge.analysis.analyzer.analyze_weights", lambda *_: pytest.fail("too late"))
    if "--plots" in words:
        pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    code, shown, errors = analyze(*words, "-q")
    assert (code, shown, errors) == (2, "", f"error: {message}\n")
    assert (tmp_path / "there.npy").read_text() == "mine"


def test_without_scipy_a_note_says_what_is_missing(analyze, monkeypatch):
    for module in ("moemerge.cli.analysis", "moemerge.analysis.matching"):
        monkeypatch.setattr(f"{module}.find_spec", lambda _name: None)
    code, _, errors = analyze("one")
    note = "note: neurons are not matched without scipy, which pip install 'moemerge[analysis]' brings\n"
    assert (code, errors[-len(note) :]) == (0, note)


def test_notes_are_told(analyze, monkeypatch):
    monkeypatch.setattr(analyzer, "_analyze_text", lambda *_: (None, ("nothing was generated",)))
    assert "note: nothing was generated" in analyze("one")[2].splitlines()


def test_plots_without_matplotlib_are_refused(analyze, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda _name: None)
    assert analyze("one", "--plots", "plots")[::2] == (
        2,
        "error: --plots: needs matplotlib, which is not installed: pip install 'moemerge[plots]'.\n",
    )

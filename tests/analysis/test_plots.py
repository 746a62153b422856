"""Plots for papers: which there are, and that the same figures make the same files."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra plots is not installed")

from moemerge.analysis import plots
from moemerge.analysis.plots import check_plots, write_plots
from moemerge.errors import OutputError, RefusedError
from tests.analysis.figures import ROLES, analysis_of, with_text, with_weights

OF_WEIGHTS = {"layers", "similarity", "matched_similarity", "router_similarity", "plane"}
OF_TEXT = {"output_similarity", "load", "ranks"}


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr(plots, "_DPI", 20)


def names(folder) -> set[str]:
    assert {path.suffix for path in folder.iterdir()} == {".png", ".svg"}
    found = [{path.stem for path in folder.glob(f"*{ending}")} for ending in (".png", ".svg")]
    assert found[0] == found[1]
    return found[0]


def draw_only(monkeypatch, *wanted: str) -> None:
    figures = plots._figures
    monkeypatch.setattr(plots, "_figures", lambda given: (made for made in figures(given) if made[0] in wanted))


@pytest.mark.usefixtures("_quick")
def test_every_figure_is_drawn_and_twice_the_same(tmp_path, monkeypatch):
    analyses = [analysis_of(2, 3), replace(analysis_of(1, 3, seed=3), model="runs/other")]
    write_plots(tmp_path / "one", analyses)
    assert names(tmp_path / "one") == OF_WEIGHTS | OF_TEXT
    draw_only(monkeypatch, "load", "plane")
    again = write_plots(tmp_path / "two", analyses)
    assert len(again) == 4
    for path in again:
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes(), path.name
    svg = (tmp_path / "one" / "load.svg").read_text("utf-8")
    assert "expert-2" in svg
    assert "<dc:date>" not in svg


@pytest.mark.usefixtures("_quick")
def test_names_are_no_formulas(tmp_path, monkeypatch):
    names = ("$\\frac$", "a$b$c", "$x^2$", "d", "beside")
    analysis = with_text(with_weights(analysis_of(), names=names), names=names[:4])
    draw_only(monkeypatch, "load")
    write_plots(tmp_path, [replace(analysis, model="$runs")])
    svg = (tmp_path / "load.svg").read_text("utf-8")
    assert all(f">{name}<" in svg for name in names[:4])


@pytest.mark.parametrize(("layers", "shown"), [(1, [1]), (2, [1, 2]), (5, [1, 3, 5])])
def test_each_layer_is_on_a_plane_once(layers, shown):
    titles = [axes.get_title() for axes in plots._planes([analysis_of(layers)]).axes]
    assert [title for title in titles if title.startswith("gate")] == [f"gate, layer {layer}" for layer in shown]


@pytest.mark.usefixtures("_quick")
def test_a_plot_that_fails_leaves_nothing_half_written(tmp_path):
    (tmp_path / "layers.svg.new").mkdir()  # in the place of the draft
    with pytest.raises(OutputError):
        write_plots(tmp_path, [analysis_of()])
    assert {path.name for path in tmp_path.iterdir()} == {"layers.png", "layers.svg.new"}


def test_what_was_not_measured_is_not_drawn():
    nothing = dict.fromkeys(ROLES, np.full((4, 5, 5), np.nan))
    figures = plots._figures([with_weights(analysis_of(text=False), matched_similarity=nothing)])
    assert {name for name, _ in figures} == OF_WEIGHTS - {"matched_similarity"}


def test_layers_without_a_figure_count_in_no_mean():
    matrices = np.full((2, 3, 3), np.nan)
    matrices[0] = [[1, 0.25, 0.5], [0.25, 1, np.nan], [0.5, np.nan, 1]]
    np.testing.assert_array_equal(
        plots._mean_pairs(matrices), [[np.nan, 0.25, 0.5], [0.25, np.nan, np.nan], [0.5, np.nan, np.nan]]
    )


def refusal(folder) -> str:
    with pytest.raises(RefusedError) as refused:
        check_plots(folder)
    return str(refused.value)


def test_folders_that_are_not_for_plots_are_refused(tmp_path, monkeypatch):
    check_plots(tmp_path / "new")
    check_plots(tmp_path)
    (tmp_path / "mine").touch()
    assert refusal(tmp_path) == f"{tmp_path}: is not empty. Choose a folder that is, or a new one."
    assert refusal(tmp_path / "mine") == f"{tmp_path / 'mine'}: is no folder. Choose another name."
    assert refusal(tmp_path / "no" / "where") == f"{tmp_path / 'no' / 'where'}: there is no folder to make it in."
    monkeypatch.setattr(plots, "find_spec", lambda _name: None)
    assert refusal(tmp_path / "new") == (
        "--plots: needs matplotlib, which is not installed: pip install 'moemerge[plots]'."
    )


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=str(tmp_path / "file" / "plots")):
        write_plots(tmp_path / "file" / "plots", [analysis_of()])

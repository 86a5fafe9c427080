"""The picture of a run's outliers, from numbers made up."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from trainer.outlier_plot import TITLES, plot_outliers
from trainer.outliers import SITES

SCALES = {site: number + 1.0 for number, site in enumerate(SITES)}


def line(step, growth):
    def view(factor):
        return {
            site: {"excess_kurtosis": [scale * factor, 3 * scale * factor], "absmax": [scale * factor, None]}
            for site, scale in SCALES.items()
        }

    return {"step": step, "in_context": view(growth), "single_tokens": view(10 * growth)}


@pytest.fixture
def log(tmp_path):
    file = tmp_path / "outliers.jsonl"
    file.write_text("".join(json.dumps(line(step, 1 + step)) + "\n" for step in (0, 50, 60)), "utf-8")
    return file


def test_every_site_has_its_curves(log, tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw))[1])
    plot_outliers(log, tmp_path / "outliers.png", "a run")
    (kurtosis, by_layer, _, absmax_by_layer) = figures[0].axes
    labels = [text.get_text() for text in kurtosis.get_legend().get_texts()]
    assert labels == list(TITLES.values())
    assert list(TITLES) == list(SITES)
    context, alone = kurtosis.lines[::2], kurtosis.lines[1::2]
    for site, one, other in zip(SITES, context, alone, strict=True):
        np.testing.assert_allclose(one.get_xydata(), [[s, 2 * SCALES[site] * (1 + s)] for s in (0, 50, 60)])
        np.testing.assert_allclose(other.get_ydata(), 10 * one.get_ydata())
    np.testing.assert_allclose(by_layer.lines[0].get_xydata(), [[0, 61], [1, 183]])
    assert np.isnan(absmax_by_layer.lines[0].get_ydata()).tolist() == [False, True]
    assert figures[0].get_suptitle().startswith("a run")


def test_the_picture_shows_the_numbers_and_is_small(log, tmp_path):
    plot_outliers(log, tmp_path / "one.png", "a run")
    log.write_text(log.read_text("utf-8").replace("60", "70"), "utf-8")
    plot_outliers(log, tmp_path / "other.png", "a run")
    one, other = imread(tmp_path / "one.png"), imread(tmp_path / "other.png")
    assert one.shape == other.shape
    assert not np.array_equal(one, other)
    assert (tmp_path / "one.png").stat().st_size < 150_000


def test_a_run_without_any_step_can_be_drawn(tmp_path):
    (tmp_path / "outliers.jsonl").write_text(json.dumps(line(0, 1.0)) + "\n", "utf-8")
    plot_outliers(tmp_path / "outliers.jsonl", tmp_path / "outliers.png", "one evaluation")
    assert (tmp_path / "outliers.png").exists()

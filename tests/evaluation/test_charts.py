"""Charts: what is drawn is what was given, files appear whole, and a missing matplotlib is named with its cure."""

import math
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from diffiqa.errors import BackendError, OutputError
from diffiqa.evaluation.charts import COLOURS, add_legend, panels, require_matplotlib, save
from diffiqa.evaluation.scatter import draw_scatter


def test_a_scatter_plot_shows_points_and_the_fitted_curve() -> None:
    scores = tuple(k / 50 for k in range(50))
    labels = tuple(1 / (1 + math.exp(4 - 8 * score)) for score in scores)
    (axes,) = draw_scatter("set", scores, labels).axes
    (dots,) = axes.collections
    assert np.asarray(dots.get_offsets()).tolist() == [list(place) for place in zip(scores, labels, strict=True)]
    (line,) = axes.lines
    x, y = np.asarray(line.get_data()).tolist()
    assert y == pytest.approx([1 / (1 + math.exp(4 - 8 * score)) for score in x], abs=1e-6)
    assert axes.get_xlim()[0] < min(scores) < max(scores) < axes.get_xlim()[1] < 1.2
    assert axes.get_ylim()[0] < min(labels) < max(labels) < axes.get_ylim()[1] < 1.2
    assert "50 images, SRCC 1.000" in axes.get_title(loc="right")


@pytest.mark.parametrize("labels", [(1.0,) * 50, (1.0, 2.0, 3.0)], ids=["flat", "few"])
def test_a_scatter_plot_without_a_curve_is_drawn_all_the_same(labels: tuple[float, ...]) -> None:
    (axes,) = draw_scatter("set", tuple(map(float, range(len(labels)))), labels).axes
    assert not axes.lines
    assert len(np.asarray(axes.collections[0].get_offsets())) == len(labels)


def test_a_figure_has_its_panels_in_rows_and_is_written_as_png(tmp_path: Path) -> None:
    figure, axes = panels(["one", "two", "three"])
    axes[2].plot([0, 1], [0, 1], color=COLOURS[1], linewidth=3)
    add_legend(figure, ["a run"])
    save(figure, tmp_path / "chart.png")
    with PIL.Image.open(tmp_path / "chart.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (1280, 800)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    assert (0xD5, 0x5E, 0x00) in colours
    with pytest.raises(OutputError, match="cannot write"):
        save(figure, tmp_path / "none" / "chart.png")
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]


def test_a_missing_matplotlib_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendError, match=r"pip install 'diffiqa\[train\]'"):
        require_matplotlib()

"""Plots: axes end at round ticks around the values, pictures show what they are given, foreign folders are refused."""

import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from diffiqa.data.datasets import DatasetError
from diffiqa.training.cli import train
from diffiqa.training.plot import COLOURS, Points, draw_runs, draw_scatter, make_axis, tick_text


def write_run(folder: Path, *, steps: int = 20, validation: str = "") -> Path:
    folder.mkdir(parents=True)
    rows = [f"{step},{1 / step},{1e-3 * step},0.5\n" for step in range(1, steps + 1)]
    (folder / "log.csv").write_text("step,loss,learning_rate,seconds\n" + "".join(rows))
    if validation:
        (folder / "validation.csv").write_text(validation)
    return folder


def count(image: PIL.Image.Image, colour: tuple[int, int, int]) -> int:
    """Return how many pixels have about a colour."""
    difference = np.abs(np.asarray(image, np.int64) - colour).max(axis=-1)
    return int((difference < 12).sum())


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_an_axis_has_a_handful_of_ticks_around_all_values(seed: int, logarithmic: bool) -> None:
    draw = np.random.default_rng(seed)
    values = (draw.lognormal(0, 3, 10) * 10.0 ** draw.integers(-6, 6)).tolist()
    axis = make_axis(values, logarithmic=logarithmic)
    assert axis.low <= min(values) * (1 + 1e-6)
    assert axis.high >= max(values) * (1 - 1e-6)
    assert 2 <= len(axis.ticks) <= 14
    assert len({tick_text(tick, axis.ticks) for tick in axis.ticks}) == len(axis.ticks) or logarithmic
    assert [axis.place(axis.low), axis.place(axis.high)] == pytest.approx([0, 1])


@pytest.mark.parametrize("value", [0.0, 0.3, -5.0, 1e-12, 1e12])
def test_an_axis_of_a_single_value_has_it_inside(value: float) -> None:
    axis = make_axis([value, value])
    assert axis.low < value < axis.high


def test_a_logarithmic_axis_halves_at_the_geometric_mean() -> None:
    axis = make_axis([0.01, 1], logarithmic=True)
    assert axis.place(0.1) == pytest.approx(0.5)
    assert axis.ticks == pytest.approx((0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1))


def test_ticks_have_the_digits_that_their_neighbours_need() -> None:
    assert [tick_text(tick, (0, 0.25, 0.5)) for tick in (0, 0.25, 0.5)] == ["0", "0.25", "0.50"]
    assert tick_text(12000, (0, 12000)) == "12,000"
    assert tick_text(2e-4, (1e-4, 2e-4)) == "2e-4"


def test_every_run_has_its_line(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", steps=9)]
    both = draw_runs(runs)
    for colour in COLOURS[:2]:
        assert count(both, colour) > 200
    assert count(draw_runs(runs[:1]), COLOURS[1]) == 0


def test_every_column_of_validation_has_a_panel(tmp_path: Path) -> None:
    without = draw_runs([write_run(tmp_path / "without")])
    rows = "step,srcc,plcc,rmse\n10,nan,nan,0.5\n20,0.5,0.6,0.25\n"
    image = draw_runs([write_run(tmp_path / "with", validation=rows)])
    assert image.height > 2 * without.height  # three rows of two panels, for five
    assert image.width == without.width


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds no run that has logged a step"):
        draw_runs([tmp_path])
    (tmp_path / "log.csv").write_text("step,loss\n1,much\n")
    with pytest.raises(DatasetError, match="without a number in step or loss"):
        draw_runs([tmp_path])


def test_the_command_writes_a_png(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    result = CliRunner().invoke(train, ["plot", str(run), "-o", str(tmp_path / "out.png")])
    assert result.exit_code == 0, result.stderr
    with PIL.Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG"
    wrong = CliRunner().invoke(train, ["plot", str(run), "-o", str(tmp_path / "out.pdf")])
    assert wrong.exit_code == 2
    assert "out.pdf.png" in wrong.stderr


def test_a_scatter_plot_shows_points_and_the_fitted_curve() -> None:
    scores = tuple(k / 50 for k in range(50))
    labels = tuple(1 / (1 + math.exp(4 - 8 * score)) for score in scores)
    image = draw_scatter(Points("set", scores, labels))
    assert count(image, COLOURS[1]) > 300
    flat = draw_scatter(Points("set", scores, (1.0,) * 50))  # nothing to fit, and no reason to fail
    assert count(flat, COLOURS[1]) == 0

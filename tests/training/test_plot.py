"""Curves of runs: every run has its line in its colour, every quantity its panel, foreign folders are refused."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from diffiqa.errors import DatasetError
from diffiqa.evaluation.charts import COLOURS
from diffiqa.training.cli import train
from diffiqa.training.plot import draw_runs


def write_run(folder: Path, *, steps: int = 20, validation: str = "") -> Path:
    folder.mkdir(parents=True)
    rows = [f"{step},{1 / step},{1e-3 * step},0.5\n" for step in range(1, steps + 1)]
    (folder / "log.csv").write_text("step,loss,learning_rate,seconds\n" + "".join(rows))
    if validation:
        (folder / "validation.csv").write_text(validation)
    return folder


def test_every_run_has_its_line(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", steps=9)]
    figure = draw_runs(runs)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a/run", "b/run"]
    loss, rate = figure.axes
    assert [line.get_color() for line in loss.lines] == list(COLOURS[:2])
    assert [np.asarray(line.get_xdata()).tolist() for line in loss.lines] == [[*range(1, 21)], [*range(1, 10)]]
    assert np.asarray(loss.lines[1].get_ydata()).tolist() == [1 / step for step in range(1, 10)]
    assert np.asarray(rate.lines[0].get_ydata()).tolist() == [1e-3 * step for step in range(1, 21)]
    assert (loss.get_yscale(), rate.get_yscale()) == ("log", "linear")  # the loss falls to a twentieth
    assert not draw_runs(runs[:1]).legends


def test_every_column_of_validation_has_a_panel_and_a_run_keeps_its_colour(tmp_path: Path) -> None:
    rows = "step,srcc,plcc,rmse\n10,nan,nan,0.5\n20,0.5,0.6,0.25\n"
    runs = [write_run(tmp_path / "without"), write_run(tmp_path / "with", validation=rows)]
    figure = draw_runs(runs)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["loss", "learning rate", "validation: srcc", "validation: plcc", "validation: rmse"]
    (line,) = figure.axes[2].lines
    assert (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) == (
        [20],
        [0.5],
    )  # NaN is left out
    assert line.get_color() == COLOURS[1]


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

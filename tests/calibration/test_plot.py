"""The picture of ranges over steps: what is drawn is what was recorded, and tensors that move are named."""

import dataclasses
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from diffiqa.calibration.cli import calibrate
from diffiqa.calibration.plot import NAMED, SMALLEST, draw_ranges, magnitudes
from diffiqa.calibration.statistics import StageStatistics, Statistics
from diffiqa.engine.manifest import StageName
from diffiqa.errors import UsageError
from diffiqa.evaluation.charts import COLOURS


def test_percentile_and_maximum_are_those_of_the_values() -> None:
    generator = np.random.default_rng(4)
    stage = StageStatistics.empty(("a",), 3)
    values = [generator.standard_normal(20000).astype(np.float32) * scale for scale in (1, 10)]
    for step, value in enumerate(values):
        stage.observe(0, step, value)
    high, largest = magnitudes(stage)
    for step, value in enumerate(values):
        assert high[0, step] == pytest.approx(np.quantile(np.abs(value), 0.999), rel=0.04)  # bins: 32 to an octave
        assert largest[0, step] == np.abs(value).max()
    assert high[0, 2] == largest[0, 2] == 0  # never run


def test_every_tensor_has_a_line_as_the_loop_runs_and_those_that_move_are_named(tiny_statistics: Statistics) -> None:
    stage = tiny_statistics.stages[StageName.UNET]
    figure = draw_ranges(tiny_statistics)
    for axes, values in zip(figure.axes, magnitudes(stage), strict=True):
        drawn = sorted(tuple(np.asarray(line.get_ydata())) for line in axes.lines)
        assert drawn == sorted(tuple(np.maximum(row, SMALLEST)) for row in values)
        assert axes.get_xlim() == (5, 0)
    names = [text.get_text().rpartition(": ")[0] for text in figure.legends[0].get_texts()]
    assert 1 <= len(names) <= NAMED
    assert set(names) <= set(stage.tensors)
    on_top = {line.get_color() for line in figure.axes[0].lines[-len(names) :]}
    assert on_top == set(COLOURS[: len(names)])


def test_statistics_without_images_or_u_net_are_refused(tiny_statistics: Statistics) -> None:
    empty = StageStatistics.empty(("a",), 6)
    with pytest.raises(UsageError, match="hold no images"):
        draw_ranges(dataclasses.replace(tiny_statistics, stages={StageName.UNET: empty}))
    with pytest.raises(UsageError, match="without a U-Net"):
        draw_ranges(dataclasses.replace(tiny_statistics, stages={}))


def test_a_picture_without_a_folder_is_refused_before_anything_is_run(tiny_engine: Path, tmp_path: Path) -> None:
    arguments = ["--engine", str(tiny_engine), "--calib", "x", "-o", str(tmp_path / "stats")]
    result = CliRunner().invoke(calibrate, [*arguments, "--plot", str(tmp_path / "none" / "ranges.png")])
    assert result.exit_code == 2
    assert "there is no folder" in result.output
    assert not (tmp_path / "stats").exists()


def test_the_command_draws_what_it_recorded(tiny_engine: Path, calibration_images: list[Path], tmp_path: Path) -> None:
    another = tmp_path / "four.png"  # a calibration by the command takes four images
    PIL.Image.open(calibration_images[0]).rotate(180).save(another)
    images = [argument for path in (*calibration_images, another) for argument in ("--calib", str(path))]
    arguments = ["--engine", str(tiny_engine), *images, "-o", str(tmp_path / "stats")]
    result = CliRunner().invoke(calibrate, [*arguments, "--plot", str(tmp_path / "ranges.png")])
    assert result.exit_code == 0, result.output
    with PIL.Image.open(tmp_path / "ranges.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 100

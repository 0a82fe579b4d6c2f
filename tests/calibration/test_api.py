"""Calibrate and quantise as a notebook calls them."""

import shutil
from pathlib import Path

import pytest

from diffiqa.calibration.api import calibrate, quantise
from diffiqa.calibration.statistics import read
from diffiqa.engine.manifest import open_engine
from diffiqa.errors import UsageError

from ..tiny import STAGES


def test_statistics_lie_in_the_engine_and_are_found_there(
    tiny_engine: Path, calibration_images: list[Path], calibration_folder: Path, tmp_path: Path
) -> None:
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    shutil.copytree(calibration_folder, engine / "calibration")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    heard: list[str] = []
    images = [*calibration_images, calibration_images[0].parent]
    shutil.copy(calibration_images[0], tmp_path / "same.png")
    with pytest.raises(UsageError, match="at least 4 different images, 3 can be used; 1 could not be read"):
        calibrate(str(engine), [*images, tmp_path / "broken.png", tmp_path / "same.png"], say=heard.append)
    assert heard == []
    done = quantise(str(engine), str(tmp_path / "int8"), say=heard.append)
    assert done.manifest == open_engine(tmp_path / "int8").manifest
    assert done.manifest.provenance.sources[-1].format.endswith(read(calibration_folder).digest)
    assert [made.stage.name for made in done.stages] == list(STAGES)
    assert heard[:2] == ["unet: quantising to int8", "unet: comparing with float32"]

"""Pictures to calibrate with, and the statistics of the tiny engine on them, collected once per session."""

from pathlib import Path

import PIL.Image
import pytest

from diffiqa.calibration.statistics import Statistics, collect, read
from diffiqa.runtime.images import synthetic


@pytest.fixture(scope="session")
def calibration_images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    # Of the kind that 8-bit stages are checked on: ranges of other pictures would clip those by a fifth.
    paths = [folder / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        PIL.Image.fromarray(synthetic(seed, 32, 48)).save(path)
    return paths


@pytest.fixture(scope="session")
def calibration_folder(
    tiny_engine: Path, calibration_images: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    collect(tiny_engine, calibration_images, folder, minimum=3)
    return folder


@pytest.fixture(scope="session")
def tiny_statistics(calibration_folder: Path) -> Statistics:
    return read(calibration_folder)

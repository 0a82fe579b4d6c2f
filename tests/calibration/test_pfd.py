"""PFD-IQA in 8 bits and in fewer steps: an engine that restores no images is calibrated like any other."""

import json
import shutil
from pathlib import Path

import PIL.Image
import pytest
from click.testing import CliRunner

from diffiqa.calibration.cli import quantise
from diffiqa.calibration.steps import LEAST_IMAGES, find_steps
from diffiqa.engine.manifest import StageName, open_engine
from diffiqa.runtime.results import Options
from diffiqa.runtime.scorer import load

from ..tiny import photo


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{seed}.png" for seed in range(LEAST_IMAGES)]
    for seed, path in enumerate(paths):
        PIL.Image.fromarray(photo(seed, 70, 80)).save(path)
    return paths


def test_stages_are_tried_in_8_bits_and_the_denoisers_state_is_no_image(
    pfd_engine: Path, images: list[Path], tmp_path: Path
) -> None:
    engine, eight = tmp_path / "engine", tmp_path / "eight"
    shutil.copytree(pfd_engine, engine)
    given = ["--engine", engine, "--calib", tmp_path / "[0-3].png", "--precision", "mixed", "--drift", 9, "-o", eight]
    result = CliRunner().invoke(quantise, [*map(str, given)])
    assert result.exit_code == 0, result.stderr
    tried = [line.partition(":")[0] for line in result.stderr.splitlines() if "the score changes by" in line]
    stages = {stage.name: stage for stage in open_engine(engine).manifest.stages}
    work = {name: stage.macs * (5 if name is StageName.DENOISER else 1) for name, stage in stages.items()}
    assert tried == sorted(work, key=lambda name: -work[name])
    report = json.loads((eight / "calibration" / "quantisation.json").read_text())
    kept = {stage["name"]: [entry["why"].partition(":")[0] for entry in stage["float32"]] for stage in report["stages"]}
    assert kept["encoder"][0] == "first convolution"
    assert kept["denoiser"] == ["last layer"]
    with load(engine) as exact, load(eight) as rounded:
        assert 0 < abs(exact.score(images[4]).score - rounded.score(images[4]).score) < 1


def test_fewer_steps_are_fitted(pfd_engine: Path, images: list[Path], tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(pfd_engine, engine)
    assert find_steps(engine, images, (2,)).fast
    with load(engine) as scorer:
        assert scorer.score(images[0], Options(fast=True)).score != scorer.score(images[0]).score

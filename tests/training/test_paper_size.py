"""Two steps of full-size training: the code that nobody has the machines to run for long."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from diffiqa.data.pictures import Pictures
from diffiqa.model.config import preset
from diffiqa.model.network import build
from diffiqa.tests.tiny import photo
from diffiqa.training.config import Optimisation, RestoreConfig, ScoreConfig
from diffiqa.training.loop import train
from diffiqa.training.restore import RestoreTask
from diffiqa.training.score import Restorations, ScoreTask

from .runs import CPU, write_photos

PAPER = preset("paper")
PLAN = Optimisation(steps=2, batch=2, learning_rate=1e-5)
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes each, and looked at elsewhere."""
    monkeypatch.setattr("diffiqa.training.loop.save_checkpoint", lambda *_: None)


def test_two_steps_of_the_full_unet(tmp_path: Path) -> None:
    config = RestoreConfig(model=PAPER, seed=1, optimisation=PLAN, crop=64)
    photos = Pictures(write_photos(tmp_path / "photos", count=2, side=96), tmp_path / "cache", min_side=64)
    task = RestoreTask(config, build(PAPER, 1), photos)
    before = {name: value.clone() for name, value in task.network.named_parameters()}
    train(task, config, tmp_path / "run", CPU)
    losses = [float(row.split(",")[1]) for row in (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]]
    assert np.isfinite(losses).all()
    assert all(not torch.equal(before[name], value) for name, value in task.network.named_parameters())


def test_two_steps_of_the_full_heads(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, batch=1)
    config = ScoreConfig(model=PAPER, seed=1, optimisation=plan, validation_crops=1)
    network = build(PAPER, 1)
    paths = write_photos(tmp_path / "photos", count=2, side=224)
    pictures = Pictures(paths, tmp_path / "cache", min_side=224)
    restorations = Restorations(network, 0, tmp_path / "restored")
    restorations.file(pictures, 0).parent.mkdir()
    for index in range(2):  # 50 steps of the full U-Net take minutes: noise in their place
        made_up = photo(index, *pictures[index].shape[:2]).transpose(2, 0, 1) / 127.5 - 1
        np.save(restorations.file(pictures, index), np.stack([made_up] * 3).astype(np.float16))
    network.unet = None
    task = ScoreTask(config, network, restorations, (pictures, [0.0, 1.0]), (pictures, [0.0, 1.0]))
    before = {name: value.clone() for name, value in task.network.named_parameters()}
    train(task, config, tmp_path / "run", CPU)
    losses = [float(row.split(",")[1]) for row in (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]]
    assert np.isfinite(losses).all()
    moved = [name for name, value in task.network.named_parameters() if not torch.equal(before[name], value)]
    assert len(moved) > 0.9 * len(before)

"""Small training runs for the tests; `python -m diffiqa.tests.training.runs FOLDER PHOTOS` is one to be killed."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffiqa.data.pictures import Pictures
from diffiqa.model.config import Norm, UNetConfig
from diffiqa.tests.tiny import TINY, photo
from diffiqa.training.config import Optimisation, Reporting, RestoreConfig
from diffiqa.training.loop import Conduct, Machine, Result, train
from diffiqa.training.restore import RestoreTask
from diffiqa.training.start import begin

CPU = Machine(torch.device("cpu"))
UNET = UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention_levels=(1,), dropout=0.2)
MODEL = dataclasses.replace(TINY, unet=UNET)
# Without statistics over the batch, and without dropout: several processes must do what one does.
SEPARABLE = dataclasses.replace(TINY, unet=dataclasses.replace(UNET, norm=Norm.GROUP, groups=4, dropout=0.0))


def restore_config(**changes: Any) -> RestoreConfig:
    """Return a configuration for a few quick steps."""
    base = RestoreConfig(
        model=MODEL,
        seed=3,
        optimisation=Optimisation(steps=12, batch=2, learning_rate=1e-3, warmup_steps=2, ema_decay=0.9),
        crop=16,
        margin=4,
        reporting=Reporting(log_every=1, checkpoint_every=3),
    )
    return dataclasses.replace(base, **changes)


def separable_config() -> RestoreConfig:
    """Return a configuration that any number of processes can share."""
    return restore_config(
        model=SEPARABLE,
        optimisation=Optimisation(steps=3, batch=4, learning_rate=1e-4, ema_decay=0.9),
    )


def write_photos(folder: Path, count: int = 3, side: int = 40) -> list[Path]:
    """Write small pictures and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in range(count):
        path = folder / f"photo{seed}.png"
        Image.fromarray(photo(seed, side, side + 8)).save(path)
        paths.append(path)
    return paths


def task_of(config: RestoreConfig, photos: list[Path], cache: Path) -> RestoreTask:
    """Return the task of a configuration."""
    pictures = Pictures(photos, cache, min_side=config.crop, longest_side=config.longest_side)
    return RestoreTask(config, begin(config.model, config.seed, {}).model, pictures)


def run(config: RestoreConfig, photos: list[Path], folder: Path, *, resume: bool = False, pause: float = 0) -> Result:
    """Run a configuration on the CPU; `pause` seconds after each row of the log leave time to be killed."""
    task = task_of(config, photos, folder / "cache")
    return train(task, config, folder, CPU, Conduct(resume=resume, progress=lambda *_: time.sleep(pause)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(restore_config(), sorted(Path(sys.argv[2]).iterdir()), Path(sys.argv[1]), pause=0.1)

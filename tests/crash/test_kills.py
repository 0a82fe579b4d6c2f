"""A few of the kills that figures/kills.py makes a hundred of."""

from pathlib import Path

from PIL import Image

from ..tiny import photo
from .kills import kill_exports, kill_runs


def test_runs(tiny_engine: Path, tmp_path: Path) -> None:
    images = []
    for seed in range(6):
        images.append(str(tmp_path / f"{seed}.png"))
        Image.fromarray(photo(seed, 32, 32)).save(images[-1])
    found = kill_runs(tiny_engine, images, tmp_path, times=3)
    assert found
    assert found.kills >= 3
    assert found.reported >= len(images)


def test_exports(tiny_engine: Path, tmp_path: Path) -> None:
    found = kill_exports(tiny_engine, tmp_path, times=3)
    assert found
    assert found.kills >= 3

"""The images a benchmark scores: those given, by size, or seeded ones."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from ..errors import ImageError, UsageError
from ..runtime.images import read_image, synthetic

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Images:
    """Files of images by the size that is scored, and why others were left out."""

    by_size: dict[Size, list[Path]]
    left_out: tuple[str, ...]


def generate(folder: Path, sizes: Sequence[Size], count: int, seed: int) -> Images:
    """Write `count` pictures of every size as PNG; the same seed gives the same pictures."""
    by_size: dict[Size, list[Path]] = {}
    for height, width in sizes:
        names = [folder / f"{width}x{height}-{index}.png" for index in range(count)]
        for index, name in enumerate(names):
            PIL.Image.fromarray(synthetic((seed, height, width, index), height, width)).save(name)
        by_size[height, width] = names
    return Images(by_size, ())


def sort_by_size(paths: Sequence[Path], min_side: int) -> Images:
    """Read every image once. Raises UsageError if none can be read."""
    by_size: defaultdict[Size, list[Path]] = defaultdict(list)
    left_out = []
    for path in paths:
        try:
            height, width = read_image(path, min_side=min_side).pixels.shape[:2]
            by_size[height, width].append(path)
        except ImageError as exc:
            left_out.append(str(exc))
    if not by_size:
        raise UsageError(f"no image can be measured: {left_out[0] if left_out else 'none was given'}")
    return Images(dict(by_size), tuple(left_out))

"""What a case scores: images of one size, and how."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from ..engine.manifest import Manifest
from ..errors import ImageError, UsageError
from ..runtime.images import read_for, synthetic
from ..runtime.results import Options

Size = tuple[int, int]  # height, width

# Batches, or images alone, in a row in an end-to-end sample on a GPU: one is decoded while another is computed, and the
# first, which nothing hides, weighs little.
_GROUPS = 4


@dataclass(frozen=True)
class Workload:
    """Images of one size, and how they are scored."""

    images: tuple[Path, ...]
    height: int
    width: int
    options: Options  # of every score
    workers: int = 1
    batch: int = 1  # images that are restored together, on a GPU


@dataclass(frozen=True)
class Images:
    """Image files by the size at which they are scored, and why others are left out."""

    by_size: dict[Size, list[Path]]
    left_out: tuple[str, ...] = ()


def generate(folder: Path, sizes: Sequence[Size], count: int, seed: int) -> Images:
    """Write `count` pictures of every size as PNG; the same seed gives the same pictures."""
    by_size: dict[Size, list[Path]] = {}
    for height, width in sizes:
        names = [folder / f"{width}x{height}-{index}.png" for index in range(count)]
        for index, name in enumerate(names):
            PIL.Image.fromarray(synthetic((seed, height, width, index), height, width)).save(name)
        by_size[height, width] = names
    return Images(by_size)


def sort_by_size(paths: Sequence[Path], manifest: Manifest) -> Images:
    """Read every image once. Raises UsageError if none can be read."""
    by_size: defaultdict[Size, list[Path]] = defaultdict(list)
    left_out = []
    for path in paths:
        try:
            height, width = read_for(path, manifest).size
            by_size[height, width].append(path)
        except ImageError as exc:
            left_out.append(str(exc))
    if not by_size:
        raise UsageError(f"no image can be measured: {left_out[0] if left_out else 'none was given'}")
    return Images(dict(by_size), tuple(left_out))


def in_batches(paths: Sequence[Path], batch: int) -> tuple[Path, ...]:
    """Return the images, repeated until they fill whole batches, and enough of them for a sample on a GPU."""
    batches = max(_GROUPS, -(-len(paths) // batch))
    return tuple(itertools.islice(itertools.cycle(paths), batches * batch))

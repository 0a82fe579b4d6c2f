"""Where an image is looked at: square crops on an even grid that reaches every border, or drawn from the seed."""

import enum
from dataclasses import dataclass

import numpy as np

from .noise import philox4x32, split_seed


class CropPlaces(enum.StrEnum):
    """Where crops lie."""

    GRID = "grid"  # spread evenly, the same in every run
    RANDOM = "random"  # drawn from the seed


@dataclass(frozen=True)
class Crop:
    """The top-left corner of a square crop, in pixels."""

    top: int
    left: int


def place_crops(places: CropPlaces, height: int, width: int, size: int, count: int, seed: int = 0) -> tuple[Crop, ...]:
    """Return `count` crops of `size`×`size` at such places of an image; fewer if it has no room for so many."""
    if places is CropPlaces.GRID or (height, width) == (size, size):
        return crop_grid(height, width, size, count)
    return _drawn(height, width, size, count, seed)


def _drawn(height: int, width: int, size: int, count: int, seed: int) -> tuple[Crop, ...]:
    """Draw a place for each crop, all places alike. Two crops may get the same place, as in MANIQA's program.

    Crop k takes its row and column from the first two words w of Philox's block `counter = (k, 0, 0, 1)`: place
    w · places / 2³², rounded down. The blocks of `noise.py` end in 0, so crops and noise share none.
    """
    if min(height, width) < size or count < 1:
        raise ValueError(f"no {count} crops of {size}×{size} in an image of {width}×{height}")
    words = philox4x32((np.arange(count, dtype=np.uint64), 0, 0, 1), split_seed(seed))
    tops, lefts = (
        (word * np.uint64(length - size + 1) >> np.uint64(32)).tolist()
        for word, length in zip(words[:2], (height, width), strict=True)
    )
    return tuple(map(Crop, tops, lefts))


def crop_grid(height: int, width: int, size: int, count: int) -> tuple[Crop, ...]:
    """Return `count` crops of `size`×`size`, spread evenly over an image; fewer if the image has no room for so many.

    Rows of crops run from border to border. Two or three crops lie on the diagonal, which touches all four borders;
    one lies in the middle.
    """
    if min(height, width) < size or count < 1:
        raise ValueError(f"no {count} crops of {size}×{size} in an image of {width}×{height}")
    free = height - size, width - size
    if count < 4 or 0 in free:
        steps = max(1, min(count, max(free) + 1))
        spots = list(zip(_spread(free[0], steps), _spread(free[1], steps), strict=True))
    else:
        rows = min(max(round((count * height / width) ** 0.5), 2), count // 2)
        per_row = [(i + 1) * count // rows - i * count // rows for i in range(rows)]
        spots = [
            (top, left)
            for top, columns in zip(_spread(free[0], rows), per_row, strict=True)
            for left in _spread(free[1], columns)
        ]
    return tuple(Crop(top, left) for top, left in dict.fromkeys(spots))


def _spread(free: int, count: int) -> list[int]:
    """Return `count` offsets from 0 to `free`, evenly; the middle when there is only one."""
    if count == 1:
        return [free // 2]
    return [(2 * i * free + count - 1) // (2 * (count - 1)) for i in range(count)]


def padded_size(height: int, width: int, alignment: int) -> tuple[int, int]:
    """Return the smallest multiples of `alignment` that hold an image."""
    return -(-height // alignment) * alignment, -(-width // alignment) * alignment

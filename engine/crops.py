"""Where an image is looked at: an even, deterministic grid of square crops that reaches every border."""

import enum
from dataclasses import dataclass


class CropPlaces(enum.StrEnum):
    """Where crops lie."""

    GRID = "grid"  # spread evenly, the same in every run
    RANDOM = "random"  # drawn from the seed


@dataclass(frozen=True)
class Crop:
    """The top-left corner of a square crop, in pixels."""

    top: int
    left: int


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

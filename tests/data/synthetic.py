"""Pictures of waves, edges and a fixed pseudo-random pattern: the same on every machine, whatever its libraries."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.float32]


def picture(height: int, width: int) -> Picture:
    """Return colour waves with a box and a disc in them, as 8-bit values over 255."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    red = 0.5 + 0.3 * np.sin(x / 7 + 0.3 * np.sin(y / 19)) + 0.2 * np.cos(y / 3.1)
    green = 0.5 + 0.4 * np.sin((x + 2 * y) / 29) * np.cos(x / 2.3)
    blue = 0.45 + 0.35 * np.cos((2 * x - y) / 41)
    planes = np.stack([red, green, blue], axis=-1)
    planes[height // 4 : height // 2, width // 5 : width // 3] *= 0.35
    planes[(y - 0.7 * height) ** 2 + (x - 0.6 * width) ** 2 < (0.15 * min(height, width)) ** 2] += 0.3
    return _eight_bit(planes)


def noise(shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return uniform values in [-0.5, 0.5) of a multiplicative hash."""
    index = np.arange(np.prod(shape), dtype=np.uint32)
    index = (index ^ (index >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    index = (index ^ (index >> np.uint32(12))) * np.uint32(0x297A2D39)
    return ((index ^ (index >> np.uint32(15))) / 2**32 - 0.5).reshape(shape)


def _eight_bit(planes: npt.NDArray[Any]) -> Picture:
    rounded: Picture = (np.round(255 * np.clip(planes, 0, 1)) / 255).astype(np.float32)
    return rounded


DISTORTIONS: dict[str, Callable[[Picture], Picture]] = {
    "equal": lambda p: p,
    "weak noise": lambda p: _eight_bit(p + 0.05 * noise(p.shape)),
    "strong noise": lambda p: _eight_bit(p + 0.6 * noise(p.shape)),
    "blur": lambda p: _eight_bit(
        np.mean([np.roll(p.astype(np.float64), s, axis=(0, 1)) for s in range(-3, 4)], axis=0)
    ),
    "contrast": lambda p: _eight_bit(0.5 + 0.4 * (p - 0.5)),
    "grey": lambda p: _eight_bit(np.repeat(p.mean(axis=-1, keepdims=True), 3, axis=-1)),
    "negative": lambda p: _eight_bit(1 - p),
    "black": np.zeros_like,
}
SIZES = {"square": (256, 256), "wide": (384, 512), "odd": (181, 263), "large": (656, 672)}

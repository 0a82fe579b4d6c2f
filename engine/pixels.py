"""From pixels to the networks' range and back, in NumPy."""

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

MID_GREY = 128  # fills pictures where nothing was restored


def to_plane(pixels: npt.NDArray[Any]) -> FloatArray:
    """Return (H, W, 3) pixels, uint8 or float in [0, 1], as a (3, H, W) float32 plane in [-1, 1]."""
    unit = np.empty((3, *pixels.shape[:2]), np.float32)
    unit[:] = pixels.transpose(2, 0, 1)
    if pixels.dtype == np.uint8:
        unit /= np.float32(255)
    unit -= np.float32(0.5)
    unit /= np.float32(0.5)
    return unit


def to_pixels(plane: FloatArray) -> npt.NDArray[np.uint8]:
    """Return a (3, H, W) plane in [-1, 1] as (H, W, 3) uint8; values outside are clipped."""
    pixels: npt.NDArray[np.uint8] = np.clip(np.rint((plane + 1) * 127.5), 0, 255).astype(np.uint8)
    return pixels.transpose(1, 2, 0)

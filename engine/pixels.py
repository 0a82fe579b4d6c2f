"""From pixels to the networks' range and back, in NumPy."""

import enum
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

MID_GREY = 128  # fills pictures where nothing was restored


class TapForm(enum.StrEnum):
    """How a restored image reaches the heads: what they were trained on."""

    FLOAT = "float"  # as the sampler leaves it
    CLAMPED = "clamped"  # to [-1, 1]
    PNG8 = "png8"  # saved as an 8-bit PNG, and read again


class Sides(enum.StrEnum):
    """How sides become multiples of what the U-Net needs."""

    PADDED = "padded"  # by reflection at the right and bottom; the padding is cut off again
    RESIZED = "resized"  # to the multiples below: all kinds of images then have this size


class ImageForm(enum.StrEnum):
    """What crops are cut from."""

    AS_IS = "as-is"  # the image
    SQUASHED = "squashed"  # the image, scaled to the size of one crop whatever its proportions


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

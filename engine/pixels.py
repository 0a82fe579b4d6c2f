"""From pixels to the networks' range and back, in NumPy."""

import enum
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Preparation:
    """The sizes of what the U-Net restores of an image, and of what the heads see of it."""

    sides: Sides
    image_form: ImageForm
    alignment: int
    crop: int

    def restored(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of what the U-Net restores, before padding."""
        if self.sides is Sides.PADDED:
            return height, width
        return height - height % self.alignment, width - width % self.alignment

    def seen(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of what crops are cut from."""
        squashed = self.image_form is ImageForm.SQUASHED
        return (self.crop, self.crop) if squashed else self.restored(height, width)


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


def as_tapped(planes: FloatArray, form: TapForm) -> FloatArray:
    """Give restored planes in [-1, 1] and beyond the form that the heads were trained on, in place; return them.

    `PNG8` gives the bits that come back from a file: SR3's programs clamp, scale to 0 … 255, round (halves to even),
    and the readers divide by 255 and take it to [-1, 1], as `to_plane` does. NaN stays NaN in every form.
    """
    if form is not TapForm.FLOAT:
        np.clip(planes, -1, 1, out=planes)
    if form is TapForm.PNG8:
        planes += np.float32(1)
        planes *= np.float32(127.5)  # the bits of / 2 * 255: halving is exact
        np.rint(planes, out=planes)
        planes /= np.float32(255)
        planes -= np.float32(0.5)
        planes /= np.float32(0.5)
    return planes


def bicubic(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Scale (H, W, 3) pixels to (height, width, 3) as the authors' and MANIQA's readers do: OpenCV's bicubic filter.

    It looks at 4×4 pixels however large the image is: unlike Pillow's it does not smooth what it reduces. Weights are
    multiples of 1/2048, and sums are whole numbers.
    """
    sums: npt.NDArray[Any] = pixels
    for axis, size in ((1, width), (0, height)):
        places, weights = _cubic(pixels.shape[axis], size)
        column = (-1, 1, 1) if axis == 0 else (-1, 1)
        sums = sum(
            np.take(sums, place, axis).astype(np.int64) * weight.reshape(column)
            for place, weight in zip(places, weights, strict=True)
        )
    small: npt.NDArray[np.uint8] = np.clip((sums + 2**21) >> 22, 0, 255).astype(np.uint8)
    return small


def squash_planes(planes: FloatArray, size: int) -> FloatArray:
    """Scale planes (N, 3, H, W) in [-1, 1], as files of 8 bits hold them, to (N, 3, size, size)."""
    return np.stack([to_plane(bicubic(to_pixels(plane), size, size)) for plane in planes])


def _cubic(length: int, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (4, size) places and weights ×2048 of Keys' kernel with a = -3/4; places beyond the ends are the ends."""
    centre = ((np.arange(size) + 0.5) * (length / size) - 0.5).astype(np.float32)
    first = np.floor(centre)
    x = centre - first
    a, one = np.float32(-0.75), np.float32(1)
    near = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (x, one - x)]
    far = ((a * (x + 1) - 5 * a) * (x + 1) + 8 * a) * (x + 1) - 4 * a
    weights = np.stack([far, *near, 1 - far - near[0] - near[1]])
    places = np.clip(first.astype(np.int64) + np.arange(-1, 3)[:, None], 0, length - 1)
    return places, np.rint(weights * 2048).astype(np.int64)

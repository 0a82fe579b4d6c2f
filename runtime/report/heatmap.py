"""Maps of numbers as pictures: block means, a colour table that survives colour blindness, palette PNGs.

A map is stored as indices into its own range, and only the palette decides how that range is coloured: the same
indices serve a scale of the map's own and one shared by many maps, and the numbers can be read back from the picture.
"""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

FloatMap = npt.NDArray[np.float32]
LEVELS = 255  # indices 0 … 254 run over a map's range
NOTHING = 255  # the index of a place without a number; transparent


@dataclass(frozen=True)
class Heatmap:
    """A map as indices: index i stands for low + (high − low) · i / 254, `NOTHING` for no number."""

    index: npt.NDArray[np.uint8]  # (H, W)
    low: float
    high: float


def block_mean(values: FloatMap, side: int) -> FloatMap:
    """Return the mean of every side×side block, NaN where a block holds no number; blocks may overhang the edge."""
    height, width = values.shape
    padded = np.pad(values, ((0, -height % side), (0, -width % side)), constant_values=np.nan)
    blocks = padded.reshape(padded.shape[0] // side, side, padded.shape[1] // side, side)
    known = np.isfinite(blocks)
    count = known.sum(axis=(1, 3))
    total = np.where(known, blocks, 0).sum(axis=(1, 3), dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def to_heatmap(values: FloatMap) -> Heatmap:
    """Spread the range of a map over the indices. A map without numbers, or of one number, has an empty range."""
    known = np.isfinite(values)
    low, high = (float(values[known].min()), float(values[known].max())) if known.any() else (0.0, 0.0)
    unit = (np.where(known, values, low) - low) / ((high - low) or 1.0)
    index = np.rint(unit * (LEVELS - 1)).astype(np.uint8)
    index[~known] = NOTHING
    return Heatmap(index, low, high)


def palette(heatmap: Heatmap, low: float, high: float) -> npt.NDArray[np.uint8]:
    """Return the (255, 3) colours of a map's indices when the colour table runs from `low` to `high`."""
    values = heatmap.low + (heatmap.high - heatmap.low) * np.arange(LEVELS) / (LEVELS - 1)
    unit = (values - low) / ((high - low) or 1.0)
    return COLOURS[np.rint(np.clip(unit, 0, 1) * (LEVELS - 1)).astype(np.intp)]


def to_png(heatmap: Heatmap, colours: npt.NDArray[np.uint8], about: dict[str, str] | None = None) -> bytes:
    """Return a palette PNG; the palette has 256 entries and follows the header directly, so that it can be replaced."""
    image = Image.fromarray(heatmap.index)
    image.putpalette(np.concatenate([colours, np.zeros((1, 3), np.uint8)]).tobytes())
    notes = PngImagePlugin.PngInfo()
    for key, text in (about or {}).items():
        notes.add_text(key, text)
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=NOTHING, bits=8, pnginfo=notes)
    return stream.getvalue()


def _colour_table() -> npt.NDArray[np.uint8]:
    """Return (255, 3) sRGB colours from dark violet over teal to yellow.

    A straight line in lightness and hue of OKLab, whose distances are even to the eye: lightness alone orders the
    colours, so they read the same in grey and with any colour blindness. Chroma is a parabola that stays within sRGB.
    """
    t = np.linspace(0, 1, LEVELS)
    lightness = 0.26 + 0.67 * t
    hue = np.deg2rad(308 - 206 * t)
    chroma = 0.12 * (1 - t) * (1 - 2 * t) + 0.09 * 4 * t * (1 - t) + 0.16 * t * (2 * t - 1)
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    # The matrices of Björn Ottosson's definition of OKLab: to cone responses, cubed, to linear sRGB.
    cones = np.stack([lightness, a, b]).T @ np.array(
        [[1, 1, 1], [0.3963377774, -0.1055613458, -0.0894841775], [0.2158037573, -0.0638541728, -1.2914855480]]
    )
    linear = cones**3 @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)
    table: npt.NDArray[np.uint8] = np.rint(srgb * 255).astype(np.uint8)
    return table


COLOURS = _colour_table()

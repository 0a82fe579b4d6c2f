"""The 25 distortions of KADID-10k at five levels, on float pictures in [0, 1].

Written from the data set's published definitions (Lin, Hosu, Saupe, QoMEX 2019) and its table of parameters. Where they
leave room, a function's comment says which reading was taken. Everything random comes from the generator that is passed
in, so equal generators give equal pictures.
"""

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from PIL import Image

from .extra import load_extra

FloatImage = npt.NDArray[np.float32]  # (height, width, 3), RGB, [0, 1]
_Bytes = npt.NDArray[np.uint8]
_Apply = Callable[[FloatImage, float, np.random.Generator], FloatImage]

LEVELS = range(1, 6)


@dataclass(frozen=True)
class Distortion:
    """One kind of distortion: its number in KADID-10k, and its parameter at each level.

    `ordered`: a higher level is a stronger distortion. Where it is not (18 and 25), level 3 is the identity.
    So is level 1 of 8, whose levels are ordered.
    """

    number: int
    name: str
    levels: tuple[float, ...]
    apply: _Apply = field(repr=False)
    ordered: bool = True


def distort(image: FloatImage, number: int, level: int, generator: np.random.Generator) -> FloatImage:
    """A distorted copy of `image`, of the same shape, clipped to [0, 1].

    Distort whole pictures, then crop: at the high ratios of JPEG 2000 the header alone fills a small picture's file.

    Raises:
        ValueError: there is no such distortion or level, or `image` is no float32 RGB picture in [0, 1].
    """
    if number not in DISTORTIONS:
        raise ValueError(f"there is no distortion {number!r}: KADID-10k numbers them 1 to {len(DISTORTIONS)}")
    if level not in LEVELS:
        raise ValueError(f"there is no level {level!r}: levels are 1 (weakest) to {len(LEVELS)}")
    _check(image)
    kind = DISTORTIONS[number]
    result = kind.apply(image, kind.levels[level - 1], generator)
    return np.clip(result, 0, 1).astype(np.float32, copy=False)


def compose(image: FloatImage, steps: Sequence[tuple[int, int]], generator: np.random.Generator) -> FloatImage:
    """A copy of `image` after several distortions, (number, level) each, in the order given."""
    _check(image)
    result = image.copy()
    for number, level in steps:
        result = distort(result, number, level, generator)
    return result


def _check(image: FloatImage) -> None:
    if image.dtype != np.float32:
        raise ValueError(f"pixels must be float32 in [0, 1], got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"a picture must have the shape (height, width, 3), got {image.shape}")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):  # so written that NaN fails too
        raise ValueError(f"pixels must lie in [0, 1], got values from {low:g} to {high:g}")


# --- tools ----------------------------------------------------------------------------------------------------------


def _convolve(image: FloatImage, kernel: npt.NDArray[np.float64]) -> FloatImage:
    """`image` convolved with an odd, square kernel; beyond its edges the picture is mirrored."""
    height, width, _ = image.shape
    reach = kernel.shape[0] // 2
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="symmetric").transpose(2, 0, 1)
    # The product of spectra wraps around at the edges of the padding, which are as wide as the kernel reaches: what is
    # wrong is cut off again.
    fast_length = load_extra("scipy.fft").next_fast_len
    size = (fast_length(padded.shape[1], real=True), fast_length(padded.shape[2], real=True))
    spectrum = np.fft.rfft2(padded, size) * np.fft.rfft2(kernel.astype(np.float32), size)
    whole = np.fft.irfft2(spectrum, size)
    cut = whole[:, 2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]
    return np.ascontiguousarray(cut.transpose(1, 2, 0), dtype=np.float32)


def _gaussian(sigma: float) -> npt.NDArray[np.float64]:
    reach = max(1, math.ceil(4 * sigma))  # beyond 4 σ lie 6e-5 of the weight
    row = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    row /= row.sum()
    return np.outer(row, row)


def _disk(radius: float) -> npt.NDArray[np.float64]:
    """The share of a disk that lies in each pixel."""
    fine = 64  # places across a pixel; down a pixel, the part inside the disk is exact
    places = np.arange(-math.ceil(radius), math.ceil(radius) + 1)
    across = (places[:, None] + (np.arange(fine) + 0.5) / fine - 0.5).ravel()
    chord = np.sqrt(np.maximum(radius**2 - across**2, 0))
    inside = np.minimum(chord, places[:, None] + 0.5) - np.maximum(-chord, places[:, None] - 0.5)
    kernel: npt.NDArray[np.float64] = np.maximum(inside, 0).reshape(places.size, places.size, fine).mean(2)
    kernel /= kernel.sum()
    return kernel


def _line(length: float, angle: float) -> npt.NDArray[np.float64]:
    """A line through the middle, each of its points shared among the four pixels around it."""
    reach = math.ceil(length / 2) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    count = 64 * math.ceil(length)
    along = ((np.arange(count) + 0.5) / count - 0.5) * length
    y, x = reach + along * math.sin(angle), reach + along * math.cos(angle)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = (1 - abs(y - top - row)) * (1 - abs(x - left - column))
        np.add.at(kernel, (top + row, left + column), share)
    return kernel / count


# sRGB (IEC 61966-2-1) to CIE XYZ, white D65; each row is divided by the white point's value, as CIELAB wants it.
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_TO_XYZ = (_XYZ / _XYZ.sum(1, keepdims=True)).astype(np.float32)
_FROM_XYZ = np.linalg.inv(_XYZ / _XYZ.sum(1, keepdims=True)).astype(np.float32)
_TO_LAB = np.array([[0, 116, 0], [500, -500, 0], [0, 200, -200]], np.float32)
_FROM_LAB = np.array([[1 / 116, 1 / 500, 0], [1 / 116, 0, 0], [1 / 116, 0, -1 / 200]], np.float32)
_KNEE = 6 / 29  # CIELAB's cube root is a straight line below this

# Full-range YCbCr (BT.601, as in JPEG) to RGB: columns are Y, Cb, Cr.
_FROM_YCBCR = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]], np.float32)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def _to_lab(image: FloatImage) -> FloatImage:
    """sRGB in [0, 1] to CIELAB: L in [0, 100]."""
    linear = np.where(
        image <= 0.04045,
        image / np.float32(12.92),
        ((image + np.float32(0.055)) / np.float32(1.055)) ** np.float32(2.4),
    )
    xyz = linear @ _TO_XYZ.T
    bent = np.where(xyz > _KNEE**3, np.cbrt(xyz), xyz / np.float32(3 * _KNEE**2) + np.float32(4 / 29))
    lab: FloatImage = bent @ _TO_LAB.T
    lab[..., 0] -= 16
    return lab


def _from_lab(lab: FloatImage) -> FloatImage:
    """CIELAB to sRGB, clipped to [0, 1]: what no display can show takes each channel's nearest value."""
    shifted = lab.copy()
    shifted[..., 0] += 16
    bent = shifted @ _FROM_LAB.T
    xyz = np.where(bent > _KNEE, bent**3, np.float32(3 * _KNEE**2) * (bent - np.float32(4 / 29)))
    linear = np.clip(xyz @ _FROM_XYZ.T, 0, 1)
    bright = np.float32(1.055) * linear ** np.float32(1 / 2.4) - np.float32(0.055)
    return np.where(linear <= 0.0031308, np.float32(12.92) * linear, bright)


def _to_bytes(image: FloatImage) -> _Bytes:
    return np.rint(image * 255).astype(np.uint8)


def _from_bytes(pixels: Image.Image) -> FloatImage:
    return np.asarray(pixels.convert("RGB"), np.float32) / np.float32(255)


def _normal(image: FloatImage, variance: float, generator: np.random.Generator) -> FloatImage:
    return generator.standard_normal(image.shape, np.float32) * np.float32(math.sqrt(variance))


# --- blur -----------------------------------------------------------------------------------------------------------


def _gaussian_blur(image: FloatImage, sigma: float, _: np.random.Generator) -> FloatImage:
    return _convolve(image, _gaussian(sigma))


def _lens_blur(image: FloatImage, radius: float, _: np.random.Generator) -> FloatImage:
    return _convolve(image, _disk(radius))


def _motion_blur(image: FloatImage, length: float, generator: np.random.Generator) -> FloatImage:
    # The camera moves by `length` pixels in a random direction, so that length 1 blurs a little.
    return _convolve(image, _line(length, generator.uniform(0, math.pi)))


# --- colour ---------------------------------------------------------------------------------------------------------


def _colour_diffusion(image: FloatImage, sigma: float, _: np.random.Generator) -> FloatImage:
    lab = _to_lab(image)
    lab[..., 1:] = _convolve(lab[..., 1:], _gaussian(sigma))
    return _from_lab(lab)


def _colour_shift(image: FloatImage, distance: float, generator: np.random.Generator) -> FloatImage:
    # Green moves by `distance` pixels in a random direction, and shows where the picture's gradient is steep: the map
    # is the gradient's magnitude, smoothed by σ 4 (else an edge's thin line hides most of the shift) and scaled to 1.
    angle = generator.uniform(0, 2 * math.pi)
    down, right = round(distance * math.sin(angle)), round(distance * math.cos(angle))
    height, width, _ = image.shape
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    green = image[..., 1]
    luma = np.pad(image @ _LUMA, 1, mode="edge")
    slope = np.hypot(luma[2:, 1:-1] - luma[:-2, 1:-1], luma[1:-1, 2:] - luma[1:-1, :-2])
    share = _convolve(slope[..., None], _gaussian(4))[..., 0]
    share /= max(float(share.max()), 1e-6)
    result = image.copy()
    result[..., 1] += share * (green[np.ix_(rows, columns)] - green)
    return result


def _colour_quantisation(image: FloatImage, colours: float, _: np.random.Generator) -> FloatImage:
    # A palette of least variance (median cut, refined by k-means until hardly a pixel changes), and
    # Floyd–Steinberg dither. Some ten thousand pixels are enough to find the palette, in a tenth of the time.
    pixels = _to_bytes(image)
    step = max(1, math.isqrt(image.size // 3) // 96)
    sample = Image.fromarray(np.ascontiguousarray(pixels[::step, ::step]))
    palette = sample.quantize(int(colours), Image.Quantize.MEDIANCUT, kmeans=1 + sample.width * sample.height // 100)
    picture = Image.fromarray(pixels)
    return _from_bytes(picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))


def _hsv_saturation(image: FloatImage, factor: float, _: np.random.Generator) -> FloatImage:
    # With hue and value fixed, a channel's distance to the value (the largest channel) is proportional to saturation.
    # A negative saturation is carried through the same formula: hues turn into their complements.
    value: FloatImage = image.max(2, keepdims=True)
    return value - np.float32(factor) * (value - image)


def _lab_saturation(image: FloatImage, factor: float, _: np.random.Generator) -> FloatImage:
    if factor == 1:
        return image  # exactly, not but for the rounding of two conversions
    lab = _to_lab(image)
    lab[..., 1:] *= np.float32(factor)
    return _from_lab(lab)


# --- compression ----------------------------------------------------------------------------------------------------


def _jpeg2000(image: FloatImage, ratio: float, _: np.random.Generator) -> FloatImage:
    stream = io.BytesIO()
    Image.fromarray(_to_bytes(image)).save(
        stream, "JPEG2000", quality_mode="rates", quality_layers=[ratio], irreversible=True
    )
    return _from_bytes(Image.open(stream))


def _jpeg(image: FloatImage, quality: float, _: np.random.Generator) -> FloatImage:
    stream = io.BytesIO()
    Image.fromarray(_to_bytes(image)).save(stream, "JPEG", quality=int(quality))
    return _from_bytes(Image.open(stream))


# --- noise ----------------------------------------------------------------------------------------------------------


def _white_noise(image: FloatImage, variance: float, generator: np.random.Generator) -> FloatImage:
    return image + _normal(image, variance, generator)


def _ycbcr_noise(image: FloatImage, variance: float, generator: np.random.Generator) -> FloatImage:
    # Converting there and back is linear: only the noise need be converted.
    return image + _normal(image, variance, generator) @ _FROM_YCBCR.T


def _impulse_noise(image: FloatImage, density: float, generator: np.random.Generator) -> FloatImage:
    # Every channel of every pixel on its own, pepper and salt equally often.
    draw = generator.random(image.shape, np.float32)
    result = image.copy()
    result[draw < density / 2] = 0
    result[draw >= 1 - density / 2] = 1
    return result


def _multiplicative_noise(image: FloatImage, variance: float, generator: np.random.Generator) -> FloatImage:
    return image * (1 + _normal(image, variance, generator))


def _denoised(image: FloatImage, variance: float, generator: np.random.Generator) -> FloatImage:
    # KADID-10k removes the noise by a network (DnCNN). Here a classic that needs no weights does it: the starlet
    # transform (à trous, cubic B-spline; Starck & Murtagh), coefficients below 3 σ of each scale's noise set to 0 (4 σ
    # in the finest, where 3 σ leaves speckles). Like KADID-10k's, it takes each channel alone, and makes no blocks.
    smooth = np.clip(_white_noise(image, variance, generator), 0, 1)
    result = np.zeros_like(image)
    for scale, share in enumerate(_STARLET_NOISE):
        smoother = _spline(_spline(smooth, 2**scale, axis=0), 2**scale, axis=1)
        detail = smooth - smoother
        detail[np.abs(detail) < (3 if scale else 4) * share * math.sqrt(variance)] = 0
        result += detail
        smooth = smoother
    return result + smooth


# The standard deviation of the starlet coefficients of white noise of σ 1, from the finest scale.
_STARLET_NOISE = (0.8908, 0.2007, 0.0856, 0.0413, 0.0205)


def _spline(image: FloatImage, step: int, axis: int) -> FloatImage:
    """`image` smoothed along an axis by [1 4 6 4 1] / 16, weights `step` pixels apart; mirrored beyond its edges."""
    reach = [(0, 0), (0, 0), (0, 0)]
    reach[axis] = (2 * step, 2 * step)
    padded = np.pad(image, reach, mode="symmetric").swapaxes(0, axis)
    length = image.shape[axis]
    near, far = (padded[k * step : k * step + length] for k in (1, 0))
    result = near + padded[3 * step : 3 * step + length]
    result *= 4
    result += 6 * padded[2 * step : 2 * step + length]
    result += far
    result += padded[4 * step : 4 * step + length]
    result /= 16
    return result.swapaxes(0, axis)


# --- brightness -----------------------------------------------------------------------------------------------------


def _curve_lightness(image: FloatImage, exponent: float) -> FloatImage:
    """Lightness L (of CIELAB, as a share of white) becomes L ** exponent: black and white stay, the rest moves."""
    lab = _to_lab(image)
    lab[..., 0] = 100 * np.clip(lab[..., 0] / 100, 0, 1) ** np.float32(exponent)
    return _from_lab(lab)


def _brighten(image: FloatImage, amount: float, _: np.random.Generator) -> FloatImage:
    return _curve_lightness(image, 1 / (1 + amount))


def _darken(image: FloatImage, amount: float, _: np.random.Generator) -> FloatImage:
    return _curve_lightness(image, 1 + amount)


def _mean_shift(image: FloatImage, amount: float, _: np.random.Generator) -> FloatImage:
    return image + np.float32(amount)


# --- spatial --------------------------------------------------------------------------------------------------------


def _jitter(image: FloatImage, sigma: float, generator: np.random.Generator) -> FloatImage:
    # Each pixel is fetched from a place of its own, normally distributed around it (σ in pixels), bilinearly.
    height, width, channels = image.shape
    move = generator.standard_normal((2, height, width), np.float32) * np.float32(sigma)
    y = np.clip(np.arange(height, dtype=np.float32)[:, None] + move[0], 0, height - 1)
    x = np.clip(np.arange(width, dtype=np.float32) + move[1], 0, width - 1)
    top, left = np.floor(y).astype(np.intp), np.floor(x).astype(np.intp)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    y_share, x_share = (y - top).astype(np.float32)[..., None], (x - left).astype(np.float32)[..., None]
    flat = image.reshape(-1, channels)
    upper = flat[top * width + left] * (1 - x_share) + flat[top * width + right] * x_share
    lower = flat[bottom * width + left] * (1 - x_share) + flat[bottom * width + right] * x_share
    result: FloatImage = upper * (1 - y_share) + lower * y_share
    return result


def _patches(image: FloatImage, count: float, generator: np.random.Generator) -> FloatImage:
    # Square patches take the place of others one side away, in random directions. A side is 16 pixels in KADID-10k's
    # own 512×384, and grows with the picture, so that a count covers the same share of any picture.
    height, width, _ = image.shape
    side = min(height, width, max(1, round(math.sqrt(height * width) / 28)))
    draw = generator.random((int(count), 3))
    room = np.array([height - side, width - side])
    places = np.floor(draw[:, :2] * (room + 1)).astype(int)
    angles = 2 * math.pi * draw[:, 2]
    steps = np.rint(side * np.stack([np.sin(angles), np.cos(angles)], 1)).astype(int)
    result = image.copy()
    for (y, x), (from_y, from_x) in zip(places, np.clip(places + steps, 0, room), strict=True):
        result[y : y + side, x : x + side] = image[from_y : from_y + side, from_x : from_x + side]
    return result


def _pixelate(image: FloatImage, amount: float, _: np.random.Generator) -> FloatImage:
    # Both sides shrink to 1 - √amount and grow back, by nearest neighbours. (With 1 - amount, four levels hardly show.)
    scale = 1 - math.sqrt(amount)
    return image[np.ix_(_coarse(image.shape[0], scale), _coarse(image.shape[1], scale))]


def _coarse(length: int, scale: float) -> npt.NDArray[np.intp]:
    """Where each place takes its pixel from after nearest-neighbour shrinking by `scale` and growing back."""
    small = max(1, round(length * scale))
    cell = (np.arange(length) * 2 + 1) * small // (2 * length)
    return (cell * 2 + 1) * length // (2 * small)


def _quantisation(image: FloatImage, levels: float, _: np.random.Generator) -> FloatImage:
    # Thresholds by Otsu's method over the values of all channels together; each class shows its mean.
    pixels = _to_bytes(image)
    histogram = np.bincount(pixels.ravel(), minlength=256)
    table = np.zeros(256, np.float32)
    edges = _otsu_edges(histogram, int(levels))
    for start, stop in itertools.pairwise(edges):
        weights = histogram[start:stop]
        if weights.any():
            table[start:stop] = np.average(np.arange(start, stop), weights=weights) / 255
    return table[pixels]


def _otsu_edges(histogram: npt.NDArray[np.intp], classes: int) -> list[int]:
    """The edges of the classes of values with the largest variance between classes: the first is 0, the last the size.

    Otsu's criterion for many classes is a sum over them, so the best division is found exactly, a class at a time.
    """
    weight = np.concatenate([[0], np.cumsum(histogram)]).astype(np.float64)
    moment = np.concatenate([[0], np.cumsum(histogram * np.arange(histogram.size))]).astype(np.float64)
    weights, moments = weight - weight[:, None], moment - moment[:, None]
    gain = np.where(weights < 0, -np.inf, moments**2 / np.maximum(weights, 1))  # [start, stop]
    best = gain[0]
    starts = []
    for _ in range(classes - 1):
        total = best[:, None] + gain
        starts.append(total.argmax(0))
        best = total.max(0)
    edges = [histogram.size]
    for start in reversed(starts):
        edges.append(int(start[edges[-1]]))
    return [0, *reversed(edges)]


def _colour_blocks(image: FloatImage, count: float, generator: np.random.Generator) -> FloatImage:
    # Squares of one random colour; a side is 32 pixels in KADID-10k's own 512×384, and grows with the picture.
    height, width, _ = image.shape
    side = min(height, width, max(1, round(math.sqrt(height * width) / 14)))
    result = image.copy()
    for down, across, *colour in generator.random((int(count), 5)):
        y, x = int(down * (height - side + 1)), int(across * (width - side + 1))
        result[y : y + side, x : x + side] = colour
    return result


# --- sharpness and contrast -----------------------------------------------------------------------------------------


def _sharpen(image: FloatImage, amount: float, _: np.random.Generator) -> FloatImage:
    # Unsharp masking with a Gaussian of σ 1.
    return image + np.float32(amount) * (image - _convolve(image, _gaussian(1)))


def _contrast(image: FloatImage, amount: float, _: np.random.Generator) -> FloatImage:
    # With u = 2x - 1, the curve u (1 + a) / (1 - a + 2a|u|): a sigmoid for a > 0, its inverse for -a. Black, white and
    # middle grey stay. It is written as a change of x, so that a = 0 changes nothing, not even by rounding.
    a = np.float32(amount)
    u = 2 * image - 1
    size = np.abs(u)
    change: FloatImage = a * u * (1 - size) / (1 - a + 2 * a * size)
    return image + change


DISTORTIONS: Mapping[int, Distortion] = MappingProxyType(
    {
        kind.number: kind
        for kind in (
            Distortion(1, "gaussian_blur", (0.1, 0.5, 1, 2, 5), _gaussian_blur),
            Distortion(2, "lens_blur", (1, 2, 4, 6, 8), _lens_blur),
            Distortion(3, "motion_blur", (1, 2, 4, 6, 10), _motion_blur),
            Distortion(4, "colour_diffusion", (1, 3, 6, 8, 12), _colour_diffusion),
            Distortion(5, "colour_shift", (1, 3, 6, 8, 12), _colour_shift),
            Distortion(6, "colour_quantisation", (64, 48, 32, 16, 8), _colour_quantisation),
            Distortion(7, "hsv_saturation", (0.4, 0.2, 0.1, 0, -0.4), _hsv_saturation),
            Distortion(8, "lab_saturation", (1, 2, 3, 6, 9), _lab_saturation),
            Distortion(9, "jpeg2000", (16, 32, 45, 120, 400), _jpeg2000),
            Distortion(10, "jpeg", (43, 36, 24, 7, 4), _jpeg),
            Distortion(11, "white_noise", (0.001, 0.002, 0.003, 0.005, 0.01), _white_noise),
            Distortion(12, "ycbcr_noise", (0.0001, 0.0005, 0.001, 0.002, 0.003), _ycbcr_noise),
            Distortion(13, "impulse_noise", (0.001, 0.005, 0.01, 0.02, 0.03), _impulse_noise),
            Distortion(14, "multiplicative_noise", (0.001, 0.005, 0.01, 0.02, 0.05), _multiplicative_noise),
            Distortion(15, "denoised", (0.01, 0.03, 0.05, 0.1, 0.15), _denoised),
            Distortion(16, "brighten", (0.1, 0.2, 0.4, 0.7, 1.1), _brighten),
            Distortion(17, "darken", (0.05, 0.1, 0.2, 0.4, 0.8), _darken),
            Distortion(18, "mean_shift", (0.15, 0.08, 0, -0.08, -0.15), _mean_shift, ordered=False),
            Distortion(19, "jitter", (0.05, 0.1, 0.2, 0.5, 1), _jitter),
            Distortion(20, "patches", (20, 40, 60, 80, 100), _patches),
            Distortion(21, "pixelate", (0.01, 0.05, 0.1, 0.2, 0.5), _pixelate),
            Distortion(22, "quantisation", (20, 16, 13, 10, 7), _quantisation),
            Distortion(23, "colour_blocks", (2, 4, 6, 8, 10), _colour_blocks),
            Distortion(24, "sharpen", (1, 2, 3, 6, 12), _sharpen),
            Distortion(25, "contrast", (0.3, 0.15, 0, -0.4, -0.6), _contrast, ordered=False),
        )
    }
)

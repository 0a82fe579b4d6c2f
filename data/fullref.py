"""Full-reference metrics in NumPy, and the pseudo-score made of them: a label where nobody was asked.

A metric compares a picture with its pristine original, both RGB in [0, 1] and (H, W, 3), as its paper defines it and
the authors' programs treat what papers leave out (borders, odd sizes). Values are those of 8-bit code values.

    HaarPSI   Reisenhofer et al. 2018   higher is better, 1 for equal pictures
    MDSI      Nafchi et al. 2016        lower is better, 0 for equal pictures
    GMSD      Xue et al. 2014           lower is better, 0 for equal pictures
    MS-SSIM   Wang et al. 2003          higher is better, 1 for equal pictures; sides of 161 pixels and more

All arithmetic is float64: the fourth root in MDSI makes 0.02 of a rounding error of 1e-7.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.codec import encode
from ..errors import DatasetError, ImageError

Array = npt.NDArray[np.float64]
Picture = npt.NDArray[Any]  # (H, W, 3), float, RGB in [0, 1]

YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])  # NTSC 1953
LHM = np.array([[0.2989, 0.587, 0.114], [0.30, 0.04, -0.35], [0.34, -0.60, 0.17]])  # luma, two opponents

HAARPSI_C, HAARPSI_ALPHA = 30.0, 4.2
MDSI_C1, MDSI_C2, MDSI_C3, MDSI_ALPHA = 140.0, 55.0, 550.0, 0.6
GMSD_C = 170.0
MS_SSIM_WEIGHTS = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])  # from the finest scale to the coarsest
MS_SSIM_C1, MS_SSIM_C2 = 0.01**2, 0.03**2
MS_SSIM_TAPS, MS_SSIM_SIGMA = 11, 1.5
MS_SSIM_SIDE = 2 ** (len(MS_SSIM_WEIGHTS) - 1) * (MS_SSIM_TAPS - 1) + 1  # 161: leaves one window at the coarsest scale

KNOTS = 257  # stored quantiles of each metric: steps of 0.4 % of the pictures


def haarpsi(reference: Picture, image: Picture) -> float:
    """Return the similarity of fine Haar details, seen where coarse ones are, in (0, 1]; with colour, at half size."""
    yiq = [_downsampled(_planes(picture, YIQ), 2) for picture in _pair(reference, image)]
    luma = [_haar_details(planes[0]) for planes in yiq]  # [scale, direction, H, W]
    chroma = [np.abs(_block_means(np.pad(planes[1:], ((0, 0), (0, 1), (0, 1))), 2, 1)) for planes in yiq]
    likeness = np.empty((3, *yiq[0].shape[1:]))  # of horizontal and of vertical details, of colour
    likeness[:2] = _similarity(luma[0][:2], luma[1][:2], HAARPSI_C).mean(axis=0)
    likeness[2] = _similarity(chroma[0], chroma[1], HAARPSI_C).mean(axis=0)
    # Pictures without any coarse detail (black ones) have no weights at all: then every place counts the same.
    weight = np.empty_like(likeness)
    weight[:2] = np.maximum(luma[0][2], luma[1][2]) + 1e-9
    weight[2] = weight[:2].mean(axis=0)
    logistic = 1 / (1 + np.exp(-HAARPSI_ALPHA * likeness))
    mean = float((logistic * weight).sum() / weight.sum())
    return float((np.log(mean / (1 - mean)) / HAARPSI_ALPHA) ** 2)


def mdsi(reference: Picture, image: Picture) -> float:
    """Return the mean deviation of gradient and colour similarity: 0 for equal pictures, below 1 in practice."""
    pair = _pair(reference, image)
    factor = max(1, int(min(pair[0].shape[:2]) / 256 + 0.5))
    ref, img = (_downsampled(_planes(picture, LHM), factor) for picture in pair)
    # The third gradient is that of the two lightnesses' mean: it tells lost detail from detail that was added.
    gradients = [_gradient(lightness) for lightness in (ref[0], img[0], (ref[0] + img[0]) / 2)]
    gradient_similarity = (
        _similarity(gradients[0], gradients[1], MDSI_C1)
        + _similarity(gradients[1], gradients[2], MDSI_C2)
        - _similarity(gradients[0], gradients[2], MDSI_C2)
    )
    # The sums are bracketed so that equal pictures give exactly 1.
    products, squares = ref[1] * img[1] + ref[2] * img[2], (ref[1] ** 2 + ref[2] ** 2) + (img[1] ** 2 + img[2] ** 2)
    colour_similarity = (2 * products + MDSI_C3) / (squares + MDSI_C3)
    similarity = MDSI_ALPHA * gradient_similarity + (1 - MDSI_ALPHA) * colour_similarity
    # Where similarity is negative, its fourth root is complex: √½ + √½ i times that of its magnitude.
    root = np.sqrt(np.sqrt(np.abs(similarity)))
    real = np.where(similarity < 0, np.sqrt(0.5), 1) * root
    imaginary = np.where(similarity < 0, np.sqrt(0.5), 0) * root
    return float(np.hypot(real - real.mean(), imaginary - imaginary.mean()).mean() ** 0.25)


def gmsd(reference: Picture, image: Picture) -> float:
    """Return the standard deviation of the gradient similarity of luma at half size: 0 for equal pictures."""
    ref, img = (_gradient(_downsampled(_planes(picture, YIQ[:1]), 2)[0]) for picture in _pair(reference, image))
    return float(_similarity(ref, img, GMSD_C).std())


def ms_ssim(reference: Picture, image: Picture) -> float:
    """Return the structural similarity of luma over five scales, in [0, 1]. Raises ImageError for sides below 161."""
    pair = _pair(reference, image)
    height, width = pair[0].shape[:2]
    if min(height, width) < MS_SSIM_SIDE:
        raise ImageError(f"MS-SSIM takes pictures of {MS_SSIM_SIDE}×{MS_SSIM_SIDE} and more, not {width}×{height}")
    ref, img = (_planes(picture, YIQ[:1])[0] / 255 for picture in pair)
    result = 1.0
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        if scale:
            ref, img = _halved(ref), _halved(img)
        mean_ref, mean_img = _gaussian(ref), _gaussian(img)
        variances = _gaussian(ref * ref) + _gaussian(img * img) - mean_ref**2 - mean_img**2
        covariance = _gaussian(ref * img) - mean_ref * mean_img
        structure = (2 * covariance + MS_SSIM_C2) / (variances + MS_SSIM_C2)
        if scale == len(MS_SSIM_WEIGHTS) - 1:
            structure *= (2 * mean_ref * mean_img + MS_SSIM_C1) / (mean_ref**2 + mean_img**2 + MS_SSIM_C1)
        result *= max(0.0, float(structure.mean())) ** weight  # a negative mean has no such power
    return float(result)


@dataclass(frozen=True)
class Metric:
    """A metric by its name, and which way it points."""

    name: str
    measure: Callable[[Picture, Picture], float]
    higher_is_better: bool


METRICS = (
    Metric("haarpsi", haarpsi, higher_is_better=True),
    Metric("mdsi", mdsi, higher_is_better=False),
    Metric("gmsd", gmsd, higher_is_better=False),
    Metric("ms_ssim", ms_ssim, higher_is_better=True),
)


def measure(reference: Picture, image: Picture) -> Array:
    """Return the values of all METRICS, in their order: one row of the table a PseudoScale is fitted on.

    To 9 decimals: equal pictures then have equal values, which rounding errors would rank.
    """
    return np.round([metric.measure(reference, image) for metric in METRICS], 9)


@dataclass(frozen=True)
class Quantiles:
    """Evenly spaced quantiles of one metric over the fitting set, ascending as the metric counts."""

    metric: str
    higher_is_better: bool
    values: tuple[float, ...]

    def ranks(self, values: Array) -> Array:
        """Return where values stand in the fitting set: 0 its worst and anything worse, 1 its best and better."""
        sign = 1 if self.higher_is_better else -1
        knots = np.sort(sign * np.array(self.values))
        levels = np.linspace(0, 1, len(knots))
        distinct, where, counts = np.unique(knots, return_inverse=True, return_counts=True)
        middle = np.bincount(where, levels) / counts  # values that many pictures share get the middle of their ranks,
        middle[0], middle[-1] = 0, 1  # except at the ends: pictures equal to their originals score 1
        return np.interp(sign * values, distinct, middle)


@dataclass(frozen=True)
class PseudoScale:
    """The pseudo-score: our own construction, not a published metric and not human opinion.

    Each metric's value is replaced by its rank in the fitting set (so that no metric's scale dominates), ranks are
    turned so that higher is better, and their mean is the score, in [0, 1]. It means: better than about this share of
    the fitting set. Fit it on the training part only, store it, apply it to all parts.
    """

    pictures: int  # in the fitting set
    quantiles: tuple[Quantiles, ...]
    schema_version: int = 1

    def scores(self, table: Array) -> Array:
        """Return the pseudo-score of each row of metric values (n, metrics), higher is better."""
        columns = _columns(table, len(self.quantiles))
        ranks = [quantiles.ranks(column) for quantiles, column in zip(self.quantiles, columns, strict=True)]
        mean: Array = np.mean(ranks, axis=0)
        return mean

    def to_json(self) -> str:
        """Return this scale as JSON text."""
        return json.dumps(encode(self), indent=1) + "\n"


def fit_pseudo_scale(table: Array) -> PseudoScale:
    """Fit the pseudo-score on rows of `measure`, one per picture of the training part. Raises DatasetError."""
    columns = _columns(table, len(METRICS))
    for metric, column in zip(METRICS, columns, strict=True):
        if len(np.unique(column)) < 2:
            raise DatasetError(
                f"no pseudo-score can be fitted: {metric.name} is the same for all {len(table)} pictures"
            )
    levels = np.linspace(0, 1, KNOTS)
    quantiles = tuple(
        Quantiles(metric.name, metric.higher_is_better, tuple(map(float, np.quantile(column, levels))))
        for metric, column in zip(METRICS, columns, strict=True)
    )
    return PseudoScale(len(table), quantiles)


def _columns(table: Array, count: int) -> Array:
    if table.ndim != 2 or table.shape[1] != count:
        raise DatasetError(f"a table of {count} metrics per picture is needed, not one of shape {table.shape}")
    if bad := int((~np.isfinite(table)).any(axis=1).sum()):
        row = int(np.argmin(np.isfinite(table).all(axis=1)))
        raise DatasetError(f"{bad} rows of metric values hold NaN or infinity, the first is row {row}")
    return table.T


def _pair(reference: Picture, image: Picture) -> tuple[Array, Array]:
    if reference.shape != image.shape:
        raise ImageError(f"a picture of shape {image.shape} cannot be compared with a reference of {reference.shape}")
    if reference.ndim != 3 or reference.shape[2] != 3 or reference.size == 0:
        raise ImageError(f"pictures of shape (height, width, 3) are compared, not {reference.shape}")
    for name, picture in (("reference", reference), ("picture", image)):
        if not np.issubdtype(picture.dtype, np.floating):
            raise ImageError(f"the {name} holds {picture.dtype}, not floats in [0, 1]")
        if not (picture.min() >= 0 and picture.max() <= 1):  # false for NaN, too
            raise ImageError(f"the {name} has values outside [0, 1], or NaN")
    return reference.astype(np.float64), image.astype(np.float64)


def _planes(picture: Array, matrix: Array) -> Array:
    """Return the colours that the rows of `matrix` define, for code values 0…255, as (row, H, W)."""
    # No matrix product: the rounding of BLAS depends on where pictures lie in memory, and equal ones must stay equal.
    red, green, blue = np.moveaxis(255 * picture, -1, 0)
    return np.stack([r * red + g * green + b * blue for r, g, b in matrix])


def _similarity(a: Array, b: Array, constant: float) -> Array:
    similarity: Array = (2 * a * b + constant) / (a * a + b * b + constant)
    return similarity


def _block_means(planes: Array, size: int, step: int) -> Array:
    """Return the means of size×size windows that begin at every `step`-th row and column (none hangs over)."""
    rows, columns = ((side - size) // step + 1 for side in planes.shape[-2:])
    total = np.zeros((*planes.shape[:-2], rows, columns))
    for i in range(size):
        for j in range(size):
            total += planes[..., i : i + step * (rows - 1) + 1 : step, j : j + step * (columns - 1) + 1 : step]
    return total / size**2


def _downsampled(planes: Array, factor: int) -> Array:
    """Average around every `factor`-th pixel; zeros beyond the border, as in the metrics' published programs."""
    margin = ((factor - 1) // 2, factor // 2)
    return _block_means(np.pad(planes, ((0, 0), margin, margin)), factor, factor)


def _halved(plane: Array) -> Array:
    """Average 2×2 pixels, with the last row or column of an odd side repeated: a dark rim would pass for structure."""
    odd = [(0, side % 2) for side in plane.shape]
    return _block_means(np.pad(plane, odd, mode="edge"), 2, 2)


def _gradient(plane: Array) -> Array:
    """Return the magnitude of the Prewitt gradient, with zeros beyond the border."""
    padded = np.pad(plane, 1)
    across, along = padded[:, 2:] - padded[:, :-2], padded[2:] - padded[:-2]
    dx = (across[:-2] + across[1:-1] + across[2:]) / 3
    dy = (along[:, :-2] + along[:, 1:-1] + along[:, 2:]) / 3
    magnitude: Array = np.sqrt(dx * dx + dy * dy)
    return magnitude


def _haar_details(plane: Array) -> Array:
    """Return magnitudes of undecimated Haar coefficients [scale 1…3, rows and columns, H, W], zeros beyond the border.

    The filter of scale k covers 2^k×2^k pixels and begins 2^(k-1)-1 before the pixel. Each scale's sums are made of
    the sums of the scale below, so that no pixel is added twice.
    """
    height, width = plane.shape
    details = np.empty((3, 2, height, width))
    sums = np.pad(plane, (3, 4))
    for scale in range(3):
        half = 2**scale
        columns_added, columns_subtracted = sums[:, :-half] + sums[:, half:], sums[:, :-half] - sums[:, half:]
        begin = 4 - half
        for direction, coefficients in enumerate(
            (columns_added[:-half] - columns_added[half:], columns_subtracted[:-half] + columns_subtracted[half:])
        ):
            shown = coefficients[begin : begin + height, begin : begin + width]
            np.abs(shown / (2 * half), out=details[scale, direction])
        sums = columns_added[:-half] + columns_added[half:]
    return details


def _gaussian(plane: Array) -> Array:
    """Filter with the 11×11 Gaussian where it fits entirely."""
    taps = np.exp(-((np.arange(MS_SSIM_TAPS) - MS_SSIM_TAPS // 2) ** 2) / (2 * MS_SSIM_SIGMA**2))
    taps /= taps.sum()
    for side in plane.shape:  # first down, then, the plane being turned each time, across
        length = side - MS_SSIM_TAPS + 1
        total = np.zeros((length, plane.shape[1]))
        product = np.empty_like(total)
        for i, tap in enumerate(taps):
            total += np.multiply(plane[i : i + length], tap, out=product)
        plane = total.T
    return plane

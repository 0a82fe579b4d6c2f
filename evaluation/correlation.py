"""How well scores agree with labels, the way papers on image quality count it.

`scores` are what a model says, `labels` what it should say, in the same order. Both must point the same way: negate
labels that are better when lower. What cannot be correlated raises DatasetError.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.extra import load_extra
from ..engine.agreement import Array, Values, paired, pearson, plcc, srcc, varied
from ..errors import DatasetError

SAMPLES, SEED = 2000, 1  # of a bootstrap
LOGISTIC_MIN = 5  # four parameters run through any four points


def krcc(scores: Values, labels: Values) -> float:
    """Return Kendall's rank correlation (tau-b: corrected for equal values)."""
    return float(load_extra("scipy.stats").kendalltau(*varied(scores, labels)).statistic)


def rmse(scores: Values, labels: Values) -> float:
    """Return the root mean square difference; it means something only where both have one scale."""
    x, y = paired(scores, labels)
    return float(np.sqrt(np.mean((x - y) ** 2)))


@dataclass(frozen=True)
class Logistic:
    """The curve (b1 − b2) / (1 + exp(−(x − b3) / b4)) + b2 that lays scores onto the scale of labels."""

    b1: float
    b2: float
    b3: float
    b4: float

    def __call__(self, scores: Values) -> Array:
        """Return the curve at the scores."""
        slope = np.tanh((np.asarray(scores, np.float64) - self.b3) / (2 * self.b4))  # exp would overflow
        curve: Array = (self.b1 - self.b2) * (1 + slope) / 2 + self.b2
        return curve


def fit_logistic(scores: Values, labels: Values) -> Logistic:
    """Fit the curve by least squares, from b1 = max y, b2 = min y, b3 = mean x, b4 = std x / 4.

    This one start can end in a poor local minimum: where points are few, or fall. So there are four starts: b4 = std x
    too, and both with a minus. The best end is returned. Raises DatasetError for fewer than five points.
    """
    x, y = varied(scores, labels)
    if len(x) < LOGISTIC_MIN:
        raise DatasetError(f"a logistic of 4 parameters is fitted to {LOGISTIC_MIN} points and more, not to {len(x)}")
    # Both axes are brought to the size of 1 first; the curve's family and the least squares are the same there.
    centre, width, bottom, height = x.mean(), x.std(), y.min(), np.ptp(y)
    x, y = (x - centre) / width, (y - bottom) / height
    found = [_descend(start, x, y) for start in (0.25, 1, -0.25, -1)]
    best = min(found, key=lambda curve: float(np.sum((curve(x) - y) ** 2)))
    return Logistic(best.b1 * height + bottom, best.b2 * height + bottom, best.b3 * width + centre, best.b4 * width)


@dataclass(frozen=True)
class Correlation:
    """All figures of one set of images. The two after the logistic are None below five images."""

    images: int
    srcc: float
    plcc: float  # on raw scores
    plcc_logistic: float | None  # after the 4-parameter logistic
    krcc: float
    rmse_logistic: float | None  # after the 4-parameter logistic, in units of the labels


def correlate(scores: Values, labels: Values) -> Correlation:
    """Return all figures."""
    linear = plcc(scores, labels)
    after = fit_logistic(scores, labels)(scores) if len(scores) >= LOGISTIC_MIN else None
    return Correlation(
        images=len(scores),
        srcc=srcc(scores, labels),
        plcc=linear,
        plcc_logistic=None if after is None else pearson(after, np.asarray(labels, np.float64)),
        krcc=krcc(scores, labels),
        rmse_logistic=None if after is None else rmse(after, labels),
    )


def spread(measure: Callable[[npt.NDArray[np.int64]], float], count: int) -> list[float]:
    """Return a measure of `count` images, with the 2.5th and the 97.5th percentile of a bootstrap over them.

    The measure is given the images' indices.
    """
    draws = np.random.default_rng(SEED).integers(count, size=(SAMPLES, count))
    found = []
    for draw in draws:
        try:
            found.append(measure(draw))
        except DatasetError:  # of few images, a draw may hold one alone
            continue
    low, high = np.percentile(found, [2.5, 97.5]).tolist()
    return [round(value, 4) for value in (measure(np.arange(count)), low, high)]


def agreement(scores: Values, labels: Values) -> dict[str, Any]:
    """Return SRCC and PLCC, each with its interval."""
    a, b = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    measures = {"srcc": srcc, "plcc": plcc}
    found = {name: spread(lambda i, of=of: of(a[i], b[i]), len(a)) for name, of in measures.items()}  # type: ignore[misc]
    return {"images": len(a), **found}


@dataclass(frozen=True)
class GroupRow:
    """The figures of one group, or why it has none (one image, equal labels)."""

    group: str
    images: int
    correlation: Correlation | None
    reason: str | None


def per_group(scores: Values, labels: Values, groups: Sequence[str]) -> tuple[GroupRow, ...]:
    """Return a row for each group, sorted by name: the paper's Table II when groups are distortion types.

    A group that cannot be correlated has a reason in place of figures; NaN anywhere is an error all the same.
    """
    x, y = paired(scores, labels)
    if len(groups) != len(x):
        raise DatasetError(f"{len(x)} scores have {len(groups)} group names")
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    rows = []
    for group, indices in sorted(members.items()):
        try:
            rows.append(GroupRow(group, len(indices), correlate(x[indices], y[indices]), None))
        except DatasetError as exc:
            rows.append(GroupRow(group, len(indices), None, str(exc)))
    return tuple(rows)


def _descend(start: float, x: Array, y: Array) -> Logistic:
    """Return the least squares below b1 = 1, b2 = 0, b3 = 0, b4 = `start`; b4 keeps its sign."""

    def curve(b: Array) -> Logistic:
        # 0 is no slope, and e¹⁴ as good as infinite: the curve of a step, and of a straight line.
        return Logistic(b[0], b[1], b[2], math.copysign(math.exp(np.clip(b[3], -14, 14)), start))

    begin = [1, 0, 0, math.log(abs(start))]
    least_squares = load_extra("scipy.optimize").least_squares
    found = least_squares(lambda b: curve(b)(x) - y, begin, method="lm", ftol=1e-14, xtol=1e-10, gtol=1e-14)
    return curve(found.x)

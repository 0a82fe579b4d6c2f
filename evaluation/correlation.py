"""How well scores agree with labels, the way image quality papers count it.

`scores` are what a model says, `labels` what it should say, in the same order; both point the same way (turn labels
that are better when lower before). Everything that cannot be correlated raises DatasetError.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..data.datasets import DatasetError
from ..data.labelfiles import read_csv
from ..errors import OutputError
from ..runtime.command.recordfile import read_records
from ..runtime.command.records import Format

Array = npt.NDArray[np.float64]
Values = Sequence[float] | npt.NDArray[np.floating]

LOGISTIC_MIN = 5  # four parameters run through any four points
LOGISTIC_STEPS = 500


def srcc(scores: Values, labels: Values) -> float:
    """Return Spearman's rank correlation; equal values share the mean of their ranks."""
    x, y = _varied(scores, labels)
    return _pearson(_ranks(x), _ranks(y))


def plcc(scores: Values, labels: Values) -> float:
    """Return Pearson's linear correlation of the values as they are."""
    return _pearson(*_varied(scores, labels))


def krcc(scores: Values, labels: Values) -> float:
    """Return Kendall's rank correlation (tau-b: corrected for equal values)."""
    x, y = _varied(scores, labels)
    order = np.lexsort((y, x))  # among equal scores labels ascend: such pairs never count as discordant
    discordant = 0
    seen: list[float] = []
    for place, label in enumerate(y[order].tolist()):
        position = bisect.bisect_right(seen, label)
        discordant += place - position
        seen.insert(position, label)
    pairs = math.comb(len(x), 2)
    tied_x, tied_y, tied_both = _tied_pairs(x), _tied_pairs(y), _tied_pairs(np.stack([x, y], axis=1))
    difference = pairs - tied_x - tied_y + tied_both - 2 * discordant
    return float(difference / math.sqrt(pairs - tied_x) / math.sqrt(pairs - tied_y))


def rmse(scores: Values, labels: Values) -> float:
    """Return the root mean square difference; it means something only where both have one scale."""
    x, y = _pair(scores, labels)
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
    """Fit the curve by least squares from b1 = max y, b2 = min y, b3 = mean x, b4 = std x / 4.

    From there alone, few points and falling ones can end in a poor local minimum, so the descent also begins from
    b4 = std x and from the falling counterparts of both; the best of the four is returned. Raises DatasetError for
    fewer than five points.
    """
    x, y = _varied(scores, labels)
    if len(x) < LOGISTIC_MIN:
        raise DatasetError(f"a logistic of 4 parameters is fitted to {LOGISTIC_MIN} points and more, not to {len(x)}")
    # Both axes are brought to the size of 1 first; the curve's family and the least squares are the same there.
    centre, width, bottom, height = x.mean(), x.std(), y.min(), np.ptp(y)
    x, y = (x - centre) / width, (y - bottom) / height
    starts = [np.array([1, 0, 0, b4]) for b4 in (0.25, 1, -0.25, -1)]
    b1, b2, b3, b4 = min((_descend(start, x, y) for start in starts), key=lambda found: found[1])[0].tolist()
    b1, b2, b3, b4 = b1 * height + bottom, b2 * height + bottom, b3 * width + centre, b4 * width
    return Logistic(float(b1), float(b2), float(b3), float(b4))


def plcc_logistic(scores: Values, labels: Values) -> float:
    """Return Pearson's linear correlation of labels with the scores laid on them by the fitted logistic."""
    return _pearson(fit_logistic(scores, labels)(scores), np.asarray(labels, np.float64))


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
    linear, after = plcc(scores, labels), None
    if len(scores) >= LOGISTIC_MIN:
        after = fit_logistic(scores, labels)(scores)
    return Correlation(
        images=len(scores),
        srcc=srcc(scores, labels),
        plcc=linear,
        plcc_logistic=None if after is None else _pearson(after, np.asarray(labels, np.float64)),
        krcc=krcc(scores, labels),
        rmse_logistic=None if after is None else rmse(after, labels),
    )


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
    x, y = _pair(scores, labels)
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


def read_scores(path: Path, column: str = "score") -> dict[str, float]:
    """Return the scores by image of a file that `iqa-run` wrote (.jsonl, .json, .csv) or of any CSV image,score.

    `column` may also be one of the branches, vcg or vda. Images without a score (failed ones) are left out, and so are
    all where the file has no such branch. Raises DatasetError.
    """
    try:
        if path.suffix.lower() == ".csv":
            rows = read_csv(path, "image", "score")
            found = [(row["image"], float(row[column])) for row in rows if row.get(column)]
        elif path.suffix.lower() in {".jsonl", ".json"}:
            records, _ = read_records(path, Format(path.suffix.lower()[1:]))
            values = [(record.image, getattr(record, column)) for record in records]
            found = [(image, value) for image, value in values if value is not None]
        else:
            raise DatasetError(f"the score file {path} must be called .jsonl, .json or .csv")
    except (OutputError, ValueError, OSError) as exc:
        raise DatasetError(f"the score file {path} cannot be read: {exc}") from exc
    scores = dict(found)
    if len(scores) < len(found):
        raise DatasetError(f"the score file {path} has {len(found) - len(scores)} images twice")
    return scores


@dataclass(frozen=True)
class GmadPair:
    """Two images that the fixed model finds about equal and the other one does not."""

    level: float  # of the fixed model's score, as a quantile of all images
    better: str  # the image that the other model prefers
    worse: str
    fixed: tuple[float, float]  # the fixed model's scores of better, worse
    other: tuple[float, float]  # the other model's


def gmad_pairs(
    fixed: Mapping[str, float], other: Mapping[str, float], levels: int, window: float = 0.02
) -> tuple[GmadPair, ...]:
    """Return, for evenly spaced levels of the fixed model, the pair there on which the other differs most.

    `fixed` and `other` map the same images to scores; a level consists of the share `window` of images (two at least)
    that stand around it when sorted by the fixed model. Call it both ways round for the paper's two figures.
    """
    if different := sorted(set(fixed) ^ set(other)):
        raise DatasetError(
            f"{len(different)} images have a score in one file only: {', '.join(different[:3])}"
            f"{' …' if len(different) > 3 else ''}"
        )
    if not 1 <= levels <= len(fixed) // 2:
        raise DatasetError(f"{len(fixed)} images have room for 1 to {len(fixed) // 2} levels, not {levels}")
    if not 0 < window <= 1:
        raise DatasetError(f"the window is a share of the images between 0 and 1, not {window}")
    images = sorted(fixed, key=lambda image: (fixed[image], image))
    _pair([fixed[image] for image in images], [other[image] for image in images])
    size = max(2, round(window * len(images)))
    pairs = []
    for index in range(levels):
        level = (index + 0.5) / levels
        first = min(max(0, round(level * len(images) - size / 2)), len(images) - size)
        near = images[first : first + size]
        worse, better = min(near, key=other.__getitem__), max(near, key=other.__getitem__)
        if other[worse] == other[better]:
            raise DatasetError(f"the other model gives one score to all {size} images around level {level:.2f}")
        pairs.append(
            GmadPair(level, better, worse, (fixed[better], fixed[worse]), (other[better], other[worse])),
        )
    return tuple(pairs)


def _pair(scores: Values, labels: Values) -> tuple[Array, Array]:
    x, y = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise DatasetError(f"scores of shape {x.shape} cannot be compared with labels of shape {y.shape}")
    for name, values in (("scores", x), ("labels", y)):
        if bad := np.flatnonzero(~np.isfinite(values)).tolist():
            raise DatasetError(f"{len(bad)} of {len(x)} {name} are NaN or infinite, the first at index {bad[0]}")
    if len(x) < 2:
        raise DatasetError(f"correlation needs two images at least, not {len(x)}")
    return x, y


def _varied(scores: Values, labels: Values) -> tuple[Array, Array]:
    x, y = _pair(scores, labels)
    for name, values in (("scores", x), ("labels", y)):
        if np.ptp(values) == 0:
            raise DatasetError(f"all {len(values)} {name} are {values[0]:g}: there is nothing to correlate")
    return x, y


def _pearson(x: Array, y: Array) -> float:
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # squares neither overflow nor vanish
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def _ranks(values: Array) -> Array:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (np.cumsum(counts) - (counts - 1) / 2)[where]
    return ranks


def _tied_pairs(values: Array) -> int:
    _, counts = np.unique(values, axis=0, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


def _descend(b: Array, x: Array, y: Array) -> tuple[Array, float]:
    """Return the Levenberg–Marquardt minimum below `b`, and its sum of squares."""
    curve, jacobian = _logistic(b, x)
    cost, damping = float(np.sum((y - curve) ** 2)), 1e-2
    for _ in range(LOGISTIC_STEPS):
        hessian = jacobian.T @ jacobian
        # The floor keeps a parameter where it is that has no influence any more (a step between two points).
        damped = hessian + damping * np.diag(np.maximum(np.diag(hessian), 1e-9))
        step = np.linalg.solve(damped, jacobian.T @ (y - curve))
        trial = b + step
        trial[3] = np.copysign(max(abs(trial[3]), 1e-6), b[3])  # never through 0, where the curve is not defined
        trial_curve, trial_jacobian = _logistic(trial, x)
        trial_cost = float(np.sum((y - trial_curve) ** 2))
        if trial_cost < cost:
            settled = bool(np.all(np.abs(step) <= 1e-9 * (1 + np.abs(b))))
            b, curve, jacobian, cost, damping = trial, trial_curve, trial_jacobian, trial_cost, damping / 5
            if settled:
                break
        elif damping > 1e12:
            break
        else:
            damping *= 4
    return b, cost


def _logistic(b: Array, x: Array) -> tuple[Array, Array]:
    """Return the curve and its derivatives (points, 4)."""
    z = (x - b[2]) / b[3]
    share = (1 + np.tanh(z / 2)) / 2
    slope = (b[0] - b[1]) * share * (1 - share) / b[3]
    return b[1] + (b[0] - b[1]) * share, np.stack([share, 1 - share, -slope, -slope * z], axis=1)

"""How well scores agree with labels, the way image quality papers count it.

`scores` are what a model says, `labels` what it should say, in the same order; both point the same way (turn labels
that are better when lower before). Everything that cannot be correlated raises DatasetError.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.extra import load_extra
from ..data.labelfiles import read_csv
from ..engine.agreement import Array, Values, paired, pearson, plcc, srcc, varied
from ..errors import DatasetError, OutputError
from ..runtime.command.recordfile import read_records
from ..runtime.command.records import Format

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
    """Fit the curve by least squares from b1 = max y, b2 = min y, b3 = mean x, b4 = std x / 4.

    From there alone, few points and falling ones can end in a poor local minimum, so the descent also begins from
    b4 = std x and from the falling counterparts of both; the best of the four is returned. Raises DatasetError for
    fewer than five points.
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


def plcc_logistic(scores: Values, labels: Values) -> float:
    """Return Pearson's linear correlation of labels with the scores laid on them by the fitted logistic."""
    return pearson(fit_logistic(scores, labels)(scores), np.asarray(labels, np.float64))


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
        plcc_logistic=None if after is None else pearson(after, np.asarray(labels, np.float64)),
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
    paired([fixed[image] for image in images], [other[image] for image in images])
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


def _descend(start: float, x: Array, y: Array) -> Logistic:
    """Return the least squares below b1 = 1, b2 = 0, b3 = 0, b4 = `start`; b4 keeps its sign."""

    def curve(b: Array) -> Logistic:
        # 0 is no slope, and e¹⁴ as good as infinite: the curve of a step, and of a straight line.
        return Logistic(b[0], b[1], b[2], math.copysign(math.exp(np.clip(b[3], -14, 14)), start))

    begin = [1, 0, 0, math.log(abs(start))]
    least_squares = load_extra("scipy.optimize").least_squares
    found = least_squares(lambda b: curve(b)(x) - y, begin, method="lm", ftol=1e-14, xtol=1e-10, gtol=1e-14)
    return curve(found.x)

"""How well two rows of numbers agree: Spearman's and Pearson's correlation, in plain NumPy."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import DatasetError

Array = npt.NDArray[np.float64]
Values = Sequence[float] | npt.NDArray[np.floating]


def srcc(scores: Values, labels: Values) -> float:
    """Return Spearman's rank correlation; equal values share the mean of their ranks. Raises DatasetError."""
    x, y = varied(scores, labels)
    return pearson(_ranks(x), _ranks(y))


def plcc(scores: Values, labels: Values) -> float:
    """Return Pearson's linear correlation of the values as they are. Raises DatasetError."""
    return pearson(*varied(scores, labels))


def paired(scores: Values, labels: Values) -> tuple[Array, Array]:
    """Return both as float64. Raises DatasetError unless they are as long as each other, finite, and two at least."""
    x, y = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise DatasetError(f"scores of shape {x.shape} cannot be compared with labels of shape {y.shape}")
    for name, values in (("scores", x), ("labels", y)):
        if bad := np.flatnonzero(~np.isfinite(values)).tolist():
            raise DatasetError(f"{len(bad)} of {len(x)} {name} are NaN or infinite, the first at index {bad[0]}")
    if len(x) < 2:
        raise DatasetError(f"correlation needs two images at least, not {len(x)}")
    return x, y


def varied(scores: Values, labels: Values) -> tuple[Array, Array]:
    """Return both as `paired` does. Raises DatasetError also where all values of one are equal."""
    x, y = paired(scores, labels)
    for name, values in (("scores", x), ("labels", y)):
        if np.ptp(values) == 0:
            raise DatasetError(f"all {len(values)} {name} are {values[0]:g}: there is nothing to correlate")
    return x, y


def pearson(x: Array, y: Array) -> float:
    """Return the correlation of values that have been checked."""
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # squares neither overflow nor vanish
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def _ranks(values: Array) -> Array:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (np.cumsum(counts) - (counts - 1) / 2)[where]
    return ranks

"""Statistics of samples, and whether another run would have the same median."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float64]

LIMIT = 0.03  # medians that differ by no larger share count as the same
CV_LIMIT = 0.05
DEVICE_CV_LIMIT = 0.025  # for computing on a GPU: trtexec's limit
FEWEST = 5  # samples that can be judged
_RESAMPLES = 1000


@dataclass(frozen=True)
class Summary:
    """The distribution of samples, in their own unit."""

    count: int
    minimum: float
    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    cv: float  # standard deviation over mean


@dataclass(frozen=True)
class Stability:
    """How far to trust the median, as shares. `problems` is empty if it can be trusted."""

    drift: float  # median of the later half / median of the earlier half − 1
    split: float  # the same of every second sample and the others: noise without drift
    repeat: float  # in 19 of 20 pairs of such runs the medians differ by less
    problems: tuple[str, ...]


def summarise(samples: Sequence[float]) -> Summary:
    """Return the summary of at least one sample."""
    values = np.asarray(samples, float)
    mean = float(values.mean())
    deviation = float(values.std(ddof=1)) if values.size > 1 else 0.0
    p90, p95, p99 = (float(p) for p in np.percentile(values, (90, 95, 99)))
    cv = deviation / mean if mean else 0.0
    return Summary(values.size, float(values.min()), mean, float(np.median(values)), p90, p95, p99, cv)


def judge(samples: Sequence[float], cv_limit: float = CV_LIMIT) -> Stability:
    """Judge samples in the order they were taken, at least one of them."""
    values = np.asarray(samples, float)
    half = values.size // 2
    drift = _apart(values[-half:], values[:half]) if half else 0.0
    split = _apart(values[1::2], values[::2]) if half else 0.0
    cv, repeat = summarise(samples).cv, _repeat(values)
    rules = {
        f"{values.size} samples are too few to judge by; take {FEWEST} or more": values.size < FEWEST,
        f"the coefficient of variation is {cv:.1%}, above {100 * cv_limit:g}%": cv > cv_limit,
        f"the later half took {drift:+.1%}: the machine drifts": abs(drift) > LIMIT,
        f"every second sample took {split:+.1%}": abs(split) > LIMIT,
        f"another run's median may differ by {repeat:.1%}, more than {LIMIT:.0%}": repeat > LIMIT,
    }
    return Stability(drift, split, repeat, tuple(text for text, broken in rules.items() if broken))


def _apart(later: Samples, earlier: Samples) -> float:
    return float(np.median(later) / np.median(earlier) - 1)


def _repeat(values: Samples) -> float:
    """Return the 95th percentile of the difference of two medians, by a seeded bootstrap."""
    generator = np.random.default_rng(0)
    drawn = np.median(generator.choice(values, (2, _RESAMPLES, values.size)), axis=2)
    return float(np.percentile(np.abs(drawn[0] / drawn[1] - 1), 95))

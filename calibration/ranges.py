"""Histograms, and the ranges that a quantiser takes from them. All have the same bins: any two merge exactly.

Bins are a float32's sign, exponent and first five bits of mantissa: 32 to an octave, from 2⁻²⁶ to 2¹⁸, one for zero,
and one at each end of each sign for what lies beyond.
"""

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]

_PER_OCTAVE_BITS = 5
_SHIFT = 23 - _PER_OCTAVE_BITS
_SMALLEST, _LARGEST = -26, 18  # exponents
_OCTAVES = (_LARGEST - _SMALLEST) << _PER_OCTAVE_BITS
_SIDE = _OCTAVES + 2  # bins of one sign: tiny, the octaves, huge
BINS = 2 * _SIDE + 1
ZERO = _SIDE  # the bin of zeros, and of what is below 2⁻¹³¹
_RAW = 1 << (32 - _SHIFT)
_INFINITE = 255 << _PER_OCTAVE_BITS  # where infinities and NaN start among the raw values of one sign

FP16_OVERFLOW = 65520.0  # the smallest number that fp16 rounds to infinity
FP16_FLUSH = 2.0**-25  # up to this, fp16 rounds to zero
FP16_SPACING = 2.0**-24  # of numbers near zero


def _fold() -> npt.NDArray[np.intp]:
    """Return the bin of each raw value (sign, exponent, top of mantissa); BINS for what is not finite."""
    raw = np.arange(_RAW // 2)
    inside = raw - ((127 + _SMALLEST) << _PER_OCTAVE_BITS)
    offset = np.where(raw == 0, 0, np.clip(inside + 2, 1, _SIDE))
    finite = raw < _INFINITE
    return np.concatenate([np.where(finite, ZERO + offset, BINS), np.where(finite, ZERO - offset, BINS)])


_FOLD = _fold()
_STARTS = 2.0**_SMALLEST * np.concatenate(
    [(1 + np.arange(32) / 32) * 2.0**octave for octave in range(_LARGEST - _SMALLEST)]
)
_LOWER = np.concatenate([[0.0], _STARTS, [2.0**_LARGEST]])  # the smallest magnitude of each bin of one sign
_ENDS = np.append(_STARTS[1:], 2.0**_LARGEST)
_CENTRES = np.concatenate([[2.0**_SMALLEST / 2], (_STARTS + _ENDS) / 2, [2.0**_LARGEST]])
CENTRES: Weights = np.concatenate([-_CENTRES[::-1], [0.0], _CENTRES])
LOWER: Weights = np.concatenate([_LOWER[::-1], [0.0], _LOWER])  # the smallest magnitude in each bin


class Method(enum.StrEnum):
    """How a range is chosen."""

    MAX = "max"  # all that was seen
    PERCENTILE = "percentile"  # all but a small share at each end


@dataclass(frozen=True)
class Range:
    """What a tensor's 8-bit numbers span; it always holds zero, which padding needs exactly."""

    low: float
    high: float

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(-self.low, self.high)


def histogram(values: FloatArray) -> tuple[Counts, int]:
    """Return the counts of all bins, and the number of values that no bin holds: infinities and NaN."""
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    raw = np.bincount(bits >> _SHIFT, minlength=_RAW)
    # Whole numbers below 2⁵³: the weights of this bincount are exact.
    folded = np.bincount(_FOLD, weights=raw, minlength=BINS + 1).astype(np.int64)
    return folded[:BINS], int(folded[BINS])


def balanced(counts: Counts) -> Weights:
    """Return one distribution of (steps, BINS) counts in which every step that saw anything weighs the same."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    seen = max(1, int(np.count_nonzero(totals)))
    weights: Weights = shares.sum(axis=0) / seen
    return weights


def quantile(weights: Weights, share: float) -> float:
    """Return the middle of the bin below which `share` of the distribution lies."""
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, share * cumulative[-1]))
    return float(CENTRES[min(index, BINS - 1)])


def choose_range(weights: Weights, low: float, high: float, method: Method, percentile: float = 99.9) -> Range:
    """Return the range for a tensor with this distribution, whose values lie between `low` and `high`."""
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low == 0 or not weights.any():
        return Range(low, high)
    if method is Method.PERCENTILE:
        ends = quantile(weights, 1 - percentile / 100), quantile(weights, percentile / 100)
        return Range(min(max(low, ends[0]), 0.0), max(min(high, ends[1]), 0.0))
    return Range(low, high)


def fp16_loss(weights: Weights) -> float:
    """Return the share of a distribution's power that fp16 loses near zero, where its numbers lie evenly apart.

    Elsewhere rounding costs every tensor the same 8·10⁻⁸, which does not count here.
    """
    magnitude = np.abs(CENTRES)
    error = np.minimum(FP16_SPACING**2 / 12, magnitude**2)
    subnormal = magnitude < 2.0**-14
    power = float(np.sum(weights * magnitude**2))
    return float(np.sum(weights * error, where=subnormal)) / power if power else 0.0

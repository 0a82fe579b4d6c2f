"""Histograms that merge exactly, and ranges chosen from them, compared with what NumPy says of the values."""

import numpy as np
import numpy.typing as npt
import pytest

from diffiqa.calibration.ranges import (
    BINS,
    CENTRES,
    LOWER,
    ZERO,
    Method,
    balanced,
    choose_range,
    fp16_loss,
    histogram,
    quantile,
)

FloatArray = npt.NDArray[np.float32]


def normals(seed: int, size: int = 20_000) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def weights_of(values: FloatArray) -> npt.NDArray[np.float64]:
    return balanced(histogram(values)[0][None])


def test_histograms_merge_exactly() -> None:
    first, second = normals(1), 100 * normals(2)
    together, _ = histogram(np.concatenate([first, second]))
    assert np.array_equal(histogram(first)[0] + histogram(second)[0], together)
    assert together.sum() == 40_000


def test_each_value_falls_into_its_bin() -> None:
    values = normals(3, 300) * np.float32(10) ** np.random.default_rng(4).uniform(-9, 7, 300).astype(np.float32)
    for value in values:
        (bin_,) = np.nonzero(histogram(np.array([value]))[0])[0]
        magnitude = abs(float(value))
        assert np.sign(value) == np.sign(bin_ - ZERO)
        assert magnitude >= LOWER[bin_]
        outer = bin_ + int(np.sign(value))
        assert not 0 <= outer < BINS or magnitude < LOWER[outer]


def test_zero_powers_of_two_and_the_ends_have_their_places() -> None:
    counts, _ = histogram(np.array([0.0, -0.0, 2.0**-25, 1e30, -1e-30], np.float32))
    assert counts[ZERO] == 2
    assert counts[np.nonzero((LOWER == 2.0**-25) & (CENTRES > 0))[0][0]] == 1
    assert counts[-1] == 1
    assert counts[ZERO - 1] == 1


def test_what_is_not_finite_is_counted_apart() -> None:
    counts, nonfinite = histogram(np.array([np.inf, -np.inf, np.nan, -np.nan, 3e38], np.float32))
    assert (counts.sum(), nonfinite) == (1, 4)


def test_every_step_weighs_the_same() -> None:
    often, _ = histogram(np.full(10_000, 1.0, np.float32))
    seldom, _ = histogram(np.full(10, 8.0, np.float32))
    weights = balanced(np.stack([often, seldom, np.zeros_like(often)]))
    assert weights[CENTRES > 4].sum() == pytest.approx(0.5)
    assert weights.sum() == pytest.approx(1)


def test_quantiles_are_those_of_the_values() -> None:
    for share in (0.001, 0.25, 0.5, 0.9, 0.999):
        values = normals(5) + 0.5
        assert quantile(weights_of(values), share) == pytest.approx(
            float(np.quantile(values, share)), rel=0.04, abs=0.02
        )


def test_max_spans_all_and_holds_zero() -> None:
    values = np.abs(normals(6)) + 1
    found = choose_range(weights_of(values), float(values.min()), float(values.max()), Method.MAX)
    assert (found.low, found.high) == (0.0, values.max())


def test_an_outlier_is_clipped() -> None:
    values = np.append(normals(7), np.float32(200.0))
    found = choose_range(weights_of(values), float(values.min()), 200.0, Method.PERCENTILE, percentile=99.9)
    assert 2 < found.high < 100


@pytest.mark.parametrize("method", list(Method))
def test_a_tensor_of_zeros_has_an_empty_range(method: Method) -> None:
    found = choose_range(weights_of(np.zeros(9, np.float32)), 0.0, 0.0, method)
    assert found.largest == 0


def test_only_small_values_lose_power_in_fp16() -> None:
    values = normals(9)
    assert fp16_loss(weights_of(values)) < 1e-9
    tiny = values * np.float32(1e-6)
    lost = np.mean((tiny - tiny.astype(np.float16).astype(np.float32)) ** 2) / np.mean(tiny**2)
    assert fp16_loss(weights_of(tiny)) == pytest.approx(float(lost), rel=0.1)

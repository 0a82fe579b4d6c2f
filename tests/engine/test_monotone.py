import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from diffiqa.engine.monotone import Monotone, fit_monotone


def test_goes_through_its_knots_in_straight_lines() -> None:
    line = Monotone((0.0, 1.0, 3.0), (2.0, 4.0, 4.5))
    assert [line(x) for x in (0, 0.5, 1, 2, 3)] == [2, 3, 4, 4.25, 4.5]


@pytest.mark.parametrize(("slope", "values"), [(0, (2.0, 4.5)), (1, (1.0, 5.5))])
def test_beyond_the_ends_it_stays_or_goes_on(slope: int, values: tuple[float, float]) -> None:
    line = Monotone((0.0, 1.0, 3.0), (2.0, 4.0, 4.5), slope)
    assert (line(-1), line(4)) == values


def test_says_what_is_wrong_with_values_from_a_file() -> None:
    cases: list[tuple[tuple[float, ...], tuple[float, ...], int, str]] = [
        ((), (), 0, "one at least"),
        ((0.0, 1.0), (0.0,), 0, "as many outputs"),
        ((0.0, 0.0), (0.0, 1.0), 0, "do not rise"),
        ((0.0, 1.0), (1.0, 0.0), 0, "fall"),
        ((0.0, float("nan")), (0.0, 1.0), 0, "do not rise"),
        ((0.0, 1.0), (0.0, 1.0), 2, "slope"),
    ]
    for inputs, outputs, slope, problem in cases:
        assert problem in str(Monotone(inputs, outputs, slope).problem)


def test_fits_as_isotonic_regression_does_where_every_pair_is_a_group() -> None:
    random = np.random.default_rng(3)
    x = random.permutation(40).astype(float)
    y = x / 10 + random.normal(size=40)
    fitted = fit_monotone(x, y, knots=40)
    blocks = isotonic_regression(y[np.argsort(x)]).x
    assert fitted.problem is None
    assert fitted.outputs == pytest.approx(sorted(set(blocks)), abs=1e-12)


def test_a_fit_has_no_bias_and_pools_equal_inputs() -> None:
    random = np.random.default_rng(4)
    x = np.repeat(random.normal(size=50), 4)
    y = x + 0.3 + random.normal(scale=0.01, size=200)
    fitted = fit_monotone(x, y, knots=20, slope_beyond=1)
    assert fitted.problem is None
    assert np.mean([fitted(a) - b for a, b in zip(x, y, strict=True)]) == pytest.approx(0, abs=0.002)
    assert fit_monotone([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], knots=5) == Monotone((1.0,), (3.0,))


def test_wants_as_many_pairs_as_knots() -> None:
    with pytest.raises(ValueError, match="4 knots"):
        fit_monotone([1, 2, 3], [1, 2, 3], knots=4)

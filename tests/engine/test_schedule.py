"""The cosine schedule and the sampling table, against the formulas written out for one step at a time."""

import math

import numpy as np
import pytest

from diffiqa.engine.schedule import Kind, Schedule, Taps

STEPS = [2, 6, 50, 2000]
# The table is float64 rounded once to float32: half a unit in the last place is 2⁻²⁴ of the number at most. Twice that
# leaves room for the rounding of the last float64 bits to fall to the other side.
ROUNDED_ONCE = 2.0**-23


def alpha_bars(steps: int) -> list[float]:
    """ᾱ without products: β undoes the division, so ᾱ is f itself until β meets its ceiling in the last step."""

    def f(i: int) -> float:
        return math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    bars = [f(i + 1) / f(0) for i in range(steps - 1)]
    return [*bars, bars[-1] * (1 - 0.999)]


@pytest.mark.parametrize("steps", STEPS)
def test_alpha_bar_is_the_cosine_with_beta_at_most_0999(steps: int) -> None:
    bar = Schedule(steps=steps).alpha_bar
    assert bar.dtype == np.float64
    np.testing.assert_allclose(bar, alpha_bars(steps), rtol=1e-9)  # a product of 2000 factors


@pytest.mark.parametrize("steps", STEPS)
def test_sampling_coefficients_are_the_formulas(steps: int) -> None:
    table, bars = Schedule(steps=steps).coefficients, alpha_bars(steps)
    for i in range(steps):
        bar, before = bars[i], bars[i - 1] if i else 1.0
        beta = 1 - bar / before
        variance = beta * (1 - before) / (1 - bar)
        expected = {
            "noise_level": math.sqrt(bar),
            "y_to_x0": math.sqrt(1 / bar),
            "noise_to_x0": math.sqrt(1 / bar - 1),
            "x0_to_mean": beta * math.sqrt(before) / (1 - bar),
            "y_to_mean": (1 - before) * math.sqrt(1 - beta) / (1 - bar),
            "sigma": math.sqrt(max(variance, 1e-20)) if i > 0 else 0.0,
        }
        for name, value in expected.items():
            column = getattr(table, name)
            assert column.shape == (steps,)
            assert column.dtype == np.float32
            assert column[i] == pytest.approx(value, rel=ROUNDED_ONCE, abs=0), f"{name}[{i}]"


def test_the_last_step_returns_the_estimate_alone() -> None:
    table = Schedule().coefficients
    assert (table.x0_to_mean[0], table.y_to_mean[0], table.sigma[0]) == (1, 0, 0)


@pytest.mark.parametrize(("kind", "std"), [(Kind.Y0, 0.0), (Kind.T1, 0.17), (Kind.T2, 0.32)])
def test_default_taps_hold_the_noise_the_definition_states(kind: Kind, std: float) -> None:
    # The state after step i is at the noise of step i − 1.
    i = Taps().step_of(kind)
    bar = Schedule().alpha_bar[i - 1] if i else 1.0
    assert math.sqrt(1 - bar) == pytest.approx(std, abs=0.01)


def test_the_distorted_image_is_no_tap() -> None:
    with pytest.raises(KeyError):
        Taps().step_of(Kind.DIS)

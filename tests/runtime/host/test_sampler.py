"""One sampling step and the whole loop, against the formulas in float64 and the documented float32 rounding."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from diffiqa.engine.noise import NoiseField
from diffiqa.engine.schedule import Kind, Schedule, Taps
from diffiqa.runtime.host.sampler import restore, step

FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]
SHAPE = (3, 4, 8)
EPS = 2.0**-24  # float32 rounds to this part of a number


def inputs(schedule: Schedule, i: int, seed: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """A state, a prediction whose estimate reaches a little beyond [-1, 1], and noise."""
    random = np.random.default_rng(seed)
    bar = schedule.alpha_bar[i]
    x0 = random.uniform(-1.4, 1.4, SHAPE)
    y = random.standard_normal(SHAPE) * 1.5
    eps = (y * math.sqrt(1 / bar) - x0) / math.sqrt(1 / bar - 1)
    return y.astype(np.float32), eps.astype(np.float32), random.standard_normal(SHAPE).astype(np.float32)


def formula(schedule: Schedule, i: int, y: Array, eps: Array, z: Array) -> tuple[Array, Array]:
    """The step in float64; also the estimate before clamping."""
    bar = float(schedule.alpha_bar[i])
    before = float(schedule.alpha_bar[i - 1]) if i > 0 else 1.0
    alpha = bar / before
    beta = 1 - alpha
    x0 = y * math.sqrt(1 / bar) - eps * math.sqrt(1 / bar - 1)
    clamped = np.minimum(np.maximum(x0, -1.0), 1.0)
    mean = clamped * beta * math.sqrt(before) / (1 - bar) + y * (1 - before) * math.sqrt(alpha) / (1 - bar)
    variance = max(beta * (1 - before) / (1 - bar), 1e-20)
    return mean + (math.sqrt(variance) * z if i > 0 else 0.0), x0


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("steps", "i"), [(50, i) for i in (0, 1, 5, 10, 25, 48, 49)] + [(2000, 0), (2000, 1), (2000, 1999)]
)
def test_step_is_the_formula(steps: int, i: int, seed: int) -> None:
    schedule = Schedule(steps=steps)
    table = schedule.coefficients
    y, eps, z = inputs(schedule, i, seed)
    expected, x0 = formula(schedule, i, y.astype(np.float64), eps.astype(np.float64), z.astype(np.float64))
    inside = (np.abs(x0) < 1).mean()
    assert 0.3 < inside < 0.95  # both sides of the clamp are looked at
    # x0 is a difference of products that are large when the state is mostly noise: coefficient, product and difference
    # round there; everything after is of the size of the state.
    largest = max(np.abs(y).max() * table.y_to_x0[i], np.abs(eps).max() * table.noise_to_x0[i])
    atol = EPS * (6 * largest * table.x0_to_mean[i] + 40)
    step(table, i, y, eps, z, np.empty_like(y))
    np.testing.assert_allclose(y, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("seed", [3])
@pytest.mark.parametrize("i", [0, 1, 7, 49])
def test_step_rounds_every_product_and_sum_in_the_documented_order(i: int, seed: int) -> None:
    # Other backends repeat this arithmetic bit by bit.
    table = Schedule().coefficients
    y, eps, z = inputs(Schedule(), i, seed)
    one, before = np.float32(1), y.copy()
    expected = np.empty_like(y)
    for place in np.ndindex(SHAPE):
        x0 = np.float32(before[place] * table.y_to_x0[i]) - np.float32(eps[place] * table.noise_to_x0[i])
        x0 = min(max(x0, -one), one)
        value = np.float32(x0 * table.x0_to_mean[i]) + np.float32(before[place] * table.y_to_mean[i])
        expected[place] = value + np.float32(z[place] * table.sigma[i]) if i > 0 else value
    step(table, i, y, eps, z, np.empty_like(y))
    np.testing.assert_array_equal(y, expected)


def test_the_last_step_adds_no_noise_even_where_there_is_none_to_read() -> None:
    y, eps, z = inputs(Schedule(), 0, 4)
    step(Schedule().coefficients, 0, y, eps, np.full_like(z, np.nan), np.empty_like(y))
    assert np.isfinite(y).all()


class Toy:
    """A denoiser that depends on the state, the level and a condition, and records its levels."""

    def __init__(self, seed: int) -> None:
        self.y = np.full(SHAPE, np.nan, np.float32)
        self.noise = np.full(SHAPE, np.nan, np.float32)
        self.levels: list[float] = []
        self._condition = np.random.default_rng(seed).uniform(-1, 1, SHAPE)

    def predict(self, y: Array, level: float) -> Array:
        out: Array = y * math.sqrt(1 - 0.9 * level**2) + 0.4 * np.sin(3 * y * level + self._condition)
        return out

    def __call__(self, noise_level: float) -> None:
        self.levels.append(noise_level)
        self.noise[...] = self.predict(self.y.astype(np.float64), noise_level)


@pytest.mark.parametrize("seed", [5, 6])
@pytest.mark.parametrize(
    ("steps", "taps"),
    [(50, Taps()), (6, Taps(t1=2, t2=4)), (6, Taps(t1=5, t2=1))],
    ids=["paper", "six steps", "from the first step"],
)
def test_loop_returns_the_states_after_the_tapped_steps(steps: int, taps: Taps, seed: int) -> None:
    schedule, toy = Schedule(steps=steps), Toy(seed)
    field = NoiseField(seed, SHAPE[1:])
    restored = restore(toy, field, schedule, taps, tuple(Kind))

    y32 = np.empty(SHAPE, np.float32)
    field.fill(steps, y32)
    y, states, inside = y32.astype(np.float64), {}, []
    for i in range(steps - 1, -1, -1):
        field.fill(i, y32)
        level = math.sqrt(schedule.alpha_bar[i])
        y, x0 = formula(schedule, i, y, toy.predict(y, level), y32.astype(np.float64))
        states[i] = y
        inside.append((np.abs(x0) < 1).mean())
    assert max(inside) > 0.3  # not only the clamp's ends
    assert toy.levels == [float(level) for level in schedule.coefficients.noise_level[::-1]]
    assert set(restored) == {Kind.Y0, Kind.T1, Kind.T2}
    for kind, i in ((Kind.Y0, 0), (Kind.T1, taps.t1), (Kind.T2, taps.t2)):
        # float32 states: each step adds some 1e-7, which the toy's slope of about 2 lets grow.
        np.testing.assert_allclose(restored[kind], states[i], rtol=0, atol=2e-5, err_msg=kind)


@pytest.mark.parametrize("kinds", [(), (Kind.DIS,), (Kind.DIS, Kind.Y0), (Kind.DIS, Kind.T2)], ids=repr)
def test_loop_returns_only_the_kinds_asked_for(kinds: tuple[Kind, ...]) -> None:
    schedule, taps = Schedule(steps=6), Taps(t1=2, t2=4)
    every = restore(Toy(7), NoiseField(7, SHAPE[1:]), schedule, taps, tuple(Kind))
    some = restore(Toy(7), NoiseField(7, SHAPE[1:]), schedule, taps, kinds)
    assert set(some) == set(kinds) - {Kind.DIS}
    for kind, state in some.items():
        np.testing.assert_array_equal(state, every[kind])


def test_taps_are_copies_that_the_next_restoration_leaves_alone() -> None:
    schedule, taps, toy = Schedule(steps=6), Taps(t1=2, t2=4), Toy(8)
    first = restore(toy, NoiseField(8, SHAPE[1:]), schedule, taps, tuple(Kind))
    kept = {kind: state.copy() for kind, state in first.items()}
    restore(toy, NoiseField(9, SHAPE[1:]), schedule, taps, tuple(Kind))
    for kind, state in first.items():
        np.testing.assert_array_equal(state, kept[kind])
        assert not np.shares_memory(state, toy.y)

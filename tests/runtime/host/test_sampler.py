"""One sampling step and the whole loop, against the formulas in float64 and the documented float32 rounding."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from diffiqa.engine.noise import NoiseField
from diffiqa.engine.sampling import Rows, Sampler, Sampling, TapRule
from diffiqa.engine.schedule import Kind, Schedule, Taps
from diffiqa.runtime.host.sampler import restore, step

FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]
SHAPE = (3, 4, 8)
EPS = 2.0**-24  # float32 rounds to this part of a number


def trained(schedule: Schedule, taps: Taps, kinds: tuple[Kind, ...] = tuple(Kind)) -> Rows:
    return Sampling.trained(schedule).rows(schedule, taps, kinds)


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


@pytest.mark.parametrize(("steps", "i"), [(50, 0), (50, 1), (50, 25), (50, 49), (2000, 1999)])
def test_step_is_the_formula(steps: int, i: int) -> None:
    schedule = Schedule(steps=steps)
    table = schedule.coefficients
    y, eps, z = inputs(schedule, i, 1)
    expected, x0 = formula(schedule, i, y.astype(np.float64), eps.astype(np.float64), z.astype(np.float64))
    inside = (np.abs(x0) < 1).mean()
    assert 0.3 < inside < 0.95  # both sides of the clamp are looked at
    # x0 is a difference of products that are large when the state is mostly noise: coefficient, product and difference
    # round there; everything after is of the size of the state.
    largest = max(np.abs(y).max() * table.y_to_x0[i], np.abs(eps).max() * table.noise_to_x0[i])
    atol = EPS * (6 * largest * table.x0_to_mean[i] + 40)
    step(table, i, y, eps, z, np.empty_like(y))
    np.testing.assert_allclose(y, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("i", [0, 1, 7, 49])
def test_step_rounds_every_product_and_sum_in_the_documented_order(i: int) -> None:
    # Other backends repeat this arithmetic bit by bit.
    table = Schedule().coefficients
    y, eps, z = inputs(Schedule(), i, 3)
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


@pytest.mark.parametrize(
    ("steps", "taps"),
    [(50, Taps()), (6, Taps(t1=2, t2=4)), (6, Taps(t1=5, t2=1))],
    ids=["paper", "six steps", "from the first step"],
)
def test_loop_returns_the_states_after_the_tapped_steps(steps: int, taps: Taps) -> None:
    schedule, toy = Schedule(steps=steps), Toy(5)
    field = NoiseField(5, SHAPE[1:])
    restored = restore(toy, field, trained(schedule, taps))

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


SAMPLINGS = {
    "ancestral": Sampling((4, 9, 14, 30, 49)),
    "a low start": Sampling((2, 4, 9, 44)),
    "ddim": Sampling((4, 9, 14, 30, 49), Sampler.DDIM),
    "half the noise": Sampling((4, 9, 30, 49), Sampler.DDIM, eta=0.5),
    "re-noised": Sampling((12, 49), Sampler.DDIM, taps=TapRule.RENOISED),
    "one step": Sampling((45,), Sampler.DDIM, taps=TapRule.RENOISED),
    "from the image": Sampling((4, 9, 24), from_image=True),
    "from the image, re-noised": Sampling((12,), Sampler.DDIM, taps=TapRule.RENOISED, from_image=True),
}


def chain(
    schedule: Schedule, sampling: Sampling, toy: "Toy", normals: Callable[[int], Array], image: Array
) -> dict[int, Array]:
    """The states by the step index whose noise level they have, the result at -1: in float64, by the papers' formulas.

    Equations 6 and 7 of DDPM (arXiv 2006.11239) with β of the pair of levels; equation 12 of DDIM (arXiv 2010.02502).
    """
    steps, states = [-1, *sampling.steps], {}
    y = normals(schedule.steps)
    if sampling.from_image:  # equation 4 of DDPM, with the image for x0
        bar = schedule.alpha_bar[sampling.steps[-1]]
        y = math.sqrt(bar) * image + math.sqrt(1 - bar) * y
    for before, now in zip(steps[-2::-1], steps[:0:-1], strict=True):
        bar, prior = schedule.alpha_bar[now], schedule.alpha_bar[before] if before >= 0 else 1.0
        x0 = np.clip((y - math.sqrt(1 - bar) * toy.predict(y, math.sqrt(bar))) / math.sqrt(bar), -1, 1)
        if sampling.sampler is Sampler.ANCESTRAL:
            alpha, beta = bar / prior, 1 - bar / prior
            mean = (math.sqrt(prior) * beta * x0 + math.sqrt(alpha) * (1 - prior) * y) / (1 - bar)
            sigma = math.sqrt(beta * (1 - prior) / (1 - bar))
        else:
            sigma = sampling.eta * math.sqrt((1 - prior) / (1 - bar) * (1 - bar / prior))
            direction = (y - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
            mean = math.sqrt(prior) * x0 + math.sqrt(max(1 - prior - sigma**2, 0)) * direction
        y = mean + sigma * normals(now)
        states[before] = y
    return states


@pytest.mark.parametrize("name", SAMPLINGS)
def test_fewer_steps_are_the_papers_chains_on_the_same_noise(name: str) -> None:
    """Compared by hand with diffusers 0.42.1 too, which is too heavy for a test.

    Its DDPM and DDIM schedulers in float64, on this schedule and toy and on the same noise, ended within 3.1e-7 of the
    table's chain: ancestral with 50, 10, 5 and 3 of 50 steps and 10, 5 and 3 of 10, DDIM with eta 0 in 10, 5 and 1,
    with eta 0.5 and with eta 1. There `use_clipped_model_output=True` is our clip.
    """
    schedule, taps, toy, sampling = Schedule(), Taps(), Toy(5), SAMPLINGS[name]
    field, scratch = NoiseField(5, SHAPE[1:]), np.empty(SHAPE, np.float32)

    def normals(step_index: int) -> Array:
        field.fill(step_index, scratch)
        return scratch.astype(np.float64)

    image = np.random.default_rng(6).uniform(-1, 1, SHAPE).astype(np.float32)
    states = chain(schedule, sampling, toy, normals, image.astype(np.float64))
    rows = sampling.rows(schedule, taps, tuple(Kind))
    restored = restore(toy, NoiseField(5, SHAPE[1:]), rows, (image, *rows.image) if rows.image else None)
    assert toy.levels == [float(schedule.coefficients.noise_level[i]) for i in reversed(sampling.steps)]
    expected = {Kind.Y0: states[-1]}
    for kind, tap in ((Kind.T1, taps.t1), (Kind.T2, taps.t2)):
        bar = schedule.alpha_bar[tap - 1]
        renoised = math.sqrt(bar) * states[-1] + math.sqrt(1 - bar) * normals(tap)
        expected[kind] = renoised if sampling.taps is TapRule.RENOISED else states[tap - 1]
    # Where the loop begins almost without a signal, x0 is a difference of numbers 1000 times as large.
    for kind, state in expected.items():
        np.testing.assert_allclose(restored[kind], state, rtol=0, atol=2e-4, err_msg=kind)


@pytest.mark.parametrize("kinds", [(), (Kind.DIS,), (Kind.DIS, Kind.Y0), (Kind.DIS, Kind.T2)], ids=repr)
def test_loop_returns_only_the_kinds_asked_for(kinds: tuple[Kind, ...]) -> None:
    schedule, taps = Schedule(steps=6), Taps(t1=2, t2=4)
    every = restore(Toy(7), NoiseField(7, SHAPE[1:]), trained(schedule, taps))
    some = restore(Toy(7), NoiseField(7, SHAPE[1:]), trained(schedule, taps, kinds))
    assert set(some) == set(kinds) - {Kind.DIS}
    for kind, state in some.items():
        np.testing.assert_array_equal(state, every[kind])


def test_taps_are_copies_that_the_next_restoration_leaves_alone() -> None:
    schedule, taps, toy = Schedule(steps=6), Taps(t1=2, t2=4), Toy(8)
    first = restore(toy, NoiseField(8, SHAPE[1:]), trained(schedule, taps))
    kept = {kind: state.copy() for kind, state in first.items()}
    restore(toy, NoiseField(9, SHAPE[1:]), trained(schedule, taps))
    for kind, state in first.items():
        np.testing.assert_array_equal(state, kept[kind])
        assert not np.shares_memory(state, toy.y)

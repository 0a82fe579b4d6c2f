"""sampler.cu against the NumPy loop of runtime/: noise in its place, steps bit for bit, taps, the step counter."""

import dataclasses

import numpy as np
import pytest

from diffiqa.engine.noise import NoiseField
from diffiqa.engine.sampling import Sampler, Sampling, TapRule
from diffiqa.engine.schedule import Ddim, Kind, Schedule, Taps
from diffiqa.kernels.launch import COEFFICIENTS, PROGRESS, Storage, Window
from diffiqa.runtime.host.sampler import restore, step

from .devices import Array, Device, Host
from .loop import Loop

# Units in the last place between our normals and NumPy's, whose float32 log, sin and cos differ from build to build.
# Measured 4 over all radius words; each is within 4 of the exact value.
NORMAL_ULP = 8


def some_windows(rng: np.random.Generator, size: tuple[int, int], count: int) -> list[Window]:
    """Windows of `size` anywhere in images of sizes of their own."""
    windows = []
    for _ in range(count):
        height, width = size[0] + int(rng.integers(0, 40)), size[1] + 4 * int(rng.integers(0, 10))
        windows.append(
            Window(
                seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
                size=(height, width),
                top=int(rng.integers(0, height - size[0] + 1)),
                left=4 * int(rng.integers(0, (width - size[1]) // 4 + 1)),
                lane=int(rng.integers(0, 2**32)),
            )
        )
    return windows


def some_size(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(1, 50)), 4 * int(rng.integers(1, 14))


def numpy_normals(windows: list[Window], size: tuple[int, int], step_index: int) -> Array:
    """The same noise by engine/noise.py."""
    out = np.empty((len(windows), 3, *size), np.float32)
    for window, image in zip(windows, out, strict=True):
        NoiseField(window.seed, window.size, window=size, top=window.top, left=window.left, lane=window.lane).fill(
            step_index, image
        )
    return out


def kernel_normals(device: Device, windows: list[Window], size: tuple[int, int], step_index: int) -> Array:
    """The noise the kernels add at `step_index`: what a loop of as many steps would start from."""
    loop = Loop(device, Storage.F32, windows, size, Schedule(steps=step_index))
    loop.begin()
    return loop.state


def bits(values: Array) -> Array:
    return values.view(np.uint32 if values.dtype == np.float32 else np.uint16)


both = pytest.mark.parametrize("storage", Storage)


def test_structs_have_the_sizes_of_their_tables(library: object) -> None:
    from diffiqa.kernels.launch import CROP, SOURCE, STEP, WINDOW

    sizes = Host(library).struct_sizes()  # type: ignore[arg-type]
    assert sizes == [dtype.itemsize for dtype in (WINDOW, STEP, PROGRESS, SOURCE, CROP)]


@both
def test_starting_noise_is_the_reference_in_every_window(
    device: Device, rng: np.random.Generator, storage: Storage
) -> None:
    size = some_size(rng)
    loop = Loop(device, storage, some_windows(rng, size, count=int(rng.integers(1, 4))), size)
    loop.begin()
    expected = numpy_normals(loop.windows, size, loop.schedule.steps)
    assert np.max(np.abs(loop.state - expected) / np.spacing(np.abs(expected))) <= NORMAL_ULP
    np.testing.assert_array_equal(bits(loop.y), bits(loop.state.astype(storage.dtype)))


def test_noise_of_a_window_is_that_of_the_image_it_is_cut_from(device: Device) -> None:
    size = (32, 48)
    image = kernel_normals(device, [Window(5, size, lane=7)], size, 9)
    window = kernel_normals(device, [Window(5, size, top=11, left=20, lane=7)], (20, 16), 9)
    np.testing.assert_array_equal(window, image[:, :, 11:31, 20:36])


def test_noise_counter_reaches_the_end_of_the_largest_image(device: Device) -> None:
    size = (37_837, 37_836)  # 3·H·W / 4 is a little below 2³²: no signed or 32-bit product may overflow on the way
    window = Window(3, size, top=size[0] - 2, left=size[1] - 8)
    found, expected = kernel_normals(device, [window], (2, 8), 1), numpy_normals([window], (2, 8), 1)
    assert np.max(np.abs(found - expected) / np.spacing(np.abs(expected))) <= NORMAL_ULP


def test_beginning_makes_the_last_step_index_the_next_to_do(device: Device) -> None:
    loop = Loop(device, Storage.F16, some_windows(np.random.default_rng(0), (8, 8), 5), (8, 8))
    loop.begin()
    assert loop.progress == (3, 0)
    level = loop.schedule.coefficients.noise_level[3]
    np.testing.assert_array_equal(device.get(loop.buffers.noise_level), np.full((5, 1), level))


@both
def test_steps_are_numpys_bit_for_bit_given_the_normals(
    device: Device, rng: np.random.Generator, storage: Storage
) -> None:
    size, schedule, batch = some_size(rng), Schedule(steps=4), int(rng.integers(1, 4))
    loop = Loop(device, storage, some_windows(rng, size, batch), size, schedule, taps=(2, 0))
    loop.begin()
    expected, tapped = loop.state, {}
    for i in reversed(range(4)):
        # Wide enough that many estimates are clipped on either side.
        predicted = rng.normal(0, 2, loop.shape).astype(storage.dtype)
        loop.predict(predicted)
        loop.step()
        z = kernel_normals(device, loop.windows, size, i) if i else np.full(loop.shape, np.nan, np.float32)
        step(schedule.coefficients, i, expected, predicted.astype(np.float32), z, np.empty_like(expected))
        np.testing.assert_array_equal(bits(loop.state), bits(expected))
        np.testing.assert_array_equal(bits(loop.y), bits(expected.astype(storage.dtype)))
        tapped[i] = expected.copy()
        assert loop.progress == (i - 1, 0)
        level = schedule.coefficients.noise_level[max(i - 1, 0)]  # the last step leaves the level as it is
        np.testing.assert_array_equal(device.get(loop.buffers.noise_level), np.full((batch, 1), level))
    np.testing.assert_array_equal(device.get(loop.buffers.taps), np.stack([tapped[2], tapped[0]]))


@both
def test_a_loop_starts_from_shares_of_an_image_and_of_noise(
    device: Device, rng: np.random.Generator, storage: Storage
) -> None:
    windows, schedule = [Window(seed, (16, 32), lane=seed) for seed in (3, 4)], Schedule(steps=4)
    walk = Sampling((0, 2), from_image=True).rows(schedule, Taps(), ())
    image = rng.uniform(-1, 1, (2, 3, 16, 32)).astype(storage.dtype)
    loop = Loop(device, storage, windows, (16, 32), walk=walk, given=(image, np.empty(0)))
    loop.begin()
    expected = np.empty(loop.shape, np.float32)
    for state, window in zip(expected, windows, strict=True):
        NoiseField(window.seed, (16, 32), lane=window.lane).fill(walk.start, state)
    assert walk.image
    expected *= walk.image[1]
    expected += image.astype(np.float32) * np.float32(walk.image[0])
    np.testing.assert_allclose(loop.state, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(bits(loop.y), bits(loop.state.astype(storage.dtype)))
    assert loop.progress == (1, 0)


@both
def test_a_state_of_another_shape_starts_from_a_share_of_what_is_given(
    device: Device, rng: np.random.Generator, storage: Storage
) -> None:
    elements, batch = 4 * int(rng.integers(1, 2000)), int(rng.integers(1, 4))
    windows = [Window(int(rng.integers(2**63)), (1, elements), lane=lane) for lane in range(batch)]
    given = (
        rng.normal(0, 3, (batch, 1, 1, elements)).astype(storage.dtype),
        rng.random((batch, 1)).astype(storage.dtype),
    )
    schedule = Schedule(3, linear=Ddim((400, 100, 0)), clip=False)
    walk = Sampling.trained(schedule).rows(schedule, Taps(), ())
    loop = Loop(device, storage, windows, (1, elements), walk=walk, planes=1, given=given)
    loop.begin()
    plain = Loop(device, Storage.F32, windows, (1, elements), walk=walk, planes=1)
    plain.begin()
    expected, shares = plain.state, given[1].astype(np.float32)[:, :, None, None]
    for state, window in zip(expected, windows, strict=True):
        noise = np.empty((1, elements), np.float32)
        NoiseField(window.seed, (1, elements), lane=window.lane, planes=1).fill(walk.start, noise)
        assert np.max(np.abs(state[0] - noise) / np.spacing(np.abs(noise))) <= NORMAL_ULP
    expected *= 1 - shares
    expected += given[0].astype(np.float32) * shares
    for row in (*reversed(range(3)), None):
        np.testing.assert_array_equal(bits(loop.state), bits(expected))
        np.testing.assert_array_equal(bits(loop.y), bits(expected.astype(storage.dtype)))
        if row is None:  # the last timestep is 0, and a step like the others
            break
        np.testing.assert_array_equal(device.get(loop.buffers.noise_level), np.float32((0, 100, 400)[row]))
        predicted = rng.normal(0, 2, loop.shape).astype(storage.dtype)  # estimates far outside of -1 and 1
        loop.predict(predicted)
        loop.step()
        scratch = np.full((2, *loop.shape), np.nan, np.float32)
        step(walk.factors, row, expected, predicted.astype(np.float32), *scratch, clip=False)


def test_last_step_adds_not_even_zero(device: Device) -> None:
    loop = Loop(device, Storage.F32, [Window(1, (4, 8))], (4, 8), Schedule(steps=1))
    loop.begin()
    device.set(loop.buffers.state, np.full(loop.shape, -0.0, np.float32))
    loop.predict(np.zeros(loop.shape))
    loop.step()
    assert np.signbit(loop.state).all()


def test_a_step_without_a_tap_leaves_the_tap_buffer_alone(device: Device) -> None:
    loop = Loop(device, Storage.F32, [Window(1, (8, 8))], (8, 8), taps=(1,))
    loop.begin()
    loop.predict(np.zeros(loop.shape))
    loop.step()
    assert np.all(bits(device.get(loop.buffers.taps)) == 0xFFFFFFFF)


def test_float32_input_may_be_the_state_itself(device: Device) -> None:
    size, windows = (12, 20), [Window(1, (12, 20)), Window(2, (12, 20), lane=1)]
    apart, shared = (Loop(device, Storage.F32, windows, size, in_place=in_place) for in_place in (False, True))
    for loop in (apart, shared):
        loop.begin()
        loop.predict(np.random.default_rng(3).normal(size=loop.shape))
        loop.step()
    np.testing.assert_array_equal(bits(shared.state), bits(apart.state))


@both
@pytest.mark.parametrize(("grid", "block"), [((1, 1), 32), ((3, 2), 64), ((1000, 50), 256)])
def test_the_shape_of_the_launch_does_not_show(
    device: Device, storage: Storage, grid: tuple[int, int], block: int
) -> None:
    size = (24, 36)
    windows = some_windows(np.random.default_rng(1), size, 2)
    plain, odd = (Loop(device, storage, windows, size, taps=(3,)) for _ in range(2))
    for loop in (plain, odd):
        launches = loop.buffers.begin(), loop.buffers.step()
        if loop is odd:
            launches = tuple(dataclasses.replace(launch, grid=grid, block=block) for launch in launches)  # type: ignore[assignment]
        device.run(launches[0])
        loop.predict(np.random.default_rng(2).normal(size=loop.shape))
        device.run(launches[1])
        assert loop.progress == (2, 0)
    np.testing.assert_array_equal(bits(odd.state), bits(plain.state))
    np.testing.assert_array_equal(device.get(odd.buffers.taps), device.get(plain.buffers.taps))


@both
def test_a_launch_after_the_last_step_changes_nothing(device: Device, storage: Storage) -> None:
    loop = Loop(device, storage, [Window(1, (8, 8))], (8, 8), taps=(0,))
    loop.begin()
    loop.predict(np.zeros(loop.shape))
    for _ in range(4):
        loop.step()
    addresses = [getattr(loop.buffers, name) for name in ("state", "y", "taps", "noise_level", "progress")]
    before = [device.get(address).tobytes() for address in addresses]
    loop.step()
    assert [device.get(address).tobytes() for address in addresses] == before
    assert loop.progress == (-1, 0)


@both
def test_beginning_again_starts_the_same_loop(device: Device, storage: Storage) -> None:
    loop = Loop(device, storage, [Window(1, (8, 8))], (8, 8))
    loop.begin()
    first = loop.state
    loop.predict(np.ones(loop.shape))
    loop.step()
    loop.begin()
    assert loop.progress == (3, 0)
    np.testing.assert_array_equal(loop.state, first)


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_a_prediction_that_overflowed_is_treated_as_in_numpy(device: Device, storage: Storage, bad: float) -> None:
    loop = Loop(device, storage, [Window(1, (4, 8))], (4, 8), Schedule(steps=1))
    loop.begin()
    expected, predicted = loop.state, np.zeros(loop.shape, np.float32)
    predicted[0, 1, 2, 3] = bad
    loop.predict(predicted)
    loop.step()
    step(loop.schedule.coefficients, 0, expected, predicted, np.empty_like(expected), np.empty_like(expected))
    np.testing.assert_array_equal(loop.state, expected)
    assert np.isnan(loop.state).sum() == np.isnan(bad)


@pytest.mark.parametrize("name", ["trained", "some steps", "half the noise", "re-noised"])
def test_whole_loop_agrees_with_the_host_loop(device: Device, name: str) -> None:
    size, schedule, taps = (16, 32), Schedule(steps=20), Taps(t1=3, t2=7)
    sampling = {
        "trained": Sampling.trained(schedule),
        "some steps": Sampling((2, 6, 11, 18)),
        "half the noise": Sampling((2, 4, 6, 19), Sampler.DDIM, eta=0.5),
        "re-noised": Sampling((5, 17), Sampler.DDIM, taps=TapRule.RENOISED),
    }[name]
    window = Window(11, (64, 64), top=16, left=32, lane=2)

    class Denoiser:
        """A prediction that depends on all of the U-Net's inputs."""

        def __init__(self) -> None:
            self.y, self.noise = (np.empty((3, *size), np.float32) for _ in range(2))

        def __call__(self, noise_level: float) -> None:
            np.multiply(np.tanh(self.y), np.float32(1 - noise_level), out=self.noise)

    noise = NoiseField(window.seed, window.size, window=size, top=window.top, left=window.left, lane=window.lane)
    kinds = (Kind.Y0, Kind.T1, Kind.T2)
    rows = sampling.rows(schedule, taps, kinds)
    expected = restore(Denoiser(), noise, rows)

    loop = Loop(device, Storage.F32, [window], size, schedule, tuple(rows.taps[kind] for kind in kinds), rows)
    loop.begin()
    for _ in range(rows.calls):
        level = device.get(loop.buffers.noise_level)[0, 0]
        loop.predict(np.tanh(loop.y) * np.float32(1 - float(level)))
        loop.step()
    restored = loop.state
    for _ in range(len(rows.steps) - rows.calls):
        loop.step()
    np.testing.assert_array_equal(bits(loop.state), bits(restored))  # what makes taps of it leaves it alone
    assert loop.progress == (-1, 0)
    for found, kind in zip(device.get(loop.buffers.taps), kinds, strict=True):
        # Normals differ by some ulp; nothing in the loop makes that grow by more than a few times.
        np.testing.assert_allclose(found[0], expected[kind], rtol=0, atol=2e-5)


def test_coefficient_names_are_the_schedules() -> None:
    assert set(COEFFICIENTS) == set(vars(Schedule().coefficients))

"""noise.h and device.h, one layer at a time: Philox words, normals, half precision."""

import numpy as np
import numpy.typing as npt
import pytest

from diffiqa.engine.noise import philox4x32
from diffiqa.kernels.launch import Launch

from .devices import Array, Device

# kat_vectors of Random123 1.09, philox4x32 with 10 rounds: counter, key, output.
PUBLISHED = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


def hexadecimal(text: str) -> npt.NDArray[np.uint32]:
    return np.array([[int(word, 16) for word in text.split()]], np.uint32)


def probe(device: Device, kernel: str, inputs: list[Array], out_shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Run a probe kernel over rows of `inputs`, with a grid that leaves every thread a few of them."""
    out = device.like(out_shape, dtype)
    addresses = [np.uint64(device.put(values)) for values in inputs]
    device.run(Launch("probes.cu", kernel, (3, 1), 64, (*addresses, np.uint64(out), np.int32(out_shape[0]))))
    return device.get(out)


@pytest.mark.parametrize("name", PUBLISHED)
def test_philox_gives_the_published_vectors(device: Device, name: str) -> None:
    counter, key, expected = map(hexadecimal, PUBLISHED[name])
    np.testing.assert_array_equal(probe(device, "probe_philox", [counter, key], (1, 4), np.uint32), expected)


def test_philox_is_the_reference_bit_for_bit(device: Device, rng: np.random.Generator) -> None:
    counters, keys = (rng.integers(0, 2**32, (50, n), np.uint32) for n in (4, 2))
    words = probe(device, "probe_philox", [counters, keys], (50, 4), np.uint32)
    for counter, (low, high), row in zip(counters, keys, words, strict=True):
        expected = philox4x32([int(word) for word in counter], (int(low), int(high)))
        assert [int(word) for word in row] == [int(word) for word in expected]


# Words whose uniform numbers lie at the ends, at the quarters (zeros of cos and sin) and where log's reduction changes.
CORNERS = [
    0,
    512,
    2**32 - 1,
    2**32 - 512,
    *(k * 2**30 + d for k in (1, 2, 3) for d in (-512, 0)),
    0xB504F200,
    0xB504F400,
]


def ulps(values: Array, exact: npt.NDArray[np.float64]) -> Array:
    return np.abs(values - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


def exact_uniform_and_angle(words: Array) -> tuple[Array, Array]:
    """The numbers a word stands for, as the reference rounds them, in float64."""
    uniform = ((words >> 9) + 0.5) * 2.0**-23
    return uniform, (uniform.astype(np.float32) * np.float32(2 * np.pi)).astype(np.float64)


def test_functions_are_as_exact_as_noise_h_says(device: Device) -> None:
    # Over all 2²³ uniform numbers: log 0.95, cos and sin 1.46.
    words = np.concatenate([CORNERS, np.random.default_rng(0).integers(0, 2**32, 200_000)]).astype(np.uint32)
    log, cos, sin = probe(device, "probe_functions", [words], (len(words), 3), np.float32).T
    uniform, angle = exact_uniform_and_angle(words)
    assert np.max(ulps(log, np.log(uniform))) < 1
    assert np.max(ulps(cos, np.cos(angle))) < 1.5
    assert np.max(ulps(sin, np.sin(angle))) < 1.5


def test_normals_are_within_4_ulp_of_the_exact_ones(device: Device) -> None:
    # Over every radius and as many angles: 3.2 ulp, mean 0.5; NumPy's own float32 way has 3.9.
    words = np.concatenate(
        [
            np.stack(np.meshgrid(CORNERS, CORNERS), -1).reshape(-1, 2),
            np.random.default_rng(0).integers(0, 2**32, (200_000, 2)),
        ]
    ).astype(np.uint32)
    normals = probe(device, "probe_normals", [words], words.shape, np.float32)
    uniform, _ = exact_uniform_and_angle(words[:, 0])
    _, angle = exact_uniform_and_angle(words[:, 1])
    radius = np.sqrt(-2 * np.log(uniform))
    assert np.max(ulps(normals, np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1))) < 4


def test_every_half_widens_to_its_value(device: Device) -> None:
    halves = np.arange(2**16, dtype=np.uint16)
    widened = probe(device, "probe_widen", [halves], halves.shape, np.float32)
    np.testing.assert_array_equal(widened, halves.view(np.float16).astype(np.float32))  # NaN equals NaN here


def test_floats_narrow_to_the_nearest_half_as_in_numpy(device: Device, rng: np.random.Generator) -> None:
    halves = rng.integers(0, 0x7C00, 1000, np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[1:] + halves[:-1]) / 2
    special = np.array(
        [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.9, 65520, 1e9, 2**-24, 2**-25, 1e-30], np.float32
    )
    values = np.concatenate([ties, -ties, rng.normal(0, 2, 1000).astype(np.float32), special])
    narrowed = probe(device, "probe_narrow", [values], values.shape, np.float16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(narrowed, values.astype(np.float16))
    assert np.signbit(narrowed[values == 0]).tolist() == np.signbit(values[values == 0]).tolist()

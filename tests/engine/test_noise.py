"""The noise: Philox against its published vectors, the field against a scalar evaluation of its definition."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from diffiqa.engine.noise import MAX_SEED, NoiseField, philox4x32, split_seed

FloatArray = npt.NDArray[np.float32]

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, output.
PUBLISHED = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}
# The field works in float32: an angle below 2π is off by 2⁻²² at most, a radius is below 5.8.
TOLERANCE = 5e-6
BIG_SEED = 0xFEDCBA9876543210


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def scalar_philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python's whole numbers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def scalar_normal(seed: int, element: int, step: int, lane: int) -> float:
    """The noise of one element of an image, by definition, in Python's floats."""
    key = (seed % 2**32, seed // 2**32)
    block = scalar_philox((element // 4, step, lane, 0), key)
    pair = element % 4 // 2 * 2
    u, v = (((word >> 9) + 0.5) / 2**23 for word in block[pair : pair + 2])
    radius = math.sqrt(-2 * math.log(u))
    return radius * (math.sin if element % 2 else math.cos)(2 * math.pi * v)


def filled(field: NoiseField, step: int) -> FloatArray:
    out = np.full(field.shape, np.nan, np.float32)
    field.fill(step, out)
    return out


def test_philox_gives_the_published_vectors() -> None:
    for texts in PUBLISHED.values():
        counter, key, expected = map(words, texts)
        assert [int(word) for word in philox4x32(counter, (key[0], key[1]))] == expected
        assert list(scalar_philox((counter[0], counter[1], counter[2], counter[3]), (key[0], key[1]))) == expected


def test_philox_works_on_arrays_of_counters() -> None:
    first = np.array([0, 1, 2**31, 2**32 - 1], np.uint64)
    together = philox4x32((first, 7, 8, 9), (10, 11))
    for j, counter in enumerate(first):
        assert tuple(int(word[j]) for word in together) == scalar_philox((int(counter), 7, 8, 9), (10, 11))


def test_noise_of_every_element_is_its_definition() -> None:
    cases: list[tuple[int, int, int]] = [(0, 0, 0), (1, 1, 3), (BIG_SEED, 50, 2**32 - 1), (MAX_SEED, 2**32 - 1, 0)]
    for seed, step, lane in cases:
        height, width = 3, 8
        noise = filled(NoiseField(seed, (height, width), lane=lane), step)
        expected = [scalar_normal(seed, element, step, lane) for element in range(3 * height * width)]
        assert noise.dtype == np.float32
        np.testing.assert_allclose(noise.ravel(), expected, rtol=0, atol=TOLERANCE)


def test_noise_of_an_image_larger_than_the_scratch_memory_is_its_definition() -> None:
    height, width = 160, 164  # 19,680 blocks of four
    noise = filled(NoiseField(BIG_SEED, (height, width)), 4).ravel()
    places = [*range(0, noise.size, 997), *range(4 * 8192 - 8, 4 * 8192 + 8), *range(noise.size - 8, noise.size)]
    expected = [scalar_normal(BIG_SEED, element, 4, 0) for element in places]
    np.testing.assert_allclose(noise[places], expected, rtol=0, atol=TOLERANCE)


WINDOWS = {
    "the whole": (0, 0, 12, 20),
    "a corner": (0, 0, 4, 8),
    "the other corner, odd row": (5, 12, 7, 8),
    "one row": (11, 0, 1, 20),
    "inside": (3, 4, 5, 4),
}


def test_a_window_reads_the_noise_of_the_whole() -> None:
    for top, left, rows, columns in WINDOWS.values():
        whole = filled(NoiseField(5, (12, 20), lane=2), 9)
        field = NoiseField(5, (12, 20), window=(rows, columns), top=top, left=left, lane=2)
        assert field.shape == (3, rows, columns)
        np.testing.assert_array_equal(filled(field, 9), whole[:, top : top + rows, left : left + columns])


def test_a_large_window_reads_the_noise_of_the_whole() -> None:
    whole = filled(NoiseField(5, (160, 200)), 1)
    window = filled(NoiseField(5, (160, 200), window=(128, 132), top=30, left=64), 1)
    np.testing.assert_array_equal(window, whole[:, 30:158, 64:196])


def test_a_field_filled_again_gives_the_same_noise() -> None:
    field = NoiseField(1, (8, 8))
    first = filled(field, 3)
    filled(field, 4)
    np.testing.assert_array_equal(filled(field, 3), first)


SAME = {"seed": 1, "step": 2, "lane": 3}


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"seed": 1 + 2**32}, {"step": 3}, {"lane": 2}], ids=["seed", "high seed", "step", "lane"]
)
def test_noise_differs_with(change: dict[str, int]) -> None:
    def noise(seed: int, step: int, lane: int) -> FloatArray:
        return filled(NoiseField(seed, (64, 64), lane=lane), step)

    one, other = noise(**SAME), noise(**(SAME | change))
    correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
    assert abs(correlation) < 5 / math.sqrt(one.size)


@pytest.mark.parametrize("seed", [0, 1, 2023])
def test_noise_is_standard_normal_and_white(seed: int) -> None:
    noise = filled(NoiseField(seed, (256, 256)), 50).astype(np.float64)
    z, n = noise.ravel(), noise.size
    bound = 4.5 / math.sqrt(n)  # of a mean of n independent numbers of variance 1; the seeds are fixed
    assert abs(z.mean()) < bound
    assert abs((z**2).mean() - 1) < bound * math.sqrt(2)
    assert abs((z**3).mean()) < bound * math.sqrt(15)
    assert abs((z**4).mean() - 3) < bound * math.sqrt(96)
    assert np.abs(z).max() < 5.8
    cdf = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in np.sort(z)])
    assert np.abs(cdf - (np.arange(n) + 0.5) / n).max() < 2 / math.sqrt(n)  # Kolmogorov–Smirnov at p ≈ 0.0007
    for lag in (1, 2, 3, 4, 8, 256, 65536):  # in a block, next blocks, next row, next channel
        assert abs((z[:-lag] * z[lag:]).mean()) < 4.5 / math.sqrt(n - lag), f"lag {lag}"


def test_seed_splits_into_low_and_high_word() -> None:
    assert split_seed(0x0123456789ABCDEF) == (0x89ABCDEF, 0x01234567)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_rejects_a_seed_of_more_than_64_bits(seed: int) -> None:
    with pytest.raises(ValueError, match=str(seed)):
        split_seed(seed)


@pytest.mark.parametrize(
    ("size", "window", "left"),
    [((8, 10), None, 0), ((8, 16), (8, 6), 0), ((8, 16), (8, 8), 2)],
    ids=["image", "window", "left"],
)
def test_rejects_a_window_off_the_blocks_of_four(size: tuple[int, int], window: tuple[int, int], left: int) -> None:
    with pytest.raises(ValueError, match="aligned to 4"):
        NoiseField(0, size, window=window, left=left)


def test_rejects_a_window_that_leaves_the_image() -> None:
    cases: list[tuple[int, int]] = [(13, 0), (0, 8), (-1, 0), (0, -4), (13, 8)]
    for top, left in cases:
        with pytest.raises(ValueError, match="leaves the image"):
            NoiseField(1, (16, 16), window=(4, 12), top=top, left=left)


def test_an_image_may_have_as_many_blocks_as_the_counter_numbers() -> None:
    assert NoiseField(1, (75_000, 75_000), window=(4, 4)).shape == (3, 4, 4)
    with pytest.raises(ValueError, match="more elements than the noise counter can number"):
        NoiseField(1, (76_000, 76_000), window=(4, 4))


def test_noise_is_computed_in_float32() -> None:
    """A score is the same to the last bit only where every operation rounds as the reference does."""
    blocks = np.arange(12)[:, None] * np.array([1, 0, 0, 0]) + np.array([0, 3, 0, 0])
    found = philox4x32([blocks[:, i] for i in range(4)], split_seed(5))
    u = [((np.asarray(word) >> 9).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23) for word in found]
    expected = np.empty((12, 4), np.float32)
    for pair in (0, 2):
        radius, angle = np.sqrt(np.log(u[pair]) * np.float32(-2)), u[pair + 1] * np.float32(2 * np.pi)
        expected[:, pair], expected[:, pair + 1] = radius * np.cos(angle), radius * np.sin(angle)
    assert np.array_equal(filled(NoiseField(5, (4, 4)), 3).reshape(12, 4), expected)


def test_noise_is_written_in_place_or_not_at_all() -> None:
    field = NoiseField(1, (4, 8))
    with pytest.raises(ValueError, match="noise is written in place: the array must be C-contiguous"):
        field.fill(0, np.empty((3, 8, 4), np.float32).transpose(0, 2, 1))

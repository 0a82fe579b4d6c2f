"""Pixels and planes: the formula at its ends, its rounding, and the way back."""

import numpy as np
import pytest

from diffiqa.engine.pixels import to_pixels, to_plane


def test_a_plane_has_the_channels_first_and_runs_from_minus_one_to_one() -> None:
    pixels = np.array([[[0, 51, 102], [153, 204, 255]]], np.uint8)  # one row of two pixels
    plane = to_plane(pixels)
    assert plane.dtype == np.float32
    np.testing.assert_allclose(plane, [[[-1, 0.2]], [[-0.6, 0.6]], [[-0.2, 1]]], atol=1e-6)


def test_bytes_and_the_floats_they_stand_for_give_the_same_bits() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
    assert np.array_equal(to_plane(pixels), to_plane(pixels.astype(np.float32) / np.float32(255)))
    unit = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    assert np.array_equal(to_plane(pixels), (unit - np.float32(0.5)) / np.float32(0.5))


def test_every_byte_comes_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(to_pixels(to_plane(pixels)), pixels)


@pytest.mark.parametrize(
    ("value", "byte"), [(-3, 0), (-1, 0), (0, 128), (0.004, 128), (0.012, 129), (1, 255), (2, 255)]
)
def test_a_plane_is_rounded_to_the_nearest_byte_and_clipped(value: float, byte: int) -> None:
    pixels = to_pixels(np.full((3, 2, 4), value, np.float32))
    assert pixels.shape == (2, 4, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == byte).all()

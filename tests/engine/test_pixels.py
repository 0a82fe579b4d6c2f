"""Pixels and planes: the formula at its ends, its rounding, and the way back."""

import numpy as np
import pytest
import torch

from diffiqa.engine.pixels import FloatArray, TapForm, as_tapped, bicubic, squash_planes, to_pixels, to_plane
from diffiqa.model.network import as_tapped as as_tapped_by_torch

from ..model import reference


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


def test_a_plane_is_rounded_to_the_nearest_byte_and_clipped() -> None:
    cases: list[tuple[float, int]] = [(-3, 0), (-1, 0), (0, 128), (0.004, 128), (0.012, 129), (1, 255), (2, 255)]
    for value, byte in cases:
        pixels = to_pixels(np.full((3, 2, 4), value, np.float32))
        assert pixels.shape == (2, 4, 3)
        assert pixels.dtype == np.uint8
        assert (pixels == byte).all()


def some_states(seed: int) -> FloatArray:
    """Noisy states, a third of them beyond [-1, 1]; and every value at and beside the middle of two bytes."""
    states = np.random.default_rng(seed).normal(0, 1.1, (3, 64, 48)).astype(np.float32)
    middles = ((np.arange(255, dtype=np.float32) + np.float32(0.5)) / np.float32(127.5)) - 1
    middles = np.concatenate([np.nextafter(middles, np.float32(-9)), middles, np.nextafter(middles, np.float32(9))])
    states.reshape(-1)[: middles.size] = middles
    return states


@pytest.mark.parametrize("seed", [1, 2])
def test_png8_is_the_way_through_a_file_to_the_bit(seed: int) -> None:
    states = some_states(seed)
    expected = reference.through_png(states)
    assert as_tapped(states.copy(), TapForm.PNG8).tobytes() == expected.tobytes()
    assert as_tapped(expected.copy(), TapForm.PNG8).tobytes() == expected.tobytes()  # twice is once
    # The heads get what they get for a picture of these bytes.
    assert to_plane(to_pixels(states)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("form", TapForm)
def test_numpy_and_torch_give_taps_the_same_bits(form: TapForm) -> None:
    states = some_states(3)
    states[2, 0, :3] = np.nan, np.inf, -np.inf
    expected = as_tapped(states.copy(), form)
    assert as_tapped_by_torch(torch.from_numpy(states), form).numpy().tobytes() == expected.tobytes()
    assert np.isnan(expected[2, 0, 0])  # a U-Net that overflowed must not look like one that did not
    limit = {TapForm.FLOAT: np.inf, TapForm.CLAMPED: 1, TapForm.PNG8: 1}[form]
    assert np.nanmax(np.abs(expected)) == limit


@pytest.mark.parametrize(
    ("size", "small"), [((61, 83), (32, 32)), ((45, 70), (44, 68)), ((20, 50), (32, 32)), ((3, 4), (16, 20))]
)
def test_the_bicubic_filter_looks_at_16_pixels(size: tuple[int, int], small: tuple[int, int]) -> None:
    pixels = np.random.default_rng(size[0]).integers(0, 256, (*size, 3), np.uint8)
    found, exact = bicubic(pixels, *small), reference.bicubic(pixels, *small).clip(0, 255)
    assert found.shape == (*small, 3)
    assert found.dtype == np.uint8
    # Weights of 11 bits: their rounding moves a sum by less than half a level.
    assert np.abs(found - exact).max() < 1
    assert (found == np.rint(exact)).mean() > 0.9
    np.testing.assert_array_equal(bicubic(pixels, *size), pixels)


def test_planes_are_squashed_as_their_pixels_are() -> None:
    pixels = np.random.default_rng(9).integers(0, 256, (2, 40, 50, 3), np.uint8)
    planes = squash_planes(np.stack([to_plane(each) for each in pixels]), 16)
    assert planes.shape == (2, 3, 16, 16)
    for plane, each in zip(planes, pixels, strict=True):
        np.testing.assert_array_equal(plane, to_plane(bicubic(each, 16, 16)))

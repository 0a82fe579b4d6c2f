"""Maps as pictures: what they average, how their colours order, and that their numbers can be read back."""

import io

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from diffiqa.runtime.report.heatmap import COLOURS, NOTHING, block_mean, palette, to_heatmap, to_png

# Linear-light simulations of full colour blindness, Machado, Oliveira and Fernandes 2009: rows give R, G, B.
SIGHTS = {
    "full colour": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue cones": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lightness(linear: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """CIE L*, 0 … 100."""
    y = np.clip(linear @ np.array([0.2126, 0.7152, 0.0722]), 0, 1)
    result: npt.NDArray[np.float64] = np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)
    return result


@pytest.mark.parametrize("sight", SIGHTS)
def test_lightness_orders_the_colours_for_every_kind_of_sight(sight: str) -> None:
    unit = COLOURS / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    levels = lightness(linear @ np.array(SIGHTS[sight]).T)[::16]
    steps = np.diff(levels)
    assert steps.min() > 0.5 * steps.mean()  # no flat stretch: two values apart look apart
    assert steps.max() < 2.5 * steps.mean()  # no false edge


def test_block_means_leave_out_what_is_unknown_and_may_overhang() -> None:
    values = np.arange(15, dtype=np.float32).reshape(3, 5)
    values[0, 0] = np.nan
    values[2, 4] = np.nan
    means = block_mean(values, 2)
    np.testing.assert_allclose(means, [[4, 5, 6.5], [10.5, 12.5, np.nan]])


def test_a_heatmap_gives_its_numbers_back() -> None:
    values = np.random.default_rng(1).normal(3, 2, (20, 30)).astype(np.float32)
    values[4:7, 5] = np.nan
    heatmap = to_heatmap(values)
    back = heatmap.low + (heatmap.high - heatmap.low) * heatmap.index / 254
    known = np.isfinite(values)
    np.testing.assert_allclose(back[known], values[known], atol=(heatmap.high - heatmap.low) / 254 / 2 + 1e-6)
    assert (heatmap.index[~known] == NOTHING).all()


@pytest.mark.parametrize("value", [np.nan, 0.0, 7.5])
def test_a_map_of_one_value_or_none_has_no_range(value: float) -> None:
    heatmap = to_heatmap(np.full((4, 4), value, np.float32))
    assert heatmap.low == heatmap.high
    assert (palette(heatmap, 0, 1)).shape == (255, 3)


def test_a_palette_follows_the_shared_scale_and_clips_beyond_it() -> None:
    heatmap = to_heatmap(np.array([[0.0, 1.0]], np.float32))
    np.testing.assert_array_equal(palette(heatmap, 0, 1), COLOURS)
    np.testing.assert_array_equal(palette(heatmap, 0, 2)[-1], COLOURS[127])
    np.testing.assert_array_equal(palette(heatmap, 0.5, 0.6)[[0, -1]], COLOURS[[0, -1]])


def test_a_png_shows_its_palette_and_nothing_where_there_is_no_number() -> None:
    values = np.array([[0, 0.5, 1, np.nan]], np.float32)
    heatmap = to_heatmap(values)
    png = to_png(heatmap, palette(heatmap, 0, 1))
    assert png[37:41] == b"PLTE"  # where the report's script replaces the palette
    assert int.from_bytes(png[33:37], "big") == 768
    shown = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))[0]
    np.testing.assert_array_equal(shown[:3, :3], COLOURS[[0, 127, 254]])
    assert list(shown[:, 3]) == [255, 255, 255, 0]

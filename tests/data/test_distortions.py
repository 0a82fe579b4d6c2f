"""The 25 distortions, each against an evaluation of its definition that shares no code with the library."""

import colorsys
import io
import itertools
import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import scipy.fft
import scipy.ndimage
from PIL import Image

from diffiqa.data.distortions import (
    DISTORTIONS,
    LEVELS,
    FloatImage,
    _disk,
    _from_lab,
    _gaussian,
    _line,
    _otsu_edges,
    _to_lab,
    compose,
    distort,
)

Array = npt.NDArray[np.float64]

# The levels of one distortion share a formula, and a table below has their parameters.
STRONGEST = 5
ENDS = (1, STRONGEST)  # where the sign of the parameter, or a kernel of one pixel, is a case of its own
NUMBERS = {kind.name: number for number, kind in DISTORTIONS.items()}
EVERY = [pytest.param(number, id=kind.name) for number, kind in DISTORTIONS.items()]
# float32 pixels after a few dozen operations, or a float32 Fourier transform, of values up to 1.
CLOSE = 3e-6
# Two conversions in float32: the power curves are steepest near black.
LAB_CLOSE = 3e-5


def textured(height: int, width: int, seed: int) -> FloatImage:
    """A random picture whose spectrum falls as a photograph's does (1/f), with edges, in [0, 1]."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(scipy.fft.fftfreq(height)[:, None], scipy.fft.fftfreq(width)) + 1 / max(height, width)
    # Channels of a photograph resemble one another: grey carries most of the variance.
    noise = generator.standard_normal((height, width, 1)) + 0.5 * generator.standard_normal((height, width, 3))
    waves = scipy.fft.ifft2(scipy.fft.fft2(noise, axes=(0, 1)) / frequency[..., None], axes=(0, 1)).real
    image = 0.5 + 0.2 * waves / waves.std()
    top, left = height // 4, width // 3
    image[top : top + height // 3, left : left + width // 4] += generator.uniform(-0.4, 0.4, 3)
    result: FloatImage = np.clip(image, 0, 1).astype(np.float32)
    return result


def grey(height: int, width: int, value: float = 0.5) -> FloatImage:
    return np.full((height, width, 3), value, np.float32)


def apply(image: FloatImage, name: str, level: int, seed: int = 7) -> FloatImage:
    return distort(image, NUMBERS[name], level, np.random.default_rng(seed))


def parameter(name: str, level: int) -> float:
    return DISTORTIONS[NUMBERS[name]].levels[level - 1]


def mse(a: FloatImage, b: FloatImage) -> float:
    return float(np.mean((a.astype(np.float64) - b) ** 2))


@pytest.fixture(scope="module")
def picture() -> FloatImage:
    return textured(61, 83, seed=1)


# The data set's table of parameters, level 1 to 5.
PUBLISHED = """
0.1 0.5 1 2 5 | 1 2 4 6 8 | 1 2 4 6 10 | 1 3 6 8 12 | 1 3 6 8 12 | 64 48 32 16 8 | 0.4 0.2 0.1 0 -0.4 | 1 2 3 6 9 |
16 32 45 120 400 | 43 36 24 7 4 | 0.001 0.002 0.003 0.005 0.01 | 0.0001 0.0005 0.001 0.002 0.003 |
0.001 0.005 0.01 0.02 0.03 | 0.001 0.005 0.01 0.02 0.05 | 0.01 0.03 0.05 0.1 0.15 | 0.1 0.2 0.4 0.7 1.1 |
0.05 0.1 0.2 0.4 0.8 | 0.15 0.08 0 -0.08 -0.15 | 0.05 0.1 0.2 0.5 1 | 20 40 60 80 100 | 0.01 0.05 0.1 0.2 0.5 |
20 16 13 10 7 | 2 4 6 8 10 | 1 2 3 6 12 | 0.3 0.15 0 -0.4 -0.6
"""

# --- the contract ---------------------------------------------------------------------------------------------------


def test_table_is_the_published_one() -> None:
    assert list(DISTORTIONS) == list(range(1, 26))
    assert [kind.number for kind in DISTORTIONS.values()] == list(range(1, 26))
    published = [tuple(float(value) for value in row.split()) for row in PUBLISHED.split("|")]
    assert [kind.levels for kind in DISTORTIONS.values()] == published
    assert len({kind.name for kind in DISTORTIONS.values()}) == 25
    assert [number for number, kind in DISTORTIONS.items() if not kind.ordered] == [18, 25]


@pytest.mark.parametrize("number", EVERY)
def test_a_result_depends_on_pixels_level_and_generator_alone(number: int, picture: FloatImage) -> None:
    for level in ENDS:
        before = picture.copy()
        first = distort(picture, number, level, np.random.default_rng(3))
        again = distort(picture, number, level, np.random.default_rng(3))
        np.testing.assert_array_equal(first, again)
        assert first.dtype == np.float32
        assert first.shape == picture.shape
        assert first.min() >= 0
        assert first.max() <= 1
        first[:] = 0.25  # the result is nobody's but the caller's
        np.testing.assert_array_equal(picture, before)
    view = picture[::-2, 3:].transpose(1, 0, 2)
    expected = distort(view.copy(), number, 4, np.random.default_rng(1))
    # Only the order of sums may differ with the layout.
    np.testing.assert_allclose(distort(view, number, 4, np.random.default_rng(1)), expected, atol=CLOSE)
    for image in (textured(8, 8, 2), textured(9, 31, 3), grey(1, 1), grey(8, 8, 0), grey(8, 8, 1), grey(17, 23)):
        for level in ENDS:
            result = distort(image, number, level, np.random.default_rng(1))
            assert result.shape == image.shape
            assert np.isfinite(result).all()


def test_random_distortions_differ_from_seed_to_seed(picture: FloatImage) -> None:
    noises = {"white_noise", "ycbcr_noise", "impulse_noise", "multiplicative_noise", "denoised"}
    moves = {"motion_blur", "colour_shift", "jitter", "patches", "colour_blocks"}
    found = {name for name in NUMBERS if mse(apply(picture, name, 5, seed=1), apply(picture, name, 5, seed=2)) > 0}
    assert found == noises | moves


@pytest.mark.parametrize(("name", "level"), [("lab_saturation", 1), ("mean_shift", 3), ("contrast", 3)], ids=str)
def test_identity_levels_change_nothing(name: str, level: int, picture: FloatImage) -> None:
    np.testing.assert_array_equal(apply(picture, name, level), picture)


def test_severity_rises_with_level() -> None:
    images = {seed: textured(128, 160, seed) for seed in (11, 12, 13)}
    for number, kind in DISTORTIONS.items():
        errors = np.zeros(len(LEVELS))
        for seed, image in images.items():
            errors += [mse(distort(image, number, level, np.random.default_rng(seed)), image) for level in LEVELS]
        assert (np.diff(errors) > 0).all() or not kind.ordered, f"{kind.name}: {errors}"


def test_a_constant_picture_has_nothing_to_move() -> None:
    blurs = ("gaussian_blur", "lens_blur", "motion_blur", "colour_diffusion")
    for name in (*blurs, "colour_shift", "jitter", "patches", "pixelate", "sharpen"):
        for level in ENDS:
            np.testing.assert_allclose(apply(grey(19, 40, 0.3), name, level), 0.3, atol=LAB_CLOSE, err_msg=name)


def test_composition_is_one_after_the_other_with_one_generator(picture: FloatImage) -> None:
    steps = [(11, 2), (3, 4), (10, 3), (23, 1)]
    generator = np.random.default_rng(5)
    expected = picture
    for number, level in steps:
        expected = distort(expected, number, level, generator)
    np.testing.assert_array_equal(compose(picture, steps, np.random.default_rng(5)), expected)


def test_composition_of_nothing_is_a_copy(picture: FloatImage) -> None:
    result = compose(picture, [], np.random.default_rng(5))
    np.testing.assert_array_equal(result, picture)
    assert not np.shares_memory(result, picture)


@pytest.mark.parametrize(
    ("image", "number", "level", "message"),
    [
        pytest.param(grey(4, 4), 0, 1, "no distortion 0", id="number_0"),
        pytest.param(grey(4, 4), 26, 1, "no distortion 26", id="number_26"),
        pytest.param(grey(4, 4), 1, 0, "no level 0", id="level_0"),
        pytest.param(grey(4, 4), 1, 6, "no level 6", id="level_6"),
        pytest.param(np.zeros((4, 4, 3)), 1, 1, "float64", id="float64"),
        pytest.param(np.zeros((4, 4, 3), np.uint8), 1, 1, "uint8", id="bytes"),
        pytest.param(np.zeros((4, 4), np.float32), 1, 1, r"\(4, 4\)", id="greyscale"),
        pytest.param(np.zeros((3, 4, 4), np.float32), 1, 1, r"\(3, 4, 4\)", id="channels_first"),
        pytest.param(np.zeros((0, 4, 3), np.float32), 1, 1, r"\(0, 4, 3\)", id="empty"),
        pytest.param(grey(4, 4, 255), 1, 1, "255", id="range_255"),
        pytest.param(grey(4, 4, -0.1), 1, 1, "-0.1", id="negative"),
        pytest.param(grey(4, 4, math.nan), 1, 1, "nan", id="nan"),
    ],
)
def test_rejects_what_it_cannot_distort(image: FloatImage, number: int, level: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distort(image, number, level, np.random.default_rng(1))


def test_composition_checks_its_picture_even_without_steps() -> None:
    with pytest.raises(ValueError, match="float64"):
        compose(np.zeros((4, 4, 3)), [], np.random.default_rng(1))  # type: ignore[arg-type]


# --- blur -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ENDS)
def test_gaussian_blur_is_scipys(level: int, picture: FloatImage) -> None:
    sigma = parameter("gaussian_blur", level)
    expected = scipy.ndimage.gaussian_filter(
        picture.astype(float), (sigma, sigma, 0), mode="reflect", radius=(max(1, math.ceil(4 * sigma)),) * 2 + (0,)
    )
    np.testing.assert_allclose(apply(picture, "gaussian_blur", level), expected, atol=CLOSE)


def test_lens_blur_is_the_mean_over_a_disk(picture: FloatImage) -> None:
    radius = parameter("lens_blur", STRONGEST)
    size = 2 * int(radius) + 1
    # A pixel's share of the disk, by counting points.
    points = (np.arange(size * 50) + 0.5) / 50 - size / 2
    inside = points[:, None] ** 2 + points**2 <= radius**2
    kernel = inside.reshape(size, 50, size, 50).sum((1, 3)) / inside.sum()
    expected = np.stack([scipy.ndimage.convolve(picture[..., c].astype(float), kernel) for c in range(3)], 2)
    # Counting 2500 points a pixel is off by some thousandths of the share of a pixel on the rim.
    np.testing.assert_allclose(apply(picture, "lens_blur", STRONGEST), expected, atol=1e-3)


def test_disk_of_radius_one_has_the_published_weights() -> None:
    # What MATLAB's documentation of fspecial('disk', 1) and every handbook gives.
    expected = [[0.0251, 0.1453, 0.0251], [0.1453, 0.3183, 0.1453], [0.0251, 0.1453, 0.0251]]
    np.testing.assert_allclose(_disk(1), expected, atol=2e-4)  # published to four decimals


def test_motion_blur_is_the_mean_of_the_moving_picture(picture: FloatImage) -> None:
    length = parameter("motion_blur", STRONGEST)
    angle = np.random.default_rng(7).uniform(0, math.pi)
    times = (np.arange(400) + 0.5) / 400 - 0.5
    expected = np.mean(
        [
            scipy.ndimage.shift(
                picture[..., 0].astype(float),
                (time * length * math.sin(angle), time * length * math.cos(angle)),
                order=1,
                mode="grid-wrap",
            )
            for time in times
        ],
        0,
    )
    inner = (slice(8, -8), slice(8, -8))  # the picture's surroundings are no part of the definition
    # 400 positions here, 64 a pixel there: both sums come this close to the integral.
    np.testing.assert_allclose(apply(picture, "motion_blur", STRONGEST)[..., 0][inner], expected[inner], atol=2e-4)


def test_level_motion_blurs_a_row_only() -> None:
    kernel = _line(2, 0)
    # A tent of half-width 1 around each point of [-1, 1]: ∫ max(0, 1 - |x - t|) dt / 2.
    np.testing.assert_allclose(kernel[2], [0, 0.25, 0.5, 0.25, 0], atol=1e-3)
    assert kernel.sum() == pytest.approx(1)
    assert not kernel[[0, 1, 3, 4]].any()


def test_kernels_keep_the_mean() -> None:
    for kernel in (_gaussian(2.5), _disk(3), _line(7, 1.1)):
        assert kernel.sum() == pytest.approx(1)
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-12)


# --- colour ---------------------------------------------------------------------------------------------------------

# L, a, b of sRGB's corners under D65 with the 2° observer, as Lindbloom's calculator and the CIE formulas give them.
PUBLISHED_LAB = {
    (1, 1, 1): (100, 0, 0),
    (0, 0, 0): (0, 0, 0),
    (1, 0, 0): (53.24, 80.09, 67.20),
    (0, 1, 0): (87.73, -86.18, 83.18),
    (0, 0, 1): (32.30, 79.19, -107.86),
    (1, 1, 0): (97.14, -21.55, 94.48),
    (0, 1, 1): (91.11, -48.09, -14.13),
    (1, 0, 1): (60.32, 98.23, -60.82),
}


def lab_of(colour: tuple[float, float, float]) -> tuple[float, float, float]:
    """CIELAB of one sRGB colour, in Python's floats, by the formulas of IEC 61966-2-1 and CIE 15."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
    x = (0.4124564 * r + 0.3575761 * g + 0.1804375 * b) / 0.95047
    y = 0.2126729 * r + 0.7151522 * g + 0.0721750 * b
    z = (0.0193339 * r + 0.1191920 * g + 0.9503041 * b) / 1.08883
    x, y, z = (t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_lab_of_known_colours() -> None:
    colours = np.array(list(PUBLISHED_LAB), np.float32)[None]
    # Published to two decimals, and from slightly different roundings of the sRGB matrix.
    np.testing.assert_allclose(_to_lab(colours)[0], list(PUBLISHED_LAB.values()), atol=0.02)


def test_lab_of_random_colours_and_back() -> None:
    colours = np.random.default_rng(21).random((1, 500, 3), np.float32)
    colours[0, :100] *= 0.05  # below both knees
    lab = _to_lab(colours)
    expected = [lab_of((float(r), float(g), float(b))) for r, g, b in colours[0]]
    np.testing.assert_allclose(lab[0], expected, atol=2e-3)  # of 100
    np.testing.assert_allclose(_from_lab(lab), colours, atol=LAB_CLOSE)


def test_colour_diffusion_blurs_a_and_b_alone() -> None:
    # Faint colours on grey: the result stays inside sRGB, so that nothing is clipped and L can be compared.
    image = (0.5 + 0.15 * (textured(48, 70, seed=4) - 0.5)).astype(np.float32)
    lab = np.array([[lab_of((float(r), float(g), float(b))) for r, g, b in row] for row in image])
    for level in (1, 3, 5):
        sigma = parameter("colour_diffusion", level)
        result = _to_lab(apply(image, "colour_diffusion", level))
        blurred = scipy.ndimage.gaussian_filter(lab[..., 1:], (sigma, sigma, 0), truncate=4)
        np.testing.assert_allclose(result[..., 0], lab[..., 0], atol=5e-3)
        np.testing.assert_allclose(result[..., 1:], blurred, atol=5e-3)


def test_colour_shift_moves_green_where_the_gradient_is_steep() -> None:
    image = textured(90, 110, seed=5)
    result = apply(image, "colour_shift", STRONGEST)
    np.testing.assert_array_equal(result[..., [0, 2]], image[..., [0, 2]])
    angle = np.random.default_rng(7).uniform(0, 2 * math.pi)
    distance = parameter("colour_shift", STRONGEST)
    move = (round(distance * math.sin(angle)), round(distance * math.cos(angle)))
    assert abs(math.hypot(*move) - distance) <= math.sqrt(0.5)
    moved = scipy.ndimage.shift(image[..., 1].astype(float), move, order=0, mode="nearest")
    luma = image.astype(float) @ [0.299, 0.587, 0.114]
    slope = np.hypot(*(scipy.ndimage.correlate1d(luma, [-1, 0, 1], axis, mode="nearest") for axis in (0, 1)))
    share = scipy.ndimage.gaussian_filter(slope, 4)
    share /= share.max()
    expected = np.clip(image[..., 1] * (1 - share) + moved * share, 0, 1)
    np.testing.assert_allclose(result[..., 1], expected, atol=1e-5)


def test_colour_quantisation_leaves_few_and_fitting_colours() -> None:
    image = textured(100, 120, seed=6)
    colours = 8
    result = apply(image, "colour_quantisation", STRONGEST)
    found = np.unique(result.reshape(-1, 3), axis=0)
    assert 0.9 * colours <= len(found) <= colours
    # The palette leaves less variance than as many evenly spaced colours would.
    nearest = found[((image.reshape(-1, 1, 3) - found) ** 2).sum(2).argmin(1)].reshape(image.shape)
    side = math.floor(colours ** (1 / 3) + 1e-9)
    even = (np.floor(image * side).clip(0, side - 1) + 0.5) / side
    assert mse(nearest, image) < 0.6 * mse(even.astype(np.float32), image)


def test_colour_quantisation_dithers() -> None:
    # At lower levels a palette is as fine as this ramp.
    ramp = np.repeat(np.linspace(0.1, 0.9, 256, dtype=np.float32)[None, :, None], 3, 2).repeat(64, 0)
    result = apply(ramp, "colour_quantisation", STRONGEST)
    found = np.unique(result.reshape(-1, 3), axis=0)
    nearest = found[((ramp.reshape(-1, 1, 3) - found) ** 2).sum(2).argmin(1)].reshape(ramp.shape)
    # Errors cancel among neighbours: over windows the mean is kept better than by taking the nearest colours. (Not at
    # the ends of the ramp, which lie beyond the palette's last colours.)
    dithered_error, nearest_error = (
        scipy.ndimage.uniform_filter(shown - ramp, (7, 7, 0))[8:-8, 32:-32].std() for shown in (result, nearest)
    )
    assert dithered_error < 0.6 * nearest_error


@pytest.mark.parametrize("level", ENDS)
def test_hsv_saturation_is_colorsys(level: int) -> None:
    factor = parameter("hsv_saturation", level)
    image = np.random.default_rng(22).random((1, 300, 3), np.float32)
    result = apply(image, "hsv_saturation", level)
    for before, after in zip(image[0], result[0], strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before.astype(float))
        expected = np.clip(colorsys.hsv_to_rgb(h, s * factor, v), 0, 1)
        np.testing.assert_allclose(after, expected, atol=CLOSE)


def test_lab_saturation_multiplies_a_and_b() -> None:
    factor = parameter("lab_saturation", STRONGEST)
    # Colours so faint that nine times as much is still inside sRGB.
    image = (0.5 + 0.03 * (np.random.default_rng(23).random((1, 300, 3), np.float32) - 0.5)).astype(np.float32)
    result = apply(image, "lab_saturation", STRONGEST)
    for before, after in zip(image[0].tolist(), result[0].tolist(), strict=True):
        lightness, a, b = lab_of(tuple(before))
        np.testing.assert_allclose(lab_of(tuple(after)), [lightness, factor * a, factor * b], atol=5e-3)


# --- compression ----------------------------------------------------------------------------------------------------


def test_jpeg_is_pillows_at_that_quality() -> None:
    image = textured(75, 101, seed=8)
    stream = io.BytesIO()
    Image.fromarray((image.astype(float) * 255 + 0.5).astype(np.uint8)).save(stream, "JPEG", quality=4)
    with Image.open(stream) as expected:
        np.testing.assert_array_equal(np.rint(apply(image, "jpeg", STRONGEST) * 255), np.asarray(expected))


def test_jpeg2000_is_pillows_at_that_ratio() -> None:
    image = textured(160, 200, seed=9)
    ratio = 400
    stream = io.BytesIO()
    Image.fromarray((image.astype(float) * 255 + 0.5).astype(np.uint8)).save(
        stream, "JPEG2000", quality_mode="rates", quality_layers=[ratio], irreversible=True
    )
    assert stream.tell() <= 1.02 * image.size / ratio + 100  # the file box around the code stream
    with Image.open(stream) as expected:
        np.testing.assert_array_equal(np.rint(apply(image, "jpeg2000", STRONGEST) * 255), np.asarray(expected))


# --- noise: the seeds are 7, and sampling errors follow from the number of samples ------------------------------------

SIDE = 400
SAMPLES = 3 * SIDE * SIDE


def assert_variance(values: npt.NDArray[np.float32], variance: float, kurtosis: float = 3.0) -> None:
    """Mean 0 and this variance, within five standard errors."""
    count = values.size
    assert abs(values.mean(dtype=float)) < 5 * math.sqrt(variance / count)
    assert abs(values.var(dtype=float) / variance - 1) < 5 * math.sqrt((kurtosis - 1) / count)


def test_white_noise_has_its_variance_and_no_correlation() -> None:
    noise = apply(grey(SIDE, SIDE), "white_noise", STRONGEST) - np.float32(0.5)
    # At the highest level ± 0.5 are 5 σ: clipping takes next to nothing away.
    assert_variance(noise, parameter("white_noise", STRONGEST))
    correlations = np.corrcoef(noise.reshape(-1, 3).T)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 5 / SIDE
    assert abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 5 / math.sqrt(SAMPLES)


def test_ycbcr_noise_is_white_in_ycbcr() -> None:
    variance = parameter("ycbcr_noise", STRONGEST)
    noise = apply(grey(SIDE, SIDE), "ycbcr_noise", STRONGEST) - np.float32(0.5)
    red, green, blue = noise.reshape(-1, 3).T.astype(float)
    # ITU-T T.871 (JFIF).
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = np.stack([y, (blue - y) / 1.772, (red - y) / 1.402])
    error = 5 * math.sqrt(2) / SIDE
    np.testing.assert_allclose(np.cov(planes) / variance, np.eye(3), atol=error)


def test_impulse_noise_is_salt_and_pepper_of_its_density() -> None:
    density = parameter("impulse_noise", STRONGEST)
    image = grey(SIDE, SIDE, 0.3)
    result = apply(image, "impulse_noise", STRONGEST)
    assert set(np.unique(result)) == {np.float32(0), np.float32(0.3), np.float32(1)}
    for value in (0, 1):
        share = float((result == value).mean())
        assert abs(share - density / 2) < 5 * math.sqrt(density / 2 / SAMPLES)


def test_multiplicative_noise_grows_with_the_pixel() -> None:
    variance = parameter("multiplicative_noise", STRONGEST)
    for value in (0.1, 0.4):
        noise = apply(grey(SIDE, SIDE, value), "multiplicative_noise", STRONGEST) / np.float32(value) - 1
        assert_variance(noise, variance)
    assert not apply(grey(8, 8, 0), "multiplicative_noise", STRONGEST).any()


def test_denoised_is_the_noisy_picture_without_small_starlet_coefficients(picture: FloatImage) -> None:
    variance = parameter("denoised", STRONGEST)
    noise = np.random.default_rng(7).standard_normal(picture.shape, np.float32)
    smooth = np.clip(picture + noise * math.sqrt(variance), 0, 1).astype(float)
    expected = np.zeros_like(smooth)
    for scale, share in enumerate([0.8908, 0.2007, 0.0856, 0.0413, 0.0205]):
        weights = np.zeros(4 * 2**scale + 1)
        weights[:: 2**scale] = [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]
        smoother = smooth
        for axis in (0, 1):
            smoother = scipy.ndimage.convolve1d(smoother, weights, axis)
        detail = smooth - smoother
        expected += detail * (np.abs(detail) >= [4, 3, 3, 3, 3][scale] * share * math.sqrt(variance))
        smooth = smoother
    difference = np.abs(apply(picture, "denoised", STRONGEST) - np.clip(expected + smooth, 0, 1))
    # A coefficient within rounding of its threshold may fall on the other side: a pixel in thousands, if any.
    assert np.quantile(difference, 0.999) < CLOSE


def test_starlet_noise_constants_are_those_of_white_noise() -> None:
    # By definition: the norm of each scale's wavelet, the difference of two iterated kernels.
    expected = [0.8908, 0.2007, 0.0856, 0.0413, 0.0205]
    kernel: Array = np.zeros((257, 257))
    kernel[128, 128] = 1
    for scale, share in enumerate(expected):
        weights = np.zeros(4 * 2**scale + 1)
        weights[:: 2**scale] = [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]
        smoother = scipy.ndimage.convolve1d(scipy.ndimage.convolve1d(kernel, weights, 0), weights, 1)
        assert np.linalg.norm(kernel - smoother) == pytest.approx(share, abs=1e-4)
        kernel = smoother


def test_denoised_is_closer_than_its_noise() -> None:
    image = scipy.ndimage.gaussian_filter(textured(128, 128, seed=10), (3, 3, 0))
    for level in LEVELS:
        assert mse(apply(image, "denoised", level), image) < 0.3 * parameter("denoised", level)


# --- brightness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sign"), [("brighten", 1), ("darken", -1)])
def test_tone_curves_move_lightness_alone_and_keep_its_ends(name: str, sign: int) -> None:
    ramp = np.repeat(np.linspace(0, 1, 257, dtype=np.float32)[None, :, None], 3, 2)
    result = apply(ramp, name, STRONGEST)
    np.testing.assert_allclose(result[0, [0, -1]], ramp[0, [0, -1]], atol=LAB_CLOSE)
    np.testing.assert_allclose(result.max(2), result.min(2), atol=LAB_CLOSE)  # grey stays grey
    assert (np.diff(result[0, :, 0]) > 0).all()
    assert (sign * (result - ramp)[0, 1:-1] > 0).all()
    amount = parameter(name, STRONGEST)
    exponent = 1 / (1 + amount) if sign > 0 else 1 + amount
    for place in (20, 100, 200):
        before, after = (lab_of(tuple(image[0, place].tolist()))[0] / 100 for image in (ramp, result))
        assert after == pytest.approx(before**exponent, abs=1e-5)


@pytest.mark.parametrize("level", ENDS)
def test_mean_shift_adds_a_constant(level: int, picture: FloatImage) -> None:
    shift = [0.15, 0.08, 0, -0.08, -0.15][level - 1]
    np.testing.assert_allclose(apply(picture, "mean_shift", level), np.clip(picture + shift, 0, 1), atol=CLOSE)


# --- spatial --------------------------------------------------------------------------------------------------------


def test_jitter_fetches_each_pixel_from_nearby(picture: FloatImage) -> None:
    height, width, _ = picture.shape
    move = np.random.default_rng(7).standard_normal((2, height, width), np.float32) * parameter("jitter", STRONGEST)
    places = np.indices((height, width)) + move
    for channel in range(3):
        expected = scipy.ndimage.map_coordinates(picture[..., channel].astype(float), places, order=1, mode="nearest")
        # Coordinates up to 83 in float32 are off by 4e-6, and so are the pixels.
        np.testing.assert_allclose(apply(picture, "jitter", STRONGEST)[..., channel], expected, atol=1e-5)


def test_jitter_displaces_by_its_sigma() -> None:
    ramp = np.repeat(np.linspace(0, 1, SIDE, dtype=np.float32)[None, :, None], 3, 2).repeat(SIDE, 0)
    for level in LEVELS:
        moved = (apply(ramp, "jitter", level) - ramp)[:, 8:-8, 0] * (SIDE - 1)  # in pixels
        sigma = parameter("jitter", level)
        assert moved.std() == pytest.approx(sigma, rel=0.01)


def test_patches_come_whole_from_one_side_away() -> None:
    height, width = 384, 512
    rows, columns = np.indices((height, width), np.float32)
    # A picture that says where each pixel came from.
    image = np.stack([rows / 1024, columns / 1024, np.zeros_like(rows)], 2)
    count = int(parameter("patches", STRONGEST))
    result = apply(image, "patches", STRONGEST)
    down, across = (np.rint((result - image)[..., c] * 1024).astype(int) for c in (0, 1))
    changed = (down != 0) | (across != 0)
    assert 0.6 * count * 16**2 < changed.sum() <= count * 16**2  # some lie on others, some had no room to move
    assert np.hypot(down[changed], across[changed]).max() <= 16 + 1
    for move in (down, across):  # in all directions
        assert move.min() < -8
        assert move.max() > 8
    far = np.hypot(down[changed], across[changed]) >= 15
    assert far.mean() > 0.8  # the rest is at the picture's edges
    # The origins are few, one for each patch: no pixel comes from a place of its own.
    assert len({(int(d), int(a)) for d, a in zip(down[changed], across[changed], strict=True)}) <= count


def test_pixelate_shows_equal_cells_of_single_pixels() -> None:
    height, width = 90, 121
    image = np.random.default_rng(24).random((height, width, 3), np.float32)  # no two pixels alike
    result = apply(image, "pixelate", STRONGEST)
    scale = 1 - math.sqrt(parameter("pixelate", STRONGEST))
    rows, columns = round(height * scale), round(width * scale)
    assert len(np.unique(result.reshape(-1, 3), axis=0)) == rows * columns
    assert {tuple(pixel) for pixel in result.reshape(-1, 3)} <= {tuple(pixel) for pixel in image.reshape(-1, 3)}
    # Both ways, a pixel is the one in which its middle falls.
    for axis, small in ((0, rows), (1, columns)):
        size = image.shape[axis]
        middles = [Fraction(2 * math.floor(Fraction(2 * i + 1, 2) * small / size) + 1, 2) for i in range(size)]
        image = image.take([math.floor(middle * size / small) for middle in middles], axis)
    np.testing.assert_array_equal(result, image)


def test_quantisation_leaves_so_many_values_each_its_class_mean() -> None:
    image = textured(80, 90, seed=14)
    levels = 7
    result = apply(image, "quantisation", STRONGEST)
    pixels = np.rint(image * 255)
    values = np.unique(result)
    assert len(values) == levels
    for value in values:
        assert pixels[result == value].mean() / 255 == pytest.approx(float(value), abs=1e-6)
    # A class is an interval, and its edges are best where each pixel's own mean is its nearest (Lloyd's condition).
    nearest = values[np.abs(pixels[..., None] / 255 - values).argmin(-1)]
    assert (nearest == result).mean() > 0.999


def test_otsu_finds_the_best_of_all_divisions() -> None:
    generator = np.random.default_rng(25)
    for classes in (2, 3, 4):
        histogram = generator.integers(0, 50, 12)
        histogram[generator.integers(0, 12, 3)] = 0
        samples = np.repeat(np.arange(12), histogram)

        def within(edges: tuple[int, ...], samples: npt.NDArray[np.intp] = samples) -> float:
            parts = [samples[(samples >= a) & (samples < b)] for a, b in itertools.pairwise(edges)]
            return float(sum(((part - part.mean()) ** 2).sum() for part in parts if part.size))

        best = min(within((0, *inner, 12)) for inner in itertools.combinations(range(1, 12), classes - 1))
        edges = _otsu_edges(histogram, classes)
        assert len(edges) == classes + 1
        assert within(tuple(edges)) == pytest.approx(best)


def test_quantisation_keeps_a_picture_of_few_values() -> None:
    image = np.random.default_rng(26).choice(np.array([0, 51, 102, 255], np.float32) / np.float32(255), (20, 20, 3))
    for level in LEVELS:
        np.testing.assert_allclose(apply(image, "quantisation", level), image, atol=CLOSE)


def test_colour_blocks_are_so_many_squares() -> None:
    image = textured(384, 512, seed=15)
    count = 10
    result = apply(image, "colour_blocks", STRONGEST)
    changed = (result != image).any(2)
    colours, sizes = np.unique(result[changed], axis=0, return_counts=True)
    assert len(colours) == count
    assert sizes.max() == 32**2  # one lies free; others may be covered in part
    for colour, size in zip(colours, sizes, strict=True):
        rows, columns = np.nonzero((result == colour).all(2))
        assert np.ptp(rows) < 32
        assert np.ptp(columns) < 32
        assert size <= 32**2


def test_patches_and_blocks_cover_the_same_share_of_any_picture() -> None:
    for height, width in ((96, 128), (384, 512), (768, 1024)):
        result = apply(grey(height, width), "colour_blocks", 1)
        assert (result != 0.5).any(2).mean() == pytest.approx(2 * 32**2 / (384 * 512), rel=0.05)


# --- sharpness and contrast -----------------------------------------------------------------------------------------


def test_sharpen_is_an_unsharp_mask(picture: FloatImage) -> None:
    amount = 12
    exact = picture.astype(float)
    expected = exact + amount * (exact - scipy.ndimage.gaussian_filter(exact, (1, 1, 0), truncate=4))
    np.testing.assert_allclose(apply(picture, "sharpen", STRONGEST), np.clip(expected, 0, 1), atol=CLOSE * (1 + amount))


@pytest.mark.parametrize("level", ENDS)
def test_contrast_is_a_sigmoid_through_black_middle_grey_and_white(level: int) -> None:
    amount = parameter("contrast", level)
    x = np.linspace(0, 1, 1025)
    result = apply(np.repeat(x.astype(np.float32)[None, :, None], 3, 2), "contrast", level)[0, :, 0]
    np.testing.assert_array_equal(result[[0, 512, 1024]], [0, 0.5, 1])
    assert (np.diff(result) > 0).all()
    u = 2 * x - 1
    np.testing.assert_allclose(result, 0.5 + 0.5 * u * (1 + amount) / (1 - amount + 2 * amount * np.abs(u)), atol=CLOSE)
    # Contrast at middle grey rises for positive amounts and falls for negative ones.
    slope = (result[513] - result[511]) / (x[513] - x[511])
    assert math.copysign(1, slope - 1) == math.copysign(1, amount) or amount == 0


def test_opposite_contrasts_undo_each_other() -> None:
    image = np.random.default_rng(27).random((20, 20, 3), np.float32)
    stronger = DISTORTIONS[25].apply(image, 0.4, np.random.default_rng(1))
    np.testing.assert_allclose(DISTORTIONS[25].apply(stronger, -0.4, np.random.default_rng(1)), image, atol=CLOSE)

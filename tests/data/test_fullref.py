import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import signal

from diffiqa.data import fullref
from diffiqa.data.fullref import METRICS, PseudoScale, fit_pseudo_scale, measure
from diffiqa.engine.codec import decode
from diffiqa.errors import DatasetError, ImageError

from .synthetic import DISTORTIONS, SIZES, noise, picture

GOLDENS = json.loads(Path(__file__).with_name("fullref_goldens.json").read_text(encoding="utf-8"))
SEVERITIES = np.linspace(0.02, 0.9, 12)


@pytest.mark.parametrize("size", SIZES)
def test_metrics_agree_with_another_implementation(size: str) -> None:
    reference = picture(*SIZES[size])
    for case in [case for case in GOLDENS if case.startswith(f"{size}, ")]:
        distortion = case.split(", ")[1]
        if size == "large" and "noise" not in distortion:
            continue  # takes the most time, and differs from others only in how far MDSI reduces it
        image = DISTORTIONS[distortion](reference)
        for metric in METRICS:
            if metric.name in GOLDENS[case]:
                # Goldens have six decimals, and the fourth root in piq's MDSI magnifies its rounding near 0.
                found = metric.measure(reference, image)
                assert found == pytest.approx(GOLDENS[case][metric.name], abs=1.5e-6), (case, metric.name)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_equal_pictures_reach_the_perfect_value(metric: fullref.Metric) -> None:
    perfect = pytest.approx(1 if metric.higher_is_better else 0, abs=1e-12)
    for size in SIZES.values():
        image = picture(*size)
        assert metric.measure(image, image.copy()) == perfect, size
    black = np.zeros((161, 170, 3), np.float32)
    assert metric.measure(black, black) == perfect


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_more_noise_is_worse_in_the_stated_direction(metric: fullref.Metric) -> None:
    reference = picture(176, 192)
    values = [metric.measure(reference, _noisy(reference, amount)) for amount in (0, 0.05, 0.2, 0.8)]
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert all(step < 0 if metric.higher_is_better else step > 0 for step in steps)


def test_haar_details_are_the_convolutions_of_the_definition() -> None:
    plane = noise((19, 24))
    details = fullref._haar_details(plane)
    for scale in range(3):
        size = 2 ** (scale + 1)
        rows = np.ones((size, size)) / size
        rows[size // 2 :] *= -1
        for direction, kernel in enumerate((rows, rows.T)):
            full = signal.correlate2d(plane, kernel)  # entry i of it begins size-1 before i
            begin = size // 2
            expected = np.abs(full[begin : begin + 19, begin : begin + 24])
            np.testing.assert_allclose(details[scale, direction], expected, atol=1e-12)


def test_gradient_is_prewitts() -> None:
    plane = noise((9, 14))
    kernel = np.array([[1, 0, -1]] * 3) / 3
    expected = np.hypot(signal.convolve2d(plane, kernel, "same"), signal.convolve2d(plane, kernel.T, "same"))
    np.testing.assert_allclose(fullref._gradient(plane), expected, atol=1e-12)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_downsampling_averages_around_every_nth_pixel(factor: int) -> None:
    planes = noise((2, 13, 18))
    for plane, result in zip(planes, fullref._downsampled(planes, factor), strict=True):
        whole = signal.convolve2d(plane, np.ones((factor, factor)) / factor**2)
        begin = factor // 2  # where MATLAB's "same" begins
        np.testing.assert_allclose(result, whole[begin : begin + 13 : factor, begin : begin + 18 : factor])


def test_ms_ssim_says_how_large_pictures_must_be() -> None:
    small = picture(160, 300)
    with pytest.raises(ImageError, match="161×161 and more, not 300×160"):
        fullref.ms_ssim(small, small)
    assert fullref.ms_ssim(picture(161, 161), picture(161, 161)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda image: image[:-1], "cannot be compared"),
        (lambda image: (image * 255).astype(np.uint8), "holds uint8"),
        (lambda image: image * 255, "outside"),
        (lambda image: np.where(image > 0.5, np.nan, image), "NaN"),
    ],
    ids=["shape", "type", "range", "nan"],
)
def test_refuses_what_is_no_picture_in_0_1(spoil: object, message: str) -> None:
    image = picture(20, 20)
    with pytest.raises(ImageError, match=message):
        fullref.gmsd(image, spoil(image))  # type: ignore[operator]
    with pytest.raises(ImageError, match="height, width, 3"):
        fullref.gmsd(image[..., 0], image[..., 0])


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    reference = picture(161, 176)
    rows = [measure(reference, _noisy(reference, amount)) for amount in SEVERITIES]
    return np.array(rows)


def test_pseudo_score_is_one_for_the_best_and_zero_for_the_worst(table: np.ndarray) -> None:
    scores = fit_pseudo_scale(table).scores(table)
    assert scores[0] == 1
    assert scores[-1] == 0
    assert all(np.diff(scores) < 0)
    # Ranks are equalised: evenly spaced severities in rank give evenly spaced scores.
    np.testing.assert_allclose(scores, np.linspace(1, 0, len(scores)), atol=0.005)  # 257 quantiles of 12 values


def test_pseudo_score_does_not_depend_on_the_scale_of_a_metric(table: np.ndarray) -> None:
    stretched = np.exp(3 * table)
    expected = fit_pseudo_scale(table).scores(table)
    np.testing.assert_allclose(fit_pseudo_scale(stretched).scores(stretched), expected, atol=0.005)


def test_pseudo_score_of_unseen_pictures_stays_in_0_1(table: np.ndarray) -> None:
    scale = fit_pseudo_scale(table[2:-2])
    scores = scale.scores(table)
    assert scores.min() == 0
    assert scores.max() == 1
    reference = picture(161, 176)
    equal, noisy = scale.scores(np.stack([measure(reference, image) for image in (reference, _noisy(reference, 0.3))]))
    assert equal == 1
    assert 0 < noisy < 1


def test_values_many_pictures_share_get_the_middle_of_their_ranks() -> None:
    column = np.array([0.0, 1, 1, 1, 2])
    ranks = fullref.Quantiles("x", True, tuple(column)).ranks(column)
    np.testing.assert_allclose(ranks, [0, 0.5, 0.5, 0.5, 1])
    reverse = fullref.Quantiles("x", False, tuple(column)).ranks(column)
    np.testing.assert_allclose(reverse, [1, 0.5, 0.5, 0.5, 0])


def test_pseudo_scale_survives_json(table: np.ndarray) -> None:
    scale = fit_pseudo_scale(table)
    assert decode(PseudoScale, json.loads(scale.to_json()), "pseudo-score", DatasetError) == scale


def test_refuses_tables_that_cannot_be_fitted(table: np.ndarray) -> None:
    with pytest.raises(DatasetError, match="NaN or infinity, the first is row 3"):
        fit_pseudo_scale(np.where(np.arange(len(table))[:, None] == 3, np.nan, table))
    with pytest.raises(DatasetError, match="the same for all 12 pictures"):
        fit_pseudo_scale(np.repeat(table[:1], 12, axis=0))
    with pytest.raises(DatasetError, match="4 metrics per picture"):
        fit_pseudo_scale(table[:, :2])


def _noisy(reference: np.ndarray, amount: float) -> np.ndarray:
    return np.clip(reference + amount * noise(reference.shape), 0, 1).astype(np.float32)


@pytest.mark.parametrize("shape", [(176, 176), (177, 203)])
def test_pictures_equal_to_their_originals_have_equal_values_whatever_they_show(shape: tuple[int, int]) -> None:
    """Rounding made HaarPSI 1.000000000000003 for some pictures and 1 for others, which ranks told apart."""
    for seed in range(8):
        reference = np.random.default_rng(seed).random((*shape, 3)).astype(np.float32)
        assert measure(reference, reference).tolist() == [1, 0, 0, 1]

"""Correlations: what SciPy says, and what cannot be correlated is named."""

import math

import numpy as np
import pytest
from scipy import stats

from diffiqa.engine.agreement import plcc, srcc
from diffiqa.errors import DatasetError


def sample(images: int, *, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    labels = rng.uniform(1, 5, images)
    scores = 7 * labels**2 + rng.normal(0, 9, images)
    return (np.round(scores / 9), np.round(labels)) if ties else (scores, labels)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("images", [3, 17, 400])
def test_figures_are_those_of_scipy(images: int, ties: bool) -> None:
    scores, labels = sample(images, ties=ties)
    assert srcc(scores, labels) == pytest.approx(stats.spearmanr(scores, labels).statistic, abs=1e-12)
    assert plcc(scores, labels) == pytest.approx(stats.pearsonr(scores, labels).statistic, abs=1e-12)


def test_says_what_cannot_be_correlated() -> None:
    cases: list[tuple[list[float], list[float], str]] = [
        ([1, 2, math.nan], [1, 2, 3], "1 of 3 scores are NaN or infinite, the first at index 2"),
        ([1, 2, 3], [1, math.inf, 3], "labels are NaN or infinite, the first at index 1"),
        ([4, 4, 4], [1, 2, 3], "all 3 scores are 4"),
        ([1, 2, 3], [0.5, 0.5, 0.5], "all 3 labels are 0.5"),
        ([1], [1], "two images"),
        ([1, 2], [1, 2, 3], "shape"),
    ]
    for scores, labels, message in cases:
        for figure in (srcc, plcc):
            with pytest.raises(DatasetError, match=message):
                figure(scores, labels)


def test_rounding_takes_no_correlation_beyond_one() -> None:
    rng = np.random.default_rng(4)
    for _ in range(300):
        values = rng.normal(size=7)
        assert plcc(values, 3 * values + 1) <= 1
        assert plcc(values, -3 * values) >= -1

"""A tensor beside its reference: the definitions, and what has none."""

import math
from pathlib import Path

import numpy as np
import pytest

from diffiqa.engine.manifest import read_manifest
from diffiqa.verify.figures import difference, total_score

GENERATOR = np.random.default_rng(7)
WANT = GENERATOR.normal(size=(3, 5, 7)).astype(np.float32)
HAVE = (WANT + 0.01 * GENERATOR.normal(size=WANT.shape)).astype(np.float32)


def test_figures_are_those_of_their_definitions() -> None:
    found = difference(WANT, HAVE, 0.9)
    want, have = WANT.astype(np.float64).ravel(), HAVE.astype(np.float64).ravel()
    error, largest = np.abs(have - want), np.abs(want).max()
    assert found.largest == largest
    assert [found.max, found.mean, found.median, found.quantile] == pytest.approx(
        [value / largest for value in (error.max(), error.mean(), np.median(error), np.quantile(error, 0.9))]
    )
    assert found.cosine == pytest.approx(want @ have / np.linalg.norm(want) / np.linalg.norm(have))
    assert found.psnr == pytest.approx(10 * math.log10(largest**2 / np.mean(error**2)))
    assert found.not_finite == 0


def test_equal_arrays_have_no_drift() -> None:
    found = difference(WANT, WANT)
    assert (found.max, found.psnr) == (0, math.inf)
    assert found.cosine == pytest.approx(1)
    nothing = difference(np.zeros(4), np.zeros(4))
    assert (nothing.max, nothing.cosine) == (0, 1)


def test_errors_of_a_reference_that_is_0_are_as_they_are() -> None:
    assert difference(np.zeros(4), np.full(4, 0.25)).max == 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_single_bad_number_makes_every_error_infinite(bad: float) -> None:
    have = HAVE.copy()
    have[1, 2, 3] = bad
    found = difference(WANT, have)
    assert found.not_finite == 1
    assert (found.max, found.mean, found.median, found.quantile) == (math.inf,) * 4
    assert (found.cosine, found.psnr) == (0, -math.inf)


def test_each_branch_counts_with_its_weight(tiny_engine: Path) -> None:
    manifest = read_manifest(tiny_engine)
    vcg, vda = np.array([0.2, 0.4], np.float32), np.array([0.5, 0.9], np.float32)
    assert total_score(manifest, vcg, vda) == pytest.approx(0.5 * 0.3 + 1.5 * 0.7)
    assert total_score(manifest, vcg, vda[:0]) == pytest.approx(0.5 * 0.3)

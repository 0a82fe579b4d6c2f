"""The distribution of scores: every score is counted once, in a bin of round width that holds it."""

import math
import re

import numpy as np

from diffiqa.runtime.report.histogram import make_histogram, strip, to_svg, to_table

CASES = {
    "one": [0.5],
    "all alike": [0.7] * 30,
    "zeros": [0.0, 0.0],
    "three": [0.55, 0.64, 0.69],
    "many": list(np.random.default_rng(1).beta(2, 3, 1000)),
    "edges": [0.1, 0.2, 0.3, 0.6, 0.7],
    "tiny": [1e-9, 2e-9],
    "next to nothing": [0.0, 5e-324],
    "huge": [-3.0, 1e99],
    "close and large": [1e6, 1e6 + 1e-6],
    "negative": [-2.5, -0.5],
}


def test_every_score_is_in_its_bin() -> None:
    for scores in CASES.values():
        histogram = make_histogram(scores)
        edges = histogram.edges
        assert sum(histogram.counts) == len(scores)
        assert 1 <= len(histogram.counts) <= 26
        slack = 1e-9 * max(map(abs, edges))
        assert edges[0] - slack <= min(scores)
        assert edges[-1] + slack >= max(scores)
        for low, high, count in zip(edges, edges[1:], histogram.counts, strict=False):
            # An edge is a rounded multiple of the step: a score on it belongs to either side.
            assert count <= sum(low - slack <= score <= high + slack for score in scores)
            assert count >= sum(low + slack < score < high - slack for score in scores)
        digits = re.sub(r"e.*|\.|0", "", f"{histogram.step:.6e}")
        assert digits in {"1", "2", "5"}


def test_the_drawing_says_what_the_table_says() -> None:
    for scores in CASES.values():
        histogram = make_histogram(scores)
        counts = [int(n) for n in re.findall(r"<title>[^<]*: (\d+) images?</title>", to_svg(histogram))]
        assert counts == list(histogram.counts)
        assert [int(n) for n in re.findall(r"<td>(\d+)</td>", to_table(histogram))] == counts


def test_places_lie_within_the_drawing() -> None:
    histogram = make_histogram(CASES["many"])
    assert histogram.position(-5) == "0.000%"
    assert histogram.position(5) == "100.000%"
    assert 'cx="0.000%"' in strip(histogram, -math.inf)

"""Charts: axes have round marks and hold their values, lines break where there is nothing to draw."""

import math
import re

import pytest

from diffiqa.runtime.report.svg import Axis, Series, bars, linear, logarithmic, plot


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 49, "0 10 20 30 40"),
        (0, 0.310, "0.0 0.1 0.2 0.3"),
        (-0.05, 1.05, "0.0 0.5 1.0"),
        (54.9, 92.3, "60 70 80 90"),
        (1e6, 1e6 + 1, "1000000.0 1000000.2 1000000.4 1000000.6 1000000.8 1000001.0"),
    ],
)
def test_a_linear_axis_has_round_marks_within_its_ends(low: float, high: float, labels: str) -> None:
    axis = linear(low, high)
    assert " ".join(text for _, text in axis.marks) == labels
    assert all(0 <= (mark - low) / (high - low) <= 1 + 1e-9 for mark, _ in axis.marks)
    assert (axis.share(low), axis.share(high)) == (0, 1)
    assert axis.share((low + high) / 2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1.5, 90, "1 10 100"),
        (1, 1, "1 10"),
        (3e-7, 0.02, "1e-7 1e-6 1e-5 1e-4 1e-3 1e-2 1e-1"),
        (0.001, 1e9, "1e-3 1e-1 1e1 1e3 1e5 1e7 1e9"),
    ],
)
def test_a_logarithmic_axis_covers_whole_powers(low: float, high: float, labels: str) -> None:
    axis = logarithmic(low, high)
    assert " ".join(text for _, text in axis.marks) == labels
    assert 0 <= axis.share(low) <= axis.share(high) <= 1
    assert axis.share(math.sqrt(axis.low * axis.high)) == pytest.approx(0.5)


def test_values_beyond_an_axis_lie_at_its_end_and_others_nowhere() -> None:
    falling = Axis(49, 0, ())
    assert [falling.share(value) for value in (60, 49, 0, -1)] == [0, 0, 1, 1]
    for value in (math.nan, math.inf, 0.0, -1.0):
        assert math.isnan(logarithmic(1, 10).share(value))


def test_a_line_breaks_where_a_value_has_no_place() -> None:
    values = (0.1, 0.2, math.nan, 0.3, 0.0, 0.4, 0.5)
    figure = plot("t", [Series("a <b>", tuple(enumerate(values)))], linear(0, 6), logarithmic(0.1, 1))
    assert [len(line.split()) for line in re.findall(r'<polyline points="([^"]*)"', figure)] == [2, 2]
    assert figure.count("<circle") == 1  # 0.3 stands alone
    assert "nan" not in figure
    assert "a &lt;b&gt;" in figure


def test_the_parts_of_a_bar_follow_each_other_in_the_colour_of_their_name() -> None:
    rows = [("one", [("load", 1.0), ("run", 3.0)]), ("two", [("run", 2.0)])]
    figure = bars("t", rows, lambda value: f"{value:g} s")
    found = re.findall(r'<rect class="part series-(\d)"[^>]* x="([\d.]+)%" width="([\d.]+)%"', figure)
    assert [(int(colour), float(x), float(width)) for colour, x, width in found] == [
        (0, 0, 22),
        (1, 22, 66),
        (1, 0, 44),
    ]
    assert "<title>run 3 s</title>" in figure
    assert ">4 s</text>" in figure

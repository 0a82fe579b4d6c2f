"""The distribution of scores as inline SVG that stays readable at any width."""

import bisect
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Html, table, tag
from .svg import across, digits_of, drawing, label, percent, round_step, upright

_MOST_BINS = 24
_PLOT, _RUG, _AXIS = 132, 10, 22  # heights of the bars, of the ticks of single images, and of the labels, CSS pixels
_TOP = 36  # room for two lines of labels
_MAX_RUG = 400  # more images than this make the ticks a solid band


@dataclass(frozen=True)
class Histogram:
    """Counts of scores in bins of equal, round width; edges are `origin + i · step`."""

    scores: tuple[float, ...]  # sorted
    origin: int  # of the first edge, in steps: whole numbers keep the edges free of rounding
    step: float
    counts: tuple[int, ...]

    @property
    def edges(self) -> tuple[float, ...]:
        """The ends of all bins."""
        return tuple((self.origin + i) * self.step for i in range(len(self.counts) + 1))

    def position(self, score: float) -> str:
        """Return where a score lies along the axis, as CSS percentage."""
        return percent((score / self.step - self.origin) / len(self.counts))


def make_histogram(scores: Sequence[float]) -> Histogram:
    """Bin scores, at least one of them and none beyond ±1e100."""
    ordered = tuple(sorted(scores))
    low, high = ordered[0], ordered[-1]
    span = high - low
    if span < max(1e-6 * abs(high), 1e-9):  # all the same to four digits: bins this narrow would only show rounding
        span = max(abs(high) / 10, 0.01)
    bins = min(_MOST_BINS, max(12, 3 * math.isqrt(len(ordered))))
    step = round_step(span / bins)
    origin = math.floor(low / step)
    count = max(1, math.floor(high / step) - origin + 1)
    edges = [(origin + i) * step for i in range(count + 1)]
    below = [bisect.bisect_left(ordered, edge) for edge in edges[1:-1]]
    ends = [0, *below, len(ordered)]
    return Histogram(ordered, origin, step, tuple(b - a for a, b in itertools.pairwise(ends)))


def to_svg(histogram: Histogram) -> Html:
    """Draw the bars, the median and, for few images, a tick for each. Every bar can be focused and names its count."""
    edges, tallest, bins = histogram.edges, max(histogram.counts), len(histogram.counts)
    digits = digits_of(histogram.step)
    base = _TOP + _PLOT
    bars = []
    for i, count in enumerate(histogram.counts):
        text = f"{edges[i]:.{digits}f} to {edges[i + 1]:.{digits}f}: {_images(count)}"
        height = round(_PLOT * count / tallest, 1)
        place = {"x": percent(i / bins), "width": percent(1 / bins)}
        bars.append(
            tag(
                "g",
                tag("title", text),
                tag("rect", class_="slot", y=_TOP, height=_PLOT, **place),
                tag("rect", class_="bar", y=base - height, height=height, **place),
                class_="bin",
                role="img",
                aria_label=text,
                tabindex=0,
                data_low=f"{edges[i]:.12g}",
                data_high=f"{edges[i + 1]:.12g}",
            )
        )
    median = statistics.median(histogram.scores)
    at = histogram.position(median)
    anchor, dx = ("end", -6) if float(at[:-1]) > 60 else ("start", 6)
    rug = histogram.scores if len(histogram.scores) <= _MAX_RUG else ()
    marks = [
        upright(at, 4, base, "median"),
        label(f"median {median:.4f}", at, 13, anchor, "median-label", dx),
        across(base, "axis"),
        *(upright(x, base + 3, base + _RUG, "rug") for x in map(histogram.position, rug)),
        across(_TOP, "grid"),
        label(_images(tallest), "0%", _TOP - 6),
    ]
    for i in range(0, len(edges), -(-bins // 5)):  # at most six labels: they must fit a phone
        anchor = "start" if i == 0 else "end" if i == bins else "middle"
        marks.append(label(f"{edges[i]:.{digits}f}", percent(i / bins), base + _RUG + _AXIS - 6, anchor))
    name = f"Histogram of scores, {len(histogram.scores)} images, median {median:.4f}"
    shapes = *bars, tag("g", *marks, class_="marks", aria_hidden="true")
    return drawing(base + _RUG + _AXIS, *shapes, class_="histogram", name=name, role="group")


def strip(histogram: Histogram, score: float) -> Html:
    """Draw where one score lies among all: a line over the histogram's range, the median's tick and a dot."""
    median = histogram.position(statistics.median(histogram.scores))
    dot = tag("circle", class_="dot", cx=histogram.position(score), cy=8, r=5)
    return drawing(16, across(8, "axis"), upright(median, 3, 13, "median"), dot, class_="strip")


def to_table(histogram: Histogram) -> Html:
    """Return the counts as a table, for those who do not see the drawing."""
    edges, digits = histogram.edges, digits_of(histogram.step)
    rows = [
        tag("tr", tag("th", f"{low:.{digits}f} – {high:.{digits}f}", scope="row"), tag("td", str(count)))
        for (low, high), count in zip(itertools.pairwise(edges), histogram.counts, strict=True)
    ]
    return table(["Score", "Images"], rows)


def _images(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"

"""The distribution of scores as inline SVG that stays readable at any width."""

import bisect
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Html, join, tag

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
        return _percent((score / self.step - self.origin) / len(self.counts))


def make_histogram(scores: Sequence[float]) -> Histogram:
    """Bin scores, at least one of them and none beyond ±1e100."""
    ordered = tuple(sorted(scores))
    low, high = ordered[0], ordered[-1]
    span = high - low
    if span < max(1e-6 * abs(high), 1e-9):  # all the same to four digits: bins this narrow would only show rounding
        span = max(abs(high) / 10, 0.01)
    bins = min(_MOST_BINS, max(12, 3 * math.isqrt(len(ordered))))
    raw = span / bins
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    origin = math.floor(low / step)
    count = max(1, math.floor(high / step) - origin + 1)
    edges = [(origin + i) * step for i in range(count + 1)]
    below = [bisect.bisect_left(ordered, edge) for edge in edges[1:-1]]
    ends = [0, *below, len(ordered)]
    return Histogram(ordered, origin, step, tuple(b - a for a, b in itertools.pairwise(ends)))


def to_svg(histogram: Histogram) -> Html:
    """Draw the bars, the median and, for few images, a tick for each. Every bar can be focused and names its count."""
    edges, tallest = histogram.edges, max(histogram.counts)
    digits = _digits(histogram.step)
    slot = 100 / len(histogram.counts)
    base = _TOP + _PLOT
    bars = []
    for i, count in enumerate(histogram.counts):
        text = f"{edges[i]:.{digits}f} to {edges[i + 1]:.{digits}f}: {_images(count)}"
        height = round(_PLOT * count / tallest, 1)
        left = _percent(i / len(histogram.counts))
        bars.append(
            tag(
                "g",
                tag("title", text),
                tag("rect", class_="slot", x=left, y=_TOP, width=f"{slot:.3f}%", height=_PLOT),
                tag("rect", class_="bar", x=left, y=base - height, width=f"{slot:.3f}%", height=height),
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
    anchor = "end" if float(at[:-1]) > 60 else "start"
    marks = [
        tag("line", class_="median", x1=at, x2=at, y1=4, y2=base),
        tag(
            "text",
            f"median {median:.4f}",
            class_="median-label",
            x=at,
            y=13,
            dx=-6 if anchor == "end" else 6,
            text_anchor=anchor,
        ),
        tag("line", class_="axis", x1="0%", x2="100%", y1=base, y2=base),
    ]
    rug = histogram.scores if len(histogram.scores) <= _MAX_RUG else ()
    marks += [tag("line", class_="rug", x1=x, x2=x, y1=base + 3, y2=base + _RUG) for x in map(histogram.position, rug)]
    every = -(-len(histogram.counts) // 5)  # at most six labels: they must fit a phone
    for i in range(0, len(edges), every):
        anchor = "start" if i == 0 else "end" if i == len(edges) - 1 else "middle"
        x = _percent(i / len(histogram.counts))
        label = f"{edges[i]:.{digits}f}"
        marks.append(tag("text", label, class_="tick", x=x, y=base + _RUG + _AXIS - 6, text_anchor=anchor))
    marks.append(tag("line", class_="grid", x1="0%", x2="100%", y1=_TOP, y2=_TOP))
    marks.append(tag("text", _images(tallest), class_="tick", x="0%", y=_TOP - 6))
    return tag(
        "svg",
        *bars,
        tag("g", *marks, class_="marks", aria_hidden="true"),
        class_="histogram",
        width="100%",
        height=base + _RUG + _AXIS,
        role="group",
        aria_label=f"Histogram of scores, {len(histogram.scores)} images, median {median:.4f}",
    )


def strip(histogram: Histogram, score: float) -> Html:
    """Draw where one score lies among all: a line over the histogram's range, the median's tick and a dot."""
    median = histogram.position(statistics.median(histogram.scores))
    return tag(
        "svg",
        tag("line", class_="axis", x1="0%", x2="100%", y1=8, y2=8),
        tag("line", class_="median", x1=median, x2=median, y1=3, y2=13),
        tag("circle", class_="dot", cx=histogram.position(score), cy=8, r=5),
        class_="strip",
        width="100%",
        height=16,
        aria_hidden="true",
    )


def to_table(histogram: Histogram) -> Html:
    """Return the counts as a table, for those who do not see the drawing."""
    edges, digits = histogram.edges, _digits(histogram.step)
    rows = [
        tag("tr", tag("th", f"{low:.{digits}f} – {high:.{digits}f}", scope="row"), tag("td", str(count)))
        for (low, high), count in zip(itertools.pairwise(edges), histogram.counts, strict=True)
    ]
    head = tag("thead", tag("tr", tag("th", "Score", scope="col"), tag("th", "Images", scope="col")))
    return tag("table", head, tag("tbody", join(*rows)))


def _images(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"


def _digits(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0), 1):.3f}%"

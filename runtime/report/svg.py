"""Charts as inline SVG: axes, lines, points and bars.

Across, places are shares of the width, written as percentages: a chart fits a phone, and its text stays as large as any
other. Downwards they are CSS pixels. Colours, fonts and strokes are those of page.css, light and dark.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .markup import Html, tag

Point = tuple[float, float]

COLOURS = 6  # of series, in page.css; then they begin again
_HEIGHT, _LABELS = 220, 26  # of a plot, and of the labels below it
_ROW = 40  # of a bar with its name above it


@dataclass(frozen=True)
class Axis:
    """What a plot shows in one direction. `low` is left or at the bottom, and may be the larger number."""

    low: float
    high: float
    marks: tuple[tuple[float, str], ...]  # values with a label
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Return where a value lies, from 0 at `low` to 1 at `high`, its ends included; NaN if it has no place."""
        if not math.isfinite(value) or (self.logarithmic and value <= 0):
            return math.nan
        scale: Callable[[float], float] = math.log10 if self.logarithmic else float
        low, high, at = map(scale, (self.low, self.high, value))
        return min(max((at - low) / ((high - low) or 1.0), 0.0), 1.0)


@dataclass(frozen=True)
class Series:
    """One line, or one point. A point without a place on the axes is a gap."""

    label: str
    points: tuple[Point, ...]


def linear(low: float, high: float) -> Axis:
    """Return an axis with about five round marks."""
    step = round_step((high - low) / 5)
    digits = digits_of(step)
    marks = (index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))
    return Axis(low, high, tuple((mark, f"{mark:.{digits}f}") for mark in marks))


def logarithmic(low: float, high: float) -> Axis:
    """Return an axis over the whole powers of ten around both ends."""
    first = math.floor(math.log10(low) + 1e-9)
    last = max(math.ceil(math.log10(high) - 1e-9), first + 1)
    powers = range(first, last + 1, max(1, math.ceil((last - first) / 6)))
    plain = first >= -3 and last <= 5
    marks = tuple((10.0**power, f"{10.0**power:g}" if plain else f"1e{power}") for power in powers)
    return Axis(10.0**first, 10.0**last, marks, logarithmic=True)


def round_step(least: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def digits_of(step: float) -> int:
    """Return how many decimals tell multiples of a round step apart."""
    return max(0, -math.floor(math.log10(step) + 1e-9))


def percent(share: float) -> str:
    """Return a share of the width, from 0 to 1, as SVG and CSS write it."""
    return f"{100 * min(max(share, 0), 1):.3f}%"


def across(y: float, class_: str) -> Html:
    """Return a line from the left edge to the right one."""
    return tag("line", class_=class_, x1="0%", x2="100%", y1=y, y2=y)


def upright(x: str, top: float, bottom: float, class_: str) -> Html:
    """Return a vertical line."""
    return tag("line", class_=class_, x1=x, x2=x, y1=top, y2=bottom)


def label(text: str, x: str | float, y: float, anchor: str | None = None, class_: str = "tick", dx: float = 0) -> Html:
    """Return a text; `anchor` start, middle or end is what of it lies at x."""
    return tag("text", text, class_=class_, x=x, y=y, dx=dx or None, text_anchor=anchor)


def drawing(height: float, *shapes: Html, class_: str, name: str | None = None, role: str = "img") -> Html:
    """Return an SVG as wide as its place. Without a `name`, screen readers leave it out."""
    seen = {"role": role, "aria_label": name} if name else {"aria_hidden": "true"}
    return tag("svg", *shapes, class_=class_, width="100%", height=height, **seen)


def plot(
    title: str, series: Sequence[Series], x: Axis, y: Axis, roof: Sequence[Point] = (), below: Html | None = None
) -> Html:
    """Return a figure of lines over a grid, with a legend and what comes `below` it.

    A series of one point is a dot. `roof` is a line that belongs to no series.
    """

    def at(point: Point) -> Point:
        return x.share(point[0]), 1 - y.share(point[1])

    shapes = []
    for value, text in y.marks:
        height = round(_HEIGHT * (1 - y.share(value)), 1)
        shapes += [across(height, "grid"), label(text, -8, height + 4, "end")]
    shapes += [label(text, percent(x.share(value)), _HEIGHT + 18, "middle") for value, text in x.marks]
    strokes = [_polyline(map(at, roof), "line roof")] if roof else []
    dots = []
    for number, one in enumerate(series):
        colour = f"series-{number % COLOURS}"
        for known, run in itertools.groupby(map(at, one.points), key=lambda place: not math.isnan(sum(place))):
            places = list(run)
            if known and len(places) > 1:
                strokes.append(_polyline(places, f"line {colour}", tag("title", one.label)))
            elif known:
                (across_, down), radius = places[0], 6 if len(one.points) == 1 else 2.5
                centre = {"cx": percent(across_), "cy": f"{_HEIGHT * down:.1f}"}
                dots.append(tag("circle", tag("title", one.label), class_=colour, r=radius, **centre))
    # A polyline takes no percentages: this unit square is stretched over the plot, and page.css keeps its strokes even.
    stretched = tag("svg", *strokes, viewBox="0 0 1 1", preserveAspectRatio="none", width="100%", height=_HEIGHT)
    svg = drawing(_HEIGHT + _LABELS, *shapes, stretched, *dots, class_="plot", name=title)
    return figure(title, svg, legend([one.label for one in series]), below)


def bars(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], text: Callable[[float], str]) -> Html:
    """Return a figure with a bar for each row, of one or several parts; parts of one name share a colour."""
    most = max(sum(value for _, value in parts) for _, parts in rows) or 1.0
    names = list(dict.fromkeys(name for _, parts in rows for name, _ in parts if name))
    shapes = []
    for row, (what, parts) in enumerate(rows):
        y, start = row * _ROW, 0.0
        shapes.append(label(what, 0, y + 14))
        for name, value in parts:
            share = 0.88 * value / most  # the rest is for the number
            colour = f"series-{names.index(name) % COLOURS if name else 0}"
            title_ = tag("title", f"{name} {text(value)}".strip())
            place = {"x": percent(start), "width": percent(share)}
            shapes.append(tag("rect", title_, class_=f"part {colour}", y=y + 20, height=14, **place))
            start += share
        shapes.append(label(text(sum(value for _, value in parts)), percent(start), y + 32, class_="value", dx=6))
    svg = drawing(len(rows) * _ROW, *shapes, class_="bars", name=title)
    return figure(title, svg, legend(names))


def legend(names: Sequence[str]) -> Html:
    """Return which colour stands for what."""
    keys = (
        tag("span", tag("span", class_=f"key series-{number % COLOURS}", aria_hidden="true"), name, class_="entry")
        for number, name in enumerate(names)
    )
    return tag("p", *keys, class_="legend-row") if names else Html()


def figure(title: str, *content: Html | None) -> Html:
    """Return a chart under its title."""
    return tag("figure", tag("figcaption", tag("b", title)), *content, class_="chart")


def _polyline(places: Iterable[Point], class_: str, title: Html | None = None) -> Html:
    return tag("polyline", title, points=" ".join(f"{x:.5f},{y:.5f}" for x, y in places), class_=class_)

"""Curves over the steps of the loop as inline SVG, with the same numbers as a table."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..runtime.report.markup import Html, tag

WIDTH, HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 34


@dataclass(frozen=True)
class Line:
    """One curve; a step without a finite value is a gap, and so is 0 on a logarithmic axis."""

    label: str
    values: tuple[float, ...]  # by step, T − 1 first


def chart(title: str, lines: Sequence[Line], *, logarithmic: bool = True) -> Html:
    """Draw curves over the steps, from noise on the left to the restored image on the right."""

    def shown(value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not logarithmic)

    drawn = [line for line in lines if any(map(shown, line.values))]
    if not drawn:
        return tag("p", f"{title}: no difference, or nothing that can be drawn.", class_="quiet")
    steps = len(drawn[0].values)
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    heights = [scale(value) for line in drawn for value in line.values if shown(value)]
    low, high = _ends(min(heights), max(heights), logarithmic=logarithmic)

    def x(index: int) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * index / max(1, steps - 1)

    def y(value: float) -> float:
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    parts: list[Html] = []
    for mark in _marks(low, high, logarithmic=logarithmic):
        label = f"1e{mark:.0f}" if logarithmic else f"{mark:g}"
        parts.append(tag("line", class_="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=f"{y(mark):.1f}", y2=f"{y(mark):.1f}"))
        parts.append(tag("text", label, class_="tick", x=_LEFT - 6, y=f"{y(mark) + 4:.1f}", text_anchor="end"))
    for index in sorted({0, steps - 1, *range(steps - 1, -1, -max(1, steps // 5))}):
        at = f"{x(index):.1f}"
        parts.append(tag("text", str(steps - 1 - index), class_="tick", x=at, y=HEIGHT - 14, text_anchor="middle"))
    for number, line in enumerate(drawn):
        points = [(x(i), y(scale(v))) if shown(v) else None for i, v in enumerate(line.values)]
        label = tag("title", line.label)
        parts.append(tag("g", label, *_strokes(points), class_=f"line line-{number % 6}"))
    legend = tag(
        "p",
        *(
            tag("span", tag("span", class_=f"key key-{number % 6}", aria_hidden="true"), line.label, class_="entry")
            for number, line in enumerate(drawn)
        ),
        class_="legend-row",
    )
    svg = tag(
        "svg",
        *parts,
        class_="curves",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}, by step from {steps - 1} to 0",
    )
    return tag("figure", tag("figcaption", tag("b", title)), svg, legend, _table(lines), class_="chart")


def _strokes(points: Sequence[tuple[float, float] | None]) -> list[Html]:
    """Return a polyline for each run of points, a dot where one stands alone."""
    strokes = []
    for present, run in itertools.groupby(points, key=lambda point: point is not None):
        if not present:
            continue
        known = [point for point in run if point]
        if len(known) == 1:
            strokes.append(tag("circle", cx=f"{known[0][0]:.1f}", cy=f"{known[0][1]:.1f}", r=2))
        else:
            strokes.append(tag("polyline", points=" ".join(f"{px:.1f},{py:.1f}" for px, py in known)))
    return strokes


def _table(lines: Sequence[Line]) -> Html:
    steps = len(lines[0].values)
    head = tag("tr", tag("th", "Step", scope="col"), *(tag("th", line.label, scope="col") for line in lines))
    rows = [
        tag("tr", tag("th", str(steps - 1 - i), scope="row"), *(tag("td", f"{line.values[i]:.3g}") for line in lines))
        for i in range(steps)
    ]
    table = tag("table", tag("thead", head), tag("tbody", *rows))
    return tag("details", tag("summary", "The same as a table"), tag("div", table, class_="scroll"))


def _ends(low: float, high: float, *, logarithmic: bool) -> tuple[float, float]:
    if logarithmic:
        return math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _marks(low: float, high: float, *, logarithmic: bool) -> list[float]:
    if logarithmic:
        every = max(1, math.ceil((high - low) / 6))
        return [float(mark) for mark in range(int(low), int(high) + 1, every)]
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]

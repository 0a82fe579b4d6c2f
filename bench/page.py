"""The report as one self-contained HTML page: plots of throughput, steps, roofline and start-up, and the tables."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..engine.atomic import replacing
from ..errors import OutputError
from ..runtime.report.markup import Html, join, tag
from .report import TABLES, WITHOUT_GRAPHS, number
from .results import Results
from .verdict import judge_results

# Okabe and Ito's colours, which people of any colour vision tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5a5a5a")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 300, 70, 20, 20, 44
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#20242c;background:#fff}
table{border-collapse:collapse;display:block;overflow-x:auto;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .6rem;border-bottom:1px solid #e4e7eb;text-align:left;white-space:nowrap}
svg{max-width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:#20242c}
.axis{stroke:#6e7480}.grid{stroke:#e4e7eb}.bad{color:#b3261e}
"""

Point = tuple[float, float]


def to_page(results: Results, path: Path) -> None:
    """Write the page, whole or not at all. Raises OutputError."""
    verdict = judge_results(results)
    head, *lines = verdict.lines
    title = f"iqa-bench: {results.engine.model} on {results.where}"
    parts = [
        tag("h1", title),
        tag("p", tag("strong", head, class_="bad" if verdict.problems else None)),
        tag("ul", *(tag("li", line) for line in lines)),
        *(tag("figure", tag("figcaption", caption), svg) for caption, svg in _plots(results)),
    ]
    for name, make in TABLES.items():
        if text := make(results):
            parts += [tag("h2", name[:1].upper() + name[1:]), _table(text)]
    parts.append(
        tag("ul", *(tag("li", f"{what}: not measured here, {why}") for what, why in results.not_measured.items()))
    )
    meta = Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width">')
    page = tag(
        "html", tag("head", meta, tag("title", title), tag("style", Html(_STYLE))), tag("body", *parts), lang="en"
    )
    try:
        with replacing(path) as stream:
            stream.write(("<!doctype html>\n" + page + "\n").encode())
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}") from exc


def _plots(results: Results) -> list[tuple[str, Html]]:
    plots = []
    if bars := [(case.name, [(1 / statistics.median(case.end_to_end), "")]) for case in results.measured]:
        plots.append(("Images per second, files in and scores out", _bars(bars)))
    if lines := _over_batch(results):
        plots.append(("Images per second over images per batch", _lines(lines)))
    lines = [
        (case.name, [(float(i), 1e3 * statistics.median(samples)) for i, samples in enumerate(case.step_seconds)])
        for case in results.measured
        if case.step_seconds
    ]
    if lines:
        plain = f", {WITHOUT_GRAPHS}" if results.gpu else ""
        plots.append((f"Milliseconds per U-Net step over the schedule, first step left{plain}", _lines(lines)))
    if results.roof and any(case.work for case in results.measured):
        caption = (
            "Roofline: GFLOP/s over the most FLOP per byte that a stage can have; the line is what was probed here"
        )
        if not (results.peak_gflops and results.peak_gbs):
            caption += ", or else what the data sheet promises"
        plots.append((caption, _roofline(results, *results.roof)))
    if results.starts:
        parts = ("interpreter", "imports", "check", "load", "first_score")
        rows = [
            (f"process {i + 1}", [(getattr(start, part), part.replace("_", " ")) for part in parts])
            for i, start in enumerate(results.starts)
        ]
        plots.append(("Seconds from the start of a process to its first score", _bars(rows)))
    return plots


def _over_batch(results: Results) -> list[tuple[str, list[Point]]]:
    """Return a line for all cases that differ in their batch alone, where some do."""
    lines: defaultdict[str, list[Point]] = defaultdict(list)
    for case in results.measured:
        lines[replace(case, batch=1).name].append((float(case.batch), 1 / statistics.median(case.end_to_end)))
    return [(name, sorted(points)) for name, points in lines.items() if len(points) > 1]


def _bars(rows: Sequence[tuple[str, Sequence[tuple[float, str]]]]) -> Html:
    """Draw a bar per row, of one or several parts; parts of one name share a colour."""
    most = max(sum(value for value, _ in parts) for _, parts in rows) or 1.0
    names = list(dict.fromkeys(name for _, parts in rows for _, name in parts if name))
    label, height = 300, 26
    shapes = []
    for row, (text, parts) in enumerate(rows):
        x, y = float(label), row * height
        shapes.append(tag("text", text, x=label - 8, y=y + 17, text_anchor="end"))
        for value, name in parts:
            width = (_WIDTH - 80) * value / most
            colour = COLOURS[names.index(name) % len(COLOURS)] if name else COLOURS[0]
            title = tag("title", f"{name} {number(value)}".strip())
            shapes.append(
                tag("rect", title, x=f"{x:.1f}", y=y + 3, width=f"{width:.1f}", height=height - 6, fill=colour)
            )
            x += width
        shapes.append(tag("text", number(sum(value for value, _ in parts)), x=f"{x + 6:.1f}", y=y + 17))
    bottom = len(rows) * height
    for index, name in enumerate(names):
        left = label + 125 * index
        shapes.append(tag("rect", x=left, y=bottom + 8, width=10, height=10, fill=COLOURS[index % len(COLOURS)]))
        shapes.append(tag("text", name, x=left + 15, y=bottom + 18))
    return _svg(label + _WIDTH, bottom + (26 if names else 4), shapes)


def _lines(lines: Sequence[tuple[str, Sequence[Point]]]) -> Html:
    """Draw a line per case; time starts at 0, so that a difference looks as large as it is."""
    right = max(x for _, points in lines for x, _ in points) or 1.0
    top = 1.1 * max(y for _, points in lines for _, y in points)
    shapes = [*_axes([(right * k / 5, f"{right * k / 5:.0f}", k / 5) for k in range(6)], True)]
    shapes += _axes([(top * k / 4, number(top * k / 4), k / 4) for k in range(5)], False)
    for index, (_, points) in enumerate(lines):
        path = " ".join("{:.1f},{:.1f}".format(*_at(x / right, y / top)) for x, y in points)
        colour = COLOURS[index % len(COLOURS)]
        shapes.append(tag("polyline", points=path, fill="none", stroke=colour, stroke_width=2))
    return _with_legend(shapes, [name for name, _ in lines])


def _roofline(results: Results, gflops: float, gbs: float) -> Html:
    """Draw what the machine allows and where the stages of the first case lie, both axes logarithmic."""
    case = next(case for case in results.measured if case.work)
    places = [(case.work[stage].intensity, case.gflops(stage) or 1e-9, stage) for stage in case.work]
    ridge = gflops / gbs
    low, high = (
        f(math.log10(p))
        for f, p in (
            (math.floor, min(ridge, *(x for x, _, _ in places)) / 2),
            (math.ceil, max(ridge, *(x for x, _, _ in places)) * 2),
        )
    )
    bottom, top = math.floor(math.log10(min(y for _, y, _ in places) / 2)), math.ceil(math.log10(gflops * 1.5))

    def at(x: float, y: float) -> Point:
        across, up = (math.log10(x) - low) / (high - low), (math.log10(y) - bottom) / (top - bottom)
        return _at(across, min(max(up, 0.0), 1.0))

    shapes = _axes([(k, f"{10.0**k:g}", (k - low) / (high - low)) for k in range(low, high + 1)], True)
    shapes += _axes([(k, f"{10.0**k:g}", (k - bottom) / (top - bottom)) for k in range(bottom, top + 1)], False)
    start = max(10.0**low, 10.0**bottom / gbs)
    roof = [at(start, gbs * start), at(ridge, gflops), at(10.0**high, gflops)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in roof)
    shapes.append(tag("polyline", points=path, fill="none", stroke="#20242c", stroke_width=2))
    for index, (x, y, stage) in enumerate(places):
        left, above = at(x, y)
        title = tag("title", f"{stage}: {number(y)} GFLOP/s at {number(x)} FLOP per byte")
        shapes.append(
            tag("circle", title, cx=f"{left:.1f}", cy=f"{above:.1f}", r=6, fill=COLOURS[index % len(COLOURS)])
        )
    return _with_legend(shapes, [stage for _, _, stage in places])


def _at(across: float, up: float) -> Point:
    """Return where a place in the plot, 0 to 1 either way, is drawn."""
    return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _TOP + (1 - up) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(ticks: Sequence[tuple[float, str, float]], horizontal: bool) -> list[Html]:
    shapes = []
    for _, text, share in ticks:
        if horizontal:
            x, y = _at(share, 0)
            shapes.append(tag("text", text, x=f"{x:.1f}", y=f"{y + 18:.1f}", text_anchor="middle"))
        else:
            x, y = _at(0, share)
            shapes.append(tag("line", class_="grid", x1=x, x2=_WIDTH - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}"))
            shapes.append(tag("text", text, x=f"{x - 6:.1f}", y=f"{y + 4:.1f}", text_anchor="end"))
    return shapes


def _with_legend(shapes: list[Html], names: Sequence[str]) -> Html:
    for index, name in enumerate(names):
        y = _HEIGHT + 18 * index
        shapes.append(tag("rect", x=_LEFT, y=y, width=10, height=10, fill=COLOURS[index % len(COLOURS)]))
        shapes.append(tag("text", name, x=_LEFT + 16, y=y + 10))
    return _svg(_WIDTH, _HEIGHT + 18 * len(names), shapes)


def _svg(width: int, height: int, shapes: Sequence[Html]) -> Html:
    return tag("svg", *shapes, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img")


def _table(markdown: str) -> Html:
    """Turn one of our own Markdown tables into HTML."""
    head, _, *rows = (
        [cell.strip().replace("\\|", "|") for cell in line.strip("|").split(" | ")] for line in markdown.split("\n")
    )
    body = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return tag("table", tag("thead", tag("tr", *(tag("th", cell) for cell in head))), tag("tbody", join(*body)))

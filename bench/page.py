"""The report as one self-contained HTML page: plots of throughput, steps, roofline and start-up, and the tables."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..data.outputs import write_file
from ..runtime.report.frame import page
from ..runtime.report.markup import Html, table, tag
from ..runtime.report.svg import Series, bars, linear, logarithmic, plot
from .report import TABLES, WITHOUT_GRAPHS, number
from .results import Results
from .verdict import judge_results

_STYLE = """
.said { margin: 0 0 2.4rem; padding-left: 1.1rem; max-width: 60rem; }
td { white-space: nowrap; }
.right { text-align: right; }
"""


def to_page(results: Results, path: Path) -> None:
    """Write the page, whole or not at all. Raises OutputError."""
    verdict = judge_results(results)
    head, *lines = verdict.lines
    title = f"iqa-bench: {results.engine.model} on {results.where}"
    lead = tag("strong", head, class_="bad" if verdict.problems else None)
    parts = [tag("ul", *(tag("li", line) for line in lines), class_="said"), *_plots(results)]
    for name, make in TABLES.items():
        if text := make(results):
            parts.append(tag("section", tag("h2", name[:1].upper() + name[1:]), _table(text)))
    missing = results.not_measured.items()
    parts.append(tag("ul", *(tag("li", f"{what}: not measured here, {why}") for what, why in missing), class_="said"))
    write_file(path, page(title, lead, *parts, css=_STYLE))


def _plots(results: Results) -> list[Html]:
    plots: list[Html] = []
    if rates := [(case.name, [("", 1 / statistics.median(case.end_to_end))]) for case in results.measured]:
        plots.append(bars("Images per second, files in and scores out", rates, number))
    if lines := _over_batch(results):
        plots.append(_lines("Images per second over images per batch", lines))
    lines = [
        Series(case.name, tuple((i, 1e3 * statistics.median(some)) for i, some in enumerate(case.step_seconds)))
        for case in results.measured
        if case.step_seconds
    ]
    if lines:
        plain = f", {WITHOUT_GRAPHS}" if results.gpu else ""
        plots.append(_lines(f"Milliseconds per U-Net step over the schedule, first step left{plain}", lines))
    if results.roof and any(case.work for case in results.measured):
        caption = (
            "Roofline: GFLOP/s over the most FLOP per byte that a stage can have; the line is what was probed here"
        )
        if not (results.peak_gflops and results.peak_gbs):
            caption += ", or else what the data sheet promises"
        plots.append(_roofline(caption, results, *results.roof))
    if results.starts:
        parts = ("interpreter", "imports", "check", "load", "first_score")
        rows = [
            (f"process {i + 1}", [(part.replace("_", " "), getattr(start, part)) for part in parts])
            for i, start in enumerate(results.starts)
        ]
        plots.append(bars("Seconds from the start of a process to its first score", rows, number))
    return plots


def _over_batch(results: Results) -> list[Series]:
    """Return a line for all cases that differ in their batch alone, where some do."""
    lines: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for case in results.measured:
        lines[replace(case, batch=1).name].append((float(case.batch), 1 / statistics.median(case.end_to_end)))
    return [Series(name, tuple(sorted(points))) for name, points in lines.items() if len(points) > 1]


def _lines(title: str, lines: Sequence[Series]) -> Html:
    """Draw a line per case; time starts at 0, so that a difference looks as large as it is."""
    right = max(x for line in lines for x, _ in line.points) or 1.0
    top = 1.1 * max(y for line in lines for _, y in line.points)
    return plot(title, lines, linear(0, right), linear(0, top))


def _roofline(title: str, results: Results, gflops: float, gbs: float) -> Html:
    """Draw what the machine allows and where the stages of the first case lie, both axes logarithmic."""
    case = next(case for case in results.measured if case.work)
    stages = [(stage, work.intensity, case.gflops(stage) or 1e-9) for stage, work in case.work.items()]
    ridge = gflops / gbs
    across = logarithmic(min(ridge, *(x for _, x, _ in stages)) / 2, max(ridge, *(x for _, x, _ in stages)) * 2)
    up = logarithmic(min(y for _, _, y in stages) / 2, gflops * 1.5)
    start = max(across.low, up.low / gbs)
    roof = [(start, gbs * start), (ridge, gflops), (across.high, gflops)]
    dots = [Series(f"{stage}: {number(y)} GFLOP/s at {number(x)} FLOP per byte", ((x, y),)) for stage, x, y in stages]
    return plot(title, dots, across, up, roof=roof)


def _table(markdown: str) -> Html:
    """Turn one of our own Markdown tables into HTML."""
    lines = [line.strip("|").split(" | ") for line in markdown.split("\n")]
    classes = ["right" if "--:" in mark else None for mark in lines.pop(1)]
    head, *rows = (
        [(cell.strip().replace("\\|", "|"), class_) for cell, class_ in zip(line, classes, strict=True)]
        for line in lines
    )
    titles = [tag("th", cell, scope="col", class_=class_) for cell, class_ in head]
    body = (tag("tr", *(tag("td", cell, class_=class_) for cell, class_ in row)) for row in rows)
    return tag("div", table(titles, body), class_="wide")

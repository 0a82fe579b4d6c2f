"""The HTML page of a verification: verdict, curves over the steps, taps, stages and scores. One file, no scripts."""

import base64
import datetime
import hashlib
from collections.abc import Callable, Sequence
from importlib import resources

from .. import __version__
from ..runtime.report.markup import Html, join, tag
from ..runtime.report.page import number_text
from .curves import Line, chart
from .figures import Difference, Findings
from .limits import RULES, LimitCheck, is_within
from .report import allowed, number, verdict_of

_STYLE = """
main { padding-block: 1rem 3rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
td, th { padding: 0.25rem 0.8rem 0.25rem 0; text-align: right; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th:first-child, .left, .where { text-align: left; }
.left, .where { white-space: normal; }
tr.beyond td, tr.beyond th { font-weight: 650; }
tr.beyond .verdict { color: light-dark(#a3201d, #ff8f87); }
.wide { overflow-x: auto; }
.scroll { overflow-x: auto; max-height: 24rem; }
.chart { margin-bottom: 2rem; max-width: 56rem; }
.curves { width: 100%; height: auto; }
.curves .grid { stroke: var(--line); }
.curves .tick { fill: var(--quiet); font-size: 12px; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.legend-row { font-size: 0.875rem; }
.entry { display: inline-block; margin-right: 1.4rem; }
.key { display: inline-block; width: 1.1rem; height: 0.2rem; margin-right: 0.4rem; vertical-align: middle; }
"""
_COLOURS = (
    "#0a6672, #6fc6d2",
    "#b36b00, #e0a53c",
    "#7a2e8c, #cf8fe0",
    "#2f6b2f, #86c986",
    "#a3201d, #ff8f87",
    "#59616b, #a3abb5",
)


def render(findings: Findings, checks: Sequence[LimitCheck]) -> str:
    """Return the page."""
    colours = "".join(
        f".line-{i} {{ stroke: light-dark({pair}); }}\n.key-{i} {{ background: light-dark({pair}); }}\n"
        for i, pair in enumerate(_COLOURS)
    )
    style = (
        resources.files("diffiqa.runtime.report").joinpath("report.css").read_text(encoding="utf-8") + _STYLE + colours
    )
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = f"{'Within' if is_within(checks) else 'Beyond'} limits: {findings.candidate.label}"
    now = datetime.datetime.now(datetime.UTC).isoformat(" ", "minutes").removesuffix("+00:00")
    count = f"{len(findings.images)} of {findings.asked} images"
    lead = f"{findings.model}, {count}. Written {now} UTC, diffiqa {__version__}."
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Html(style)),
    )
    body = tag(
        "body",
        tag("header", tag("div", tag("h1", title), tag("p", lead, class_="lead"))),
        tag("main", _warning(findings), _parties(findings), _verdict(checks), _loop(findings), _taps(findings),
            _scores(findings)),
    )  # fmt: skip
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _warning(findings: Findings) -> Html:
    if findings.trained:
        return Html()
    what = tag("strong", "This engine is untrained: its scores mean nothing, and neither does their order.")
    return tag("div", tag("p", what), class_="warning", role="note")


def _parties(findings: Findings) -> Html:
    rows = [("Reference", findings.reference), ("Candidate", findings.candidate)]
    items = [tag("div", tag("dt", name), tag("dd", f"{party.label} ({party.id})")) for name, party in rows]
    return tag("dl", *items, class_="small")


def _verdict(checks: Sequence[LimitCheck]) -> Html:
    rows = []
    for check in checks:
        about = RULES[check.name].about if check.name in RULES else "every number is finite"
        cells = [number(check.value), allowed(check)]
        rows.append(
            tag(
                "tr",
                tag("th", check.name, scope="row"),
                tag("td", about, class_="left"),
                *(tag("td", cell) for cell in cells),
                tag("td", str(verdict_of(check)), class_="verdict"),
                tag("td", check.where, class_="where"),
                class_=None if check.within else "beyond",
            )
        )
    return _section("Verdict", _table(("Limit", "What", "Measured", "Allowed", "Verdict", "Where"), rows))


def _loop(findings: Findings) -> Html:
    """Curves: the worst image at every step, and the mean over the images."""
    images = findings.images
    forced = [figures.forced for figures in images if figures.forced]
    noise, state = [figures.noise for figures in images], [figures.state for figures in images]
    if not noise[0]:
        return Html()
    high = f"{findings.quantile:.0%} quantile"
    errors = [
        *([_worst("one step: largest", forced, lambda d: d.max)] if forced else []),
        *([_worst(f"one step: {high}", forced, lambda d: d.quantile)] if forced else []),
        *([_mean("one step: mean", forced, lambda d: d.mean)] if forced else []),
        *([_mean("one step: median", forced, lambda d: d.median)] if forced else []),
        _worst("whole run: largest", noise, lambda d: d.max),
        _mean("whole run: mean", noise, lambda d: d.mean),
    ]
    cosines = [_worst("whole run", noise, lambda d: 1 - d.cosine)]
    psnr = [_mean("whole run", noise, lambda d: d.psnr)]
    if forced:
        cosines.insert(0, _worst("one step", forced, lambda d: 1 - d.cosine))
        psnr.insert(0, _mean("one step", forced, lambda d: d.psnr))
    states = [
        _worst("largest", state, lambda d: d.max),
        _worst(high, state, lambda d: d.quantile),
        _mean("mean", state, lambda d: d.mean),
        _mean("median", state, lambda d: d.median),
    ]
    return _section(
        "The loop, step by step",
        tag("p", "Errors are shares of the reference’s largest value. The largest error is that of the worst image, "
            "the mean is over all images. “One step” gives the candidate the reference’s inputs at each step; in the "
            "“whole run” it goes on from its own results.", class_="quiet"),
        chart("Noise that the U-Net predicts: error", errors),
        chart("The same: distance of the cosine from 1", cosines),
        chart("The same: PSNR, dB", psnr, logarithmic=False),
        chart("State that each step starts from, in the whole run: error", states),
    )  # fmt: skip


def _taps(findings: Findings) -> Html:
    """Worst images: what the heads look at, and what each stage adds by itself."""
    groups: dict[str, list[Difference]] = {}
    for figures in findings.images:
        for kind, tap in figures.taps.items():
            groups.setdefault(f"tap {kind}", []).append(tap)
        if figures.maps:
            groups.setdefault("ViT maps", []).append(figures.maps)
        for stage, answer in figures.heads.items():
            groups.setdefault(f"{stage}, given the reference’s inputs", []).append(answer)
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(
                tag("td", number(value))
                for value in (
                    max(d.max for d in found),
                    max(d.quantile for d in found),
                    max(d.mean for d in found),
                    max(d.median for d in found),
                    min(d.cosine for d in found),
                    min(d.psnr for d in found),
                )
            ),
            tag("td", str(sum(d.not_finite for d in found))),
        )
        for name, found in groups.items()
    ]
    titles = ("Tensor", "Largest", f"{findings.quantile:.0%}", "Mean", "Median", "Cosine", "PSNR, dB", "NaN, Inf")
    return _section("Taps and stages, worst image", _table(titles, rows)) if rows else Html()


def _scores(findings: Findings) -> Html:
    names = list(findings.images[0].scores)
    rows = []
    for figures in findings.images:
        cells: list[str] = []
        for want, have in figures.scores.values():
            cells += [number_text(want), number_text(have), number(abs(have - want))]
        label = tag("th", tag("bdi", figures.name), scope="row")
        rows.append(tag("tr", label, *(tag("td", cell) for cell in cells)))
    titles = ["Image", *(f"{name}{part}" for name in names for part in (": reference", ": candidate", ": difference"))]
    return _section("Scores", _table(titles, rows))


def _section(title: str, *children: Html) -> Html:
    return tag("section", tag("h2", title), *children)


def _table(titles: Sequence[str], rows: Sequence[Html]) -> Html:
    texts = {"What", "Where"}
    cells = (tag("th", title, scope="col", class_="left" if title in texts else None) for title in titles)
    head = tag("thead", tag("tr", *cells))
    return tag("div", tag("table", head, tag("tbody", join(*rows))), class_="wide")


def _worst(label: str, runs: Sequence[tuple[Difference, ...]], pick: Callable[[Difference], float]) -> Line:
    return Line(label, tuple(max(map(pick, column)) for column in zip(*runs, strict=True)))


def _mean(label: str, runs: Sequence[tuple[Difference, ...]], pick: Callable[[Difference], float]) -> Line:
    return Line(label, tuple(sum(map(pick, column)) / len(column) for column in zip(*runs, strict=True)))

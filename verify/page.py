"""The HTML page of a verification: verdict, curves over the steps, taps, stages and scores. One file, no scripts."""

import datetime
import math
from collections.abc import Callable, Sequence

from .. import __version__
from ..runtime.report.frame import page
from ..runtime.report.markup import Html, table, tag
from ..runtime.report.page import number_text
from ..runtime.report.svg import Axis, Series, linear, logarithmic, plot
from .figures import Difference, Findings
from .limits import RULES, LimitCheck, is_within
from .report import allowed, number, verdict_of

_STYLE = """
tr.beyond :is(td, th) { font-weight: 650; }
tr.beyond .verdict { color: var(--bad); }
"""


def render(findings: Findings, checks: Sequence[LimitCheck]) -> str:
    """Return the page."""
    title = f"{'Within' if is_within(checks) else 'Beyond'} limits: {findings.candidate.label}"
    now = datetime.datetime.now(datetime.UTC).isoformat(" ", "minutes").removesuffix("+00:00")
    count = f"{len(findings.images)} of {findings.asked} images"
    lead = f"{findings.model}, {count}. Written {now} UTC, diffiqa {__version__}."
    above = _warning(findings), _parties(findings), _verdict(checks)
    return page(title, lead, *above, _loop(findings), _taps(findings), _scores(findings), css=_STYLE)


def _warning(findings: Findings) -> Html:
    if findings.trained:
        return Html()
    what = tag("strong", "This engine is untrained: its scores mean nothing, and neither does their order.")
    return tag("div", tag("p", what), class_="warning", role="note")


def _parties(findings: Findings) -> Html:
    rows = [("Reference", findings.reference), ("Candidate", findings.candidate)]
    items = [tag("div", tag("dt", name), tag("dd", f"{party.label} ({party.id})")) for name, party in rows]
    return tag("section", tag("dl", *items, class_="small"))


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
                tag("td", check.where, class_="left"),
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
        _worst("one step: largest", forced, lambda d: d.max),
        _worst(f"one step: {high}", forced, lambda d: d.quantile),
        _mean("one step: mean", forced, lambda d: d.mean),
        _mean("one step: median", forced, lambda d: d.median),
        _worst("whole run: largest", noise, lambda d: d.max),
        _mean("whole run: mean", noise, lambda d: d.mean),
    ]
    both = (("one step", forced), ("whole run", noise))
    cosines = [_worst(what, runs, lambda d: 1 - d.cosine) for what, runs in both]
    psnr = [_mean(what, runs, lambda d: d.psnr) for what, runs in both]
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
        _chart("Noise that the network predicts: error", errors),
        _chart("The same: distance of the cosine from 1", cosines),
        _chart("The same: PSNR, dB", psnr, on_powers=False),
        _chart("State that each step starts from, in the whole run: error", states),
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
    errors, likenesses = ("max", "quantile", "mean", "median"), ("cosine", "psnr")
    rows = []
    for name, found in groups.items():
        worst = [max(getattr(each, part) for each in found) for part in errors]
        worst += [min(getattr(each, part) for each in found) for part in likenesses]
        cells = [*map(number, worst), str(sum(each.not_finite for each in found))]
        rows.append(tag("tr", tag("th", name, scope="row"), *(tag("td", cell) for cell in cells)))
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
    return tag("div", table([*cells], rows, class_="numbers"), class_="wide")


def _worst(label: str, runs: Sequence[tuple[Difference, ...]], pick: Callable[[Difference], float]) -> Series:
    return _by_step(label, [max(map(pick, column)) for column in zip(*runs, strict=True)])


def _mean(label: str, runs: Sequence[tuple[Difference, ...]], pick: Callable[[Difference], float]) -> Series:
    return _by_step(label, [sum(map(pick, column)) / len(column) for column in zip(*runs, strict=True)])


def _by_step(label: str, values: Sequence[float]) -> Series:
    """Return the values of the steps, of which the first that is run has the highest number."""
    return Series(label, tuple(zip(range(len(values) - 1, -1, -1), values, strict=True)))


def _chart(title: str, lines: Sequence[Series], *, on_powers: bool = True) -> Html:
    """Draw curves over the steps, from noise on the left to the restored image on the right, with their numbers."""

    def drawable(value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not on_powers)

    lines = [line for line in lines if line.points]  # without points: not measured
    drawn = [line for line in lines if any(drawable(value) for _, value in line.points)]
    shown = [value for line in drawn for _, value in line.points if drawable(value)]
    if not shown:
        return tag("p", f"{title}: no difference, or nothing that can be drawn.", class_="quiet")
    last = len(lines[0].points) - 1
    steps = Axis(last, 0, tuple((step, str(step)) for step in sorted({last, *range(0, last, max(1, (last + 1) // 5))})))
    margin = 0.05 * (max(shown) - min(shown)) or 0.05 * abs(shown[0]) or 1.0
    up = logarithmic(min(shown), max(shown)) if on_powers else linear(min(shown) - margin, max(shown) + margin)
    rows = [
        tag("tr", tag("th", f"{last - i}", scope="row"), *(tag("td", f"{line.points[i][1]:.3g}") for line in lines))
        for i in range(last + 1)
    ]
    below = table(["Step", *(line.label for line in lines)], rows, class_="numbers")
    numbers = tag("details", tag("summary", "The same as a table"), tag("div", below, class_="scroll"))
    return plot(title, drawn, steps, up, below=numbers)

"""An evaluation as Markdown that is as readable on a terminal."""

from collections.abc import Sequence

from .correlation import GroupRow
from .findings import ORDERED, Evaluation


def to_text(found: Evaluation) -> str:
    """Return the evaluation as Markdown that is as readable on a terminal."""
    part = f", part {found.part}" if found.part else ""
    blocks = [
        f"# {found.scores} on {found.data}{part}",
        f"{found.images} labelled images, {found.images - len(found.missing)} with a score. Labels: "
        f"{'higher' if found.higher_is_better else 'lower'} is better.",
    ]
    if found.missing:
        more = " …" if len(found.missing) > 10 else ""
        blocks.append(f"Without a score: {', '.join(found.missing[:10])}{more}")
    blocks.append(_block("scores", found.branches))
    if found.distortions:
        blocks += ["## By distortion", _block("distortion", found.distortions)]
    if found.levels:
        rows = [
            (row.distortion, str(row.references), f"{row.median:.3f}", "" if row.ordered else "levels are not in order")
            for row in found.levels
        ]
        reached, of = found.put_in_order
        blocks += [
            "## By level",
            table([("distortion", "references", "median Spearman with level", ""), *rows]),
            f"{reached} of {of} distortions whose levels are in order have a median of {ORDERED} or more, either sign.",
        ]
    if found.originals:
        o = found.originals
        blocks.append(
            f"The original has the higher score in {o.higher} of {o.compared} comparisons ({o.share:.1%}), the same "
            f"in {o.equal}."
        )
    if p := found.opinions:
        blocks.append(
            f"As opinions from 1 to 5, scores have a root mean square error of {p.error:.2f} on {p.images} images, "
            f"where a label of {p.worst:g} is a 1 and {p.best:g} a 5. The engine states {p.stated:.2f}. Half of the "
            f"images have a percentile above {p.percentile:.0f}."
        )
    return "\n\n".join(blocks) + "\n"


def _block(title: str, groups: Sequence[GroupRow]) -> str:
    """Return the figures of groups as a table, and below it why some have none."""
    head = (title, "images", "SRCC", "KRCC", "PLCC raw", "PLCC after logistic", "RMSE after logistic")
    rows = []
    for row in groups:
        c = row.correlation
        figures = (c.srcc, c.krcc, c.plcc, c.plcc_logistic, c.rmse_logistic) if c else (None,) * 5
        rows.append((row.group, str(row.images), *("" if value is None else f"{value:.4f}" for value in figures)))
    reasons = [f"\n\n{row.group}: {row.reason}" for row in groups if row.reason]
    return table([head, *rows]) + "".join(reasons)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first row its head, whose columns line up: the first left, all others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    rules = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    lines.insert(1, f"|{'|'.join(rules)}|")
    return "\n".join(lines)

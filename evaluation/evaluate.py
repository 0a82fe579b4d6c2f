"""How well scores agree with labels, in one typed document: all images, each branch, each distortion, each level."""

import json
import posixpath
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.datasets import Dataset, Item
from ..data.distortions import DISTORTIONS
from ..data.outputs import write_file
from ..engine.agreement import srcc
from ..engine.codec import encode
from ..errors import DatasetError, OutputError
from ..runtime.command.run import Outputs, run
from ..runtime.results import Options
from ..runtime.scorer import Scorer
from .charts import save
from .correlation import GroupRow, gmad_pairs, per_group, read_scores
from .scatter import Points, draw_scatter

SCHEMA_VERSION = 1
SCORES_NAME, JSON_NAME, TEXT_NAME, SCATTER_NAME = "scores.jsonl", "evaluation.json", "evaluation.md", "scatter.png"
ORDERED = 0.9  # what the median of |Spearman| over levels must reach for a distortion to count as put in order
BRANCHES = {"score": "total", "vcg": "VCG alone", "vda": "VDA alone"}  # columns of score files

# Facts about levels. CSV files are taken to name distortions as `iqa-train rate` and KADID-10k do.
_SHIFT, _CONTRAST, _LAB, _BLUR = (DISTORTIONS[number].name for number in (18, 25, 8, 1))
_UNORDERED = {"tid2013": ("mean shift", "contrast"), "csiq": ()}  # levels go both ways
_KADID_UNORDERED = (_SHIFT, _CONTRAST)
_KADID_IDENTITIES = ((_SHIFT, 3), (_CONTRAST, 3), (_LAB, 1), (_BLUR, 1))  # leave the picture as it is

Scores = Mapping[str, float]  # by the labels' name of the image


@dataclass(frozen=True)
class LevelRow:
    """Spearman of score against level within one reference: its median over the references of a distortion."""

    distortion: str
    references: int
    median: float
    ordered: bool  # whether its levels are in the order of their strength, so that the median means something


@dataclass(frozen=True)
class Originals:
    """Comparisons of a distorted picture with its original; distortions that change nothing are left out."""

    compared: int
    higher: int  # the original has the higher score
    equal: int

    @property
    def share(self) -> float:
        """The share of comparisons that the original wins."""
        return self.higher / self.compared


@dataclass(frozen=True)
class Evaluation:
    """All that is found out about one set of scores. Correlations are of scores with labels turned higher-is-better."""

    data: str
    part: str | None  # of the split; None: the whole set
    scores: str  # the engine, or the score file
    higher_is_better: bool  # of the labels as published
    images: int  # that have a label
    missing: tuple[str, ...]  # labelled images without a score
    branches: tuple[GroupRow, ...]  # total, VCG alone, VDA alone, as far as known
    distortions: tuple[GroupRow, ...]
    levels: tuple[LevelRow, ...]
    originals: Originals | None
    schema_version: int = SCHEMA_VERSION

    @property
    def put_in_order(self) -> tuple[int, int]:
        """For how many of the distortions with ordered levels the median reaches ORDERED, and how many these are."""
        ordered = [row for row in self.levels if row.ordered]
        return sum(abs(row.median) >= ORDERED - 1e-9 for row in ordered), len(ordered)  # 0.9 is no binary number


def evaluate(
    dataset: Dataset, items: Sequence[Item], branches: Mapping[str, Scores], *, scores: str, part: str | None = None
) -> Evaluation:
    """Compare scores with the labels of `items`; `branches` has the keys of BRANCHES, at least "score".

    Images without a score are listed. Raises DatasetError if fewer than two have one.
    """
    total = branches["score"]
    scored = [item for item in items if item.image in total]
    if len(scored) < 2:
        raise DatasetError(
            f"{len(scored)} of the {len(items)} images of {dataset.name} have a score, where two at least are needed: "
            f"do the scores belong to these labels, which call an image {items[0].image}?"
        )
    rows: list[GroupRow] = []
    for column, name in BRANCHES.items():
        known = [item for item in scored if item.image in branches.get(column, {})]
        if known:
            rows += per_group([branches[column][i.image] for i in known], _labels(dataset, known), [name] * len(known))
    distorted = [item for item in scored if item.distortion]
    distortions: tuple[GroupRow, ...] = ()
    if len(distorted) > 1:
        values = [total[item.image] for item in distorted]
        distortions = per_group(values, _labels(dataset, distorted), [str(item.distortion) for item in distorted])
    return Evaluation(
        data=dataset.name,
        part=part,
        scores=scores,
        higher_is_better=dataset.higher_is_better,
        images=len(items),
        missing=tuple(item.image for item in items if item.image not in total),
        branches=tuple(rows),
        distortions=distortions,
        levels=_levels(dataset, distorted, total),
        originals=_originals(dataset, scored, total),
    )


def _labels(dataset: Dataset, items: Sequence[Item]) -> list[float]:
    return [item.label if dataset.higher_is_better else -item.label for item in items]


def _levels(dataset: Dataset, items: Sequence[Item], scores: Scores) -> tuple[LevelRow, ...]:
    series: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        if item.distortion and item.reference and item.level is not None:
            series[item.distortion, item.reference].append(item)
    found: dict[str, list[float]] = defaultdict(list)
    for (distortion, _), members in sorted(series.items()):
        levels, values = [item.level or 0 for item in members], [scores[item.image] for item in members]
        if len(set(levels)) > 2:  # two would always be in order, or in the other one
            # Scores that are all equal put nothing in order.
            found[distortion].append(srcc(values, levels) if len(set(values)) > 1 else 0.0)
    unordered = _UNORDERED.get(dataset.name, _KADID_UNORDERED)
    return tuple(
        LevelRow(name, len(values), statistics.median(values), name not in unordered)
        for name, values in sorted(found.items())
    )


def _originals(dataset: Dataset, items: Sequence[Item], scores: Scores) -> Originals | None:
    """Compare with the reference's file, else with the one picture of the same reference that has no distortion."""
    pristine: dict[str, list[float]] = defaultdict(list)
    for item in items:
        if item.reference and not item.distortion:
            pristine[item.reference].append(scores[item.image])
    identities = () if dataset.name in _UNORDERED else _KADID_IDENTITIES
    differences = []
    for item in items:
        known = pristine.get(item.reference or "", [])
        original = scores.get(item.reference or "") if item.reference_path else known[0] if len(known) == 1 else None
        if original is not None and item.distortion and (item.distortion, item.level) not in identities:
            differences.append(original - scores[item.image])
    if not differences:
        return None
    return Originals(len(differences), sum(d > 0 for d in differences), sum(d == 0 for d in differences))


def pictures_of(items: Iterable[Item]) -> dict[str, Path]:
    """Return the files of images and of the references that are files, by their names in the labels."""
    found: dict[str, Path] = {}
    for item in items:
        if item.reference and item.reference_path:
            found[item.reference] = item.reference_path
        found[item.image] = item.path
    return found


def score_pictures(
    scorer: Scorer,
    pictures: Mapping[str, Path],
    folder: Path,
    options: Options,
    *,
    resume: bool = False,
    force: bool = False,
    quiet: bool = False,
    workers: int = 1,
) -> dict[str, dict[str, float]]:
    """Score pictures into scores.jsonl as `iqa-run` does, resuming included; return the scores as `read_branches`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(f"cannot make the folder {folder}: {exc.strerror or exc}") from exc
    outputs = Outputs(file=folder / SCORES_NAME, resume=resume, force=force, quiet=quiet)
    names = {image: str(path) for image, path in pictures.items()}
    run(scorer, list(dict.fromkeys(names.values())), options, outputs, workers=workers)
    return _branches(folder / SCORES_NAME, names)


def read_branches(path: Path, pictures: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Return the scores of a file by branch and by the labels' names of the images. Raises DatasetError."""
    return _branches(path, _matched(pictures, read_scores(path), path))


def _branches(path: Path, names: Mapping[str, str]) -> dict[str, dict[str, float]]:
    columns = {column: read_scores(path, column) for column in BRANCHES}
    return {
        column: {image: values[name] for image, name in names.items() if name in values}
        for column, values in columns.items()
    }


def _matched(pictures: Mapping[str, Path], names: Iterable[str], where: Path) -> dict[str, str]:
    """Return what the score file calls each picture: its path, its name in the labels, or an end of either.

    So scores need not have been made from the same folder. Raises DatasetError where two names would do.
    """
    spelt = {posixpath.normpath(name.replace("\\", "/")): name for name in names}
    found: dict[str, str] = {}
    for image, path in pictures.items():
        exact = next((name for name in (path.as_posix(), image) if name in spelt), None)
        if exact:
            found[image] = exact
    free = set(spelt) - set(found.values())
    by_end: dict[str, list[str]] = defaultdict(list)
    for name in sorted(free):
        for end in _ends(name):
            by_end[end].append(name)
    unknown = set(pictures) - set(found)
    claims = Counter(end for image in unknown for end in _ends(image) if end in free)
    # The longest names choose first: what ends like `b/a.png` is not the picture `a.png`.
    for image in sorted(unknown, key=lambda image: (-image.count("/"), image)):
        candidates = [name for name in by_end.get(image, []) if name in free]
        candidates = candidates or [end for end in _ends(image) if end in free][:1]
        if len(candidates) > 1:
            raise DatasetError(
                f"{where} has {candidates[0]} and {candidates[1]}, and either could be {image}; name images in it as "
                f"the labels do"
            )
        if candidates and claims[candidates[0]] > 1:
            raise DatasetError(
                f"{where} has {candidates[0]}, which could be {image} or another image of the labels; name images in "
                f"it as the labels do"
            )
        if candidates:
            found[image] = candidates[0]
            free.remove(candidates[0])
    return {image: spelt[name] for image, name in found.items()}


def _ends(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def write_evaluation(folder: Path, found: Evaluation, points: Points) -> None:
    """Write evaluation.json, evaluation.md and scatter.png. Raises OutputError."""
    document = json.dumps(encode(found), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(folder / JSON_NAME, document)
    write_file(folder / TEXT_NAME, to_text(found))
    save(draw_scatter(points), folder / SCATTER_NAME)


def points_of(dataset: Dataset, items: Sequence[Item], scores: Scores) -> Points:
    """Return what the scatter plot shows: labels as published over scores."""
    scored = [item for item in items if item.image in scores]
    direction = "higher" if dataset.higher_is_better else "lower"
    return Points(
        title=dataset.name,
        scores=tuple(scores[item.image] for item in scored),
        labels=tuple(item.label for item in scored),
        label_name=f"label ({direction} is better)",
    )


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


def gmad_table(first: Path, second: Path, levels: int) -> list[tuple[str, ...]]:
    """Return the gMAD pairs of two score files as rows of text, the first one the head: each model fixed in turn.

    As in the paper's Figs. 5 and 6, for levels from low to high quality. Raises DatasetError.
    """
    a, b = read_scores(first), read_scores(second)
    head = ("fixed", "level", "better", "worse", "fixed_better", "fixed_worse", "other_better", "other_worse")
    return [
        head,
        *(
            (
                str(path),
                f"{pair.level:.3f}",
                pair.better,
                pair.worse,
                *(f"{value:.6g}" for value in (*pair.fixed, *pair.other)),
            )
            for path, fixed, other in ((first, a, b), (second, b, a))
            for pair in gmad_pairs(fixed, other, levels)
        ),
    ]

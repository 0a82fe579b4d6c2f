"""How well scores agree with labels, in one typed document: all images, each branch, each distortion, each level."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..data.datasets import Dataset, Item
from ..data.distortions import DISTORTIONS
from ..engine.agreement import srcc
from ..engine.codec import LATER
from ..errors import DatasetError
from .correlation import GroupRow, per_group, rmse
from .reference import Ends

SCHEMA_VERSION = 1
ORDERED = 0.9  # what the median of |Spearman| over levels must reach for a distortion to count as put in order
BRANCHES = {"score": "total", "vcg": "VCG alone", "vda": "VDA alone"}  # by the columns of score files
PEOPLE = ("percentile", "opinion", "opinion_error")  # more of their columns, where the engine has a reference

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
    """How often an original has a higher score than its distorted version. Distortions without effect are left out."""

    compared: int
    higher: int  # the original has the higher score
    equal: int

    @property
    def share(self) -> float:
        """The share of comparisons that the original wins."""
        return self.higher / self.compared


@dataclass(frozen=True)
class Opinions:
    """How far the opinions that the engine gives are from people's, from 1 to 5."""

    images: int
    worst: float  # the label that is a 1
    best: float  # the label that is a 5
    error: float  # root mean square
    stated: float  # the error that the engine states, on its own reference
    percentile: float  # the median of the images' percentiles in that reference


@dataclass(frozen=True)
class Evaluation:
    """All findings about one set of scores. For correlations, labels are turned so that higher is better."""

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
    opinions: Opinions | None = field(default=None, metadata=LATER)

    @property
    def put_in_order(self) -> tuple[int, int]:
        """How many distortions with ordered levels have a median of ORDERED or more, and how many there are."""
        ordered = [row for row in self.levels if row.ordered]
        return sum(abs(row.median) >= ORDERED - 1e-9 for row in ordered), len(ordered)  # 0.9 is no binary number


def compare(
    dataset: Dataset,
    items: Sequence[Item],
    branches: Mapping[str, Scores],
    *,
    scores: str,
    part: str | None = None,
    ends: Ends | None = None,
) -> Evaluation:
    """Compare scores with the labels of `items`; `branches` has keys of BRANCHES and PEOPLE, at least "score".

    `ends`, of the labels, are those of the set unless they are given. Images without a score are listed. Raises
    DatasetError if fewer than two have one.
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
        opinions=_opinions(ends or Ends(dataset, dataset.worst, dataset.best), scored, branches),
    )


def _opinions(ends: Ends, items: Sequence[Item], branches: Mapping[str, Scores]) -> Opinions | None:
    percentiles, opinions, errors = (branches.get(column, {}) for column in PEOPLE)
    known = [item for item in items if item.image in opinions]
    if len(known) < 2:
        return None
    return Opinions(
        images=len(known),
        worst=ends.worst,
        best=ends.best,
        error=rmse([opinions[item.image] for item in known], ends.opinions(known)),
        stated=errors[known[0].image],
        percentile=statistics.median(percentiles[item.image] for item in known),
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

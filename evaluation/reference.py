"""Scores and people's opinions → the `Reference` that an engine carries."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.datasets import Dataset, Item
from ..engine.agreement import Array, Values, paired
from ..engine.manifest import Manifest, weights_id
from ..engine.monotone import Monotone, fit_monotone
from ..engine.reference import BEST, MIN_IMAGES, PERCENTS, WORST, Reference
from ..errors import DatasetError, UsageError
from .correlation import rmse

IMAGES_PER_KNOT = 25
FOLDS, SEED = 10, 0


@dataclass(frozen=True)
class Ends:
    """The labels that are the worst and the best opinion. Raises UsageError if they cannot be those of `dataset`."""

    dataset: Dataset
    worst: float
    best: float

    def __post_init__(self) -> None:
        """Refuse ends that point the other way, or that labels lie beyond."""
        low, high = sorted((self.worst, self.best))
        labels = [item.label for item in self.dataset.items]
        better = "higher" if self.dataset.higher_is_better else "lower"
        given = f"--opinions {self.worst:g} {self.best:g}"
        if self.worst == self.best or (self.best > self.worst) != self.dataset.higher_is_better:
            raise UsageError(f"{given}: labels of {self.dataset.name} are better when {better}; give the worst first")
        if min(labels) < low or max(labels) > high:
            raise UsageError(f"{given}: labels of {self.dataset.name} run from {min(labels):g} to {max(labels):g}")

    def opinions(self, items: Sequence[Item]) -> Array:
        """Return the labels on the scale of opinions."""
        share = (np.array([item.label for item in items]) - self.worst) / (self.best - self.worst)
        return WORST + (BEST - WORST) * share


def make_reference(
    name: str, manifest: Manifest, scores: Values, opinions: Values, *, crops: int, mode: str
) -> Reference:
    """Return a reference of scores that `manifest`'s engine gave, and of people's opinions of the same images.

    Raises DatasetError if they are too few, or if a score says nothing.
    """
    values, known = paired(scores, opinions)
    require_enough(name, len(values))
    values = values if manifest.score.higher_is_better else -values
    reference = Reference(
        name=name,
        images=len(values),
        crops=crops,
        mode=mode,
        quantiles=tuple(np.percentile(values, PERCENTS).tolist()),
        opinions=_fit(values, known),
        error=held_out_error(values, known),
        weights=weights_id(manifest.provenance.sources),
        scoring=manifest.scoring_id,
    )
    if reference.problem:
        raise DatasetError(f"the scores of {name} make no reference: it {reference.problem}")
    return reference


def require_enough(name: str, images: int) -> None:
    """Raise DatasetError if a set has too few images for a reference."""
    if images < MIN_IMAGES:
        raise DatasetError(f"a reference needs {MIN_IMAGES} images with a score at least, {name} has {images}")


def held_out_error(scores: Array, opinions: Array) -> float:
    """Return the root mean square error of the map, where each image is judged by a fit without it and its fold."""
    order = np.random.default_rng(SEED).permutation(len(scores))
    guesses = np.empty(len(scores))
    for fold in np.array_split(order, FOLDS):
        rest = np.setdiff1d(order, fold)
        guesses[fold] = [_fit(scores[rest], opinions[rest])(score) for score in scores[fold]]
    return rmse(guesses, opinions)


def _fit(scores: Array, opinions: Array) -> Monotone:
    return fit_monotone(scores, opinions, knots=max(2, len(scores) // IMAGES_PER_KNOT))

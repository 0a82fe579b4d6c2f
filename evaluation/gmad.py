"""gMAD: two models compete, each on images that the other one finds equal (the paper's Figs. 5 and 6)."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..engine.agreement import paired
from ..errors import DatasetError


@dataclass(frozen=True)
class GmadPair:
    """Two images that the fixed model finds about equal and the other one does not."""

    level: float  # of the fixed model's score, as a quantile of all images
    better: str  # the image that the other model prefers
    worse: str
    fixed: tuple[float, float]  # the fixed model's scores of better, worse
    other: tuple[float, float]  # the other model's


def gmad_pairs(
    fixed: Mapping[str, float], other: Mapping[str, float], levels: int, window: float = 0.02
) -> tuple[GmadPair, ...]:
    """Return a pair for each level: the fixed model finds its images alike, the other model as unlike as possible.

    `fixed` and `other` map the same images to scores. The levels are evenly spaced in the order by the fixed model. At
    each level the images around it are compared: the share `window` of all, two at least. The paper's two figures are
    two calls, with the models in either place.
    """
    if different := sorted(set(fixed) ^ set(other)):
        raise DatasetError(
            f"{len(different)} images have a score in one file only: {', '.join(different[:3])}"
            f"{' …' if len(different) > 3 else ''}"
        )
    if not 1 <= levels <= len(fixed) // 2:
        raise DatasetError(f"{len(fixed)} images have room for 1 to {len(fixed) // 2} levels, not {levels}")
    if not 0 < window <= 1:
        raise DatasetError(f"the window is a share of the images between 0 and 1, not {window}")
    images = sorted(fixed, key=lambda image: (fixed[image], image))
    paired([fixed[image] for image in images], [other[image] for image in images])
    size = max(2, round(window * len(images)))
    pairs = []
    for index in range(levels):
        level = (index + 0.5) / levels
        first = min(max(0, round(level * len(images) - size / 2)), len(images) - size)
        near = images[first : first + size]
        worse, better = min(near, key=other.__getitem__), max(near, key=other.__getitem__)
        if other[worse] == other[better]:
            raise DatasetError(f"the other model gives one score to all {size} images around level {level:.2f}")
        pairs.append(GmadPair(level, better, worse, (fixed[better], fixed[worse]), (other[better], other[worse])))
    return tuple(pairs)

"""What a score means to a person: where it lies among the scores of known photographs, and which opinion it stands for.

`iqa-eval --reference` makes a reference from scores and opinions. A bundle and a manifest carry it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DatasetError
from .codec import decode
from .monotone import Monotone

MIN_IMAGES = 100
PERCENTS = tuple(range(101))
WORST, BEST = 1.0, 5.0  # of opinions
MAX_BYTES = 2**20  # a reference has a few thousand


@dataclass(frozen=True)
class Reference:
    """The scores of images that people rated, turned so that higher is better, and a map of them onto opinions."""

    name: str  # of the set
    images: int
    crops: int  # that were asked for
    mode: str  # the same
    quantiles: tuple[float, ...]  # of the scores, one for each of PERCENTS
    opinions: Monotone  # from WORST to BEST
    error: float  # of the map, as root mean square over images that it was not fitted to
    weights: str  # `weights_id` of the engine's sources
    scoring: str  # the engine's `scoring_id`

    @property
    def problem(self) -> str | None:
        """What keeps this from being a reference, or None. Values from a file are checked with it."""
        outputs = self.opinions.outputs
        rules = {
            "must have a name of at most 100 printable characters": 0 < len(self.name) <= 100
            and self.name.isprintable(),
            f"needs {MIN_IMAGES} images at least, not {self.images}": self.images >= MIN_IMAGES,
            f"must have {len(PERCENTS)} quantiles": len(self.quantiles) == len(PERCENTS),
            "has quantiles that fall": bool(np.all(np.diff(self.quantiles) >= 0)),
            "has quantiles that are all equal": len(set(self.quantiles)) > 1,
            f"has opinions whose map {self.opinions.problem}": self.opinions.problem is None,
            f"has opinions beyond {WORST:g} to {BEST:g}": all(WORST <= output <= BEST for output in outputs),
            "has a map of opinions that goes on beyond its ends": self.opinions.slope_beyond == 0,
            "has a negative error": self.error >= 0,
        }
        return next((text for text, holds in rules.items() if not holds), None)

    @property
    def explained(self) -> tuple[str, str]:
        """What percentile and opinion say, and no more than was measured."""
        return (
            f"Percentile: the share of the {self.images} images of {self.name} that have a worse score.",
            f"Opinion: from 1 to 5, what the people who rated {self.name} would say; its root mean square error there "
            f"is {self.error:.2f}.",
        )

    def percentile(self, score: float) -> float:
        """Return the percentage of the set's images that have a lower score."""
        return float(np.interp(score, self.quantiles, PERCENTS))

    def caveat(self, crops: int, mode: str) -> str | None:
        """Return what sets a score with these options apart from those of the set, or None."""
        if (crops, mode) == (self.crops, self.mode):
            return None
        return f"percentile and opinion hold for {_options(self.crops, self.mode)}, not for {_options(crops, mode)}"


def _options(crops: int, mode: str) -> str:
    return f"--crops {crops} --mode {mode}"


def percent_text(percentile: float | None) -> str:
    """Return a percentile in whole percent, rounded down: no image is better than one it was not found better than."""
    return f"{int(percentile)} %" if percentile is not None and math.isfinite(percentile) else ""


def opinion_text(opinion: float | None) -> str:
    """Return an opinion with one decimal: its error is larger."""
    return "" if opinion is None else f"{opinion:.1f}"


def read_reference(path: Path) -> Reference:
    """Read what `iqa-eval --reference` wrote. Raises DatasetError."""
    try:
        with path.open("rb") as stream:
            data = json.loads(stream.read(MAX_BYTES))
        reference = decode(Reference, data, "the reference", ValueError)
        problem: object = reference.problem and f"it {reference.problem}"
    except (OSError, ValueError, RecursionError) as exc:
        problem = exc.strerror if isinstance(exc, OSError) else exc
    if problem:
        raise DatasetError(f"{path} cannot be used as a reference: {problem}; iqa-eval --reference makes one")
    return reference

"""The U-Net's ranges over the steps of the loop as a chart: it shows where the schedule moves them."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..engine.manifest import StageName
from ..errors import UsageError
from ..evaluation.charts import FAINT, add_legend, colour, panels
from . import ranges
from .statistics import StageStatistics, Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 5  # tensors: as many as can be told apart
PERCENTILE = 99.9
SMALLEST = 2.0**-26  # magnitudes below it are drawn there: a logarithmic axis has no 0
_MAGNITUDES = np.abs(ranges.CENTRES)
_ORDER = np.argsort(_MAGNITUDES, kind="stable")

Table = npt.NDArray[np.float64]  # (tensors, steps)


def draw_ranges(statistics: Statistics) -> "Figure":
    """Draw percentile 99.9 and maximum of every tensor's magnitudes; name the tensors that move the most.

    Raises UsageError if there is nothing to draw.
    """
    stage = statistics.stages.get(StageName.UNET)
    if stage is None:
        raise UsageError("these statistics are of an engine without a U-Net: nothing in them moves over the steps")
    high, largest = magnitudes(stage)
    seen = np.all(high > 0, axis=1)
    if not seen.any():
        raise UsageError("these statistics hold no images: there are no ranges to draw")
    tensors = [stage.tensors[row] for row in np.flatnonzero(seen)]
    high, largest = high[seen], largest[seen]
    moved = high.max(axis=1) / high.min(axis=1)
    named = _most_moved(high, moved)
    titles = [
        f"U-Net, {len(tensors)} tensors: p{PERCENTILE} of magnitudes by step",
        "The same: largest magnitude by step",
    ]
    figure, axes_of = panels(titles)
    for axes, values in zip(axes_of, (high, largest), strict=True):
        _draw(axes, np.maximum(values, SMALLEST), named)
    add_legend(figure, [f"{tensors[row]}: {moved[row]:.0f}-fold" for row in named])
    return figure


def magnitudes(stage: StageStatistics) -> tuple[Table, Table]:
    """Return percentile and maximum of the magnitudes of every tensor at every step; 0 where nothing was seen."""
    cumulative = np.cumsum(stage.histogram[:, :, _ORDER], axis=2)
    total = cumulative[:, :, -1:]
    at = np.argmax(cumulative >= np.maximum(total, 1) * (PERCENTILE / 100), axis=2)
    high = np.where(total[:, :, 0] > 0, _MAGNITUDES[_ORDER][at], 0.0)
    largest = np.maximum(np.maximum(-stage.low, stage.high), 0.0)  # −inf where nothing was seen
    return high, largest.astype(np.float64)


def _most_moved(high: Table, moved: Table) -> list[int]:
    """Return the rows of the tensors whose range changes most; of those that move alike, a chain's first alone."""
    named: list[int] = []
    for row in np.argsort(-moved, kind="stable"):
        if all(np.abs(np.log(high[row] / high[other])).max() > 0.1 for other in named):
            named.append(int(row))
        if len(named) == NAMED:
            break
    return named


def _draw(axes: "Axes", values: Table, named: list[int]) -> None:
    """Draw a line for every tensor; those that have a name lie on top."""
    axes.set_yscale("log")
    axes.set_xlabel("step: noise on the left, the restored image on the right")
    axes.set_xlim(max(1, values.shape[1] - 1), 0)  # as the loop runs
    for row, line in enumerate(values):
        if row not in named:
            axes.plot(line, color=FAINT, linewidth=0.8)
    for place, row in reversed(list(enumerate(named))):
        axes.plot(values[row], color=colour(place), linewidth=2.2)

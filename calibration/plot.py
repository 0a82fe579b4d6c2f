"""The U-Net's ranges over the steps of the loop as PNG, so that one sees where the schedule moves them."""

import numpy as np
import numpy.typing as npt
import PIL.Image

from ..engine.manifest import StageName
from ..errors import UsageError
from ..training.plot import COLOURS, GRID, HEIGHT, WIDTH, Axis, Canvas, draw_legend, make_axis
from . import ranges
from .statistics import StageStatistics, Statistics

NAMED = 5  # tensors: as many as can be told apart
PERCENTILE = 99.9
FAINT = tuple((3 * value + 110) // 4 for value in GRID)
_MAGNITUDES = np.abs(ranges.CENTRES)
_ORDER = np.argsort(_MAGNITUDES, kind="stable")

Table = npt.NDArray[np.float64]  # (tensors, steps)


def draw_ranges(statistics: Statistics) -> PIL.Image.Image:
    """Draw two panels, percentile 99.9 and maximum of every tensor's magnitudes, and name those that move the most.

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
    legend = draw_legend([f"{tensors[row]}: {moved[row]:.0f}-fold" for row in named])
    panels = [
        _panel(f"U-Net, {len(tensors)} tensors: p{PERCENTILE} of magnitudes by step", high, named),
        _panel("The same: largest magnitude by step", largest, named),
    ]
    sheet = PIL.Image.new("RGB", (2 * WIDTH, legend.height + HEIGHT), "white")
    sheet.paste(legend)
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index * WIDTH, legend.height))
    return sheet


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


def _panel(title: str, values: Table, named: list[int]) -> PIL.Image.Image:
    canvas = Canvas(WIDTH, HEIGHT, title, "step: noise on the left, the restored image on the right", "")
    values = np.maximum(values, 2.0**-26)
    steps = values.shape[1]
    x = Axis(max(1, steps - 1), 0, tuple(range(0, steps, max(1, steps // 5))))  # as the loop runs
    y = make_axis([float(values.min()), float(values.max())], logarithmic=True)
    canvas.axes(x, y)
    for row in [row for row in range(len(values)) if row not in named] + named[::-1]:
        colour = COLOURS[named.index(row)] if row in named else FAINT
        places = [(x.place(step), y.place(float(value))) for step, value in enumerate(values[row])]
        canvas.line(places, (colour[0], colour[1], colour[2]), 2.2 if row in named else 0.8)
    return canvas.finish()

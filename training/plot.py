"""Curves of training runs as a chart: loss, learning rate and what validation found."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DatasetError
from ..evaluation.charts import add_legend, colour, panels, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_NAME = "plot.png"
DOTS = 40  # points of a line: with no more, each gets a dot

Curve = tuple[list[float], list[float]]  # steps, values


def draw_runs(runs: Sequence[Path]) -> "Figure":
    """Draw one panel for each quantity, in it a line for each run. Raises DatasetError for a folder that is no run."""
    names = _short_names(runs)
    found: dict[str, dict[int, Curve]] = {}  # by title, then by the run's place
    for place, (name, run) in enumerate(zip(names, runs, strict=True)):
        log, validation = _read(run / "log.csv"), _read(run / "validation.csv")
        if not log:
            raise DatasetError(f"{run} holds no run that has logged a step: it has no rows in log.csv")
        columns = [("loss", log, "loss"), ("learning rate", log, "learning_rate")]
        named = [column for column in (validation[0] if validation else ()) if column != "step"]
        columns += [(f"validation: {column.replace('_', ' ')}", validation, column) for column in named]
        for title, rows, column in columns:
            curve = _curve(name, rows, column)
            if curve[0]:
                found.setdefault(title, {})[place] = curve
    figure, axes_of = panels(list(found))
    for axes, (title, curves) in zip(axes_of, found.items(), strict=True):
        values = [value for _, y in curves.values() for value in y]
        # On a linear scale, a loss that falls to a tenth or less shows nothing of its end.
        if title == "loss" and min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
        for place, (x, y) in curves.items():
            marker = "o" if len(x) <= DOTS else ""
            axes.plot(x, y, color=colour(place), marker=marker, markersize=4, label=names[place])
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
    if len(names) > 1:
        add_legend(figure, names)
    return figure


def write_plot(folder: Path) -> None:
    """Write the chart of a run into its folder. Raises OutputError."""
    save(draw_runs([folder]), folder / PLOT_NAME)


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as exc:
        raise DatasetError(f"{path} cannot be read: {exc}") from exc


def _curve(name: str, rows: Sequence[dict[str, str]], column: str) -> Curve:
    """Return a column of a log. Values that are not finite are left out: a young network's correlation is NaN."""
    points = []
    for row in rows:
        try:
            point = float(row["step"]), float(row[column])
        except (KeyError, TypeError, ValueError) as exc:
            raise DatasetError(f"the log of run {name} has a row without a number in step or {column}") from exc
        if all(map(math.isfinite, point)):
            points.append(point)
    return [x for x, _ in points], [y for _, y in points]


def _short_names(runs: Sequence[Path]) -> list[str]:
    """Return the names of the folders, with the names above them where two would be equal."""
    resolved = [run.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in resolved)):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in runs]

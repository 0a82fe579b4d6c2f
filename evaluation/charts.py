"""Charts as PNG files, drawn by matplotlib through its objects: no window, no state that others share."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.extra import load_extra
from ..engine.atomic import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 6.4, 4.0, 100  # of a panel, in inches; pixels per inch
INK, GREY, FAINT = "#20242c", "#6e7480", "#c7c9cc"
# Okabe and Ito's colours, which people of any colour vision tell apart. Yellow is left out: it is too light on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5a5a5a")


def require_matplotlib() -> None:
    """Raise BackendError if matplotlib is missing. Call it before hours of work that end with a chart."""
    load_extra("matplotlib.figure")


def panels(
    titles: Sequence[str], *, columns: int = 2, width: float = WIDTH, height: float = HEIGHT
) -> "tuple[Figure, list[Axes]]":
    """Return a figure with one panel for each title, in rows of `columns`. Raises BackendError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(columns * width, rows * height), dpi=DPI, layout="constrained")
    found = []
    for place, title in enumerate(titles, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_title(title, loc="left", color=INK)
        axes.grid(color="#e4e7ec")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY)
        found.append(axes)
    return figure, found


def colour(index: int) -> str:
    """Return the colour of a line by its number; colours come again after the last one."""
    return COLOURS[index % len(COLOURS)]


def add_legend(figure: "Figure", names: Sequence[str]) -> None:
    """Name the colours of lines above all panels, in as many rows as the names need."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour(index), linewidth=3) for index in range(len(names))]
    letters = figure.get_figwidth() * 10  # that fit side by side
    fitting = max(1, int(letters // (max(map(len, names)) + 8)))
    figure.legend(lines, names, loc="outside upper left", ncols=min(len(names), fitting), frameon=False)


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all. Raises OutputError."""
    with writing(path) as stream:
        figure.savefig(stream, format="png")

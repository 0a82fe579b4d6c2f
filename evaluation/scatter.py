"""Labels over scores as a chart, with the fitted logistic."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..engine.agreement import plcc, srcc
from ..errors import DatasetError
from .charts import COLOURS, GREY, panels
from .correlation import LOGISTIC_MIN, fit_logistic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_scatter(title: str, scores: Sequence[float], labels: Sequence[float], label_name: str = "label") -> "Figure":
    """Draw a point for each image, and the logistic where one can be fitted."""
    figure, (axes,) = panels([title], columns=1, width=8, height=6)
    axes.set_xlabel("score")
    axes.set_ylabel(label_name)
    count = len(scores)
    size, opacity = (40, 0.67) if count <= 300 else (20, 0.43) if count <= 3000 else (10, 0.24)
    axes.scatter(scores, labels, s=size, alpha=opacity, color=COLOURS[0], linewidths=0)
    figures = f"{count} images"
    try:
        figures += f", SRCC {srcc(scores, labels):.3f}"
        figures += f", PLCC raw {plcc(scores, labels):.3f}"
        if count >= LOGISTIC_MIN:
            curve = fit_logistic(scores, labels)
            low, high = min(scores), max(scores)
            along = [low + (high - low) * k / 200 for k in range(201)]
            axes.set_ylim(axes.get_ylim())  # of the labels: a steep curve may leave them
            axes.plot(along, curve(along).tolist(), color=COLOURS[1], linewidth=2)
            figures += "; line: fitted logistic"
    except DatasetError:  # scores or labels without any difference: there is nothing to correlate
        pass
    axes.set_title(figures, loc="right", color=GREY, fontsize="small")
    return figure

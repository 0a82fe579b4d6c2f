"""Labels over scores as a chart, with the fitted logistic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.datasets import Dataset, Item
from ..engine.agreement import plcc, srcc
from ..errors import DatasetError
from .charts import COLOURS, GREY, panels
from .correlation import LOGISTIC_MIN, fit_logistic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Points:
    """Scores of images and their labels."""

    title: str
    scores: tuple[float, ...]
    labels: tuple[float, ...]
    label_name: str = "label"


def draw_scatter(points: Points) -> "Figure":
    """Draw a point for each image, and the logistic where one can be fitted."""
    figure, (axes,) = panels([points.title], columns=1, width=8, height=6)
    axes.set_xlabel("score")
    axes.set_ylabel(points.label_name)
    count = len(points.scores)
    size, opacity = (40, 0.67) if count <= 300 else (20, 0.43) if count <= 3000 else (10, 0.24)
    axes.scatter(points.scores, points.labels, s=size, alpha=opacity, color=COLOURS[0], linewidths=0)
    figures = f"{count} images"
    try:
        figures += f", SRCC {srcc(points.scores, points.labels):.3f}"
        figures += f", PLCC raw {plcc(points.scores, points.labels):.3f}"
        if count >= LOGISTIC_MIN:
            curve = fit_logistic(points.scores, points.labels)
            low, high = min(points.scores), max(points.scores)
            along = [low + (high - low) * k / 200 for k in range(201)]
            axes.set_ylim(axes.get_ylim())  # of the labels: a steep curve may leave them
            axes.plot(along, curve(along).tolist(), color=COLOURS[1], linewidth=2)
            figures += "; line: fitted logistic"
    except DatasetError:  # scores or labels without any difference: there is nothing to correlate
        pass
    axes.set_title(figures, loc="right", color=GREY, fontsize="small")
    return figure


def points_of(dataset: Dataset, items: Sequence[Item], scores: Mapping[str, float]) -> Points:
    """Return what the scatter plot shows: labels as published over scores."""
    scored = [item for item in items if item.image in scores]
    direction = "higher" if dataset.higher_is_better else "lower"
    return Points(
        title=dataset.name,
        scores=tuple(scores[item.image] for item in scored),
        labels=tuple(item.label for item in scored),
        label_name=f"label ({direction} is better)",
    )

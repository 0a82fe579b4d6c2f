"""The protocol of executors, which carry out plans on the host or on a GPU, and their outcome."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..engine.schedule import Kind
from .plan import Plan, Window

FloatArray = npt.NDArray[np.float32]
Planes = FloatArray | tuple[FloatArray, FloatArray]  # an image, or a pair: see `both`
Call = Callable[[], None]
Task = tuple[Any, int]  # an image, as its executor takes it, and a seed
# Told what a running plan has so far: the state (3, height, width) of a window before each step and after the last,
# then the score map (grid, grid) of each crop. Executors reuse what they show, and may show nothing.
Show = Callable[[Window, FloatArray], None]


def both(image: Any) -> tuple[Any, Any]:
    """Return what the heads see of an image, and what the U-Net restores: one array, unless it is a pair."""
    return image if isinstance(image, tuple) else (image, image)


class StageRunner(Protocol):
    """One loaded stage. Safe to bind and call from several threads."""

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        """Return a call that runs the stage on these arrays: it reads `inputs` and fills `outputs`."""


@dataclass(frozen=True)
class Branch:
    """A branch's verdict on one crop; maps are (grid, grid)."""

    score: float
    score_map: FloatArray
    weight_map: FloatArray


@dataclass(frozen=True)
class Verdict:
    """Both branches' verdicts on one crop, None where the model has no such branch; or the score of one without any."""

    vcg: Branch | None
    vda: Branch | None
    score: float | None = None
    probabilities: tuple[FloatArray, ...] = ()  # in the order of the manifest's plan, each (words,)

    @property
    def maps(self) -> tuple[FloatArray, FloatArray]:
        """Score and weight over the crop: those of VCG, else of VDA; a score without branches is one place."""
        if branch := self.vcg or self.vda:
            return branch.score_map, branch.weight_map
        return np.full((1, 1), self.score, np.float32), np.ones((1, 1), np.float32)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a plan: a verdict per crop, and the crops that were scored (crops, kinds, 3, size, size)."""

    verdicts: tuple[Verdict, ...]
    crops: FloatArray
    planes: dict[Kind, FloatArray]  # whole mode: the restored images (3, H, W), padding cut off
    notes: tuple[str, ...] = ()  # what the result should say about its computation
    seconds: float = 0.0  # of its executor; of a batch, its share


class Cancelled(Exception):  # noqa: N818 — the caller's wish, not an error
    """Raised inside a running plan when the caller no longer wants its result."""


class Executor(Protocol):
    """Carries out plans, here or on a device."""

    takes_pixels: bool  # it takes bytes (height, width, 3) as well as planes (3, height, width) in [-1, 1]
    together: int  # how many tasks it restores at a time
    queue_depth: int  # callers whose images it can bring in while it works for another; they do not count as workers

    def run_together(
        self,
        tasks: Sequence[Task],
        plan: Plan,
        cancelled: Callable[[], bool],
        *,
        pictures: bool = True,
        show: Show | None = None,
    ) -> list[Outcome]:
        """Restore and score images of one size. Without `pictures`, outcomes may lack crops and planes."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True)
class Opened:
    """A loaded engine: its executor, and its name in records."""

    executor: Executor
    name: str


def paste(
    crop: FloatArray,
    share: FloatArray,
    plan: Plan,
    index: int,
    window: Window,
    restored: dict[Kind, FloatArray],
    weight: FloatArray | None,
) -> None:
    """Add the weighted part of a window that a crop reads to the crop's restored kinds; `share` sums the weights."""
    at = plan.crops[index]
    top, left = max(at.top, window.top), max(at.left, window.left)
    bottom = min(at.top + plan.cut[0], window.top + window.height)
    right = min(at.left + plan.cut[1], window.left + window.width)
    here = np.s_[top - at.top : bottom - at.top, left - at.left : right - at.left]
    there = np.s_[top - window.top : bottom - window.top, left - window.left : right - window.left]
    for row, plane in enumerate(restored.values(), start=1):
        piece = plane[(slice(None), *there)]
        crop[(row, slice(None), *here)] += piece if weight is None else piece * weight[there]
    share[here] += 1 if weight is None else weight[there]

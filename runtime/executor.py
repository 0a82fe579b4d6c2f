"""What carries out a plan, on the host or on a GPU: the protocol, and what comes out of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..engine.schedule import Kind
from .plan import Plan, Window

FloatArray = npt.NDArray[np.float32]
Call = Callable[[], None]
Task = tuple[Any, int]  # an image, in a form that its executor takes, and a seed


class StageRunner(Protocol):
    """One loaded stage. Safe to bind and call from several threads."""

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        """Return a call that runs the stage from and into these very arrays."""


@dataclass(frozen=True)
class Branch:
    """A branch's verdict on one crop; maps are (grid, grid)."""

    score: float
    score_map: FloatArray
    weight_map: FloatArray


@dataclass(frozen=True)
class Verdict:
    """Both branches' verdicts on one crop; None where the model has no such branch."""

    vcg: Branch | None
    vda: Branch | None


@dataclass(frozen=True)
class Outcome:
    """A carried-out plan: a verdict per crop, and the crops of all kinds (crops, kinds, 3, size, size) as scored."""

    verdicts: tuple[Verdict, ...]
    crops: FloatArray
    planes: dict[Kind, FloatArray]  # whole mode: the restored images (3, H, W), padding cut off
    notes: tuple[str, ...] = ()  # what a result should say about how it came about
    seconds: float = 0.0  # that its executor spent on it, or its share of what was done together


class Cancelled(Exception):  # noqa: N818 — it reports a wish, not an error
    """Raised inside a running plan once the caller no longer wants its result."""


class Executor(Protocol):
    """Carries out plans, here or on a device."""

    takes_pixels: bool  # (height, width, 3) bytes as they are, beside planes (3, height, width) in [-1, 1]
    together: int  # how many tasks it restores at a time
    queue_depth: int  # callers whose images it can bring in while it works for another; they do not count as workers

    def run_together(
        self, tasks: Sequence[Task], plan: Plan, cancelled: Callable[[], bool], *, pictures: bool = True
    ) -> list[Outcome]:
        """Restore and score images of one size; who wants no `pictures` may get outcomes without crops and planes."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True)
class Opened:
    """An engine that is loaded: what carries out plans, and what records call it."""

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
    """Add the part of a window that a crop reads to the crop's restored kinds, weighted; `share` sums the weights."""
    at = plan.crops[index]
    top, left = max(at.top, window.top), max(at.left, window.left)
    bottom = min(at.top + plan.crop_size, window.top + window.height)
    right = min(at.left + plan.crop_size, window.left + window.width)
    here = np.s_[top - at.top : bottom - at.top, left - at.left : right - at.left]
    there = np.s_[top - window.top : bottom - window.top, left - window.left : right - window.left]
    for row, plane in enumerate(restored.values(), start=1):
        piece = plane[(slice(None), *there)]
        crop[(row, slice(None), *here)] += piece if weight is None else piece * weight[there]
    share[here] += 1 if weight is None else weight[there]

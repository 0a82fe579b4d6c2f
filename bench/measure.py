"""Our own pipeline under the clock: every case in turn, round after round, so that a change of the machine hits all."""

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import ImageError, UsageError
from ..runtime.host import StageRunner
from ..runtime.images import read_image
from ..runtime.manifest import EngineDirectory, Manifest, StageName
from ..runtime.plan import make_plan
from ..runtime.results import Failure, Options
from ..runtime.schedule import Taps
from ..runtime.scorer import Scorer
from .machine import resident_mib
from .results import Case, Soak, Work
from .timing import Clock, timed_stages
from .work import count_work

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


@dataclass(frozen=True)
class Setting:
    """What a case is made of."""

    images: tuple[Path, ...]
    height: int
    width: int
    crops: int
    steps: int
    workers: int
    seed: int

    @property
    def options(self) -> Options:
        """How its images are scored."""
        return Options(crops=self.crops, seed=self.seed)


@dataclass
class _Samples:
    end_to_end: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    stages: dict[StageName, list[float]] = field(default_factory=dict)
    steps: list[list[float]] = field(default_factory=list)  # one list of all steps per sample


class Bench:
    """One case, ready to be measured round by round. It owns its buffers; loaded stages are shared between cases."""

    def __init__(
        self,
        directory: EngineDirectory,
        stages: Mapping[StageName, StageRunner],
        setting: Setting,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.setting, self._clock = setting, clock
        manifest = with_steps(directory.manifest, setting.steps)
        self._timed = timed_stages(stages, clock)
        self._scorer = Scorer(manifest, self._timed, backend="bench")
        self._plan = make_plan(setting.height, setting.width, manifest, setting.options)
        self._pixels = [read_image(path, min_side=manifest.crop.size).pixels for path in setting.images]
        self._samples = _Samples(stages={name: [] for name in stages})
        self.work: dict[str, Work]
        self.work, self._uncounted = count_work(replace(directory, manifest=manifest), self._plan)

    def warm_up(self) -> None:
        """Score one image: buffers are bound, caches filled."""
        self._scorer.score(self._pixels[0], self.setting.options)

    def round(self) -> None:
        """Take one end-to-end sample, and a compute-only one of every image."""
        self._end_to_end()
        for pixels in self._pixels:
            self._compute(pixels)

    def _end_to_end(self) -> None:
        start = self._clock()
        results = self._scorer.stream(self.setting.images, self.setting.options, workers=self.setting.workers)
        with closing(results):
            for result in results:
                if isinstance(result, Failure):  # it could be read when the benchmark began
                    raise ImageError(result.error)
        self._samples.end_to_end.append((self._clock() - start) / len(self.setting.images))

    def _compute(self, pixels: Pixels) -> None:
        for stage in self._timed.values():
            stage.spent.clear()
        start = self._clock()
        self._scorer.score(pixels, self.setting.options)
        seconds = self._clock() - start
        # All at once, so that Ctrl-C leaves no sample without its parts.
        calls = np.array(self._timed[StageName.UNET].spent if StageName.UNET in self._timed else [])
        steps = calls.reshape(-1, self.setting.steps).mean(axis=0).tolist() if calls.size else []
        parts = {name: sum(stage.spent) for name, stage in self._timed.items()}
        for name, part in parts.items():
            self._samples.stages[name].append(part)
        self._samples.steps.append(steps)
        self._samples.compute.append(seconds)

    @property
    def timed_calls(self) -> int:
        """How many calls of networks a score makes."""
        return sum(len(stage.spent) for stage in self._timed.values())

    def case(self) -> Case:
        """Return the samples taken so far."""
        s, count = self._samples, len(self._samples.compute)
        return Case(
            height=self.setting.height,
            width=self.setting.width,
            crops=len(self._plan.crops),
            steps=self.setting.steps,
            workers=self.setting.workers,
            mode=self._plan.mode.value,
            images=tuple(path.name for path in self.setting.images),
            end_to_end=tuple(s.end_to_end),
            compute=tuple(s.compute),
            stages={name.value: tuple(parts[:count]) for name, parts in s.stages.items()},
            step_seconds=tuple(zip(*s.steps[:count], strict=True)),
            work=self.work,
            uncounted=self._uncounted,
        )

    def soak(self, count: int, *, readings: int = 40) -> "SoakRun":
        """Return a run over `count` images of this case."""
        return SoakRun(self._scorer, self.setting, count, max(1, count // readings), self._clock)


class SoakRun:
    """Many images in a row: latency and memory must stay what they were."""

    def __init__(self, scorer: Scorer, setting: Setting, count: int, every: int, clock: Clock) -> None:
        self._scorer, self._setting, self._count, self._every, self._clock = scorer, setting, count, every, clock
        self._seconds: list[float] = []
        self._resident: list[float] = []

    def run(self) -> None:
        """Score them all; what was measured stays if this is interrupted."""
        images = self._setting.images
        stream = (images[i % len(images)] for i in range(self._count))
        last = self._clock()
        with closing(self._scorer.stream(stream, self._setting.options, workers=self._setting.workers)) as results:
            for index, _ in enumerate(results, start=1):
                now = self._clock()
                self._seconds.append(now - last)
                last = now
                if index % self._every == 0 and (mib := resident_mib()) is not None:
                    self._resident.append(mib)

    @property
    def found(self) -> Soak:
        """What was seen so far."""
        return Soak(tuple(self._seconds), tuple(self._resident))


def with_steps(manifest: Manifest, steps: int) -> Manifest:
    """Return the manifest with another number of sampling steps, taps at the same share of them.

    That is another function: its scores are not the engine's. Only its speed is asked for.
    """
    if steps == manifest.schedule.steps:
        return manifest
    share = steps / manifest.schedule.steps
    taps = Taps(manifest.taps.y0, *(max(1, round(tap * share)) for tap in (manifest.taps.t1, manifest.taps.t2)))
    if StageName.UNET not in [stage.name for stage in manifest.stages]:
        raise UsageError("this engine restores nothing, so it has no steps to choose")
    if not 2 <= steps <= 4000 or len({taps.y0, taps.t1, taps.t2}) < 3 or max(taps.t1, taps.t2) >= steps:
        raise UsageError(f"{steps} steps are too few, or too many, for the taps of this engine")
    return replace(manifest, schedule=replace(manifest.schedule, steps=steps), taps=taps)

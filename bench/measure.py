"""Our own pipeline under the clock: every case in turn, round after round, so that a change of the machine hits all."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from ..engine.manifest import EngineDirectory, Manifest, StageName
from ..engine.schedule import Taps
from ..errors import ImageError, UsageError
from ..runtime.images import read_image
from ..runtime.plan import make_plan
from ..runtime.results import Failure, Options
from ..runtime.scorer import Scorer
from .machine import resident_mib
from .results import Case, DeviceTimes, Soak, Work
from .running import DeviceCase, Runtime, Sample
from .timing import Clock
from .work import count_work


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
    batch: int = 1  # images that are restored together, on a GPU

    @property
    def options(self) -> Options:
        """How its images are scored."""
        return Options(crops=self.crops, seed=self.seed)


class Bench:
    """One case, ready to be measured round by round. It owns its buffers; the loaded engine is shared between cases."""

    def __init__(
        self, directory: EngineDirectory, runtime: Runtime, setting: Setting, clock: Clock = time.perf_counter
    ) -> None:
        self.setting, self._clock = setting, clock
        manifest = with_steps(directory.manifest, setting.steps)
        self._directory, self._runtime = replace(directory, manifest=manifest), runtime
        self._plan = make_plan(setting.height, setting.width, manifest, setting.options)
        read = {path: read_image(path, min_side=manifest.crop.size).pixels for path in dict.fromkeys(setting.images)}
        self._pixels = [read[path] for path in setting.images]
        self._end_to_end: list[float] = []
        self._joules: list[float] = []
        self._samples: list[Sample] = []
        self.runner = runtime.case(manifest, setting.batch, clock)
        self.work: dict[str, Work]
        self.work, self._uncounted = self._count_work()

    def warm_up(self) -> None:
        """Score until buffers are bound, caches filled, graphs captured."""
        self.runner.warm_up(self._pixels[: self.setting.batch], self.setting.options)
        if isinstance(self.runner, DeviceCase):  # who waits there has memory for pixels beside, from the second on
            self._score_all()

    def round(self) -> None:
        """Take one end-to-end sample, and a compute-only one of every image, or of every batch of them."""
        self._stream()
        for start in range(0, len(self._pixels), self.setting.batch):
            pixels = self._pixels[start : start + self.setting.batch]
            self._samples.append(self.runner.take(pixels, self.setting.options))

    def _stream(self) -> None:
        joules = self._runtime.joules()
        start = self._clock()
        self._score_all(self._runtime.glance)
        self._end_to_end.append((self._clock() - start) / len(self.setting.images))
        if joules is not None and (now := self._runtime.joules()) is not None:
            self._joules.append((now - joules) / len(self.setting.images))

    def _score_all(self, amid: Callable[[], None] = lambda: None) -> None:
        """Score files as users do, and call `amid` after the first result, while the next is computed."""
        results = self.runner.scorer.stream(self.setting.images, self.setting.options, workers=self.setting.workers)
        with closing(results):
            for index, result in enumerate(results):
                if isinstance(result, Failure):  # it could be read when the benchmark began
                    raise ImageError(result.error)
                if index == 0 and len(self.setting.images) > self.setting.batch:
                    amid()

    def case(self) -> Case:
        """Return the samples taken so far."""
        samples = self._samples
        if samples:  # the warm-up binds; what runs how often is known from then on
            self.work, self._uncounted = self._count_work()
        return Case(
            height=self.setting.height,
            width=self.setting.width,
            crops=len(self._plan.crops),
            steps=self.setting.steps,
            workers=self.setting.workers,
            mode=self._plan.mode.value,
            images=tuple(path.name for path in dict.fromkeys(self.setting.images)),
            end_to_end=tuple(self._end_to_end),
            compute=tuple(sample.seconds for sample in samples),
            stages={
                stage.name.value: tuple(sample.stages[stage.name] for sample in samples)
                for stage in self._directory.manifest.stages
            },
            step_seconds=tuple(zip(*(sample.steps for sample in samples), strict=True)),
            work=self.work,
            uncounted=self._uncounted,
            batch=self.setting.batch,
            device=self._device_times(),
        )

    def soak(self, count: int, *, readings: int = 40) -> "SoakRun":
        """Return a run over `count` images of this case."""
        return SoakRun(self.runner.scorer, self.setting, count, max(1, count // readings), self._clock)

    def _device_times(self) -> DeviceTimes | None:
        found, runner = [sample.device for sample in self._samples if sample.device], self.runner
        if not isinstance(runner, DeviceCase):
            return None
        return DeviceTimes(
            upload=tuple(sample.upload for sample in found),
            kernels=tuple(sample.kernels for sample in found),
            download=tuple(sample.download for sample in found),
            computing=tuple(sample.computing for sample in found),
            busy=tuple(sample.busy for sample in found),
            wall=tuple(sample.wall for sample in found),
            enqueue=tuple(sample.enqueue for sample in found),
            plain=tuple(sample.plain for sample in found if sample.plain is not None),
            enqueue_plain=tuple(sample.enqueue_plain for sample in found if sample.enqueue_plain is not None),
            joules=tuple(self._joules),
            buffers_mib=runner.layer.peak / 2**20,
            graphs=runner.executor.graphs.captures,
            late_allocations=runner.late_allocations,
            notes=tuple(runner.notes),
        )

    def _count_work(self) -> tuple[dict[str, Work], str | None]:
        calls = {name.value: count for name, count in self.runner.calls.items() if count}
        return count_work(self._directory, self._plan, calls, self.setting.batch, self._runtime.item_bytes)


class SoakRun:
    """Many images in a row, in whole batches: latency and memory must stay what they were."""

    def __init__(self, scorer: Scorer, setting: Setting, count: int, every: int, clock: Clock) -> None:
        self._scorer, self._setting, self._count, self._every, self._clock = scorer, setting, count, every, clock
        self._seconds: list[float] = []
        self._resident: list[float] = []

    def run(self) -> None:
        """Score them all; what was measured stays if this is interrupted."""
        images, batch = self._setting.images, self._setting.batch
        stream = (images[i % len(images)] for i in range(-(-self._count // batch) * batch))
        last = self._clock()
        with closing(self._scorer.stream(stream, self._setting.options, workers=self._setting.workers)) as results:
            for index, _ in enumerate(results, start=1):
                if index % batch == 0:  # the results of a batch come all at once
                    now = self._clock()
                    self._seconds.append((now - last) / batch)
                    last = now
                if index % self._every == 0 and (mib := resident_mib()) is not None:
                    self._resident.append(mib)

    @property
    def found(self) -> Soak:
        """What was seen so far."""
        return Soak(tuple(self._seconds), tuple(self._resident), self._setting.batch)


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

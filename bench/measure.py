"""Our own pipeline under the clock, round by round: all cases take turns, so that a change of the machine hits all."""

import itertools
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from ..engine.manifest import EngineDirectory
from ..errors import ImageError
from ..runtime.images import read_for, read_image
from ..runtime.plan import make_plan
from ..runtime.results import Failure
from .machine import resident_mib
from .results import Case, DeviceTimes, Soak
from .running import DeviceCase, Runtime, Sample
from .timing import Clock
from .work import count_work
from .workload import Workload

_COLUMNS = ("upload", "kernels", "download", "computing", "busy", "wall", "enqueue", "plain", "enqueue_plain")
_READINGS = 40  # of memory, over a soak


class Measurement:
    """One case, measured round by round. It has buffers of its own; all cases share the loaded engine."""

    def __init__(
        self, directory: EngineDirectory, runtime: Runtime, workload: Workload, clock: Clock = time.perf_counter
    ) -> None:
        self.workload, self._clock, self._watch = workload, clock, runtime.watch
        manifest = directory.manifest
        self._directory, self._item_bytes = directory, runtime.item_bytes
        self._plan = make_plan(*read_for(workload.images[0], manifest).size, manifest, workload.options)
        read = {path: read_image(path, min_side=manifest.crop.size).pixels for path in dict.fromkeys(workload.images)}
        self._pixels = [read[path] for path in workload.images]  # the scorer prepares them
        self._end_to_end: list[float] = []
        self._joules: list[float] = []
        self._samples: list[Sample] = []
        self.runner = runtime.case(manifest, workload.batch, clock)

    def warm_up(self) -> None:
        """Score until buffers are bound, caches are filled and graphs are captured."""
        self.runner.warm_up(self._pixels[: self.workload.batch], self.workload.options)
        if isinstance(self.runner, DeviceCase):  # from the second image on, one that waits has memory for its pixels
            self.score(self.workload.images)

    def round(self) -> None:
        """Take one end-to-end sample, and a compute-only one of every image, or of every batch of them."""
        joules = self._watch.joules() if self._watch else None
        start = self._clock()
        self.score(self.workload.images, self._glance)
        count = len(self.workload.images)
        self._end_to_end.append((self._clock() - start) / count)
        if self._watch and joules is not None and (now := self._watch.joules()) is not None:
            self._joules.append((now - joules) / count)
        for first in range(0, len(self._pixels), self.workload.batch):
            pixels = self._pixels[first : first + self.workload.batch]
            self._samples.append(self.runner.take(pixels, self.workload.options))

    def case(self) -> Case:
        """Return the samples taken so far."""
        workload, samples = self.workload, self._samples
        calls = {name.value: count for name, count in self.runner.calls.items() if count}
        work, uncounted = count_work(self._directory, self._plan, calls, workload.batch, self._item_bytes)
        return Case(
            height=workload.height,
            width=workload.width,
            crops=len(self._plan.crops),
            steps=len(self._plan.sampling.steps),
            workers=workload.workers,
            mode=self._plan.mode.value,
            images=tuple(path.name for path in dict.fromkeys(workload.images)),
            end_to_end=tuple(self._end_to_end),
            compute=tuple(sample.seconds for sample in samples),
            stages={
                stage.name.value: tuple(sample.stages[stage.name] for sample in samples)
                for stage in self._directory.manifest.stages
            },
            step_seconds=tuple(zip(*(sample.steps for sample in samples), strict=True)),
            work=work,
            uncounted=uncounted,
            batch=workload.batch,
            device=self._device_times(self.runner) if isinstance(self.runner, DeviceCase) else None,
        )

    def score(self, images: Iterable[Path], done: Callable[[int], None] = lambda _count: None) -> None:
        """Score files as users do, and say after each how many are done. Raises ImageError for one that failed."""
        scorer, options, workers = self.runner.scorer, self.workload.options, self.workload.workers
        with closing(scorer.stream(images, options, workers=workers)) as results:
            for count, result in enumerate(results, start=1):
                if isinstance(result, Failure):  # the file could be read when the benchmark began
                    raise ImageError(result.error)
                done(count)

    def _glance(self, done: int) -> None:
        """Look at the GPU once, after the first result, while the next image is computed."""
        if self._watch and done == 1 and len(self.workload.images) > self.workload.batch:
            self._watch.glance()

    def _device_times(self, runner: DeviceCase) -> DeviceTimes:
        rows = [sample.device for sample in self._samples]
        return DeviceTimes(
            joules=tuple(self._joules),
            buffers_mib=runner.layer.peak / 2**20,
            graphs=runner.executor.graphs.captures,
            late_allocations=runner.late_allocations,
            notes=tuple(runner.notes),
            **{name: tuple(row[name] for row in rows if name in row) for name in _COLUMNS},
        )


class SoakRun:
    """Many images in a row, in whole batches: latency and memory must stay what they were."""

    def __init__(self, measurement: Measurement, count: int, *, clock: Clock = time.perf_counter) -> None:
        self._measurement, self._clock = measurement, clock
        self._batch = measurement.workload.batch
        self._count, self._every = -(-count // self._batch) * self._batch, max(1, count // _READINGS)
        self._seconds: list[float] = []
        self._resident: list[float] = []

    def run(self) -> None:
        """Score all images; what was measured stays if this is interrupted."""
        last = self._clock()

        def note(done: int) -> None:
            nonlocal last
            if done % self._batch == 0:  # the results of a batch come all at once
                now = self._clock()
                self._seconds.append((now - last) / self._batch)
                last = now
            if done % self._every == 0 and (mib := resident_mib()) is not None:
                self._resident.append(mib)

        images = itertools.cycle(self._measurement.workload.images)
        self._measurement.score(itertools.islice(images, self._count), note)

    @property
    def found(self) -> Soak:
        """What was measured so far."""
        return Soak(tuple(self._seconds), tuple(self._resident), self._batch)

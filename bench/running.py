"""The engine under the clock, on the host or on a GPU: it scores, and tells where the time went."""

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from ..engine.manifest import EngineDirectory, Manifest, StageName
from ..runtime.backends import Backend, GpuBackend, HostBackend, InductorOnGpu, OnnxRuntime, TensorRt
from ..runtime.executor import Executor, StageRunner
from ..runtime.gpu.door import closed_if_it_fails
from ..runtime.gpu.graphs import Form
from ..runtime.gpu.tensorrt import gpu_capability, installed_libraries, load_library
from ..runtime.plan import sampling_of
from ..runtime.results import Options
from ..runtime.scorer import Scorer
from .gpu import GpuWatch
from .timing import Clock, timed_stages

if TYPE_CHECKING:
    from ..runtime.gpu.layer import Layer

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """One score, or one batch of them, under the clock: seconds per image."""

    seconds: float
    stages: dict[StageName, float]
    steps: list[float]  # one U-Net call per step, in the order run; a call may serve a whole batch
    device: dict[str, float] = field(default_factory=dict)  # what `results.DeviceTimes` has a column of


class HostRuntime:
    """Networks on the CPU."""

    item_bytes = 4
    watch = None  # the energy of CPUs is for the system's administrator to read

    def __init__(self, directory: EngineDirectory, backend: HostBackend) -> None:
        spinning = isinstance(backend, OnnxRuntime) and backend.spinning
        loaded = backend.load(directory)
        self.name = loaded.name + (", idle threads wait busily" if spinning else "")
        self.precision = loaded.precision.value
        self._stages = loaded.stages

    def case(self, manifest: Manifest, batch: int, clock: Clock) -> "HostCase":
        """Return a case on buffers of its own."""
        return HostCase(manifest, self._stages, clock)

    def close(self) -> None:
        """Let go of the networks."""
        self._stages = {}


class HostCase:
    """A case on the CPU."""

    def __init__(self, manifest: Manifest, stages: Mapping[StageName, StageRunner], clock: Clock) -> None:
        self._timed, self._clock = timed_stages(stages, clock), clock
        self.scorer = Scorer(manifest, self._timed, backend="bench")
        self.timed_calls = 0  # around which the last sample read the clock
        self.calls: dict[StageName, int] = {}  # of networks, in the last sample

    def warm_up(self, pixels: Sequence[Pixels], options: Options) -> None:
        """Score one image, to bind buffers and fill caches."""
        self.scorer.score(pixels[0], options)

    def take(self, pixels: Sequence[Pixels], options: Options) -> Sample:
        """Score one image."""
        for stage in self._timed.values():
            stage.spent.clear()
        start = self._clock()
        self.scorer.score(pixels[0], options)
        seconds = self._clock() - start
        spent = {name: stage.spent for name, stage in self._timed.items()}
        self.calls = {name: len(calls) for name, calls in spent.items()}
        self.timed_calls = sum(self.calls.values())
        return Sample(
            seconds, {name: sum(calls) for name, calls in spent.items()}, _by_step(spent, self.scorer, options)
        )

    def close(self) -> None:
        """Drop the buffers."""
        self.scorer.close()


class DeviceRuntime:
    """Networks on a GPU, and a watch over that GPU. Without a GPU it raises what `load` raises."""

    def __init__(self, directory: EngineDirectory, backend: GpuBackend) -> None:
        self.watch = GpuWatch(backend.device)
        self.opened = backend.load(directory)
        self.watch.opened()
        self.layer, self.name, self.precision = self.opened.layer, self.opened.name, self.opened.precision.value
        self.form = self.opened.form if backend.cuda_graph else Form.NONE
        with closed_if_it_fails(self.layer, directory):
            self._loaded = self.opened.stages(1)

    @property
    def item_bytes(self) -> int:
        """Bytes of a number at the U-Net's inputs; without a U-Net, at those of the first stage."""
        from ..runtime.gpu.layer import ITEM_BYTES

        first = self._loaded.get(StageName.UNET) or next(iter(self._loaded.values()))
        return ITEM_BYTES[first.built.inputs[0].dtype]

    def case(self, manifest: Manifest, batch: int, clock: Clock) -> "DeviceCase":
        """Return a case on memory of its own."""
        return DeviceCase(self, manifest, batch, clock)

    def close(self) -> None:
        """Free the engines and the device."""
        for stage in self._loaded.values():
            stage.close()
        del self.opened  # and with it ONNX Runtime's sessions
        self.layer.close()


class DeviceCase:
    """A case on a GPU."""

    def __init__(self, runtime: DeviceRuntime, manifest: Manifest, batch: int, clock: Clock) -> None:
        from ..runtime.gpu.executor import DeviceExecutor
        from .device_timing import Replaced, TimedLayer, timed_stages

        self._runtime, self._clock = runtime, clock
        self.layer = TimedLayer(runtime.layer, clock)
        self.executor = DeviceExecutor(
            manifest,
            cast("Layer", self.layer),
            timed_stages(runtime.opened.stages(batch), self.layer),
            form=runtime.form,
            together=batch,
            rebuild=runtime.opened.rebuild,
        )
        self.scorer = Scorer(manifest, self.executor, backend="bench")
        plain = Replaced(self.executor, run_together=partial(self.executor.run_together, form=Form.NONE))
        self.plain_scorer = Scorer(manifest, cast(Executor, plain), backend="bench")
        self.timed_calls = 0
        self.calls: dict[StageName, int] = {}
        self.notes: dict[str, None] = {}
        self._warm = 0  # allocations when it was

    @property
    def late_allocations(self) -> int:
        """Pieces of memory asked for since the warm-up."""
        return self.layer.allocations - self._warm

    def warm_up(self, pixels: Sequence[Pixels], options: Options) -> None:
        """Score three times: the first score binds, the second captures, the third replays."""
        for _ in range(3):
            self._score(pixels, options)
        self._warm = self.layer.allocations

    def take(self, pixels: Sequence[Pixels], options: Options) -> Sample:
        """Score normally, then with events around every launch; where graphs are wanted, both again without them."""
        from .device_timing import DOWNLOAD, KERNELS, UPLOAD

        count, layer = len(pixels), self.layer
        seconds = self._score(pixels, options)
        self.timed_calls, enqueue = layer.calls, layer.enqueue
        with self._marking():
            wall = self._score(pixels, options)
        spans, brought = layer.spans(), layer.brought
        up, down, busy = sum(spans[UPLOAD]), sum(spans[DOWNLOAD]), sum(map(sum, spans.values()))
        times = {"upload": up + brought, "download": down, "computing": busy - up - down, "busy": busy}
        times |= {"wall": wall, "enqueue": enqueue}
        if self._runtime.form is not Form.NONE:
            times |= {"plain": self._score(pixels, options, self.plain_scorer), "enqueue_plain": layer.enqueue}
            with self._marking():
                self._score(pixels, options, self.plain_scorer)
            spans = layer.spans()
        times["kernels"] = sum(spans[KERNELS])
        stages = {name: spans[name] for name in StageName if name in spans}
        self.calls = {name: len(calls) for name, calls in stages.items()}
        return Sample(
            seconds / count,
            {name: sum(calls) / count for name, calls in stages.items()},
            _by_step(stages, self.scorer, options),
            {name: value / count for name, value in times.items()},
        )

    def close(self) -> None:
        """Free this case's memory, contexts and graphs."""
        self.scorer.close()

    def _score(self, pixels: Sequence[Pixels], options: Options, scorer: Scorer | None = None) -> float:
        """Score images and return the seconds; the layer's times are then those of this score."""
        self.layer.reset()
        start = self._clock()
        score = (scorer or self.scorer).score
        found = [score(pixels[0], options)] if len(pixels) == 1 else score(list(pixels), options)
        seconds = self._clock() - start
        for result in found:
            self.notes |= dict.fromkeys(result.notes)
        return seconds

    @contextlib.contextmanager
    def _marking(self) -> Generator[None, None, None]:
        self.layer.marking = True
        try:
            yield
        finally:
            self.layer.marking = False


Runtime = HostRuntime | DeviceRuntime


def open_runtime(directory: EngineDirectory, backend: Backend) -> Runtime:
    """Load an engine. Raises BackendError or EngineError where this machine cannot run it."""
    return DeviceRuntime(directory, backend) if isinstance(backend, GpuBackend) else HostRuntime(directory, backend)


def import_libraries(backend: Backend) -> None:
    """Import the library that runs the networks, apart from loading them. Raises BackendError if it is missing."""
    if not isinstance(backend, GpuBackend):
        _ = backend.name
        return
    gpu_capability(backend.device)
    if isinstance(backend, TensorRt):
        for library in installed_libraries():
            load_library(library)
    elif isinstance(backend, InductorOnGpu):
        from ..runtime.inductor import torch_on_gpu

        torch_on_gpu(backend.device)
    else:
        _ = OnnxRuntime().name


def _steps(scorer: Scorer, options: Options) -> int:
    return len(sampling_of(scorer.manifest, options).steps)


def _by_step(calls: Mapping[StageName, Sequence[float]], scorer: Scorer, options: Options) -> list[float]:
    """Return the mean call of every step, over windows and batches of them, or crops."""
    spent = np.array(calls.get(scorer.manifest.flow.loop.stage, ()))
    return list(spent.reshape(-1, _steps(scorer, options)).mean(axis=0).tolist()) if spent.size else []

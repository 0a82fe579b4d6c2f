"""A whole benchmark: images, ceilings, start-up, our cases, a soak, peers; what was measured survives any end."""

import contextlib
import itertools
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from ..engine.manifest import open_engine
from ..errors import UsageError
from ..runtime.backends import Backend, GpuBackend, OnnxRuntime
from ..runtime.host.onnx_stage import available_cpus
from ..runtime.inputs import find_images
from .ceilings import DeviceProbe, Probe
from .contenders import Contender, Ground, ours_in
from .fresh import measure_start
from .machine import Watch, describe
from .measure import Bench, Setting, SoakRun
from .peers import Contest
from .pictures import Images, Size, generate, sort_by_size
from .results import SCHEMA, Ceilings, Engine, Gpu, Results, Start
from .running import DeviceRuntime, open_runtime
from .timing import SETTLE, Clock, clock_cost

NOT_ON_CPU = {
    "GPU (transfers, enqueue, idle share, energy, capture)": "this was a run on the CPU; give --backend tensorrt or "
    "onnxruntime-gpu",
    "batches of crops": "on the CPU crops run one at a time, so that a score never depends on its neighbours",
}
NOT_ON_GPU = {
    "gaps between kernels": "events stand around a graph, or a network, not inside: what its kernels wait for is in "
    "its time"
}
# Batches, or images alone, in a row in an end-to-end sample on a GPU: one is decoded while another is computed, and the
# first, which nothing hides, weighs little.
_GROUPS = 4


@dataclass(frozen=True)
class Wanted:
    """What to measure."""

    engine: Path
    images: tuple[str, ...] = ()  # none: generated ones
    sizes: tuple[Size, ...] = ((224, 224),)  # of generated images: height, width
    count: int = 2  # of generated images, of every size
    crops: tuple[int, ...] = ()  # none: the engine's own count
    steps: tuple[int, ...] = ()
    workers: tuple[int, ...] = (1,)
    batches: tuple[int, ...] = (1,)
    rounds: int = 10
    starts: int = 3
    soak: int = 0
    seed: int = 0
    backend: Backend = field(default_factory=OnnxRuntime)  # of several images at a time, `batches` decides
    contenders: tuple[Contender, ...] = ()
    ckpt: Path | None = None
    timeout: float = 900.0  # seconds until a peer is given up that does not answer


class Run:
    """One benchmark. `results` may be asked for at any time, after an interruption too."""

    def __init__(
        self,
        wanted: Wanted,
        options: dict[str, str],
        *,
        progress: Callable[[str], None] = lambda _text: None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._wanted, self._options, self._progress, self._clock = wanted, options, progress, clock
        self._created = datetime.now(UTC).isoformat(timespec="seconds")
        self._backend = wanted.backend
        self._threads = getattr(wanted.backend, "threads", None) or available_cpus()
        self._directory = open_engine(wanted.engine)
        self._open = contextlib.ExitStack()  # what holds memory
        self._runtime = open_runtime(self._directory, self._backend)
        self._open.callback(self._runtime.close)
        self._watch = Watch()
        self._images = Images({}, ())
        self._benches: list[Bench] = []
        self._probe: Probe | DeviceProbe | None = None
        self._starts: list[Start] = []
        self._soak: SoakRun | None = None
        self._contest: Contest | None = None
        self._not_measured = dict(NOT_ON_GPU if self._backend.on_gpu else NOT_ON_CPU)

    def run(self) -> None:
        """Measure everything, once. Raises UsageError where nothing can be measured."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._images = self._find_images(Path(folder))
                self._run(self._settings())
        finally:
            self._open.close()

    def _run(self, settings: Sequence[Setting]) -> None:
        self._progress("counting work")
        for setting in settings:
            bench = Bench(self._directory, self._runtime, setting, self._clock)
            self._open.callback(bench.runner.close)
            self._benches.append(bench)
        self._measure_starts(settings[0])
        for number, bench in enumerate(self._benches, start=1):
            self._progress(f"warming up case {number} of {len(self._benches)}")
            bench.warm_up()
        if isinstance(self._backend, GpuBackend):
            self._probe = DeviceProbe(self._backend.device)
            self._open.callback(self._probe.close)
        else:
            self._probe = Probe(self._threads)
        self._measure_rounds(self._probe)
        if self._wanted.soak:
            self._progress(f"scoring {self._wanted.soak} images in a row")
            self._soak = self._benches[0].soak(self._wanted.soak)
            self._soak.run()
        if self._wanted.contenders:
            self._open.close()  # peers need a GPU's memory; what was measured stays
            self._measure_peers(settings)

    def results(self, *, interrupted: bool = False) -> Results:
        """Return what was measured so far."""
        m = self._directory.manifest
        cases = tuple(bench.case() for bench in self._benches)
        why = {case.uncounted for case in cases if case.uncounted}
        found = self._probe.found if self._probe else None
        self._not_measured |= self._probe.refused if self._probe else {}
        dtype = "float16" if self._backend.on_gpu else "float32"
        gpu = self._gpu()
        return Results(
            schema=SCHEMA,
            created=self._created,
            options=self._options,
            interrupted=interrupted,
            machine=describe(self._threads),
            load=self._watch.found,
            engine=Engine(
                m.engine_id,
                m.model_name,
                m.score.trained,
                self._runtime.name,
                {stage.name.value: stage.file.sha256 for stage in m.stages},
            ),
            ceilings=Ceilings(
                tuple(found.matmul_gflops if found else ()), tuple(found.copy_gbs if found else ()), dtype
            ),
            cases=cases,
            starts=tuple(self._starts),
            peers=self._contest.found if self._contest else (),
            soak=self._soak.found if self._soak else None,
            overhead=self._overhead(),
            left_out=self._images.left_out,
            not_measured={**self._not_measured, **({"FLOPs": "; ".join(sorted(why))} if why else {})},
            gpu=gpu,
        )

    def _gpu(self) -> Gpu | None:
        """Return what is known of the GPU, and take note of what is not."""
        if not isinstance(self._runtime, DeviceRuntime):
            return None
        gpu = self._runtime.watch.found(self._runtime.layer.name)
        self._not_measured |= self._runtime.watch.refused
        return gpu

    def _find_images(self, folder: Path) -> Images:
        size = self._directory.manifest.crop.size
        if self._wanted.images:
            self._progress("reading images")
            return sort_by_size(find_images(self._wanted.images), size)
        for height, width in self._wanted.sizes:
            if min(height, width) < size:
                raise UsageError(f"images of {width}×{height} are smaller than a crop of this engine, {size}×{size}")
        return generate(folder, self._wanted.sizes, self._wanted.count, self._wanted.seed)

    def _settings(self) -> list[Setting]:
        m = self._directory.manifest
        return [
            Setting(self._in_a_row(paths, batch), height, width, crops, steps, workers, self._wanted.seed, batch)
            for (height, width), paths in self._images.by_size.items()
            for crops in self._wanted.crops or (m.crop.count,)
            for steps in self._wanted.steps or (m.schedule.steps,)
            for workers in self._wanted.workers
            for batch in self._wanted.batches
        ]

    def _in_a_row(self, paths: Sequence[Path], batch: int) -> tuple[Path, ...]:
        return _in_batches(paths, batch) if self._backend.on_gpu else tuple(paths)

    def _measure_starts(self, setting: Setting) -> None:
        for number in range(self._wanted.starts):
            self._progress(f"fresh process {number + 1} of {self._wanted.starts}")
            try:
                start = measure_start(
                    self._directory.path,
                    setting.images[0],
                    self._backend,
                    crops=setting.crops,
                    seed=setting.seed,
                )
            except (subprocess.CalledProcessError, OSError, ValueError) as exc:
                said = getattr(exc, "stderr", None) or str(exc)
                self._not_measured["start-up"] = f"the process failed: {said.strip().splitlines()[-1]}"
                return
            self._starts.append(start)

    def _measure_rounds(self, probe: Probe | DeviceProbe) -> None:
        gpu = self._runtime.watch if isinstance(self._runtime, DeviceRuntime) else contextlib.nullcontext()
        for number in range(self._wanted.rounds):
            self._progress(f"round {number + 1} of {self._wanted.rounds}")
            time.sleep(SETTLE)
            probe.sample()
            with self._watch, gpu:
                for bench in self._benches:
                    bench.round()

    def _measure_peers(self, settings: Sequence[Setting]) -> None:
        ground = Ground(self._directory.path.resolve(), self._wanted.ckpt, self._backend)
        # Peers score one image at a time: cases that differ in workers or batch alone are one.
        cases = {
            replace(bench.case(), workers=1, batch=1).name: replace(
                setting, images=tuple(dict.fromkeys(setting.images)), workers=1, batch=1
            )
            for bench, setting in zip(self._benches, settings, strict=True)
        }
        self._contest = Contest(
            (ours_in(self._runtime.precision), *self._wanted.contenders),
            ground,
            list(cases.items()),
            rounds=self._wanted.rounds,
            timeout=self._wanted.timeout,
            progress=self._progress,
        )
        self._contest.run()

    def _overhead(self) -> float | None:
        calls = [bench.runner.timed_calls / bench.setting.batch for bench in self._benches]  # per image
        medians = [statistics.median(bench.case().compute) for bench in self._benches if bench.case().compute]
        if not medians or len(medians) < len(calls):
            return None
        return clock_cost() * sum(calls) / sum(medians)


def _in_batches(paths: Sequence[Path], batch: int) -> tuple[Path, ...]:
    """Return the images, again and again until they fill some batches, or are some if alone."""
    batches = max(_GROUPS, -(-len(paths) // batch))
    return tuple(itertools.islice(itertools.cycle(paths), batches * batch))

"""One benchmark, step by step: what was measured survives any end."""

import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from ..engine.manifest import open_engine
from ..runtime.backends import Backend, GpuBackend
from ..runtime.host.onnx_stage import available_cpus
from .ceilings import Probe, probe_cpu, probe_gpu
from .contenders import OURS, Contender, Ground
from .fresh import measure_start
from .machine import Watch, describe
from .measure import Measurement, SoakRun
from .peers import Contest
from .results import SCHEMA, Case, Ceilings, Engine, Results, Start
from .running import DeviceRuntime, open_runtime
from .timing import SETTLE, clock_cost
from .workload import Workload

NOT_ON_CPU = {
    "GPU (transfers, enqueue, idle share, energy, capture)": "this was a run on the CPU; give --backend tensorrt or "
    "onnxruntime-gpu",
    "batches of crops": "on the CPU crops run one at a time, so that a score never depends on its neighbours",
}
NOT_ON_GPU = {
    "gaps between kernels": "events stand around a graph, or a network, not inside: the time that its kernels wait is "
    "part of its time"
}


class Run:
    """One benchmark. Call its steps in the order in which they stand here; ask for `results` at any time."""

    def __init__(self, engine: Path, backend: Backend, options: dict[str, str], say: Callable[[str], None]) -> None:
        self._backend, self._options, self._say = backend, options, say
        self._created = datetime.now(UTC).isoformat(timespec="seconds")
        self._threads = getattr(backend, "threads", None) or available_cpus()
        self.directory = open_engine(engine)
        self._open = contextlib.ExitStack()  # what holds memory
        self._runtime = open_runtime(self.directory, backend)
        self._open.callback(self._runtime.close)
        self._watch = Watch()
        self._left_out: tuple[str, ...] = ()
        self._measurements: list[Measurement] = []
        self._probe: Probe | None = None
        self._starts: list[Start] = []
        self._soak: SoakRun | None = None
        self._contest: Contest | None = None
        self._not_measured = dict(NOT_ON_GPU if backend.on_gpu else NOT_ON_CPU)

    def close(self) -> None:
        """Free the engine and all cases; what was measured stays."""
        self._open.close()

    def prepare(self, workloads: Sequence[Workload], left_out: tuple[str, ...]) -> None:
        """Make a case of each workload, with buffers of its own; `left_out` are images that could not be read."""
        self._say("preparing the cases")
        self._left_out = left_out
        for workload in workloads:
            measurement = Measurement(self.directory, self._runtime, workload)
            self._open.callback(measurement.runner.close)
            self._measurements.append(measurement)

    def measure_starts(self, count: int) -> None:
        """Start fresh processes that score an image of the first case."""
        workload = self._measurements[0].workload
        image, crops, seed = workload.images[0], workload.options.crops, workload.options.seed
        for number in range(count):
            self._say(f"fresh process {number + 1} of {count}")
            try:
                self._starts.append(measure_start(self.directory.path, image, self._backend, crops=crops, seed=seed))
            except (subprocess.CalledProcessError, OSError, ValueError) as exc:
                said = getattr(exc, "stderr", None) or str(exc)
                self._not_measured["start-up"] = f"the process failed: {said.strip().splitlines()[-1]}"
                return

    def measure_cases(self, rounds: int) -> None:
        """Warm every case up, then measure all of them in turn, with the ceilings between the rounds."""
        for number, measurement in enumerate(self._measurements, start=1):
            self._say(f"warming up case {number} of {len(self._measurements)}")
            measurement.warm_up()
        backend = self._backend
        self._probe = probe_gpu(backend.device) if isinstance(backend, GpuBackend) else probe_cpu(self._threads)
        self._open.callback(self._probe.close)
        for number in range(rounds):
            self._say(f"round {number + 1} of {rounds}")
            time.sleep(SETTLE)
            self._probe.sample()
            with self._watch, self._runtime.watch or contextlib.nullcontext():
                for measurement in self._measurements:
                    measurement.round()

    def measure_soak(self, count: int) -> None:
        """Score images of the first case in a row."""
        self._say(f"scoring {count} images in a row")
        self._soak = SoakRun(self._measurements[0], count)
        self._soak.run()

    def measure_peers(self, contenders: Sequence[Contender], ckpt: Path | None, rounds: int, timeout: float) -> None:
        """Free our own memory, which peers need, and measure them: each gives up after so many seconds of silence."""
        self.close()
        # Peers score one image at a time: cases that differ in workers or batch alone are one.
        cases = {
            replace(measurement.case(), workers=1, batch=1).name: replace(
                measurement.workload, images=tuple(dict.fromkeys(measurement.workload.images)), workers=1, batch=1
            )
            for measurement in self._measurements
        }
        self._contest = Contest(
            (replace(OURS, precision=self._runtime.precision), *contenders),
            Ground(self.directory.path.resolve(), ckpt, self._backend),
            list(cases.items()),
            rounds=rounds,
            timeout=timeout,
            progress=self._say,
        )
        self._contest.run()

    def results(self, *, interrupted: bool = False) -> Results:
        """Return what was measured so far."""
        m, probe, watch = self.directory.manifest, self._probe, self._runtime.watch
        cases = tuple(measurement.case() for measurement in self._measurements)
        gpu = self._runtime.watch.found(self._runtime.layer.name) if isinstance(self._runtime, DeviceRuntime) else None
        why = "; ".join(sorted({case.uncounted for case in cases if case.uncounted}))
        dtype = "float16" if self._backend.on_gpu else "float32"
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
            ceilings=probe.found(dtype) if probe else Ceilings((), (), dtype),
            cases=cases,
            starts=tuple(self._starts),
            peers=self._contest.found if self._contest else (),
            soak=self._soak.found if self._soak else None,
            overhead=self._overhead(cases),
            left_out=self._left_out,
            not_measured=self._not_measured
            | (probe.refused if probe else {})
            | (watch.refused if watch else {})
            | ({"FLOPs": why} if why else {}),
            gpu=gpu,
        )

    def _overhead(self, cases: Sequence[Case]) -> float | None:
        """Return the share of computing that reading the clock takes; None until every case has a sample."""
        if not cases or not all(case.compute for case in cases):
            return None
        calls = [m.runner.timed_calls / m.workload.batch for m in self._measurements]  # per image
        return clock_cost() * sum(calls) / sum(statistics.median(case.compute) for case in cases)

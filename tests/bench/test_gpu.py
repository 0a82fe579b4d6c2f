"""`iqa-bench` on a GPU that is none: what is timed where, what NVML may refuse, and what is left on the device.

Times are those of NumPy and of the kernels on the CPU, so no test asks how large one is.
"""

import gc
import itertools
import json
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from diffiqa import BackendError, Options
from diffiqa.bench import ceilings, fresh, running
from diffiqa.bench import gpu as gpu_module
from diffiqa.bench import run as run_module
from diffiqa.bench.ceilings import DEVICE_CALLS, Probe, probe_cpu, probe_gpu, torch_product
from diffiqa.bench.device_timing import DOWNLOAD, GRAPH, KERNELS, UPLOAD, TimedLayer
from diffiqa.bench.gpu import GpuWatch, sheet
from diffiqa.bench.measure import Measurement, SoakRun
from diffiqa.bench.page import to_page
from diffiqa.bench.report import TABLES, to_markdown
from diffiqa.bench.results import Case, Ceilings, DeviceTimes, Gpu, GpuLoad, Results, Start, read
from diffiqa.bench.running import DeviceCase, DeviceRuntime
from diffiqa.bench.verdict import judge_results
from diffiqa.bench.workload import Workload, generate, in_batches
from diffiqa.cli import main
from diffiqa.engine.manifest import Library, StageName, open_engine
from diffiqa.runtime.backends import BACKENDS, GpuBackend, OnnxOnGpu, TensorRt
from diffiqa.runtime.gpu import door, tensorrt
from diffiqa.runtime.gpu import onnx_stage as onnx_device
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.scorer import Scorer, load

from ..fake_device import FakeLayer, load_anew
from ..tiny import STAGES, photo
from .conftest import REAL_SIZES
from .test_verdict import CASE, QUIET, SAMPLES

TENSORRT = TensorRt()


class FakeNvml:
    """NVML that answers what it is told to, and refuses the rest as the real one does: by raising."""

    def __init__(self) -> None:
        self.numbers = {
            "memory_mib": 81559.0,
            "used_mib": 900.0,
            "power_limit_watts": 700.0,
            "sm_clock_mhz": 1980.0,
            "memory_clock_mhz": 2619.0,
            "max_sm_clock_mhz": 1980.0,
            "max_memory_clock_mhz": 2619.0,
            "celsius": 45.0,
        }
        self.spent = itertools.count(1000.0, 6.0)  # joules, 6 between two readings
        self.held: dict[str, float] = {"power limit": 3.0}
        self.there: dict[int, str] = {}
        self.why = ["none"]
        self.refuses: set[str] = set()

    def number(self, what: str) -> float:
        self._refuse(what)
        return next(self.spent) if what == "joules" else self.numbers[what]

    def driver(self) -> str:
        self._refuse("driver")
        return "580.65.06"

    def compute_capability(self) -> str:
        self._refuse("compute_capability")
        return "8.9"

    def held_back(self) -> dict[str, float]:
        self._refuse("held_back")
        return dict(self.held)

    def reasons(self) -> list[str]:
        self._refuse("reasons")
        return self.why

    def processes(self) -> dict[int, str]:
        self._refuse("processes")
        return dict(self.there)

    def _refuse(self, what: str) -> None:
        if what in self.refuses or "all" in self.refuses:
            raise RuntimeError("Not Supported")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    found = FakeNvml()
    monkeypatch.setattr(gpu_module, "Nvml", lambda ordinal: found)
    return found


def call(engine: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", "--engine", str(engine), *map(str, arguments)])


def on(
    engine: Path,
    folder: Path,
    size: tuple[int, int] = (40, 48),
    *,
    batch: int = 1,
    backend: GpuBackend = TENSORRT,
    crops: int = 2,
) -> Measurement:
    directory = open_engine(engine)
    images = tuple(generate(folder, [size], 2 * batch, seed=3).by_size[size])
    workload = Workload(images, *size, Options(crops=crops), batch=batch)
    return Measurement(directory, DeviceRuntime(directory, backend), workload)


def device_case(bench: Measurement) -> DeviceCase:
    assert isinstance(bench.runner, DeviceCase)
    return bench.runner


def measured(bench: Measurement, rounds: int = 2) -> tuple[Case, DeviceTimes]:
    bench.warm_up()
    for _ in range(rounds):
        bench.round()
    case = bench.case()
    assert case.device
    return case, case.device


# ------------------------------------------------------------------------------------------------------ a whole run


def test_a_run_has_all_that_one_on_the_cpu_has_and_what_a_gpu_has_beside(
    tiny_build: Path, fake_gpu: FakeLayer, nvml: FakeNvml, tmp_path: Path
) -> None:
    files = tmp_path / "bench.json", tmp_path / "bench.html"
    sweep = ("--size", "48x40", "--crops", "2", "--batch", "1,2", "--rounds", "2", "--starts", "0", "--soak", "4")
    result = call(tiny_build, "--backend", "tensorrt", *sweep, "--json", files[0], "--html", files[1], "-q")
    assert result.exit_code in {0, 1}, result.output  # whether this machine is quiet is not tested
    results = read(files[0])
    assert results.engine.backend == "tensorrt-rtx 1.7 fp32: fake GPU"
    assert [(case.crops, case.batch) for case in results.measured] == [(2, 1), (2, 2)]
    for name, make in TABLES.items():
        assert bool(make(results)) == (name not in {"startup", "peers"}), name
        assert make(results) in result.stdout
    assert result.stdout.startswith("## tiny on fake GPU\n")
    assert "fake GPU, compute capability 8.9, driver 580.65.06, 81,559 MiB, power limit 700 W" in result.stdout
    assert "SM clock 1,980 of 1,980 MHz" in result.stdout
    assert results.gpu
    assert len(results.gpu.load.celsius) == 4  # one for each case and round
    assert "matrix product of the GPU" in results.not_measured  # there is none
    assert not any("on the CPU" in why for why in results.not_measured.values())
    assert "Images per second over images per batch" in files[1].read_text(encoding="utf-8")
    summary = json.loads(files[0].read_text())["summary"]["cases"][0]
    assert summary["gpu"]["ms"].keys() >= {"h2d", "compute", "d2h", "enqueue", "enqueue_without_graphs"}
    assert summary["gpu"]["joules_per_image"] == 1.5  # 6 for four images
    assert fake_gpu.left == 0
    assert fake_gpu.closed


def test_without_a_gpu_the_error_is_the_one_that_load_gives(tiny_engine: Path) -> None:
    if tensorrt.device_capability() is not None:
        pytest.skip("there is a GPU")
    for backend in (TensorRt(), OnnxOnGpu()):
        with pytest.raises(BackendError) as expected:
            load(tiny_engine, backend)
        result = call(tiny_engine, "--backend", backend.key)
        assert result.exit_code == 2
        assert str(expected.value) in result.stderr
        assert result.stdout == ""


def test_ctrl_c_keeps_what_was_measured_and_frees_the_device(
    tiny_build: Path, fake_gpu: FakeLayer, nvml: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[int] = []

    def interrupted(self: Measurement) -> None:
        rounds.append(1)
        if len(rounds) == 3:
            fake_gpu.watch = interrupt
        measure(self)

    def interrupt(_launches: int) -> None:
        raise KeyboardInterrupt

    measure = Measurement.round
    monkeypatch.setattr(Measurement, "round", interrupted)
    file = tmp_path / "bench.json"
    options = ("--size", "40x40", "--crops", "1", "--rounds", "5", "--starts", "0", "--json", file)
    result = call(tiny_build, "--backend", "tensorrt", *options)
    assert result.exit_code == 130, result.output
    results = read(file)
    assert results.interrupted
    (case,) = results.measured
    assert case.device
    assert len(case.end_to_end) == 2
    assert len(case.compute) == len(case.device.busy) == 8  # two rounds of two images, twice over
    assert fake_gpu.left == 0


def test_peers_find_the_gpu_free_and_are_told_all_that_ours_was(
    tiny_build: Path, fake_gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    class Recorder:
        found = ()

        def __init__(self, *what: Any, **_how: Any) -> None:
            asked.append(what)

        def run(self) -> None:
            assert fake_gpu.closed
            assert fake_gpu.left == 0

    monkeypatch.setattr(run_module, "Contest", Recorder)
    options = ("--size", "40x40", "--crops", "1", "--batch", "2,1", "--rounds", "1", "--starts", "0", "--no-cuda-graph")
    result = call(tiny_build, "--backend", "tensorrt", *options, "--device", "1", "--peer", "torch eager")
    assert result.exit_code in {0, 1}, result.output
    ((contenders, ground, cases),) = asked
    assert [contender.name for contender in contenders] == ["diffiqa", "torch eager"]
    assert ground.backend == TensorRt(device=1, cuda_graph=False)
    assert [name for name, _ in cases] == ["40×40, 1 crop, 6 steps"]  # batches are no cases of theirs
    assert [len(workload.images) for _, workload in cases] == [2]


# ------------------------------------------------------------------------------------------------ where the time goes


def test_every_call_has_a_name_and_a_time_on_the_device(tiny_build: Path, fake_gpu: FakeLayer, tmp_path: Path) -> None:
    bench = on(tiny_build, tmp_path)
    case, times = measured(bench)
    assert case.work["unet"].calls == 6
    assert case.work["vit"].calls == 1  # both crops in one batch
    assert np.array(case.step_seconds).shape == (6, 4)
    samples = [*case.stages.values(), times.upload, times.kernels, times.download, times.busy, times.wall]
    samples += [times.enqueue, times.plain, times.enqueue_plain]
    assert {len(column) for column in samples} == {4}  # two rounds of two images
    assert all(value > 0 for column in samples for value in column)
    assert times.joules == ()  # no NVML here
    assert case.outside < 1
    assert case.idle is not None
    assert case.idle < 1
    assert times.graphs == 2  # the loop, the heads
    assert times.late_allocations == 0
    assert times.notes == ()
    assert times.buffers_mib > 0
    assert times.buffers_mib * 2**20 == fake_gpu.driver.peak


def test_figures_of_scores_with_graphs_and_without_are_kept_apart(
    tiny_build: Path, fake_gpu: FakeLayer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(spans: TimedLayer) -> dict[str, list[float]]:
        return graphs if any(name == GRAPH for name, _, _ in spans._spans) else plain

    graphs = {UPLOAD: [1.0, 2.0], KERNELS: [4.0], GRAPH: [8.0, 16.0], DOWNLOAD: [32.0]}
    plain = {UPLOAD: [500.0], KERNELS: [100.0], DOWNLOAD: [500.0]}
    plain |= {name.value: [300.0] * 6 for name in STAGES}
    monkeypatch.setattr(TimedLayer, "spans", seconds)
    case, times = measured(on(tiny_build, tmp_path, crops=1), rounds=1)
    assert times.busy == (63.0, 63.0)
    assert times.computing == case.computing == (28.0, 28.0)
    assert times.upload == pytest.approx((3.0, 3.0), abs=0.5)  # and what came by the second stream
    assert times.download == (32.0, 32.0)
    assert times.kernels == (100.0, 100.0)
    assert case.stages["unet"] == (1800.0, 1800.0)
    text = to_markdown(replace(of(), cases=(case,)))
    assert "| 28,000 | 32,000 |" in text
    assert "| stage, without CUDA graphs |" in text
    assert "| ms/step, without CUDA graphs |" in text
    assert "host launching without graphs, ms (may hold waiting)" in text
    assert "without CUDA graphs" not in to_markdown(QUIET)


def test_the_steps_that_a_page_draws_are_said_to_be_without_graphs(tmp_path: Path) -> None:
    to_page(of(), tmp_path / "a.html")
    assert "first step left, without CUDA graphs" in (tmp_path / "a.html").read_text(encoding="utf-8")
    to_page(QUIET, tmp_path / "b.html")
    assert "without CUDA graphs" not in (tmp_path / "b.html").read_text(encoding="utf-8")


def test_what_the_second_of_those_who_wait_allocates_is_there_when_a_case_is_warm(
    tiny_build: Path, fake_gpu: FakeLayer, tmp_path: Path
) -> None:
    bench = on(tiny_build, tmp_path)
    bench.warm_up()
    assert len(fake_gpu.beside) == 2  # one for each
    allocated, case = fake_gpu.allocations, bench.case()
    bench.round()
    assert fake_gpu.allocations == allocated
    assert case.end_to_end == case.compute == ()  # of the warm-up nothing is kept


@pytest.mark.parametrize(("count", "batch", "images"), [(6, 1, 6), (4, 2, 4), (5, 2, 6)])
def test_a_soak_has_a_value_for_every_batch(
    tiny_build: Path,
    fake_gpu: FakeLayer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    batch: int,
    images: int,
) -> None:
    """The clock is stepped by what is scored: a second for an image, all at once for a batch."""
    bench = on(tiny_build, tmp_path, (32, 32), batch=batch, crops=1)
    given = 0

    def results(_self: Scorer, paths: Iterable[Path], _options: Options, workers: int) -> Iterator[int]:
        nonlocal given
        for start, same in itertools.groupby(enumerate(paths), lambda item: item[0] // batch):
            for _ in same:
                given = (start + 1) * batch
                yield given

    monkeypatch.setattr(Scorer, "stream", results)
    run = SoakRun(bench, count, clock=lambda: float(given))
    run.run()
    assert run.found.seconds == (1.0,) * (images // batch)
    assert run.found.images == images
    if len(run.found.seconds) > 1:
        assert f"| images | {images} |" in TABLES["soak"](replace(QUIET, soak=run.found))


def test_events_stand_around_graphs_and_never_inside_them(
    tiny_build: Path, fake_gpu: FakeLayer, tmp_path: Path
) -> None:
    """A mark in a capture is a problem to the driver, so that this would fail."""
    bench = on(tiny_build, tmp_path, crops=1)
    runner, pixels, options = device_case(bench), [photo(1, 40, 48)], Options(crops=1)
    layer = runner.layer
    layer.marking = True
    runner.warm_up(pixels, options)
    layer.reset()
    runner.scorer.score(pixels[0], options)
    assert len(layer.spans()[GRAPH]) == 2
    assert not set(STAGES) & set(layer.spans())
    layer.reset()
    runner.plain_scorer.score(pixels[0], options)
    plain = layer.spans()
    assert {name: len(plain[name]) for name in STAGES} == {"unet": 6, "vit": 1, "vcg": 1, "vda": 1}
    assert plain[KERNELS]
    assert plain[UPLOAD]
    assert plain[DOWNLOAD]
    assert GRAPH not in plain
    assert layer.calls == sum(map(len, plain.values()))
    assert layer.brought > 0
    layer.reset()
    runner.scorer.score(pixels[0], options)
    assert len(layer.spans()[GRAPH]) == 2, "the graphs are kept"
    assert runner.executor.graphs.captures == 2


def test_being_watched_changes_no_score(tiny_build: Path, fake_gpu: FakeLayer, tmp_path: Path) -> None:
    bench = on(tiny_build, tmp_path)
    picture, options = photo(5, 40, 48), Options(crops=2)
    measured(bench, rounds=1)
    watched = bench.runner.scorer.score(picture, options).score
    with load(tiny_build) as scorer:
        assert scorer.score(picture, options).score == watched


def test_cases_leave_the_engine_to_each_other(tiny_build: Path, fake_gpu: FakeLayer, tmp_path: Path) -> None:
    directory = open_engine(tiny_build)
    runtime = DeviceRuntime(directory, TENSORRT)
    images = tuple(generate(tmp_path, [(40, 48)], 1, seed=3).by_size[40, 48])
    workloads = [Workload(images, 40, 48, Options(crops=1, steps=steps)) for steps in (6, 4)]
    first, second = (Measurement(directory, runtime, workload) for workload in workloads)
    first.warm_up()
    second.warm_up()
    first.runner.close()
    second.round()
    assert len(second.case().step_seconds) == 4
    second.runner.close()
    assert not fake_gpu.closed
    assert fake_gpu.alive == 0
    runtime.close()
    assert fake_gpu.closed


def test_without_graphs_there_is_one_kind_of_sample(tiny_build: Path, fake_gpu: FakeLayer, tmp_path: Path) -> None:
    case, times = measured(on(tiny_build, tmp_path, backend=TensorRt(cuda_graph=False)))
    assert (times.plain, times.enqueue_plain, times.graphs) == ((), (), 0)
    assert case.without_graph is None
    assert set(case.stages) == {"unet", "vit", "vcg", "vda"}
    assert all(min(parts) > 0 for parts in case.stages.values())


def test_a_graph_that_could_not_be_captured_is_a_problem(tiny_build: Path, fake_gpu: FakeLayer, tmp_path: Path) -> None:
    fake_gpu.capture_fails = lambda launches: True
    case, times = measured(on(tiny_build, tmp_path), rounds=1)
    assert any("ran without a CUDA graph" in note for note in times.notes)
    found = judge_results(replace(QUIET, cases=(case,)))
    assert any("ran without a CUDA graph" in problem for problem in found.problems)


# ------------------------------------------------------------------------------------------------------------ batches


def test_times_of_a_batch_are_per_image(
    tiny_build: Path, fake_gpu: FakeLayer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eight(case: DeviceCase, *what: Any) -> float:
        score(case, *what)
        case.layer.enqueue, case.layer.brought = 6.0, 2.0
        return 8.0

    score = DeviceCase._score
    spans = {UPLOAD: [1.0], KERNELS: [4.0], DOWNLOAD: [2.0], **{name.value: [3.0] * 6 for name in STAGES}}
    monkeypatch.setattr(DeviceCase, "_score", eight)
    monkeypatch.setattr(TimedLayer, "spans", lambda _layer: spans)
    case, times = measured(on(tiny_build, tmp_path, (32, 32), batch=2, crops=1), rounds=1)
    pair = 4 * 6 * 3.0 + 4.0 + 3.0  # seconds on the device for both images
    assert case.compute == times.wall == times.plain == (4.0, 4.0)
    assert times.enqueue == times.enqueue_plain == (3.0, 3.0)
    assert times.busy == (pair / 2, pair / 2)
    assert times.computing == ((pair - 3.0) / 2,) * 2
    assert (times.upload, times.kernels, times.download) == ((1.5, 1.5), (2.0, 2.0), (1.0, 1.0))
    assert set(case.stages.values()) == {(9.0, 9.0)}
    assert set(case.step_seconds) == {(3.0, 3.0)}  # a step is a call, for however many


def test_images_share_batches_and_the_work_of_an_image_stays(
    tiny_build: Path, fake_gpu: FakeLayer, tmp_path: Path
) -> None:
    size = 32, 32  # what this build takes several of
    case, times = measured(on(tiny_build, tmp_path, size, batch=2, crops=1), rounds=1)
    assert case.name == "32×32, 1 crop, 6 steps, batch 2"
    assert case.work["unet"].calls == 6  # for both images
    assert len(case.compute) == len(times.busy) == 2  # four images, two at a time
    assert times.notes == ()
    alone = measured(on(tiny_build, tmp_path, size, crops=1), rounds=1)[0]
    assert case.work["unet"].gflop == pytest.approx(alone.work["unet"].gflop)
    assert case.work["unet"].intensity > alone.work["unet"].intensity  # weights are read once for both


def test_a_batch_that_the_build_does_not_take_is_a_problem(
    tiny_build: Path, fake_gpu: FakeLayer, tmp_path: Path
) -> None:
    case, times = measured(on(tiny_build, tmp_path, batch=2), rounds=1)
    assert case.work["unet"].calls == 12
    assert times.notes[0].startswith("restored 1 at a time, not 2: ")
    found = judge_results(replace(QUIET, cases=(case,)))
    assert any("batch 2: restored 1 at a time, not 2" in problem for problem in found.problems)


def test_images_are_repeated_until_they_fill_batches() -> None:
    cases: list[tuple[int, int, int]] = [(2, 1, 4), (9, 1, 9), (2, 8, 32), (3, 2, 8), (20, 4, 20), (1, 4, 16)]
    for count, batch, length in cases:
        paths = [Path(str(i)) for i in range(count)]
        found = in_batches(paths, batch)
        assert len(found) == length
        assert found[:count] == tuple(paths[:length])


# -------------------------------------------------------------------------------------------------- ONNX Runtime there


@pytest.fixture
def onnx_gpu(fake_gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch) -> FakeLayer:
    """A machine with a GPU and an onnxruntime that has CUDA."""
    monkeypatch.setattr(running, "gpu_capability", lambda ordinal: "8.9")
    monkeypatch.setattr(door, "installed_libraries", list)
    monkeypatch.setattr(onnx_device, "prepare", lambda settings: None)
    monkeypatch.setattr(onnx_device, "gpu_settings", lambda settings, ordinal, stream: OnnxRuntime(threads=1))
    monkeypatch.setattr(onnx_device, "stranded", lambda session: [])
    monkeypatch.setattr(onnx_device, "DEVICE", "cpu")
    return fake_gpu


def test_onnxruntime_on_a_gpu_is_measured_without_graphs(
    tiny_engine: Path, onnx_gpu: FakeLayer, nvml: FakeNvml, tmp_path: Path
) -> None:
    file = tmp_path / "bench.json"
    options = ("--size", "40x40", "--crops", "1", "--batch", "1,3", "--rounds", "1", "--starts", "0", "--json", file)
    result = call(tiny_engine, "--backend", "onnxruntime-gpu", *options)
    assert result.exit_code in {0, 1}, result.output
    results = read(file)
    assert results.engine.backend.endswith(" on fake GPU")
    alone, three = results.measured
    assert three.work["unet"].calls == alone.work["unet"].calls == 6
    assert alone.device
    assert alone.device.plain == ()
    assert alone.device.launching == ((), alone.device.enqueue)
    assert json.loads(file.read_text())["summary"]["cases"][0]["gpu"]["ms"].keys() == {
        "h2d",
        "compute",
        "d2h",
        "enqueue_without_graphs",
    }
    assert onnx_gpu.left == 0


def test_sessions_on_a_gpu_are_gone_when_peers_start(
    tiny_engine: Path, onnx_gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[weakref.ref[Any]] = []
    looked: list[bool] = []
    make = onnx_device.on_device

    def noted(device: str, ordinal: int, manifest: Any, loaded: Mapping[StageName, Any], **how: int) -> Any:
        sessions.extend(weakref.ref(stage.session) for stage in loaded.values())
        return make(device, ordinal, manifest, loaded, **how)

    class Looker:
        found = ()

        def __init__(self, *_what: Any, **_how: Any) -> None: ...

        def run(self) -> None:
            gc.collect()
            looked.extend(session() is None for session in sessions)

    monkeypatch.setattr(OnnxRuntime, "load_stage", load_anew)  # what other tests loaded does not go
    monkeypatch.setattr(onnx_device, "on_device", noted)
    monkeypatch.setattr(run_module, "Contest", Looker)
    options = ("--size", "40x40", "--crops", "1", "--rounds", "1", "--starts", "0", "--peer", "torch eager")
    result = call(tiny_engine, "--backend", "onnxruntime-gpu", *options)
    assert result.exit_code in {0, 1}, result.output
    assert looked
    assert all(looked)


def test_a_gpu_that_would_leave_much_to_the_cpu_is_given_back(
    tiny_engine: Path, onnx_gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_device, "stranded", lambda session: ["Conv /stem"])
    result = call(tiny_engine, "--backend", "onnxruntime-gpu", "--starts", "0")
    assert result.exit_code == 2
    assert "on the CPU, not on fake GPU: Conv /stem" in result.stderr
    assert onnx_gpu.closed


# ---------------------------------------------------------------------------------------------------------- start-up


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime-gpu"])
def test_start_up_tells_the_score_that_captures_apart(
    tiny_build: Path,
    onnx_gpu: FakeLayer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    backend: str,
) -> None:
    monkeypatch.setattr(door, "installed_libraries", lambda: [Library.TENSORRT_RTX])
    monkeypatch.setattr(running, "gpu_capability", lambda ordinal: "8.9")
    (image,) = generate(tmp_path, [(40, 40)], 1, seed=0).by_size[40, 40]
    asked: dict[str, Any] = {"engine": str(tiny_build), "image": str(image), "crops": 1, "seed": 0}
    asked |= {"backend": backend, "settings": asdict(BACKENDS[backend]())}
    fresh.main(json.dumps(asked))
    parts = json.loads(capsys.readouterr().out)
    assert parts.pop("entered") > 0
    start = Start(interpreter=0.0, **parts)
    assert start.second_score is not None
    assert len(onnx_gpu.graphs) == (2 if backend == "tensorrt" else 0)
    assert "| second score | " in TABLES["startup"](replace(QUIET, starts=(start,)))


def test_a_fresh_process_that_fails_is_said(tiny_build: Path, fake_gpu: FakeLayer, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ("--size", "40x40", "--crops", "1", "--rounds", "1", "--starts", "1", "--json", file)
    call(tiny_build, "--backend", "tensorrt", *options)  # its fresh process has no fake driver, and no engine is one
    assert read(file).not_measured["start-up"].startswith("the process failed: ")


# -------------------------------------------------------------------------------------------------------------- NVML


def watched(nvml: FakeNvml, during: Callable[[], None] = lambda: None) -> tuple[Gpu, dict[str, str]]:
    """Return what is known of a GPU after a round, and what is not; process 7 is ours."""
    nvml.there.pop(7, None)
    watch = GpuWatch(0)
    nvml.there[7] = "python"
    watch.opened()
    with watch:
        during()
        watch.glance()
    return watch.found("NVIDIA H100 80GB HBM3"), watch.refused


def test_a_gpu_is_described_and_its_peak_is_that_of_the_data_sheet(nvml: FakeNvml) -> None:
    found, refused = watched(nvml)
    assert refused == {}
    assert (found.driver, found.compute_capability, found.memory_mib) == ("580.65.06", "8.9", 81559)
    assert (found.sheet_tflops, found.sheet_gbs) == (989.4, 3350)
    assert found.load == GpuLoad((45.0,), (1980.0,), (2619.0,), (900.0,), {"power limit": 0.0}, (), ())


def test_a_data_sheet_is_that_of_the_very_gpu() -> None:
    cases: list[tuple[str, float | None]] = [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla T4", 65),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ]
    for name, tflops in cases:
        assert (sheet(name) or (None,))[0] == tflops


@pytest.mark.parametrize(
    "what", ["joules", "celsius", "used_mib", "held_back", "reasons", "processes", "driver", "compute_capability"]
)
def test_a_figure_that_nvml_refuses_is_one_figure_less(
    tiny_build: Path, fake_gpu: FakeLayer, nvml: FakeNvml, tmp_path: Path, what: str
) -> None:
    nvml.refuses.add(what)
    found, refused = watched(nvml)
    assert (what == "joules") == (refused == {})  # that one is asked for by the cases
    assert all(why == "NVML: RuntimeError: Not Supported" for why in refused.values())
    assert to_markdown(replace(QUIET, gpu=found))
    if what == "joules":
        case, times = measured(on(tiny_build, tmp_path), rounds=1)
        assert times.joules == ()
        assert "| – |" in TABLES["GPU"](replace(QUIET, cases=(case,)))


def test_no_nvml_at_all_is_said_once(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(_ordinal: int) -> FakeNvml:
        raise OSError("libnvidia-ml.so.1 is not there")

    monkeypatch.setattr(gpu_module, "Nvml", none)
    found, refused = watched(nvml)
    assert list(refused.values()) == ["NVML: OSError: libnvidia-ml.so.1 is not there"]
    assert found.load.others is None
    assert found.memory_mib is None
    results = replace(QUIET, gpu=found)
    assert "## tiny on NVIDIA H100 80GB HBM3\n" in to_markdown(results)
    assert judge_results(results).problems == ()
    to_page(results, tmp_path / "a.html")


def test_energy_is_counted_around_whole_images(
    tiny_build: Path, fake_gpu: FakeLayer, nvml: FakeNvml, tmp_path: Path
) -> None:
    _, times = measured(on(tiny_build, tmp_path), rounds=2)
    assert times.joules == (3.0, 3.0)  # 6 between two readings, for two images


def problems(gpu: Gpu) -> str:
    return " ".join(judge_results(replace(QUIET, gpu=gpu)).problems)


def test_another_process_on_the_gpu_is_a_problem_and_ours_is_none(nvml: FakeNvml) -> None:
    assert problems(watched(nvml)[0]) == ""
    nvml.there = {3: "before"}
    gone = watched(nvml, lambda: nvml.there.update({9: "meanwhile"}))[0]
    assert gone.load.others == ("before (3)", "meanwhile (9)")
    assert "Other processes computed on the GPU: before (3), meanwhile (9)." in problems(gone)


def test_a_limit_that_held_the_clocks_back_is_a_problem(nvml: FakeNvml) -> None:
    nvml.held["overheating"] = 1.0
    found = watched(nvml, lambda: nvml.held.update({"overheating": 1e6}))[0]
    assert "The GPU's overheating held its clocks back for 100% of the time." in problems(found)
    nvml.refuses.add("held_back")
    nvml.why = ["sw_thermal_slowdown", "gpu_idle"]
    found = watched(nvml)[0]
    assert found.load.held_back is None
    assert problems(found) == "The GPU's clocks were not at their fastest: sw_thermal_slowdown."


def test_a_power_limit_is_what_a_full_load_brings(nvml: FakeNvml) -> None:
    nvml.why = ["sw_power_cap"]
    found = watched(nvml, lambda: nvml.held.update({"power limit": 1e6}))[0]
    assert problems(found) == ""
    said = judge_results(replace(QUIET, gpu=found)).remarks
    assert sum("power limit held its clocks back for 100% of the time, as it does under" in text for text in said) == 1
    nvml.refuses.add("held_back")
    found = watched(nvml)[0]
    assert problems(found) == ""
    said = judge_results(replace(QUIET, gpu=found)).remarks
    assert any("power limit held its clocks back at times" in text for text in said)
    nvml.why = ["sw_power_cap", "hw_power_brake_slowdown"]
    assert problems(watched(nvml)[0]) == "The GPU's clocks were not at their fastest: hw_power_brake_slowdown."


def test_clocks_are_read_while_the_gpu_works(
    tiny_build: Path, fake_gpu: FakeLayer, nvml: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, streaming, seen = on(tiny_build, tmp_path), [False], []
    stream = Scorer.stream

    def streamed(*what: Any, **how: Any) -> Any:
        streaming[0] = True
        yield from stream(*what, **how)
        streaming[0] = False

    def number(what: str) -> float:
        if what != "joules":
            seen.append(streaming[0])
        return 1.0

    monkeypatch.setattr(Scorer, "stream", streamed)
    monkeypatch.setattr(nvml, "number", number)
    bench.warm_up()
    assert seen == []
    assert bench._watch
    with bench._watch:
        bench.round()
    assert seen == [True] * 4  # once: temperature, two clocks, memory


def test_nvml_is_asked_in_its_own_units(monkeypatch: pytest.MonkeyPatch) -> None:
    class System:
        memory_info = SimpleNamespace(total=81559 * 2**20, used=900 * 2**20)
        temperature = SimpleNamespace(get_sensor=lambda: 45)
        current_clock_event_reasons = ("gpu_idle",)
        compute_running_processes = (SimpleNamespace(pid=7),)

        def get_clock(self, kind: str) -> Any:
            now, most = {"sm": (1755, 1980), "memory": (2600, 2619)}[kind]
            return SimpleNamespace(get_current_mhz=lambda: now, get_max_mhz=lambda: most)

        def get_field_values(self, names: list[str]) -> list[Any]:
            if names[0].endswith("HW_POWER_BRAKE_SLOWDOWN"):
                raise RuntimeError("Not Supported")
            return [SimpleNamespace(value={"DEV_POWER_CURRENT_LIMIT": 700_000}.get(names[0], 5_000_000))]

    class Fields:
        def __getattr__(self, name: str) -> str:
            return name

    class Device:
        compute_capability = SimpleNamespace(major=9, minor=0)

        def __init__(self, ordinal: int) -> None:
            assert ordinal == 3

        def to_system_device(self) -> System:
            return System()

    system = SimpleNamespace(
        get_kernel_mode_driver_version=lambda: (580, 65), get_process_name=lambda number: "/usr/bin/python"
    )
    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(Device=Device, system=system))
    monkeypatch.setitem(sys.modules, "cuda.core.system", system)
    monkeypatch.setitem(sys.modules, "cuda.core.system.typing", SimpleNamespace(FieldId=Fields()))
    found = gpu_module.Nvml(3)
    assert {name: found.number(name) for name in (*FakeNvml().numbers, "joules")} == {
        "memory_mib": 81559,
        "used_mib": 900,
        "power_limit_watts": 700,  # NVML's milliwatts
        "sm_clock_mhz": 1755,
        "memory_clock_mhz": 2600,
        "max_sm_clock_mhz": 1980,
        "max_memory_clock_mhz": 2619,
        "celsius": 45,
        "joules": 5000,  # millijoules
    }
    seconds = 0.005  # nanoseconds
    assert found.held_back() == {"power limit": seconds, "temperature limit": seconds, "overheating": seconds}
    assert (found.driver(), found.compute_capability()) == ("580.65", "9.0")
    assert (found.reasons(), found.processes()) == (["gpu_idle"], {7: "python"})


# ------------------------------------------------------------------------------------------------------- the verdict


def of(**changed: Any) -> Results:
    """Return quiet figures of a GPU: a tenth of the time is not the U-Net's, launching takes next to none."""
    tenth, little = tuple(0.02 * s for s in SAMPLES), tuple(0.001 * s for s in SAMPLES)
    times = DeviceTimes(
        upload=little,
        kernels=little,
        download=little,
        busy=tuple(0.99 * s for s in SAMPLES),
        wall=SAMPLES,
        enqueue=tenth,
        computing=tuple(0.988 * s for s in SAMPLES),
        plain=tuple(1.5 * s for s in SAMPLES),
        enqueue_plain=SAMPLES,
        joules=(5.0,) * len(SAMPLES),
        buffers_mib=10.0,
        graphs=2,
        late_allocations=0,
        notes=(),
    )
    load = GpuLoad((40.0,), (1980.0,), (2619.0,), (900.0,), {}, (), ())
    gpu = Gpu("NVIDIA H100 80GB HBM3", "9.0", "580", 81559.0, 700.0, 1980.0, 2619.0, 989.4, 3350.0, load)
    return replace(QUIET, cases=(replace(CASE, device=replace(times, **changed)),), gpu=gpu, peers=())


def remarks(**changed: Any) -> str:
    found = judge_results(of(**changed))
    assert found.problems == ()
    return " ".join(found.remarks)


def test_a_gpu_that_is_kept_busy_has_nothing_said_against_it() -> None:
    said = remarks()
    assert "unet takes 100% of the GPU's time" in said
    assert "data sheet's peak in fp16" in said
    assert "Without CUDA graphs computing takes 1.50 times as long." in said
    assert not any(word in said for word in ("launch-bound", "transfer-bound", "nothing to do", "allocated"))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"enqueue": tuple(0.9 * s for s in SAMPLES)},
            "224×224, 1 crop, 2 steps: launch-bound, as the host takes 91% of the GPU's time",
        ),
        ({"upload": SAMPLES}, "transfer-bound, as copies take as long as computing, or longer."),
        ({"busy": tuple(0.9 * s for s in SAMPLES)}, "the GPU has nothing to do for 10.0% of a score."),
        ({"late_allocations": 3}, "it allocated memory 3 times after the warm-up."),
    ],
    ids=["launch-bound", "transfer-bound", "idle", "allocations"],
)
def test_what_bounds_a_gpu_is_said(changed: dict[str, Any], says: str) -> None:
    assert says in remarks(**changed)


def test_what_hardly_bounds_a_gpu_is_not_said() -> None:
    def scaled(share: float) -> tuple[float, ...]:
        return tuple(share * s for s in SAMPLES)

    busy = 0.99  # of the time
    for share, said in ((0.79, False), (0.81, True)):
        assert ("launch-bound" in remarks(enqueue=scaled(share * busy))) is said
    for share, said in ((0.02, False), (0.04, True)):
        assert ("the GPU has nothing to do" in remarks(busy=scaled(1 - share))) is said
    for share, said in ((0.9, False), (1.1, True)):
        changed = {"computing": SAMPLES, "upload": scaled(share / 2), "download": scaled(share / 2)}
        assert ("transfer-bound" in remarks(**changed)) is said
    for share, said in ((0.009, False), (0.011, True)):
        gpu = of().gpu
        assert gpu
        held = replace(gpu, load=replace(gpu.load, held_back={"overheating": share}))
        assert ("overheating held its clocks back" in problems(held)) is said


@pytest.mark.parametrize("changed", [{"plain": (), "enqueue_plain": ()}, {"graphs": 0}], ids=["unwanted", "not had"])
def test_without_graphs_launching_is_told_and_not_judged(changed: dict[str, Any]) -> None:
    """A stream that is full makes the host wait in its launches: that takes as long as the GPU, whatever bounds it."""
    waiting = tuple(0.95 * s for s in SAMPLES)
    assert "launch-bound" in remarks(enqueue=waiting)
    assert "launch-bound" not in remarks(enqueue=waiting, **changed)
    assert "| – | 951 |" in TABLES["GPU"](of(enqueue=waiting, **changed))


def test_a_record_from_before_computing_was_kept_is_read() -> None:
    (case,) = of(computing=()).cases
    assert case.computing == pytest.approx(tuple(0.996 * s for s in SAMPLES))


def test_a_gpu_is_held_to_trtexecs_limit_of_variation() -> None:
    noisy = tuple(1 + 0.06 * (i % 2) for i in range(12))
    (case,) = of().cases
    assert any("above 2.5%" in p for p in replace(case, compute=noisy).stability.problems)
    assert not any("coefficient" in p for p in replace(case, compute=noisy, device=None).stability.problems)


def test_the_data_sheet_stands_in_for_a_roof_that_was_not_probed(tmp_path: Path) -> None:
    assert of().roof == (100.0, 10.0)  # what QUIET has probed
    bare = replace(of(), ceilings=replace(QUIET.ceilings, matmul_gflops=(), copy_gbs=()))
    assert bare.roof == (989_400.0, 3350.0)
    to_page(bare, tmp_path / "a.html")
    assert "or else what the data sheet promises" in (tmp_path / "a.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------- what only a GPU, or torch on one, runs


def test_the_matrix_product_is_torchs() -> None:
    pytest.importorskip("torch")
    torch_product("cpu", 32)()
    assert DEVICE_CALLS > 1


def test_ceilings_that_cannot_be_had_say_why() -> None:
    if tensorrt.device_capability() is not None:
        pytest.skip("there is a GPU")
    probe = probe_gpu(0)
    probe.sample()
    assert len(probe.refused) == 2
    assert "has no CUDA or no GPU" in probe.refused["matrix product of the GPU"]
    assert probe.found("float16") == Ceilings((), (), "float16")


@pytest.mark.parametrize(
    ("make", "product", "copy", "calls", "sizes"),
    [
        (probe_gpu, "torch_product", "device_copy", 5, [("cuda:1", 8192), (1, 2**29)]),
        (probe_cpu, "host_product", "host_copy", 1, [(1, 1536), (1, 2**27)]),
    ],
)
def test_rates_are_those_of_all_calls_together(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[int], Probe],
    product: str,
    copy: str,
    calls: int,
    sizes: list[tuple[str | int, int]],
) -> None:
    now = 0.0
    asked: list[tuple[str | int, int]] = []

    def taking(seconds: float) -> Callable[[str | int, int], Callable[[], None]]:
        def run() -> None:
            nonlocal now
            now += seconds

        def ready(where: str | int, size: int) -> Callable[[], None]:
            asked.append((where, size))
            return run

        return ready

    monkeypatch.setattr(ceilings, product, taking(0.25))
    monkeypatch.setattr(ceilings, copy, taking(0.5))
    for name, size in REAL_SIZES.items():
        monkeypatch.setattr(ceilings, name, size)
    probe = make(1)
    for _ in range(2):
        probe.sample(lambda: now)
    assert asked == sizes
    assert probe.refused == {}
    found = probe.found("float16")
    (_, side), (_, size) = sizes
    assert found.matmul_gflops == (calls * 2 * side**3 / 0.25 / 1e9,) * 2
    assert found.copy_gbs == (calls * 2 * size / 0.5 / 1e9,) * 2  # read and written
    assert DEVICE_CALLS == 5


def test_the_installed_cuda_core_has_every_name_that_is_asked() -> None:
    core, system = pytest.importorskip("cuda.core"), pytest.importorskip("cuda.core.system")
    from cuda.core.system.typing import ClockType, FieldId

    names = {
        core.Device: ["compute_capability", "to_system_device", "allocate", "create_stream", "set_current"],
        core.Stream: ["record", "sync"],
        core.Event: ["__sub__"],
        core.Buffer: ["copy_to", "fill"],
        system: ["get_kernel_mode_driver_version", "get_process_name"],
        system.Device: [
            "compute_running_processes",
            "current_clock_event_reasons",
            "get_clock",
            "get_field_values",
            "memory_info",
            "temperature",
        ],
        FieldId: ["DEV_TOTAL_ENERGY_CONSUMPTION", "DEV_POWER_CURRENT_LIMIT"],
    }
    assert [name for kind, wanted in names.items() for name in wanted if not hasattr(kind, name)] == []
    assert core.EventOptions(timing_enabled=True).timing_enabled
    assert {ClockType("sm"), ClockType("memory")}


def test_the_counters_of_limits_exist_where_nvml_is_new_enough() -> None:
    typing = pytest.importorskip("cuda.core.system.typing")
    counters = ("SW_POWER_CAP", "SW_THERM_SLOWDOWN", "HW_THERM_SLOWDOWN", "HW_POWER_BRAKE_SLOWDOWN")
    assert all(hasattr(typing.FieldId, f"DEV_CLOCKS_EVENT_REASON_{name}") for name in counters)

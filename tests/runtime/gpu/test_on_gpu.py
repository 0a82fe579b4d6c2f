"""What only a GPU can show of the device runtime. Never run where it was written (no GPU there).

`pytest -m gpu tests/runtime/gpu/test_on_gpu.py`, after `pytest -m gpu tests/kernels`, which speaks for the kernels.
The names say the layer at fault; read failures from the bottom layer up:

1. cuda.core as we call it: test_layer_…, which need nothing else
2. TensorRT as we call it: test_stage_…
3. the executor, as tests/runtime/gpu/test_executor.py has it without a GPU: test_loop_…, test_batch_…, test_modes_…
4. CUDA graphs: test_graph_…
5. endurance and company: test_memory_…, test_interrupt_…, test_processes_…
6. the layers together, judged as a user would: test_verify_…
"""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffiqa.engine.manifest import EngineDirectory, Library, Precision, StageName, open_engine
from diffiqa.engine.pixels import to_plane
from diffiqa.engine.schedule import Kind, Schedule, Taps
from diffiqa.errors import BackendError
from diffiqa.export.builds import BuildOptions, build_engines
from diffiqa.kernels.launch import (
    PROGRESS,
    STEP,
    WINDOW,
    SamplerBuffers,
    Storage,
    Window,
    normalise_pad,
    step_table,
    window_table,
)
from diffiqa.runtime.backends import TensorRt
from diffiqa.runtime.builds import Machine, choose_profile, newest_build
from diffiqa.runtime.executor import Outcome
from diffiqa.runtime.gpu.cuda import CudaLayer
from diffiqa.runtime.gpu.executor import DeviceExecutor
from diffiqa.runtime.gpu.graphs import Form
from diffiqa.runtime.gpu.inductor_stage import on_stream
from diffiqa.runtime.gpu.layer import DeviceMemoryError, LoadedStage
from diffiqa.runtime.gpu.tensorrt import gpu_capability, load_library, usable_library
from diffiqa.runtime.gpu.tensorrt_stage import load_engines
from diffiqa.runtime.host.executor import HostExecutor
from diffiqa.runtime.host.onnx_stage import OnnxRuntime, OnnxStage
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.inductor import fitting_build, packages, torch_on_gpu
from diffiqa.runtime.plan import make_plan
from diffiqa.runtime.results import Mode, Options
from diffiqa.runtime.scorer import load

from ...fake_device import fake_stages
from ...tiny import STAGES, photo
from .host_stage import HostStage
from .test_executor import scores

pytestmark = pytest.mark.gpu

BATCHES, SIZES = ("1", "2", "4"), ("32x32", "32x32:64x64:160x160")
# float32 engines without TF32 sum in another order than ONNX Runtime: 1e-5 of values around 1 in one network. The loop
# calls one six times, and its first steps divide by small √ᾱ.
STAGE, PIXELS, SCORES = 1e-4, 2e-3, 2e-4

Make = Callable[..., DeviceExecutor]


@pytest.fixture(scope="module")
def capability() -> str:
    """The GPU's compute capability."""
    try:
        return gpu_capability(0)
    except BackendError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def library(capability: str) -> Library:
    found = usable_library(capability)
    if found is None:
        pytest.skip(f"no installed TensorRT has kernels for compute capability {capability}")
    return found


def _built(tiny_engine: Path, folder: Path, library: Library, precision: Precision) -> EngineDirectory:
    path = Path(shutil.copytree(tiny_engine, folder / "engine"))
    build_engines(path, BuildOptions(library, precision, BATCHES, SIZES))
    return open_engine(path)


@pytest.fixture(scope="module")
def directory(tiny_engine: Path, library: Library, tmp_path_factory: pytest.TempPathFactory) -> EngineDirectory:
    """The tiny model with float32 engines."""
    return _built(tiny_engine, tmp_path_factory.mktemp("fp32"), library, Precision.FP32)


@pytest.fixture(scope="module")
def half(tiny_engine: Path, library: Library, tmp_path_factory: pytest.TempPathFactory) -> EngineDirectory:
    return _built(tiny_engine, tmp_path_factory.mktemp("fp16"), library, Precision.FP16)


@pytest.fixture(scope="module")
def host(tiny_engine: Path) -> HostExecutor:
    onnx = open_engine(tiny_engine)
    return HostExecutor(onnx.manifest, load_stages(onnx, OnnxRuntime(threads=2)))


Stages = Callable[[CudaLayer, Precision], dict[StageName, LoadedStage]]


def engines_of(directory: EngineDirectory, layer: CudaLayer) -> dict[StageName, LoadedStage]:
    library = load_library(directory.manifest.builds[-1].library)
    build = newest_build(directory, [Machine(library.library, library.version, gpu_capability(0))])
    return load_engines(layer, library, directory, build)


@pytest.fixture(scope="module")
def compiled(
    tiny_engine: Path, capability: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[Precision, EngineDirectory]:
    """The tiny model with builds of PyTorch's compiler for this GPU."""
    try:
        torch_on_gpu(0)
    except BackendError as reason:
        pytest.skip(str(reason))
    folders = {precision: tmp_path_factory.mktemp(precision) for precision in (Precision.FP32, Precision.FP16)}
    return {
        precision: _built(tiny_engine, folder, Library.INDUCTOR, precision) for precision, folder in folders.items()
    }


@pytest.fixture(params=["host", "engines", "compiled"])
def stages(request: pytest.FixtureRequest, tiny_engine: Path, capability: str) -> Stages:
    """What the executor runs: networks on the host, which any GPU can wait for; or what a library built."""
    if request.param != "host":
        request.getfixturevalue("library" if request.param == "engines" else "compiled")

    def load(layer: CudaLayer, precision: Precision) -> dict[StageName, LoadedStage]:
        if request.param == "compiled":
            directory = request.getfixturevalue("compiled")[precision]
            build = fitting_build(directory, capability)
            return on_stream(layer, 0, build, packages(directory, build, 0))
        if request.param == "engines":
            return engines_of(request.getfixturevalue("directory" if precision is Precision.FP32 else "half"), layer)
        onnx, options = open_engine(tiny_engine), {"batches": BATCHES, "sizes": SIZES, "precision": precision}
        return fake_stages(layer, onnx, kind=HostStage, **options)  # type: ignore[arg-type]

    return load


@pytest.fixture
def make(stages: Stages, tiny_engine: Path) -> Iterator[Make]:
    """Return a maker of executors, which are closed at the end."""
    made: list[DeviceExecutor] = []

    def new(
        form: Form = Form.LOOP,
        *,
        precision: Precision = Precision.FP32,
        layer: CudaLayer | None = None,
        taps: Taps | None = None,
        together: int = 1,
    ) -> DeviceExecutor:
        manifest = open_engine(tiny_engine).manifest
        manifest = dataclasses.replace(manifest, taps=taps or manifest.taps)
        on = layer or CudaLayer(0)
        on.enter()
        made.append(DeviceExecutor(manifest, on, stages(on, precision), form=form, together=together))
        return made[-1]

    yield new
    for executor in made:
        executor.close()


def run(executor: DeviceExecutor | HostExecutor, pixels: Any, seed: int = 0, **options: Any) -> Outcome:
    plan = make_plan(pixels.shape[0], pixels.shape[1], executor._manifest, Options(**options))
    if isinstance(executor, HostExecutor):
        return executor.run(to_plane(pixels), plan, seed)
    return executor.run(pixels, plan, seed)


def bits(outcome: Outcome) -> list[bytes]:
    maps = [m.tobytes() for v in outcome.verdicts for b in (v.vcg, v.vda) if b for m in (b.score_map, b.weight_map)]
    planes = [plane.tobytes() for plane in outcome.planes.values()]
    return [np.array(scores(outcome)).tobytes(), outcome.crops.tobytes(), *maps, *planes]


def free_bytes() -> int:
    from cuda.bindings import driver

    status, free, _ = driver.cuMemGetInfo()
    assert int(status) == 0
    return int(free)


# ------------------------------------------------------------------------------------------------ 1. cuda.core


@pytest.fixture
def layer(capability: str) -> Iterator[CudaLayer]:
    made = CudaLayer(0)
    made.enter()
    yield made
    made.close()


def test_layer_copies_there_and_back_pinned_and_not(layer: CudaLayer) -> None:
    values = np.random.default_rng(0).normal(size=(3, 1001)).astype(np.float32)
    address = layer.allocate(values.nbytes)
    assert address % 256 == 0
    pinned = layer.allocate_pinned(values.nbytes)
    np.copyto(pinned, values.reshape(-1).view(np.uint8))
    for source in (values, pinned):
        back = layer.allocate_pinned(values.nbytes)
        layer.upload(address, source)
        layer.download(back, address)
        layer.synchronise()
        assert back.tobytes() == values.tobytes()
        layer.free_pinned(back)
    layer.free_pinned(pinned)
    layer.free(address)


def _normalise(layer: CudaLayer) -> tuple[Callable[[], None], Callable[[], Any]]:
    """Return a launch of a kernel and a look at its result."""
    pixels = photo(0, 32, 32)
    image, plane = layer.allocate(pixels.nbytes), layer.allocate(4 * pixels.size)
    layer.upload(image, pixels)
    launch = normalise_pad(image, (32, 32), 96, plane, (32, 32), Storage.F32)

    def result() -> Any:
        found = np.empty((3, 32, 32), np.float32)
        layer.download(found, plane)
        layer.synchronise()
        layer.upload(plane, np.zeros_like(found))
        np.testing.assert_array_equal(found, to_plane(pixels))

    return lambda: layer.launch(launch), result


def test_layer_launches_a_kernel(layer: CudaLayer) -> None:
    launch, check = _normalise(layer)
    launch()
    check()


def test_layer_captures_and_replays(layer: CudaLayer) -> None:
    launch, check = _normalise(layer)
    launch()
    check()
    layer.begin_capture()
    launch()
    graph = layer.end_capture()
    for _ in range(2):
        graph.launch()
        check()
    graph.close()


def test_layer_brings_images_while_another_thread_captures(layer: CudaLayer) -> None:
    launch, check = _normalise(layer)
    launch()
    layer.synchronise()
    values = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    brought: list[int] = []

    def bring() -> None:
        layer.enter()
        address = layer.allocate(values.nbytes, beside=True)
        pinned = layer.allocate_pinned(values.nbytes, beside=True)
        np.copyto(pinned, values)
        layer.bring(address, pinned)
        layer.free_pinned(pinned)
        brought.append(address)

    layer.begin_capture()
    launch()
    other = threading.Thread(target=bring)
    other.start()
    other.join(60)
    graph = layer.end_capture()
    graph.launch()
    check()
    (address,) = brought
    back = np.empty_like(values)
    layer.download(back, address)
    layer.synchronise()
    np.testing.assert_array_equal(back, values)
    layer.free(address)
    graph.close()


def test_layer_is_whole_after_an_abandoned_capture(layer: CudaLayer) -> None:
    launch, check = _normalise(layer)
    launch()  # loads the code, which a capture does not allow
    check()
    layer.begin_capture()
    launch()
    layer.abandon_capture()
    layer.synchronise()
    launch()
    check()


def test_layer_after_a_capture_that_fails_goes_on(layer: CudaLayer) -> None:
    """Waiting for a stream that is being captured is what breaks a capture."""
    launch, check = _normalise(layer)
    launch()  # loads the code
    check()
    layer.begin_capture()
    launch()
    with pytest.raises(BackendError):
        layer.synchronise()
    layer.abandon_capture()
    launch()
    check()


def _sampler(layer: CudaLayer, steps: int) -> tuple[SamplerBuffers, Callable[[], tuple[bytes, int]]]:
    """Return a restoration without a network, and a look at its last state and its counter, which spoils both."""
    pixels = 3 * 16 * 16
    state = layer.allocate(4 * pixels)
    buffers = SamplerBuffers(
        Storage.F32,
        *(1, 16, 16, steps, steps),
        state=state,
        y=state,
        noise=layer.allocate(4 * pixels),
        noise_level=layer.allocate(4),
        taps=0,
        windows=layer.allocate(WINDOW.itemsize),
        table=layer.allocate(steps * STEP.itemsize),
        progress=layer.allocate(PROGRESS.itemsize),
    )
    layer.upload(buffers.noise, np.random.default_rng(0).normal(size=pixels).astype(np.float32))
    layer.upload(buffers.windows, window_table([Window(3, (16, 16))], (16, 16)))
    layer.upload(buffers.table, step_table(vars(Schedule(steps=steps).coefficients), (), range(steps)))

    def result() -> tuple[bytes, int]:
        found, progress = np.empty(pixels, np.float32), np.empty(1, PROGRESS)
        layer.download(found, state)
        layer.download(progress, buffers.progress)
        layer.synchronise()
        layer.upload(state, np.zeros_like(found))
        layer.upload(buffers.progress, np.zeros_like(progress))
        return found.tobytes(), int(progress["step"][0])

    return buffers, result


@pytest.mark.parametrize("steps", [1, 300])
def test_layer_replays_a_whole_loop_until_the_steps_are_done(layer: CudaLayer, steps: int) -> None:
    buffers, result = _sampler(layer, steps)

    def loop() -> None:
        layer.launch(buffers.begin())
        for _ in range(steps):
            layer.launch(buffers.step())

    loop()
    expected = result()
    assert expected[1] == -1
    layer.begin_capture()
    loop()
    graph = layer.end_capture()
    for _ in range(3):
        graph.launch()
        assert result() == expected
    graph.close()


def test_layer_tells_memory_that_is_not_there(layer: CudaLayer) -> None:
    with pytest.raises(DeviceMemoryError, match=r"has no .* MiB left"):
        layer.allocate(2**50)
    layer.free(layer.allocate(2**20))


# ------------------------------------------------------------------------------------------------ 2. TensorRT


@pytest.mark.parametrize("name", STAGES)
def test_stage_gives_what_onnxruntime_gives(directory: EngineDirectory, layer: CudaLayer, name: StageName) -> None:
    """Through `bind`, on our memory and stream, in every profile's largest shape."""
    stage = engines_of(directory, layer)[name]
    onnx = directory.manifest.stage(name)
    assert onnx is not None
    reference = OnnxStage(directory.file(onnx.file), OnnxRuntime(threads=2))
    for number, profile in enumerate(stage.built.profiles):
        rng = np.random.default_rng(number)
        shapes = {spec: span.maximum for spec, span in profile.items()}
        chosen = choose_profile(stage.built.profiles, shapes)
        assert chosen is not None
        inputs = {spec: rng.uniform(0, 1, shape).astype(np.float32) for spec, shape in shapes.items()}
        first = onnx.inputs[0]
        dims = dict(zip(first.shape, shapes[first.name], strict=True))
        outputs = {
            s.name: np.zeros([dims[n] if isinstance(n, str) else n for n in s.shape], np.float32) for s in onnx.outputs
        }
        reference.bind(inputs, outputs)()
        found = {spec: np.full_like(value, np.nan) for spec, value in outputs.items()}
        addresses = {spec: layer.allocate(value.nbytes) for spec, value in {**inputs, **found}.items()}
        for spec, value in inputs.items():
            layer.upload(addresses[spec], value)
        bound = stage.bind(chosen, shapes, addresses)
        if bound.activation_bytes:
            bound.use_activation(layer.allocate(bound.activation_bytes), bound.activation_bytes)
        bound.enqueue()
        for spec, value in found.items():
            layer.download(value, addresses[spec])
        layer.synchronise()
        for spec, value in found.items():
            scale = max(1.0, float(np.abs(outputs[spec]).max()))
            np.testing.assert_allclose(value, outputs[spec], atol=STAGE * scale, err_msg=f"{spec}, profile {number}")
        bound.close()
    stage.close()


# ------------------------------------------------------------------------------------------------ 3. the executor


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("height", "width", "seed"), [(32, 32, 0), (45, 70, 1), (67, 141, 2**40 + 3)])
def test_loop_without_graphs_is_the_hosts(
    make: Make, host: HostExecutor, mode: Mode, height: int, width: int, seed: int
) -> None:
    pixels = photo(seed % 97, height, width)
    found = run(make(Form.NONE), pixels, seed, mode=mode, crops=7)
    expected = run(host, pixels, seed, mode=mode, crops=7)
    np.testing.assert_array_equal(found.crops[:, 0], expected.crops[:, 0], err_msg="the image as given")
    np.testing.assert_allclose(found.crops, expected.crops, atol=PIXELS, err_msg="restored images")
    np.testing.assert_allclose(scores(found), scores(expected), atol=SCORES, err_msg="scores")


@pytest.mark.parametrize("taps", [Taps(t1=1, t2=3), Taps(t1=4, t2=2)], ids=str)
def test_loop_taps_are_the_states_after_their_steps(make: Make, tiny_engine: Path, taps: Taps) -> None:
    onnx = open_engine(tiny_engine)
    manifest = dataclasses.replace(onnx.manifest, taps=taps)
    reference = HostExecutor(manifest, load_stages(onnx, OnnxRuntime(threads=2)))
    pixels = photo(3, 48, 64)
    found, expected = run(make(Form.NONE, taps=taps), pixels, 3), run(reference, pixels, 3)
    for kind in (Kind.Y0, Kind.T1, Kind.T2):
        np.testing.assert_allclose(found.planes[kind], expected.planes[kind], atol=PIXELS, err_msg=kind)


def test_loop_of_fp16_engines_stays_near_float32(make: Make, host: HostExecutor) -> None:
    pixels = photo(2, 60, 64)
    found, expected = run(make(precision=Precision.FP16), pixels, 3, crops=5), run(host, pixels, 3, crops=5)
    np.testing.assert_allclose(found.crops, expected.crops, atol=5e-2)
    np.testing.assert_allclose(scores(found), scores(expected), atol=2e-2)


def test_batch_neighbours_do_not_change_a_crop(make: Make) -> None:
    """Four crops of one picture, all alike, in one batch: the same bits in each place."""
    pixels = np.tile(photo(4, 32, 32), (2, 2, 1))
    outcome = run(make(), pixels, crops=4, mode=Mode.CROP)
    assert len({crop[0].tobytes() for crop in outcome.crops}) == 1, "the crops are not alike: gather_crops"
    alone = run(make(), pixels[:32, :32], crops=1, mode=Mode.CROP)
    # Crop 0 has lane 0 in both; a batch of one may run other kernels.
    np.testing.assert_allclose(scores(outcome)[:2], scores(alone), atol=SCORES)
    other = pixels.copy()
    other[40:, 40:] = 255 - other[40:, 40:]
    assert scores(run(make(), other, crops=4, mode=Mode.CROP))[:2] == scores(outcome)[:2]


@pytest.mark.parametrize("mode", [Mode.WHOLE, Mode.CROP])
def test_batch_of_several_images_gives_each_the_same_bits_whatever_shares_it(make: Make, mode: Mode) -> None:
    """Places in a batch, neighbours and padding: an engine must compute each place alike, as --batch promises."""
    executor = make(together=4)
    pixels = [photo(i, 32, 32) for i in range(6)]
    plan = make_plan(32, 32, executor._manifest, Options(mode=mode, crops=1))
    tasks = [(picture, seed) for seed, picture in enumerate(pixels)]
    first: dict[int, list[bytes]] = {}
    for group in (tasks[:4], tasks[4:], tasks[3:4], tasks[1:5], tasks[::-1][:4], tasks[:4]):
        for (_, seed), outcome in zip(group, executor.run_together(group, plan), strict=True):
            assert bits(outcome) == first.setdefault(seed, bits(outcome))


def test_modes_agree_on_a_small_image(make: Make) -> None:
    pixels, executor = photo(5, 50, 60), make()
    assert bits(run(executor, pixels, 3)) == bits(run(executor, pixels, 3, mode=Mode.TILE))


# ------------------------------------------------------------------------------------------------ 4. graphs


@pytest.mark.parametrize("mode", [Mode.WHOLE, Mode.CROP])
@pytest.mark.parametrize("form", [Form.STEP, Form.LOOP])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_graph_gives_the_bits_of_plain_launches(make: Make, precision: Precision, form: Form, mode: Mode) -> None:
    plain, by_graph = make(Form.NONE, precision=precision), make(form, precision=precision)
    for seed in range(4):
        pixels = photo(seed, 60, 70)
        expected, found = (run(executor, pixels, seed, mode=mode, crops=6) for executor in (plain, by_graph))
        assert found.notes == (), "the capture failed"
        assert bits(found) == bits(expected), f"image {seed}"
    assert by_graph.graphs.captures > 0


def test_graph_of_one_shape_survives_another_shape(make: Make) -> None:
    executor = make()
    small, large = photo(6, 40, 40), photo(7, 150, 150)
    first = {id(p): [bits(run(executor, p, 1, crops=2)) for _ in range(3)][-1] for p in (small, large)}
    for picture in (small, large, small, large):
        outcome = run(executor, picture, 1, crops=2)
        assert outcome.notes == ()
        assert bits(outcome) == first[id(picture)]


# ------------------------------------------------------------------------------------------------ 5. endurance


def test_memory_stays_flat_over_a_thousand_images(make: Make) -> None:
    executor = make()
    pictures = [photo(i, *size) for i, size in enumerate([(32, 32), (64, 90), (120, 110)])]
    allocations = 0
    layer = executor._layer
    allocate = layer.allocate

    def counted(size: int, *, beside: bool = False) -> int:
        nonlocal allocations
        allocations += 1
        return allocate(size, beside=beside)

    layer.allocate = counted  # type: ignore[method-assign]
    for number in range(1000):
        if number == 30:
            free, allocations = free_bytes(), 0
        picture = pictures[number % 3]
        plan = make_plan(picture.shape[0], picture.shape[1], executor._manifest, Options(crops=4))
        executor.run(picture, plan, number, pictures=False)
    assert allocations == 0, "the executor allocates"
    # Other processes may come and go; a leak of one small buffer per image would be more.
    assert free - free_bytes() < 8 * 2**20, "CUDA or TensorRT allocate"


def test_memory_that_runs_out_makes_batches_smaller(make: Make, host: HostExecutor) -> None:
    class Small(CudaLayer):
        """A GPU with room for what two crops need, more or less."""

        limit, used = 0, 0

        def allocate(self, size: int, *, beside: bool = False) -> int:
            if self.limit and self.used + size > self.limit:
                super().allocate(2**50)  # CUDA's own refusal
            address = super().allocate(size, beside=beside)
            self._sizes[address] = size
            self.used += size
            return address

        def free(self, address: int) -> None:
            self.used -= self._sizes.pop(address, 0)
            super().free(address)

        _sizes: dict[int, int] = {}  # noqa: RUF012 — one instance

    layer = Small(0)
    executor = make(layer=layer)
    pixels = photo(8, 90, 90)
    needed = []
    for crops in (2, 4):
        run(executor, pixels, 5, mode=Mode.CROP, crops=crops)
        needed.append(layer.used)
        executor._release()
    layer.limit = sum(needed) // 2
    outcome = run(executor, pixels, 5, mode=Mode.CROP, crops=4)
    assert "crops at a time" in outcome.notes[0]
    expected = run(host, pixels, 5, mode=Mode.CROP, crops=4)
    np.testing.assert_allclose(scores(outcome), scores(expected), atol=SCORES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.fromarray(photo(i, 100, 100)).save(tmp_path / "images" / f"{i:02}.png")
    return tmp_path / "images"


def _command(directory: EngineDirectory, folder: Path, out: Path) -> list[str]:
    options = ["--backend", "tensorrt", "--seeds", "50", "-o", str(out)]
    return [sys.executable, "-m", "diffiqa.cli", "run", "--engine", str(directory.path), str(folder), *options]


def test_interrupt_leaves_results_and_a_clean_gpu(directory: EngineDirectory, folder: Path, tmp_path: Path) -> None:
    with load(directory.path, TensorRt()) as scorer:  # this process's own context stays over both looks
        before = free_bytes()
        out = tmp_path / "scores.jsonl"
        process = subprocess.Popen(_command(directory, folder, out), stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (out.exists() and out.read_text().count("\n") >= 3):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert "Traceback" not in stderr
        assert 3 <= len(out.read_text().splitlines()) < 40
        assert before - free_bytes() < 64 * 2**20
        assert scorer.score(photo(0, 64, 64)).score


def test_processes_share_a_gpu(directory: EngineDirectory, folder: Path, tmp_path: Path) -> None:
    outs = [tmp_path / f"{name}.jsonl" for name in ("alone", "first", "second")]
    subprocess.run(_command(directory, folder, outs[0]), check=True, capture_output=True)
    pair = [subprocess.Popen(_command(directory, folder, out), stderr=subprocess.PIPE, text=True) for out in outs[1:]]
    for process in pair:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    records = [[json.loads(line) for line in out.read_text().splitlines()] for out in outs]
    found = [[(record["image"], record["score"]) for record in run_] for run_ in records]
    assert found[0] == found[1] == found[2]


def test_verify_finds_an_fp16_build_within_its_limits_with_a_graph_and_without(
    half: EngineDirectory, tmp_path: Path
) -> None:
    images = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(images):
        Image.fromarray(photo(seed, 40, 48)).save(path)
    command = [sys.executable, "-m", "diffiqa.cli", "verify", "--engine", str(half.path), "--backend", "tensorrt"]
    # A network that was never trained gives nearly equal scores: their order is no matter of precision.
    lifted = ["--limit", "srcc=none", "--limit", "plcc=none"]
    report = tmp_path / "report.json"
    done = subprocess.run([*command, *lifted, "--json", report, *images], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {check["name"]: check["value"] for check in json.loads(report.read_text())["checks"]}
    assert found["graph"] == 0
    assert found["repeat"] == 0

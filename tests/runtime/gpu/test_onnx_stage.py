"""ONNX Runtime inside the device's loop, on a driver without a GPU: its sessions bound to addresses of the host.

What runs is the CPU provider, so what these tests are for is all but CUDA: shapes, addresses, the growth of memory,
errors, and what is asked of a GPU's provider. `test_onnx_device_gpu.py` has the rest.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffiqa.engine.manifest import EngineDirectory, StageName, open_engine
from diffiqa.engine.pixels import to_plane
from diffiqa.errors import BackendError, UsageError
from diffiqa.runtime.backends import OnnxOnGpu
from diffiqa.runtime.gpu import cuda, door
from diffiqa.runtime.gpu import onnx_stage as onnx_device
from diffiqa.runtime.gpu.executor import DeviceExecutor
from diffiqa.runtime.gpu.graphs import Form
from diffiqa.runtime.gpu.layer import DeviceMemoryError, LoadedStage
from diffiqa.runtime.gpu.onnx_stage import BATCH, CUDA, OnnxDeviceStage, gpu_settings, on_device, prepare, stranded
from diffiqa.runtime.host.executor import HostExecutor
from diffiqa.runtime.host.onnx_stage import OnnxRuntime, OnnxStage
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.results import Mode, Options
from diffiqa.runtime.scorer import load

from ...fake_device import FakeLayer
from ...fakecuda.driver import Driver
from ...tiny import photo
from .test_executor import check_close, device, planned, same, small_tiles  # noqa: F401 — a fixture

RECORDED = {"session.record_ep_graph_assignment_info": "1"}


@pytest.fixture(scope="module")
def directory(tiny_engine: Path) -> EngineDirectory:
    return open_engine(tiny_engine)


@pytest.fixture(scope="module")
def sessions(directory: EngineDirectory) -> dict[StageName, Any]:
    return dict(load_stages(directory, OnnxRuntime(threads=1, session_config=RECORDED)))


@pytest.fixture(scope="module")
def host(directory: EngineDirectory, sessions: dict[StageName, Any]) -> HostExecutor:
    return HostExecutor(directory.manifest, sessions)


@pytest.fixture
def layer(driver: Driver) -> FakeLayer:
    """Sessions on the CPU run in the caller's thread, so what they read has to be there."""
    return FakeLayer(driver, eager=True)


def on_cpu(directory: EngineDirectory, sessions: dict[StageName, Any]) -> dict[StageName, LoadedStage]:
    m = directory.manifest
    return {stage.name: OnnxDeviceStage(sessions[stage.name], stage, m, ("cpu", 0)) for stage in m.stages}


def executor_on(
    layer: FakeLayer, directory: EngineDirectory, sessions: dict[StageName, Any], form: Form = Form.NONE
) -> DeviceExecutor:
    return DeviceExecutor(directory.manifest, layer, on_cpu(directory, sessions), form=form)


# ------------------------------------------------------------------------------------------------------- the loop


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("height", "width", "crops"), [(45, 70, 5), (120, 128, 9)])
def test_outcomes_are_those_of_the_host(
    directory: EngineDirectory,
    sessions: dict[StageName, Any],
    host: HostExecutor,
    layer: FakeLayer,
    mode: Mode,
    height: int,
    width: int,
    crops: int,
) -> None:
    """Nine crops are more than go through at once."""
    pixels = photo(3, height, width)
    plan = planned(directory, pixels, mode=mode, crops=crops)
    executor = executor_on(layer, directory, sessions)
    first = executor.run(pixels, plan, 5)
    check_close(first, host.run(to_plane(pixels), plan, 5))
    assert same(executor.run(pixels, plan, 5), first)
    assert first.notes == ()
    executor.close()
    assert layer.alive == 0


@pytest.mark.parametrize("mode", [Mode.WHOLE, Mode.CROP])
def test_memory_follows_the_images_and_then_stays(
    directory: EngineDirectory, sessions: dict[StageName, Any], layer: FakeLayer, driver: Driver, mode: Mode
) -> None:
    """Nothing is set aside for the maximum of an open-ended profile; buffers move as images grow, and bits stay."""
    executor = executor_on(layer, directory, sessions)
    engines = device(FakeLayer(driver), directory)
    pictures = [photo(i, *shape) for i, shape in enumerate([(32, 32), (64, 90), (120, 110)])]
    plans = [planned(directory, picture, mode=mode, crops=3) for picture in pictures]
    executor.run(pictures[0], plans[0], 0)
    small = layer.held
    for number in range(2):
        if number == 1:
            allocations = layer.allocations
        for picture, plan in zip(pictures, plans, strict=True):
            assert same(executor.run(picture, plan, 1), engines.run(picture, plan, 1))
    assert layer.allocations == allocations
    assert small < layer.held < 2**25


def test_no_graph_is_tried_and_the_result_says_so(
    directory: EngineDirectory, sessions: dict[StageName, Any], layer: FakeLayer
) -> None:
    pixels = photo(5, 48, 64)
    plan, executor = planned(directory, pixels, crops=1), executor_on(layer, directory, sessions, Form.LOOP)
    first, second = executor.run(pixels, plan, 0), executor.run(pixels, plan, 0)
    assert same(first, second)
    assert second.notes == ("ran without a CUDA graph: ONNX Runtime's own allocations cannot be captured",)
    assert layer.graphs == []


# --------------------------------------------------------------------------------------------------------- errors


class Failing:
    """A session that fails when it runs."""

    def __init__(self, session: Any, message: str) -> None:
        self._session, self.message = session, message

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.options = options
        if self.message:
            raise RuntimeError(self.message)
        self._session.run_with_iobinding(binding, options)


@pytest.mark.parametrize("name", [StageName.UNET, StageName.VDA])
def test_a_stage_that_fails_is_named(
    directory: EngineDirectory, sessions: dict[StageName, Any], layer: FakeLayer, name: StageName
) -> None:
    failing = Failing(sessions[name].session, "CUDNN_STATUS_EXECUTION_FAILED\n at conv.cc:1")
    executor = executor_on(layer, directory, sessions | {name: SimpleNamespace(session=failing)})
    pixels = photo(1, 40, 40)
    with pytest.raises(BackendError, match=f"onnxruntime failed in the {name} stage: CUDNN_STATUS_EXECUTION_FAILED$"):
        executor.run(pixels, planned(directory, pixels), 0)
    failing.message = ""
    assert executor.run(pixels, planned(directory, pixels), 0).verdicts
    # Otherwise a run on a GPU would wait for its end.
    assert failing.options.get_run_config_entry("disable_synchronize_execution_providers") == "1"


@pytest.mark.parametrize(
    "says",
    ["Failed to allocate memory for requested buffer of size 99", "CUDA failure 2: out of memory"],
)
def test_memory_that_onnxruntime_does_not_get_makes_batches_smaller(
    directory: EngineDirectory, sessions: dict[StageName, Any], host: HostExecutor, layer: FakeLayer, says: str
) -> None:
    class Short(Failing):
        """The first batch is too large, tried again with nothing else on the device too."""

        left = 2

        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            self.left -= 1
            if self.left < 0:
                self.message = ""
            super().run_with_iobinding(binding, options)

    short = Short(sessions[StageName.VDA].session, says)
    executor = executor_on(layer, directory, sessions | {StageName.VDA: SimpleNamespace(session=short)})
    pixels = photo(2, 90, 90)
    plan = planned(directory, pixels, crops=5)
    outcome = executor.run(pixels, plan, 1)
    assert "at most 2 ran at once" in outcome.notes[0]
    check_close(outcome, host.run(to_plane(pixels), plan, 1))
    assert str(onnx_device._failure("the vda stage", RuntimeError(says))) == f"the vda stage: {says}"


def test_memory_of_no_known_device_cannot_be_bound(directory: EngineDirectory, sessions: dict[StageName, Any]) -> None:
    stage = on_cpu(directory, sessions)[StageName.VDA]
    stage.place = ("nowhere", 0)  # type: ignore[attr-defined]
    size = directory.manifest.crop.size
    shapes = {"images": (1, len(directory.manifest.kinds), 3, size, size)}
    with pytest.raises(BackendError, match="cannot bind the vda stage to"):
        stage.bind(0, shapes, dict.fromkeys(("images", "score", "score_map", "weight_map"), 256))


# ----------------------------------------------------------------------------------------- what a GPU is asked for


def options_of(settings: OnnxRuntime) -> list[dict[str, Any]]:
    return [provider[1] for provider in settings.providers if not isinstance(provider, str)]


def test_a_provider_is_given_our_device_and_stream_and_exact_arithmetic() -> None:
    settings = gpu_settings(None, 1, 4096)
    assert settings.provider_names == [CUDA]
    (options,) = options_of(settings)
    assert options["device_id"] == "1"
    assert options["user_compute_stream"] == "4096"
    assert options["use_tf32"] == "0"
    assert options["cudnn_conv_algo_search"] != "EXHAUSTIVE"
    assert settings.deterministic


def test_options_of_a_provider_are_the_users_but_for_device_and_stream() -> None:
    asked = OnnxRuntime(providers=["TensorrtExecutionProvider", (CUDA, {"use_tf32": "1"})])
    settings = gpu_settings(asked, 0, 7)
    assert settings.provider_names == asked.provider_names
    assert [options["user_compute_stream"] for options in options_of(settings)] == ["7", "7"]
    assert options_of(settings)[1]["use_tf32"] == "1"
    with pytest.raises(UsageError, match=r"device_id of CUDAExecutionProvider cannot be set: .* device"):
        gpu_settings(OnnxRuntime(providers=[(CUDA, {"device_id": "1"})]), 0, 7)
    kept = gpu_settings(OnnxRuntime(providers=[CUDA], spinning=True, session_config={"a": "1"}), 0, 7)
    assert (kept.spinning, kept.session_config["a"]) == (True, "1")
    with pytest.raises(UsageError, match=r"takes the providers CUDA.*, not CPUExecutionProvider"):
        gpu_settings(OnnxRuntime(), 0, 7)


def test_an_onnxruntime_without_cuda_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_device, "providers_here", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"no CUDAExecutionProvider, only CPUEx.*pip uninstall onnxruntime"):
        prepare(None)


def test_networks_that_would_run_on_the_cpu_are_refused(
    directory: EngineDirectory, sessions: dict[StageName, Any]
) -> None:
    """As ONNX Runtime does without a word where its GPU provider lacks a kernel; here, of course, all of them."""
    assert isinstance(sessions[StageName.UNET], OnnxStage)
    assert any(node.startswith("Conv ") for node in stranded(sessions[StageName.UNET]))
    with pytest.raises(
        BackendError, match=r"would run nodes of the unet stage on the CPU, not on GPU 0: Gemm .*, …; use the backend"
    ):
        on_device("GPU 0", 0, directory.manifest, sessions)


def test_batches_and_sizes_are_bounded(directory: EngineDirectory, sessions: dict[StageName, Any]) -> None:
    stages = on_cpu(directory, sessions)
    crops, images = stages[StageName.UNET].built.profiles
    assert (crops["y"].minimum[0], crops["y"].maximum[0]) == (1, BATCH)
    assert images["y"].maximum[0] == 1
    (vit,) = stages[StageName.VIT].built.profiles
    assert vit["image"].maximum[0] == BATCH * len(directory.manifest.kinds)


# ------------------------------------------------------------------------------------------------------ the choice


@pytest.fixture
def gpu(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> FakeLayer:
    """A machine with a GPU and an onnxruntime that has CUDA, but no TensorRT."""
    layer = FakeLayer(driver, eager=True)
    monkeypatch.setattr(door, "gpu_capability", lambda ordinal: "8.9")
    monkeypatch.setattr(door, "installed_libraries", list)
    monkeypatch.setattr(cuda, "CudaLayer", lambda ordinal: layer.open())
    monkeypatch.setattr(onnx_device, "prepare", lambda settings: None)
    monkeypatch.setattr(onnx_device, "gpu_settings", lambda settings, ordinal, stream: OnnxRuntime(threads=1))
    monkeypatch.setattr(onnx_device, "stranded", lambda session: [])
    monkeypatch.setattr(onnx_device, "DEVICE", "cpu")
    return layer


def test_auto_takes_onnxruntime_on_a_gpu_before_that_on_the_cpu_and_says_why_not_tensorrt(
    tiny_engine: Path, gpu: FakeLayer
) -> None:
    with load(tiny_engine) as scorer:
        assert scorer.info.backend.endswith(" on fake GPU")
        assert scorer.info.reason.startswith("not TensorRT: tensorrt is not installed")
        found = scorer.score(photo(1, 40, 40), Options(crops=1))
    with load(tiny_engine, OnnxRuntime()) as scorer:
        assert found.score == pytest.approx(scorer.score(photo(1, 40, 40), Options(crops=1)).score, abs=1e-5)
    assert gpu.alive == 0
    assert gpu.closed


def test_what_a_user_sets_reaches_onnxruntime(
    tiny_engine: Path, gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def settings(given: OnnxRuntime, ordinal: int, stream: int) -> OnnxRuntime:
        assert stream == gpu.stream
        asked.extend((given, ordinal))
        return OnnxRuntime(threads=1)

    monkeypatch.setattr(onnx_device, "gpu_settings", settings)
    load(tiny_engine, OnnxOnGpu(device=2, providers=[CUDA, "X"], session_config={"a": "1"})).close()
    assert asked == [OnnxRuntime(providers=[CUDA, "X"], session_config={"a": "1"}), 2]


def test_auto_without_a_gpu_says_so_once(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_ordinal: int) -> str:
        raise BackendError("no NVIDIA GPU: none")

    monkeypatch.setattr(door, "gpu_capability", none)
    assert load(tiny_engine).info.reason == "not TensorRT: no NVIDIA GPU: none"


def test_what_keeps_onnxruntime_off_the_gpu_is_said_or_raised(
    tiny_engine: Path, gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_settings: object) -> None:
        raise BackendError("no CUDAExecutionProvider")

    monkeypatch.setattr(onnx_device, "prepare", fails)
    assert "; not ONNX Runtime on a GPU: no CUDAExecutionProvider" in load(tiny_engine).info.reason
    with pytest.raises(BackendError, match="no CUDAExecutionProvider"):
        load(tiny_engine, OnnxOnGpu())


def test_a_gpu_that_is_full_is_given_back(tiny_engine: Path, gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object, **_how: object) -> object:
        raise DeviceMemoryError("9 MiB")

    monkeypatch.setattr(onnx_device, "on_device", short)
    with pytest.raises(BackendError, match=r"not enough GPU memory to load .*9 MiB"):
        load(tiny_engine, OnnxOnGpu())
    assert gpu.closed


def test_the_installed_onnxruntime_has_every_name_the_device_calls() -> None:
    import onnxruntime

    names = {
        "InferenceSession": ["get_provider_graph_assignment_info", "io_binding", "run_with_iobinding"],
        "IOBinding": ["bind_input", "bind_output"],
        "RunOptions": ["add_run_config_entry"],
        "SessionOptions": ["use_deterministic_compute"],
    }
    assert callable(onnxruntime.preload_dlls)
    missing = [
        f"{kind}.{name}"
        for kind, found in names.items()
        for name in found
        if not hasattr(getattr(onnxruntime, kind), name)
    ]
    assert missing == []

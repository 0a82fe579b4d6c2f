"""Builds of ONNX Runtime and of PyTorch's compiler in the device's loop, run by the CPU's kernels on a fake GPU.

These tests are for all but CUDA: which build is taken, sizes, addresses, types, graphs by name, errors, memory.
"""

import contextlib
import ctypes
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffiqa.engine.manifest import Build, Library, Precision, StageName
from diffiqa.errors import BackendError, EngineError, ImageError
from diffiqa.export.builds import BuildOptions, build_engines
from diffiqa.export.onnx_build import OnnxMaker
from diffiqa.export.torch_graph import OnnxModule
from diffiqa.runtime import inductor
from diffiqa.runtime.backends import InductorOnGpu, OnnxOnGpu, OnnxRuntime
from diffiqa.runtime.gpu import cuda, door, inductor_stage
from diffiqa.runtime.gpu import onnx_stage as onnx_device
from diffiqa.runtime.gpu.layer import DeviceMemoryError
from diffiqa.runtime.gpu.onnx_stage import SESSIONS, OnnxBuildStage, nvidia_folders, prepare
from diffiqa.runtime.host.onnx_stage import OnnxStage
from diffiqa.runtime.results import Mode, Options
from diffiqa.runtime.scorer import load
from diffiqa.verify.api import verify

from ...fake_device import FakeLayer
from ...fakecuda.driver import Driver
from ...tiny import STAGES, photo

NEAR = {Precision.FP32: 1e-5, Precision.FP16: 2e-3}


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_engine, tmp_path / "engine"))


@pytest.fixture
def gpu(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> FakeLayer:
    """A machine with a Hopper GPU, no TensorRT, and an onnxruntime that has CUDA."""
    layer = FakeLayer(driver, eager=True)
    monkeypatch.setattr(door, "gpu_capability", lambda ordinal: "9.0")
    monkeypatch.setattr(door, "installed_libraries", list)
    monkeypatch.setattr(cuda, "CudaLayer", lambda ordinal: layer.open())
    monkeypatch.setattr(onnx_device, "prepare", lambda settings: None)
    monkeypatch.setattr(onnx_device, "gpu_settings", lambda settings, ordinal, stream: OnnxRuntime(threads=1))
    monkeypatch.setattr(onnx_device, "stranded", lambda session: [])
    monkeypatch.setattr(onnx_device, "DEVICE", "cpu")
    return layer


def same_scores(engine: Path, backend: OnnxOnGpu | InductorOnGpu, near: float) -> str:
    """Score in two modes and sizes; return what records call the backend."""
    asked = [(photo(1, 40, 40), Options(crops=3, mode=Mode.CROP)), (photo(2, 48, 56), Options(crops=2))]
    with load(engine, backend) as ours, load(engine, OnnxRuntime(threads=1)) as theirs:
        for image, options in asked:
            found = ours.score(image, options)
            assert found.score == pytest.approx(theirs.score(image, options).score, abs=near)
            assert ours.score(image, options).score == found.score
        return ours.info.backend


# ------------------------------------------------------------------------------------------------------ ONNX Runtime


@pytest.mark.parametrize("precision", NEAR)
def test_a_build_of_onnx_runtime_runs_in_the_place_of_the_float32_stages(
    engine: Path, gpu: FakeLayer, precision: Precision
) -> None:
    build_engines(engine, BuildOptions(Library.ONNXRUNTIME, precision))
    name = same_scores(engine, OnnxOnGpu(), NEAR[precision])
    assert f" {precision}: " in name
    assert same_scores(engine, OnnxOnGpu(builds=False), NEAR[Precision.FP32]) == name.replace(f" {precision}:", ":")
    assert gpu.alive == 0
    assert gpu.closed


def test_a_build_is_verified_and_the_float32_stages_are_no_build(engine: Path, gpu: FakeLayer, tmp_path: Path) -> None:
    Image.fromarray(photo(3, 40, 40)).save(tmp_path / "a.png")
    limits = {"srcc": None, "plcc": None}  # of one image
    with pytest.raises(EngineError, match=r"holds no onnxruntime build to verify.*--target onnxruntime"):
        verify(engine, [tmp_path / "a.png"], backend=OnnxOnGpu(), limits=limits)
    build, _ = build_engines(engine, BuildOptions(Library.ONNXRUNTIME))
    options = Options(crops=2, mode=Mode.CROP, seeds=1)
    result = verify(
        engine,
        [tmp_path / "a.png"],
        backend=OnnxOnGpu(),
        options=options,
        limits=limits,
    )
    assert result.findings.candidate.id.endswith(f"+{build.key}")
    assert result.findings.candidate.cast == "fp16"
    assert result.within, [check for check in result.checks if not check.within]
    assert gpu.closed


def test_a_stale_build_is_not_passed_over(engine: Path, gpu: FakeLayer) -> None:
    build, _ = build_engines(engine, BuildOptions(Library.ONNXRUNTIME))
    (engine / build.stages[0].file.path).write_bytes(b"x")
    with pytest.raises(EngineError, match=r"has 1 bytes.*--target onnxruntime --precision fp16 --force"):
        load(engine, OnnxOnGpu())


@pytest.fixture
def loads(engine: Path, gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every session of a build was made with."""
    notes: list[dict[str, Any]] = []

    class Noted(OnnxStage):
        def __init__(self, path: Path, settings: OnnxRuntime, *, sizes: Any = None) -> None:
            options = dict(settings.providers[0][1]) if not isinstance(settings.providers[0], str) else {}
            notes.append({"stage": path.stem, "sizes": dict(sizes), "options": options})
            super().__init__(path, OnnxRuntime(threads=1), sizes=sizes)

    monkeypatch.setattr(onnx_device, "OnnxStage", Noted)
    settings = OnnxRuntime(providers=[("CUDAExecutionProvider", {"use_tf32": "0"})])
    monkeypatch.setattr(onnx_device, "gpu_settings", lambda asked, ordinal, stream: settings)
    build_engines(engine, BuildOptions(Library.ONNXRUNTIME))
    return notes


def test_sessions_have_fixed_sizes_channels_last_and_a_graph(engine: Path, loads: list[dict[str, Any]]) -> None:
    with load(engine, OnnxOnGpu()) as scorer:
        scorer.score(photo(1, 40, 40), Options(crops=2, mode=Mode.CROP))
    assert {(note["stage"], *note["sizes"].items()) for note in loads} >= {
        ("unet", ("B", 2), ("H", 32), ("W", 32)),
        ("vda", ("B", 2)),
        ("vit", ("N", 8)),
    }
    assert all(note["options"] == {"use_tf32": "0", "prefer_nhwc": "1", "enable_cuda_graph": "1"} for note in loads)


def test_without_cuda_graphs_onnxruntime_is_asked_for_none(engine: Path, loads: list[dict[str, Any]]) -> None:
    with load(engine, OnnxOnGpu(cuda_graph=False)) as scorer:
        scorer.score(photo(1, 32, 32), Options(crops=1))
    assert {note["options"]["enable_cuda_graph"] for note in loads} == {"0"}


def test_a_graph_that_onnxruntime_refuses_costs_a_warning_alone(
    engine: Path, loads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    noted: Any = onnx_device.OnnxStage  # type: ignore[attr-defined]

    def refusing(path: Path, settings: OnnxRuntime, *, sizes: Any) -> Any:
        stage = noted(path, settings, sizes=sizes)
        if loads[-1]["options"]["enable_cuda_graph"] == "1":
            raise BackendError("onnxruntime cannot load x: This session cannot use the CUDA Graph feature")
        return stage

    monkeypatch.setattr(onnx_device, "OnnxStage", refusing)
    with caplog.at_level(logging.WARNING), load(engine, OnnxOnGpu()) as scorer:
        assert scorer.score(photo(1, 32, 32), Options(crops=1)).score > 0
    assert "unet: runs without a CUDA graph" in caplog.text


def test_another_failure_is_not_taken_for_a_graph(
    engine: Path, gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_path: Path, _settings: OnnxRuntime, *, sizes: Any) -> OnnxStage:
        raise BackendError("onnxruntime cannot load x: it is damaged")

    build_engines(engine, BuildOptions(Library.ONNXRUNTIME))
    monkeypatch.setattr(onnx_device, "OnnxStage", broken)
    with pytest.raises(BackendError, match="it is damaged"):
        load(engine, OnnxOnGpu())
    assert gpu.closed


def test_a_build_with_nodes_on_the_cpu_is_refused(
    engine: Path, gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_engines(engine, BuildOptions(Library.ONNXRUNTIME, Precision.BF16))
    monkeypatch.setattr(onnx_device, "OnnxStage", lambda path, settings, *, sizes: SimpleNamespace())
    monkeypatch.setattr(onnx_device, "stranded", lambda session: ["Conv a", "Conv b"])
    says = r"nodes of the unet stage on the CPU.*Conv a, Conv b; build it with another --precision than bf16"
    with pytest.raises(BackendError, match=says):
        load(engine, OnnxOnGpu())


def test_bindings_name_graphs_of_their_own_and_old_sessions_go(engine: Path) -> None:
    build, _ = build_engines(engine, BuildOptions(Library.ONNXRUNTIME, Precision.FP32))
    vda = build.stages[-1]
    made: list[int] = []

    def session(sizes: Any) -> OnnxStage:
        made.append(sizes["B"])
        return OnnxStage(engine / vda.file.path, OnnxRuntime(threads=1), sizes=sizes)

    stage = OnnxBuildStage(vda, session, ("cpu", 0), graph=True)
    kept = [(ctypes.c_char * 2**20)() for _ in range(4)]
    names = ("images", "score", "score_map", "weight_map")
    addresses = {name: ctypes.addressof(memory) for name, memory in zip(names, kept, strict=True)}

    def bind(batch: int) -> Any:
        return stage.bind(0, {"images": (batch, 4, 3, 32, 32)}, addresses)

    ids = [bind(batch)._options.get_run_config_entry("gpu_graph_id") for batch in (1, 1, 2)]
    assert len(set(ids)) == 3
    assert "0" not in ids
    assert made == [1, 2]
    for batch in range(3, SESSIONS + 2):
        bind(batch)
    bind(2)
    assert made == [1, 2, 3, 4, 5]
    bind(1)  # the one used longest ago
    assert made[-1] == 1


# --------------------------------------------------------------------------------------------------- where wheels are


def test_nvidias_wheels_are_found_elsewhere_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "base" / "nvidia" / name / "lib" for name in ("cu13", "cudnn")]
    for folder in folders:
        folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "base")])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert [folder for folder in nvidia_folders(tmp_path) if tmp_path in folder.parents] == folders
    assert not [folder for folder in nvidia_folders(tmp_path / "base") if tmp_path in folder.parents]
    asked: list[Any] = []
    monkeypatch.setattr(onnx_device, "providers_here", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda directory=None: asked.append(directory))
    prepare(None)
    assert asked[0] is None
    assert {str(folder) for folder in folders} <= set(asked)


# ------------------------------------------------------------------------------------------------ PyTorch's compiler


class HostPlace(inductor_stage._Place):
    """The fake GPU's memory is the host's: tensors lie at its addresses, and there is no stream to go on."""

    failures = 0

    def tensor(self, address: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
        count, kind = torch.Size(shape).numel(), getattr(torch, dtype)
        memory = (ctypes.c_char * (count * kind.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=kind).reshape(shape)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        yield

    def ran_out_of_memory(self) -> bool:
        return self.failures > 0


Form = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@pytest.fixture
def compiled(engine: Path, gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch) -> dict[StageName, list[int]]:
    """Builds for the GPU whose stages PyTorch interprets; this notes which profile of which stage was asked for."""
    asked: dict[StageName, list[int]] = {name: [] for name in STAGES}

    class Maker(OnnxMaker):
        """Writes what would be compiled, as a build of PyTorch's compiler for this GPU."""

        library, suffix, folder, machine_code = Library.INDUCTOR, ".pt2", "inductor", True
        capabilities, batches = ("9.0",), ("1", "1:2:4")

        def __init__(self) -> None:
            super().__init__(())
            self.version = torch.__version__

    class Interpreted:
        def __init__(self, path: Path, _device: int | None) -> None:
            self._module = OnnxModule(onnx.load(path))
            self._asked = asked[StageName(path.stem)]

        def form(self, profile: int) -> Form:
            self._asked.append(profile)
            return torch.no_grad()(lambda inputs: self._module(*inputs))

    monkeypatch.setenv("XDG_STATE_HOME", str(engine.parent / "state"))
    monkeypatch.setattr("diffiqa.export.builds.make_maker", lambda options: Maker())
    monkeypatch.setattr(inductor, "Package", Interpreted)
    monkeypatch.setattr(inductor, "torch_on_gpu", lambda ordinal: torch)

    def place(layer: FakeLayer, *_: object) -> HostPlace:
        return HostPlace(layer, None, None, None)

    monkeypatch.setattr(inductor_stage, "_place", place)
    return asked


def built(engine: Path, precision: Precision) -> Build:
    sizes = ("32x32", "32x32:64x64:96x96")
    build, _ = build_engines(engine, BuildOptions(Library.INDUCTOR, precision, sizes=sizes))
    return build


@pytest.mark.parametrize("precision", NEAR)
def test_compiled_stages_work_on_the_devices_memory(
    engine: Path, compiled: dict[StageName, list[int]], gpu: FakeLayer, precision: Precision
) -> None:
    built(engine, precision)
    name = same_scores(engine, InductorOnGpu(cuda_graph=False), NEAR[precision])
    assert name == f"inductor {torch.__version__} {precision}: fake GPU"
    assert set(compiled[StageName.UNET]) == {1, 2}  # batches up to four crops; whole images
    assert gpu.alive == 0


def test_auto_takes_it_before_onnxruntime_and_says_why_not_tensorrt(
    engine: Path, compiled: dict[StageName, list[int]], gpu: FakeLayer
) -> None:
    with load(engine) as scorer:
        assert scorer.info.backend.startswith("onnxruntime ")
        assert "not PyTorch Inductor on a GPU" in scorer.info.reason
        assert f"iqa-build --engine {engine} --target inductor" in scorer.info.reason
    built(engine, Precision.FP32)
    with load(engine) as scorer:
        assert scorer.info.backend.startswith("inductor ")
        assert scorer.info.reason.startswith("not TensorRT: tensorrt is not installed")


def test_an_image_that_was_not_built_for_names_the_command(
    engine: Path, compiled: dict[StageName, list[int]], gpu: FakeLayer
) -> None:
    built(engine, Precision.FP32)
    with load(engine, InductorOnGpu()) as scorer, pytest.raises(ImageError) as caught:
        scorer.score(photo(1, 120, 96))
    wanted = "--target inductor --precision fp32 --batch 1,1:2:4 --sizes 32x32,32x32:64x64:96x96,120x96"
    assert str(caught.value).endswith(wanted)


@pytest.mark.parametrize(("short", "kind"), [(0, BackendError), (1, DeviceMemoryError)])
def test_a_form_that_fails_is_named_and_memory_told_apart(short: int, kind: type[Exception]) -> None:
    def form(_inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        raise RuntimeError("run_func_(...) API call failed at model_container_runner.cpp, line 145\nmore")

    place = HostPlace(SimpleNamespace(name="GPU 0"), None, None, None)
    place.failures = short
    bound = inductor_stage._Bound(place, StageName.VDA, form, [], [])
    with pytest.raises(kind, match=r"GPU 0: torch failed in the vda stage: run_func_.*line 145$"):
        bound.enqueue()
    assert bound.capture_problem() is None
    assert bound.activation_bytes == 0


def test_a_torch_without_cuda_says_so(engine: Path, gpu: FakeLayer) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch is built for CUDA")
    with pytest.raises(BackendError, match=r"torch .* cannot use a GPU; install a build of it for CUDA"):
        load(engine, InductorOnGpu())

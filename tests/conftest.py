"""Fixtures shared by all tests, made once per session: the tiny model, its engine, the kernels for the CPU."""

import ctypes
import dataclasses
import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch

from diffiqa.engine.manifest import (
    MANIFEST,
    Build,
    EngineDirectory,
    FileEntry,
    Library,
    Precision,
    Source,
    file_sha256,
    read_manifest,
)
from diffiqa.export import engine as engine_module
from diffiqa.export.engine import export_engine
from diffiqa.export.stages import StagePlan
from diffiqa.kernels import load as kernels_load
from diffiqa.model.checkpoint import Loaded
from diffiqa.model.network import DiffV2IQA, build
from diffiqa.runtime.gpu import cuda, door, tensorrt, tensorrt_stage
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.scorer import Scorer, load

from .fake_device import FakeLayer, fake_stages, load_once
from .fakecuda.driver import DRIVER, Driver, build_driver, compiled, load_driver
from .kernels.devices import HOST_LIBRARY, Missing, build_host
from .model.pfd.small import random_small
from .tiny import TINY, perturbed

# A process that a shell started in the background ignores Ctrl-C, and so would the children that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
if "FAKE_CUDA_GPU" in os.environ:  # see fakecuda/driver.py
    kernels_load.compiled = compiled
torch.set_num_threads(1)  # the models are tiny: more threads would only wait for each other


@pytest.fixture(scope="session", autouse=True)
def state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remember self-tests and keys for this session only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def stages_loaded_once() -> Iterator[None]:
    """Load no file twice into ONNX Runtime."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntime, "load_stage", load_once)
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Undo what a test of iqa-bench sets: another number of threads gives a later test other last bits."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model() -> DiffV2IQA:
    return perturbed(build(TINY, seed=1), seed=2)


@pytest.fixture(scope="session")
def tiny_loaded(tiny_model: DiffV2IQA) -> Loaded:
    source = Source("bundle", "tiny.safetensors", 1, "0" * 64, "diffiqa bundle")
    return Loaded(tiny_model, (source,), ())


def made_once(temporary: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder of the whole run, filled by whichever of its processes came first; the others wait."""
    base = temporary.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's engine, or that of the session which started this one."""
    if ready := os.environ.get("TINY_ENGINE"):
        return Path(ready)
    tiny_loaded: Loaded = request.getfixturevalue("tiny_loaded")
    return made_once(tmp_path_factory, "engines", lambda folder: export_engine(tiny_loaded, folder / "tiny")) / "tiny"


@pytest.fixture
def ready_graphs(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tiny model is exported, take the graphs of its engine: tracing them takes most of an export's time."""

    def copied(plan: StagePlan, path: Path, _alignment: int) -> onnx.ModelProto:
        shutil.copy(tiny_engine / "onnx" / f"{plan.name}.onnx", path)
        return onnx.load(path)

    monkeypatch.setattr(engine_module, "export_graph", copied)


@pytest.fixture(scope="session")
def pfd_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine of a small PFD-IQA, or that of the session which started this one."""
    if ready := os.environ.get("PFD_ENGINE"):
        return Path(ready)
    return made_once(tmp_path_factory, "pfd", lambda folder: export_engine(random_small(), folder / "pfd")) / "pfd"


@pytest.fixture(scope="session")
def scorer(tiny_engine: Path) -> Scorer:
    return load(tiny_engine)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as a shared library."""
    try:
        return ctypes.CDLL(str(made_once(tmp_path_factory, "kernels", build_host) / HOST_LIBRARY))
    except Missing as reason:
        pytest.skip(str(reason))


@pytest.fixture
def tiny_build(tiny_engine: Path, tmp_path: Path) -> Path:
    """Return an engine directory with a build for 8.9 whose engines are a few bytes."""
    path = tmp_path / "engine"
    path.mkdir()
    shutil.copytree(tiny_engine / "onnx", path / "onnx")
    manifest = read_manifest(tiny_engine)

    def written(name: str) -> FileEntry:
        file = path / "tensorrt" / "a" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
        return FileEntry(f"tensorrt/a/{name}", file.stat().st_size, file_sha256(file))

    stages = fake_stages(SimpleNamespace(), EngineDirectory(tiny_engine, manifest))  # type: ignore[arg-type]
    built_stages = tuple(
        dataclasses.replace(stage.built, file=written(f"{name}.engine")) for name, stage in stages.items()
    )
    files = written("plan.json"), written("build.log")
    batches, sizes = ("1:2:4",), ("32x32", "32x32:64x64:128x128")
    build = Build(
        "a", Library.TENSORRT_RTX, "1.7", ("8.9",), Precision.FP32, batches, sizes, built_stages, *files, None
    )
    (path / MANIFEST).write_text(dataclasses.replace(manifest, builds=(build,)).to_json())
    return path


@pytest.fixture(scope="session")
def fake_libcuda(
    request: pytest.FixtureRequest, library: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ctypes.CDLL]:
    """This process's CUDA driver, which is ours: fakecuda/driver.h. Tests without `driver` see none."""
    pytest.importorskip("cuda.core", reason="cuda.core is not installed", exc_type=ImportError)
    if any(item.get_closest_marker("gpu") for item in request.session.items):
        pytest.skip("tests for a GPU run in this process: its driver is the machine's own")
    try:
        found = load_driver(made_once(tmp_path_factory, "driver", build_driver) / DRIVER, library._name)
    except Missing as reason:
        pytest.skip(str(reason))
    with pytest.MonkeyPatch.context() as patch:  # cuda.core remembers a GPU that is gone
        patch.setattr(tensorrt, "_has_driver", lambda: bool(found.fake_has_gpu()))
        yield found


@pytest.fixture
def driver(fake_libcuda: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """A machine with a GPU, as new. A test that leaves a problem behind fails; one that expects some takes them."""
    monkeypatch.setattr(kernels_load, "compiled", compiled)
    driver = Driver(fake_libcuda)
    yield driver
    problems = driver.problems()
    driver.close()
    assert problems == []


@pytest.fixture
def layer(driver: Driver) -> FakeLayer:
    """The real layer on that machine."""
    return FakeLayer(driver)


@pytest.fixture
def fake_gpu(layer: FakeLayer, monkeypatch: pytest.MonkeyPatch) -> FakeLayer:
    """A machine with a GPU of compute capability 8.9 and tensorrt-rtx 1.7; whoever opens it gets this layer."""

    def engines(found: FakeLayer, _library: object, directory: EngineDirectory, _build: Build) -> object:
        return fake_stages(found, directory)

    monkeypatch.setattr(door, "gpu_capability", lambda ordinal: "8.9")
    monkeypatch.setattr(door, "installed_libraries", lambda: [Library.TENSORRT_RTX])
    monkeypatch.setattr(
        door, "load_library", lambda name: SimpleNamespace(library=name, version="1.7", capabilities={})
    )
    monkeypatch.setattr(cuda, "CudaLayer", lambda ordinal: layer.open())
    monkeypatch.setattr(tensorrt_stage, "load_engines", engines)
    return layer

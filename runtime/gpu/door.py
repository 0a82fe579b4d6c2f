"""The door of the room: an engine is loaded onto a GPU here, for an executor to take over."""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...engine.manifest import Build, EngineDirectory, Library, Precision
from ...errors import BackendError
from ..builds import Machine, newest_build, open_build, rebuild_command
from ..executor import Opened
from ..host.onnx_stage import OnnxRuntime, Provider
from .graphs import Form
from .tensorrt import TRAITS, TensorRT, gpu_capability, installed_libraries, load_library

if TYPE_CHECKING:
    from ...engine.manifest import StageName
    from .cuda import CudaLayer
    from .executor import DeviceExecutor
    from .layer import LoadedStage


@dataclass(frozen=True)
class OnGpu:
    """An engine on a GPU, for an executor to take over."""

    layer: "CudaLayer"
    stages: "Callable[[int], Mapping[StageName, LoadedStage]]"  # for batches of so many images
    name: str  # what records call it
    precision: Precision
    form: Form  # what one CUDA graph holds, where graphs are wanted
    build: Build | None = None
    # The command for a build that takes images of a size, and so many at a time, as well.
    rebuild: Callable[[str, int], str] = "iqa-build --sizes {} --batch {}".format

    def executor(self, directory: EngineDirectory, *, cuda_graph: bool = True, batch: int = 1) -> "DeviceExecutor":
        """Return what carries out plans, and closes the layer. If this raises, the layer is closed."""
        from .executor import DeviceExecutor

        form = self.form if cuda_graph else Form.NONE
        with closed_if_it_fails(self.layer, directory):
            return DeviceExecutor(
                directory.manifest, self.layer, self.stages(batch), form=form, together=batch, rebuild=self.rebuild
            )

    def ready(self, directory: EngineDirectory, *, cuda_graph: bool, batch: int) -> Opened:
        """Return it as `load` takes it."""
        name = self.name + (f", {batch} at a time" if batch > 1 else "")
        return Opened(self.executor(directory, cuda_graph=cuda_graph, batch=batch), name)


def open_tensorrt(directory: EngineDirectory, ordinal: int) -> OnGpu:
    """Load the build that fits a GPU onto it. Raises BackendError or EngineError with the way out."""
    capability = gpu_capability(ordinal)
    # Only where there is a GPU: most machines that score have none, and start sooner without.
    from .cuda import CudaLayer
    from .tensorrt_stage import load_engines

    # Without any library, the message names the one that the newest build is for.
    built = (build.library for build in reversed(directory.manifest.builds) if build.library in TRAITS)
    missed = next(built, Library.TENSORRT)
    libraries = _loaded(installed_libraries() or [missed])
    machines = [
        Machine(name, library.version, capability, tuple(library.capabilities)) for name, library in libraries.items()
    ]
    build = newest_build(directory, machines)
    layer = CudaLayer(ordinal)
    with closed_if_it_fails(layer, directory):
        engines = load_engines(layer, libraries[build.library], directory, build)
    name = f"{build.library} {build.version} {build.precision}: {layer.name}"
    rebuild = _rebuild(directory, build)
    return OnGpu(layer, lambda _batch: engines, name, build.precision, Form.LOOP, build=build, rebuild=rebuild)


def _rebuild(directory: EngineDirectory, build: Build) -> Callable[[str, int], str]:
    """Return what gives the command for the same build with a size and a batch more."""

    def command(size: str, batch: int) -> str:
        batches = (str(batch),) if batch > 1 else ()
        return rebuild_command(directory.path, build, more_batches=batches, more_sizes=(size,))

    return command


def open_inductor(directory: EngineDirectory, ordinal: int) -> OnGpu:
    """Load the build of PyTorch's compiler that fits a GPU onto it. Raises BackendError or EngineError."""
    from ..inductor import fitting_build, packages, torch_on_gpu

    capability = gpu_capability(ordinal)
    torch_on_gpu(ordinal)
    build = fitting_build(directory, capability)
    from .cuda import CudaLayer
    from .inductor_stage import on_stream

    layer = CudaLayer(ordinal)
    with closed_if_it_fails(layer, directory):
        stages = on_stream(layer, ordinal, build, packages(directory, build, ordinal))
    name = f"inductor {build.version} {build.precision}: {layer.name}"
    rebuild = _rebuild(directory, build)
    return OnGpu(layer, lambda _batch: stages, name, build.precision, Form.LOOP, build=build, rebuild=rebuild)


def _loaded(names: Sequence[Library]) -> dict[Library, TensorRT]:
    """Load the libraries that can be loaded. Raises BackendError if none can."""
    loaded, problems = {}, []
    for name in names:
        try:
            loaded[name] = load_library(name)
        except BackendError as exc:
            problems.append(exc)
    if not loaded:
        raise problems[0]
    return loaded


def open_onnxruntime(
    directory: EngineDirectory,
    ordinal: int,
    providers: Sequence[Provider],
    session_config: Mapping[str, str],
    *,
    cuda_graph: bool = True,
    builds: bool = True,
) -> OnGpu:
    """Load onto a GPU the newest build for ONNX Runtime, or the float32 stages where there is none, or not `builds`.

    Raises BackendError or EngineError with the way out.
    """
    capability = gpu_capability(ordinal)
    from ..host.onnx_stage import version
    from ..host.stages import load_stages
    from .cuda import CudaLayer
    from .onnx_stage import build_on_device, gpu_settings, on_device, prepare

    asked = OnnxRuntime(providers=providers, session_config=session_config)
    prepare(asked)
    build = None
    if builds and any(made.library is Library.ONNXRUNTIME for made in directory.manifest.builds):
        build = open_build(directory, Machine(Library.ONNXRUNTIME, None, capability))
    layer = CudaLayer(ordinal)
    with closed_if_it_fails(layer, directory):
        settings = gpu_settings(asked, ordinal, layer.stream)
        if build:
            made = build_on_device(layer.name, ordinal, directory, build, settings, cuda_graph=cuda_graph)
            name = f"onnxruntime {version()} {build.precision}: {', '.join(settings.provider_names)} on {layer.name}"
            # ONNX Runtime captures a step in a graph of its own; ours cannot hold it.
            return OnGpu(layer, made, name, build.precision, Form.NONE, build=build)
        sessions = load_stages(directory, settings)

    def stages(batch: int) -> "Mapping[StageName, LoadedStage]":
        return on_device(layer.name, ordinal, directory.manifest, sessions, together=batch)

    # ONNX Runtime allocates as it runs, which no capture allows.
    return OnGpu(layer, stages, f"{settings.name} on {layer.name}", Precision.FP32, Form.NONE)


@contextlib.contextmanager
def closed_if_it_fails(layer: "CudaLayer", directory: EngineDirectory) -> Generator[None, None, None]:
    """Close a layer if what is to take it over cannot be made; too little memory becomes a BackendError."""
    try:
        yield
    except MemoryError as exc:
        layer.close()
        raise BackendError(f"not enough GPU memory to load {directory.path}: {exc}") from exc
    except BaseException:
        layer.close()
        raise

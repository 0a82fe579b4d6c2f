"""What runs the networks: an engine loaded for the host, or onto a GPU for an executor to take over."""

import contextlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..engine.manifest import Build, EngineDirectory, Library, Manifest, Precision, StageName
from ..errors import BackendError, EngineError
from .executor import StageRunner
from .gpu.builds import build_command, newest_build
from .gpu.graphs import Form
from .gpu.tensorrt import gpu_capability, installed_libraries, load_library
from .host import onnx_stage as onnx_backend
from .host import openvino_stage as openvino_backend
from .host.onnx_stage import OnnxRuntime, OnnxStage
from .host.openvino_stage import OpenVino, OpenVinoStage

if TYPE_CHECKING:
    from .gpu.cuda import CudaLayer
    from .gpu.executor import DeviceExecutor
    from .gpu.layer import LoadedStage

HostSettings = OnnxRuntime | OpenVino


def host_settings(
    backend: str, threads: int | None, precision: str = "fp32", *, spinning: bool = False
) -> HostSettings:
    """Return how to set up what runs stages on the host; ONNX Runtime computes as the engine's files say."""
    if backend == "openvino":
        return OpenVino(threads, precision)
    return OnnxRuntime(threads, spinning=spinning)


def host_name(settings: HostSettings) -> str:
    """Return what records call it. Raises BackendError where this machine does not have it."""
    if isinstance(settings, OpenVino):
        return openvino_backend.name(settings)
    return f"onnxruntime {onnx_backend.version()}: {', '.join(settings.provider_names)}"


def load_stages(directory: EngineDirectory, settings: HostSettings) -> dict[StageName, StageRunner]:
    """Load every stage of an engine, refusing files that are not what the manifest says they are."""
    m = directory.manifest
    wanted = _expected_inputs(m)
    stages: dict[StageName, StageRunner] = {}
    for stage in m.stages:
        path = directory.file(stage.file)
        listed = tuple({spec.name: list(spec.shape) for spec in specs} for specs in (stage.inputs, stage.outputs))
        loaded: OnnxStage | OpenVinoStage
        # Shapes decide what is allocated: they are believed only where file, manifest and model agree.
        if isinstance(settings, OnnxRuntime):
            loaded = OnnxStage(path, settings)
            agree = loaded.signature() == listed
        else:
            # Nearly all time is the U-Net's. In bf16 the heads move a score many times as far as a crop's U-Net does,
            # and save nothing that can be measured.
            in_float32 = replace(settings, precision="fp32")
            loaded = OpenVinoStage(path, settings if stage.name is StageName.UNET else in_float32)
            agree = loaded.signature() == tuple(map(_without_names, listed))
        if not agree or listed[0] != wanted[stage.name]:
            raise EngineError(
                f"{path} is not the {stage.name} stage that the manifest describes; export the engine again"
            )
        stages[stage.name] = loaded
    return stages


def _without_names(shapes: dict[str, list[int | str]]) -> dict[str, list[int | None]]:
    """Return shapes by name with None for every free size, as OpenVINO gives them."""
    return {name: [None if isinstance(size, str) else size for size in shape] for name, shape in shapes.items()}


def _expected_inputs(m: Manifest) -> dict[StageName, dict[str, list[int | str]]]:
    """Return the input shapes that each stage of such a model must have."""
    kinds, size = len(m.kinds), m.crop.size
    image: list[int | str] = ["B", 3, "H", "W"]
    vit = m.stage(StageName.VIT)
    maps = vit.outputs[0].shape[1:] if vit and vit.outputs else ()
    return {
        StageName.UNET: {"y": image, "condition": image, "noise_level": ["B", 1]},
        StageName.VIT: {"image": ["N", 3, size, size]},
        StageName.VCG: {"maps": ["B", kinds, *maps]},
        StageName.VDA: {"images": ["B", kinds, 3, size, size]},
    }


@dataclass(frozen=True)
class OnGpu:
    """An engine on a GPU, for an executor to take over."""

    layer: "CudaLayer"
    stages: "Callable[[int], Mapping[StageName, LoadedStage]]"  # for batches of so many images
    name: str  # of what runs them, as records have it
    precision: Precision
    captured: bool  # whether what runs them can be
    build: Build | None = None
    # The command for a build that takes images of a size, and so many at a time, as well.
    rebuild: Callable[[str, int], str] = "iqa-build --sizes {} --batch {}".format

    @property
    def form(self) -> Form:
        """What one CUDA graph holds, where graphs are wanted."""
        return Form.LOOP if self.captured else Form.NONE

    def executor(self, directory: EngineDirectory, *, cuda_graph: bool = True, batch: int = 1) -> "DeviceExecutor":
        """Return what carries plans out, and closes the layer. Raises BackendError or EngineError, the layer closed."""
        from .gpu.executor import DeviceExecutor

        form = self.form if cuda_graph else Form.NONE
        with closed_if_it_fails(self.layer, directory):
            return DeviceExecutor(
                directory.manifest, self.layer, self.stages(batch), form=form, together=batch, rebuild=self.rebuild
            )


def open_tensorrt(directory: EngineDirectory, ordinal: int, _onnx: OnnxRuntime | None = None) -> OnGpu:
    """Load the build that fits a GPU onto it. Raises BackendError or EngineError with the way out."""
    capability = gpu_capability(ordinal)
    # Only where there is a GPU: most machines that score have none, and start sooner without.
    from .gpu.cuda import CudaLayer
    from .gpu.tensorrt_stage import load_engines

    # With none installed, the one that the newest build is for is missed.
    missed = directory.manifest.builds[-1].library if directory.manifest.builds else Library.TENSORRT
    libraries = {name: load_library(name) for name in installed_libraries() or [missed]}
    versions = {name: library.version for name, library in libraries.items()}
    build = newest_build(directory, versions, capability)

    def rebuild(size: str, batch: int) -> str:
        return build_command(
            directory.path,
            library=build.library,
            precision=build.precision,
            batches=tuple(dict.fromkeys((*build.batches, str(batch)) if batch > 1 else build.batches)),
            sizes=tuple(dict.fromkeys((*build.sizes, size))),
            capabilities=build.compute_capabilities if build.library is Library.TENSORRT_RTX else (),
        )

    layer = CudaLayer(ordinal)
    with closed_if_it_fails(layer, directory):
        engines = load_engines(layer, libraries[build.library], directory, build)
    name = f"{build.library} {build.version} {build.precision}: {layer.name}"
    return OnGpu(layer, lambda _batch: engines, name, build.precision, captured=True, build=build, rebuild=rebuild)


def open_onnxruntime(directory: EngineDirectory, ordinal: int, onnx: OnnxRuntime | None = None) -> OnGpu:
    """Load the ONNX stages onto a GPU. Raises BackendError or EngineError with the way out."""
    gpu_capability(ordinal)
    from .gpu.cuda import CudaLayer
    from .gpu.onnx_stage import gpu_settings, on_device, prepare

    prepare(onnx)
    layer = CudaLayer(ordinal)
    with closed_if_it_fails(layer, directory):
        settings = gpu_settings(onnx, ordinal, layer.stream)
        sessions = load_stages(directory, settings)

    def stages(batch: int) -> "Mapping[StageName, LoadedStage]":
        return on_device(layer.name, ordinal, directory.manifest, sessions, together=batch)

    # ONNX Runtime allocates as it runs, which cannot be captured: there is no graph to ask for, or to do without.
    return OnGpu(layer, stages, f"{host_name(settings)} on {layer.name}", Precision.FP32, captured=False)


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


# In the order in which auto tries them.
ON_GPU = {
    "tensorrt": ("TensorRT", open_tensorrt),
    "onnxruntime-gpu": ("ONNX Runtime on a GPU", open_onnxruntime),
}

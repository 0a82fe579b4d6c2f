"""Stages on a device through ONNX Runtime: sessions bound to device addresses, on the layer's stream.

For machines with a GPU and without a TensorRT build that fits. All around the networks is as with engines; the scratch
memory of the sessions is ONNX Runtime's own, and we do not count it.

The float32 stages as exported take any size. A stage of a build has a session for each size: all that depends on sizes
alone is gone from it, so ONNX Runtime can capture its run in a graph of its own.
"""

import contextlib
import importlib.util
import io
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...engine.manifest import Build, BuiltStage, EngineDirectory, Manifest, ShapeRange, Stage, StageName
from ...errors import BackendError, UsageError, first_line
from ..executor import StageRunner
from ..host.onnx_stage import OnnxRuntime, OnnxStage, Provider, providers_here
from .layer import DeviceMemoryError, LoadedStage, Shapes

DEVICE = "cuda"  # ONNX Runtime's name for where the addresses are
CUDA = "CUDAExecutionProvider"
# Those whose inputs and outputs are addresses of the GPU that the layer knows.
GPU_PROVIDERS = (CUDA, "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
OURS = {
    "device_id",
    "user_compute_stream",
    "has_user_compute_stream",
    "enable_cuda_graph",
    "trt_cuda_graph_enable",
    "nv_cuda_graph_enable",
}
BATCH = 8  # crops that go through a network at once: as many as iqa-build takes unless told otherwise
LARGEST = 65_536  # of an image's sides: what is too large for the memory says so itself
SESSIONS = 4  # of one stage of a build, for the sizes used last; each holds weights

_DEFAULTS = {
    CUDA: {
        "cudnn_conv_algo_search": "HEURISTIC",  # left alone it takes the fastest of a measurement: another each time
        "use_tf32": "0",  # float32 is what the engine was verified in
        "arena_extend_strategy": "kSameAsRequested",  # powers of two would leave less for our buffers
    }
}
# Nodes that need a GPU. The small rest (shapes, mostly) ONNX Runtime keeps on the CPU by design.
_HEAVY = {"Attention", "Conv", "ConvInteger", "Einsum", "Gemm", "MatMul", "MatMulInteger", "QLinearConv", "Softmax"}

# As ONNX Runtime's bindings take them: NumPy's types, or, as NumPy has no bfloat16, ONNX's number.
_ELEMENTS = {"float32": np.float32, "float16": np.float16, "bfloat16": 16}

# How arena, driver and cuDNN say that memory is missing: onnxruntime has no exception of its own for it.
_NO_MEMORY = ("allocate memory", "available memory", "out of memory", "alloc_failed")


_log = logging.getLogger(__name__)


class OnnxDeviceStage:
    """A session whose inputs and outputs are device memory. It takes any size: one profile for crops, one for images,
    of which it takes `together` at a time.

    `place` is ONNX Runtime's name and number of the device, such as ("cuda", 0).
    """

    open_ended = True

    def __init__(
        self, loaded: OnnxStage, stage: Stage, manifest: Manifest, place: tuple[str, int], together: int = 1
    ) -> None:
        profiles = _profiles(stage, manifest, together)
        self.built = BuiltStage(stage.name, stage.file.sha256, stage.file, stage.inputs, stage.outputs, profiles, ())
        self.loaded: OnnxStage | None = loaded
        self.place = place

    def bind(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> "_Binding":
        """Return a binding of its own to these addresses."""
        assert self.loaded is not None  # noqa: S101 — closed by the executor that binds
        return _Binding(self.built, self.loaded.session, self.place, shapes, addresses)

    def close(self) -> None:
        """Let go of the session; the bindings free it with its last reference."""
        self.loaded = None


class OnnxBuildStage:
    """A stage of a build: `load` makes its session for one size of every free dimension."""

    open_ended = True
    _graph_ids = itertools.count(1)  # ONNX Runtime's names for graphs; 0 is the one that it takes unasked

    def __init__(
        self, built: BuiltStage, load: Callable[[Mapping[str, int]], OnnxStage], place: tuple[str, int], *, graph: bool
    ) -> None:
        self.built, self._load, self._place, self._graph = built, load, place, graph
        self._loaded: OrderedDict[tuple[tuple[str, int], ...], OnnxStage] = OrderedDict()

    def bind(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> "_Binding":
        """Return a binding to these addresses, with a graph of its own."""
        graph_id = next(self._graph_ids) if self._graph else None
        session = self._loaded_for(self.built.sizes(shapes)).session
        return _Binding(self.built, session, self._place, shapes, addresses, graph_id)

    def prepare(self) -> None:
        """Load the session for one crop. Raises BackendError if ONNX Runtime does not take the stage."""
        self._loaded_for(self.built.sizes({name: span.minimum for name, span in self.built.profiles[0].items()}))

    def _loaded_for(self, sizes: Mapping[str, int]) -> OnnxStage:
        key = tuple(sorted(sizes.items()))
        if key not in self._loaded:
            self._loaded[key] = self._load(sizes)
            while len(self._loaded) > SESSIONS:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def close(self) -> None:
        """Let go of the sessions; the bindings free them with their last references."""
        self._loaded.clear()


class _Binding:
    """A session's inputs and outputs at addresses that never change."""

    activation_bytes = 0  # ONNX Runtime allocates its own

    def __init__(
        self,
        built: BuiltStage,
        session: Any,
        place: tuple[str, int],
        shapes: Shapes,
        addresses: Mapping[str, int],
        graph_id: int | None = None,
    ) -> None:
        import onnxruntime

        self._name, self._session = built.name, session
        self._options = onnxruntime.RunOptions()
        # The stream keeps the order, and the executor waits before it reads.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if graph_id is not None:
            self._options.add_run_config_entry("gpu_graph_id", str(graph_id))
        sizes = built.sizes(shapes)
        try:
            self._binding: Any = self._session.io_binding()
            for bind, specs in (
                (self._binding.bind_input, built.inputs),
                (self._binding.bind_output, built.outputs),
            ):
                for spec in specs:
                    bind(spec.name, *place, _ELEMENTS[spec.dtype], spec.at(sizes), addresses[spec.name])
        except Exception as exc:  # onnxruntime's exceptions share no base class
            raise _failure(f"onnxruntime cannot bind the {self._name} stage to {dict(shapes)}", exc) from exc

    def use_activation(self, address: int, size: int) -> None:
        pass  # none was asked for

    def enqueue(self) -> None:
        """Run on the session's stream; on a GPU this returns before it is done."""
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as exc:
            raise _failure(f"onnxruntime failed in the {self._name} stage", exc) from exc

    def capture_problem(self) -> str | None:
        """Return why not: a run allocates, copies shapes to the host and queries its stream: no capture allows that."""
        return "ONNX Runtime's own allocations cannot be captured"

    def close(self) -> None:
        self._binding = None


def gpu_settings(settings: OnnxRuntime | None, ordinal: int, stream: int) -> OnnxRuntime:
    """Return settings of sessions for a GPU and a stream. Raises UsageError for options that a user may not set."""
    asked: list[Provider] = list(settings.providers) if settings else [CUDA]
    providers: list[Provider] = []
    for provider in asked:
        name, given = (provider, {}) if isinstance(provider, str) else provider
        if name not in GPU_PROVIDERS:
            raise UsageError(f"the backend onnxruntime-gpu takes the providers {', '.join(GPU_PROVIDERS)}, not {name}")
        if taken := OURS & set(given):
            raise UsageError(
                f"{', '.join(sorted(taken))} of {name} cannot be set: stream and graphs are diffiqa's, and the option "
                f"device chooses the GPU"
            )
        ours = {"device_id": str(ordinal), "user_compute_stream": str(stream)}
        providers.append((name, {**_DEFAULTS.get(name, {}), **given, **ours}))
    config = {"session.record_ep_graph_assignment_info": "1", **(settings.session_config if settings else {})}
    return replace(settings or OnnxRuntime(), providers=providers, session_config=config, deterministic=True)


def prepare(settings: OnnxRuntime | None) -> None:
    """Raise BackendError, saying how to get them, unless the installed ONNX Runtime has the providers asked for."""
    found = providers_here()
    if missing := [name for name in (settings.provider_names if settings else [CUDA]) if name not in found]:
        raise BackendError(
            f"this onnxruntime has no {', '.join(missing)}, only {', '.join(found)}; put the package onnxruntime-gpu "
            f"in the place of onnxruntime: pip uninstall onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    import onnxruntime

    # CUDA's libraries where pip installs them: since 1.21 onnxruntime looks there only when it is told to, and only
    # beside itself. NVIDIA's wheels may lie in another folder of the path, such as that of a base environment.
    if preload := getattr(onnxruntime, "preload_dlls", None):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints, and stdout is for results
            preload()
            for folder in nvidia_folders(Path(onnxruntime.__file__).parent.parent):
                preload(directory=str(folder))


def nvidia_folders(but_in: Path) -> list[Path]:
    """Return the folders of libraries in NVIDIA's wheels on the path, but for those in one folder of packages."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (spec.submodule_search_locations if spec else None) or ()]
    return sorted(folder for place in places if place.parent != but_in for folder in place.glob("*/lib"))


def on_device(
    device: str, ordinal: int, manifest: Manifest, loaded: Mapping[StageName, StageRunner], *, together: int = 1
) -> dict[StageName, LoadedStage]:
    """Return stages on a GPU, of sessions set up for it. Raises BackendError if much of one would run on the CPU."""
    stages: dict[StageName, LoadedStage] = {}
    for stage in manifest.stages:
        session = loaded[stage.name]
        assert isinstance(session, OnnxStage)  # noqa: S101 — set up by `gpu_settings`
        _refuse_stranded(session, stage.name, device, "use the backend onnxruntime for this engine")
        stages[stage.name] = OnnxDeviceStage(session, stage, manifest, (DEVICE, ordinal), together)
    return stages


def build_on_device(
    device: str, ordinal: int, directory: EngineDirectory, build: Build, settings: OnnxRuntime, *, cuda_graph: bool
) -> Callable[[int], dict[StageName, LoadedStage]]:
    """Return what makes the stages of a build for so many images at a time."""
    manifest = directory.manifest

    def stage_of(made: BuiltStage, stage: Stage, together: int) -> LoadedStage:
        path = directory.path / made.file.path

        def load(sizes: Mapping[str, int], *, graph: bool = cuda_graph) -> OnnxStage:
            chosen = _with_options(settings, {"prefer_nhwc": "1", "enable_cuda_graph": "1" if graph else "0"})
            try:
                session = OnnxStage(path, chosen, sizes=sizes)
            except BackendError as exc:
                if not graph or "graph" not in str(exc).lower():
                    raise
                # It refuses a graph if a node is left to the CPU.
                _log.warning("%s: runs without a CUDA graph: %s", made.name, exc)
                return load(sizes, graph=False)
            _refuse_stranded(session, made.name, device, f"build it with another --precision than {build.precision}")
            return session

        profiled = replace(made, profiles=_profiles(stage, manifest, together))
        ready = OnnxBuildStage(profiled, load, (DEVICE, ordinal), graph=cuda_graph)
        ready.prepare()  # what ONNX Runtime refuses, it refuses before the first image
        return ready

    def stages(together: int) -> dict[StageName, LoadedStage]:
        return {
            made.name: stage_of(made, stage, together)
            for made, stage in zip(build.stages, manifest.stages, strict=True)
        }

    return stages


def _with_options(settings: OnnxRuntime, options: Mapping[str, str]) -> OnnxRuntime:
    """Return settings whose CUDA provider has these options, where the user has not set them."""
    providers = [
        (name, {**options, **given}) if name == CUDA else (name, given)
        for name, given in (p if isinstance(p, tuple) else (p, {}) for p in settings.providers)
    ]
    return replace(settings, providers=providers)


def _refuse_stranded(session: OnnxStage, name: StageName, device: str, remedy: str) -> None:
    """Raise BackendError if a session would run much of a stage on the CPU."""
    if heavy := stranded(session):
        raise BackendError(
            f"onnxruntime would run nodes of the {name} stage on the CPU, not on {device}: "
            f"{', '.join(heavy[:3])}{', …' if len(heavy) > 3 else ''}; {remedy}"
        )


def stranded(loaded: OnnxStage) -> list[str]:
    """Return the costly nodes that a session runs on the CPU. Raises BackendError where onnxruntime does not tell."""
    ask = getattr(loaded.session, "get_provider_graph_assignment_info", None)
    if ask is None:
        raise BackendError(
            "this onnxruntime does not say which nodes it runs on the CPU, so a slow run on the CPU would pass for one "
            "on the GPU; install onnxruntime-gpu 1.24 or newer"
        )
    return [
        f"{node.op_type} {node.name}"
        for part in ask()
        if part.ep_name == "CPUExecutionProvider"
        for node in part.get_nodes()
        if node.op_type in _HEAVY
    ]


def _profiles(stage: Stage, manifest: Manifest, together: int) -> tuple[dict[str, ShapeRange], ...]:
    """Return what a stage takes: crops in batches, and, for the U-Net, images of any size."""
    kinds, crop, most = len(manifest.kinds), manifest.crop.size, max(BATCH, together)
    crops = {"B": (1, most), "N": (kinds, kinds * most), "H": (crop, crop), "W": (crop, crop)}
    images = {"B": (1, together), "H": (1, LARGEST), "W": (1, LARGEST)}

    def profile(spans: Mapping[str, tuple[int, int]]) -> dict[str, ShapeRange]:
        sides = {spec.name: [spans[n] if isinstance(n, str) else (n, n) for n in spec.shape] for spec in stage.inputs}
        return {
            name: ShapeRange(tuple(low for low, _ in dims), tuple(low for low, _ in dims), tuple(h for _, h in dims))
            for name, dims in sides.items()
        }

    return (profile(crops), profile(images)) if stage.name is StageName.UNET else (profile(crops),)


def _failure(what: str, exc: Exception) -> Exception:
    text = f"{what}: {first_line(exc)}"
    if any(word in str(exc).lower() for word in _NO_MEMORY):
        return DeviceMemoryError(text)
    return BackendError(text)

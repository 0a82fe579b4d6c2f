"""Stages through TensorRT or TensorRT-RTX: engines of a build, and execution contexts bound to addresses."""

from collections.abc import Mapping
from typing import Any

from ...engine.manifest import Build, BuiltStage, EngineDirectory, StageName, TensorSpec
from ...errors import BackendError, EngineError
from ..builds import rebuild_command
from .cuda import CudaLayer
from .layer import ITEM_BYTES, DeviceMemoryError, LoadedStage, Shapes
from .runtime_cache import RuntimeCache, cache_of
from .tensorrt import DTYPES, Log, TensorRT, gpu_capability


def load_engines(
    layer: CudaLayer, library: TensorRT, directory: EngineDirectory, build: Build
) -> dict[StageName, LoadedStage]:
    """Load every engine of a build whose files have been checked; errors name the way out."""
    capability = gpu_capability(layer._ordinal)
    command = rebuild_command(directory.path, build, capability, force=True)
    cache = cache_of(directory.path, build, layer.name, capability) if library.traits.compiles_late else None
    stages: dict[StageName, LoadedStage] = {}
    try:
        for built in build.stages:
            data = (directory.path / built.file.path).read_bytes()
            stages[built.name] = _Engine(layer, library, built, data, f"build it again with: {command}", cache)
    except BaseException:
        for stage in stages.values():
            stage.close()
        raise
    return stages


class _Engine:
    """A deserialised engine."""

    open_ended = False

    def __init__(
        self,
        layer: CudaLayer,
        library: TensorRT,
        built: BuiltStage,
        data: bytes,
        remedy: str,
        cache: RuntimeCache | None = None,
    ) -> None:
        self.built, self._cache = built, cache
        self._layer, self.library = layer, library
        api, log = library.api, library.log
        log_start = log.count
        self._runtime = api.Runtime(log.logger)
        if library.traits.tells_validity:
            verdict, diagnostics = self._runtime.get_engine_validity(data)
            if verdict == api.EngineValidity.INVALID:
                reasons = [
                    name
                    for name, flag in api.EngineInvalidityDiagnostics.__members__.items()
                    if int(diagnostics) & int(flag)
                ]
                words = ", ".join([*(reasons or ["it gives no reason"]), *log.errors(log_start)])
                what = f"{library.library} refuses {built.name}.engine on {layer.name}: {words}"
                raise EngineError(f"{what}; {_way_out(reasons, remedy)}")
        self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise library_error(log, log_start, f"{library.library} cannot load {built.name}.engine; {remedy}")
        listed = {spec.name: spec for spec in (*built.inputs, *built.outputs)}
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        if set(names) != set(listed) or any(not self._agrees(listed[name]) for name in names):
            raise EngineError(f"{built.name}.engine has other tensors than the manifest says; {remedy}")

    def bind(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> "_Context":
        """Return a context of its own: a captured graph does not survive a change of its context's shapes."""
        return _Context(self._layer, self, profile, shapes, addresses)

    def create_context(self) -> Any:
        """Return an execution context without scratch memory of its own; None if the library cannot."""
        api = self.library.api
        own = api.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.library.traits.compiles_late:
            return self.engine.create_execution_context(own)
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(own)
        config.dynamic_shapes_kernel_specialization_strategy = api.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = api.CudaGraphStrategy.DISABLED  # graphs are ours
        if self._cache:
            self._cache.attach(config)
        return self.engine.create_execution_context(config)

    def close(self) -> None:
        """Let go of the engine; its last reference frees it. The first engine to go saves the cache that all share."""
        if self._cache:
            self._cache.save()
        self.engine = self._runtime = None

    def _agrees(self, spec: TensorSpec) -> bool:
        """Whether the engine's tensor has the item size and dimensions the manifest lists."""
        shape = tuple(-1 if isinstance(n, str) else n for n in spec.shape)
        size = self.engine.get_tensor_bytes_per_component(spec.name)
        dtype = DTYPES.get(self.engine.get_tensor_dtype(spec.name).name)
        # A static profile may leave the network's free dimension fixed in the engine.
        known = tuple(self.engine.get_tensor_shape(spec.name))
        fits = len(known) == len(shape) and all(a in {b, -1} or b == -1 for a, b in zip(known, shape, strict=True))
        return dtype == spec.dtype and size in {-1, ITEM_BYTES[spec.dtype]} and fits


class _Context:
    """An execution context whose shapes and addresses never change."""

    def __init__(
        self, layer: CudaLayer, stage: _Engine, profile: int, shapes: Shapes, addresses: Mapping[str, int]
    ) -> None:
        self._layer, self._name, self._log = layer, stage.built.name, stage.library.log
        self._asks_capturable = stage.library.traits.tells_capturable
        log_start = self._log.count
        self._context = stage.create_context()
        done = self._context is not None and self._context.set_optimization_profile_async(profile, layer.stream)
        done = done and all(self._context.set_input_shape(name, tuple(shape)) for name, shape in shapes.items())
        done = done and not self._context.infer_shapes()
        done = done and all(self._context.set_tensor_address(name, address) for name, address in addresses.items())
        if not done:
            raise library_error(self._log, log_start, f"{layer.name}: engine {self._name} does not take {dict(shapes)}")
        # Of the whole profile, not of these shapes: the shared memory then grows once per profile, not per image.
        self.activation_bytes = int(stage.engine.get_device_memory_size_for_profile_v2(profile))

    def use_activation(self, address: int, size: int) -> None:
        self._context.set_device_memory(address, size)

    def enqueue(self) -> None:
        """Enqueue, and check the answer: TensorRT reports a failure with False, in a capture too."""
        log_start = self._log.count
        if not self._context.execute_async_v3(self._layer.stream):
            raise library_error(self._log, log_start, f"{self._layer.name}: engine {self._name} failed")

    def capture_problem(self) -> str | None:
        """Ask the library, where it can tell."""
        if self._asks_capturable and not self._context.is_stream_capturable(self._layer.stream):
            return f"engine {self._name} says that it cannot be captured"
        return None

    def close(self) -> None:
        self._context = None  # its last reference frees it


def _way_out(diagnostics: list[str], rebuild: str) -> str:
    """Return what to do about an engine that the library refuses; building it again helps only against some reasons."""
    if {"VERSION_MISMATCH", "MALFORMED_ENGINE"} & set(diagnostics):
        return rebuild
    if {"OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "CUDA_ERROR"} & set(diagnostics):
        return "install a current NVIDIA driver, or use another backend, such as onnxruntime-gpu"
    if "INSUFFICIENT_GPU_MEMORY" in diagnostics:
        return "free memory of the GPU, or build with smaller --batch and --sizes"
    return "use another backend, such as onnxruntime-gpu"


def library_error(log: Log, log_start: int, what: str) -> Exception:
    """Return the error for a failure of the library, with its own words from message `log_start` of its log on."""
    messages = log.errors(since=log_start)
    text = f"{what}: {messages[0]}" if messages else what
    if any("out of memory" in message.lower() or "outofmemory" in message.lower() for message in messages):
        return DeviceMemoryError(text)
    return BackendError(text)

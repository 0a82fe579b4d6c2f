"""A GPU as plans need it, in a few calls; and the one real implementation, on cuda.core and TensorRT.

`Layer` is narrow so that the tests can put another in its place: NumPy arrays for memory, the same kernels compiled by
a C++ compiler, ONNX Runtime for engines. What only a GPU can show is in `CudaLayer`, `_Engine` and `_Context`, which
have not run on one yet: the names they call are those of cuda.core 1.2, cuda.bindings 13 and tensorrt-rtx 1.7, not what
these do.
"""

import contextlib
import ctypes
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, DiffiqaError, EngineError, first_line
from ..kernels.compile import KernelError
from ..kernels.launch import Launch, more_steps
from .builds import rebuild_command
from .foreign import result_of
from .graphs import Enqueue, Graph
from .manifest import Build, BuiltStage, EngineDirectory, ShapeRange, StageName, TensorSpec
from .runtime_cache import RuntimeCache, cache_of
from .tensorrt import TensorRT, gpu_capability

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Shapes = Mapping[str, tuple[int, ...]]

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class DeviceMemoryError(MemoryError):
    """Device memory that is not to be had; the message says how much was asked for, and where."""


class BoundStage(Protocol):
    """An engine with its shapes and addresses set: what a graph may be captured of, as long as they stay."""

    activation_bytes: int  # scratch memory it needs while it runs; stages that run one after the other share theirs

    def use_activation(self, address: int, size: int) -> None:
        """Set its scratch memory, before the first `enqueue` and never again."""

    def enqueue(self) -> None:
        """Run on the layer's stream, or become part of what is being captured."""

    def capture_problem(self) -> str | None:
        """Return why it cannot be captured, if it knows."""

    def close(self) -> None:
        """Free its context."""


class LoadedStage(Protocol):
    """An engine on the device."""

    # Its profiles say what it takes, not what is worth setting memory aside for: buffers grow with the images.
    open_ended: bool

    @property
    def built(self) -> BuiltStage:
        """Its signature and profiles."""

    def bind(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> BoundStage:
        """Set input shapes, and the address of every input and output, in a context of its own."""

    def close(self) -> None:
        """Free it."""


class Layer(Protocol):
    """One device and one stream: all calls take effect in order. Device addresses are multiples of 256.

    Beside it there is a second stream, for `bring` and the memory that this fills: both may be called while another
    thread captures or waits.

    Raises DeviceMemoryError, or BackendError for whatever else the device refuses.
    """

    name: str

    def enter(self) -> None:
        """Make the device the calling thread's; before any other call in a thread."""

    def allocate(self, size: int, *, beside: bool = False) -> int:
        """Return the address of new device memory, its contents arbitrary."""

    def bring(self, address: int, values: Array) -> None:
        """Copy pinned `values` to memory that was allocated `beside`, and return when they are there."""

    def free(self, address: int) -> None:
        """Give back device memory, after what has been launched."""

    def allocate_pinned(self, size: int) -> Bytes:
        """Return host memory that the device copies from and to by itself."""

    def free_pinned(self, memory: Bytes) -> None:
        """Give it back; no copy from or to it may be under way."""

    def upload(self, address: int, values: Array) -> None:
        """Copy to the device. Pinned `values` must stay as they are until `synchronise`; others are taken at once."""

    def download(self, values: Array, address: int) -> None:
        """Copy from the device; pinned `values` are there after `synchronise`."""

    def launch(self, launch: Launch) -> None:
        """Launch a kernel, or make it part of what is being captured."""

    def synchronise(self) -> None:
        """Wait for all that was launched and copied."""

    def mark(self) -> object:
        """Note the time when the stream comes to here; never while capturing."""

    def seconds_between(self, first: object, last: object) -> float:
        """Return the time on the device between two marks; after `synchronise`."""

    def begin_capture(self) -> None:
        """From now on launches of this thread are recorded, not run."""

    def end_capture(self) -> Graph:
        """Return what was recorded, ready to run."""

    def capture_loop(self, begin: Enqueue, step: Enqueue, progress: int) -> Graph:
        """Return a graph of `begin`, and of `step` as long as the PROGRESS at that address has steps left.

        Both are called here, once, and launch kernels and engines, nothing else.
        """

    def abandon_capture(self) -> None:
        """Drop what is being recorded, if anything is; never raises."""

    def close(self) -> None:
        """Free the device's stream and all memory; never raises."""


def choose_profile(profiles: tuple[dict[str, ShapeRange], ...], shapes: Shapes) -> int | None:
    """Return the profile that takes these input shapes and spans least, so a static one if there is one; or None."""

    def takes(profile: Mapping[str, ShapeRange]) -> bool:
        return all(
            len(shape) == len(profile[name].minimum)
            and all(
                low <= n <= high
                for low, n, high in zip(profile[name].minimum, shape, profile[name].maximum, strict=True)
            )
            for name, shape in shapes.items()
        )

    def largest(index: int) -> int:
        return sum(math.prod(span.maximum) for span in profiles[index].values())

    fitting = [index for index, profile in enumerate(profiles) if takes(profile)]
    return min(fitting, key=largest, default=None)


class CudaLayer:
    """A GPU through cuda.core. One thread at a time, after `enter`, but for what goes `beside`."""

    def __init__(self, ordinal: int) -> None:
        gpu_capability(ordinal)  # raises saying what is missing
        from cuda.bindings import driver
        from cuda.core import Device, LegacyPinnedMemoryResource

        from ..kernels.load import compiled, device_arch, with_cuda_core

        self.name = f"GPU {ordinal}"
        self._driver, self._ordinal = driver, ordinal
        self._capturing = False
        self._buffers: dict[int, Any] = {}
        with self._speaking("cannot be used"):
            self._device = Device(ordinal)
            self._device.set_current()
            self.name = str(self._device.name)
            self._stream = self._device.create_stream()
            self._beside = self._device.create_stream()
            self._pinned = LegacyPinnedMemoryResource()
            self._enqueue = with_cuda_core(compiled(device_arch()))

    @property
    def stream(self) -> int:
        """The handle of the stream, for a library that launches on it. Never the default stream."""
        return int(self._stream.handle)

    def enter(self) -> None:
        """Make the device the calling thread's."""
        with self._speaking("cannot be used"):
            self._device.set_current()

    def allocate(self, size: int, *, beside: bool = False) -> int:
        """Return the address of new device memory, there for the stream it is allocated on from now on."""
        with self._speaking(f"has no {_mebibytes(size)} left"):
            buffer = self._device.allocate(size, stream=self._beside if beside else self._stream)
        address = int(buffer.handle)
        self._buffers[address] = buffer
        return address

    def bring(self, address: int, values: Array) -> None:
        """Copy host to device on the second stream, and wait for it: the host's time, which others use."""
        with self._speaking("does not take data"):
            stream = self._beside
            result_of(self._driver.cuMemcpyHtoDAsync(address, values.ctypes.data, values.nbytes, stream.handle))
            stream.sync()

    def free(self, address: int) -> None:
        """Give back device memory, in order of the stream it was allocated on."""
        with self._speaking("does not free memory"):
            self._buffers.pop(address).close()

    def allocate_pinned(self, size: int) -> Bytes:
        """Return page-locked host memory."""
        with self._speaking(f"cannot lock {_mebibytes(size)} of host memory"):
            buffer = self._pinned.allocate(size)
        address = int(buffer.handle)
        self._buffers[address] = buffer
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, memory: Bytes) -> None:
        """Give back page-locked memory."""
        self.free(memory.ctypes.data)

    def upload(self, address: int, values: Array) -> None:
        """Copy host to device. From pageable memory the driver returns once it has the values, says its manual."""
        with self._speaking("does not take data"):
            result_of(self._driver.cuMemcpyHtoDAsync(address, values.ctypes.data, values.nbytes, self._stream.handle))

    def download(self, values: Array, address: int) -> None:
        """Copy device to host."""
        with self._speaking("does not give data"):
            result_of(self._driver.cuMemcpyDtoHAsync(values.ctypes.data, address, values.nbytes, self._stream.handle))

    def launch(self, launch: Launch) -> None:
        """Launch one of our kernels."""
        with self._speaking(f"does not run {launch.kernel}"):
            self._enqueue(launch, self._stream)

    def synchronise(self) -> None:
        """Wait for the stream; errors of what ran on it come out here."""
        with self._speaking("failed"):
            self._stream.sync()

    def mark(self) -> Any:
        """Record an event that has a time."""
        from cuda.core import EventOptions

        with self._speaking("does not time"):
            return self._stream.record(options=EventOptions(timing_enabled=True))

    def seconds_between(self, first: Any, last: Any) -> float:
        """Return the time between two events, which the driver gives in milliseconds."""
        with self._speaking("does not time"):
            return float(last - first) / 1e3

    def begin_capture(self) -> None:
        """Capture this stream, forbidding unsafe calls to this thread alone: others may allocate meanwhile.

        Through the driver and not cuda.core's GraphBuilder, which destroys a capture that failed although the driver
        already has, and crashes (its issue 2834, in 1.2): a capture that TensorRT spoils is to cost a note.
        """
        with self._speaking("cannot capture"):
            self._capturing = True
            mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            result_of(self._driver.cuStreamBeginCapture(self._stream.handle, mode))

    def end_capture(self) -> "_CudaGraph":
        """Instantiate what was captured."""
        with self._speaking("could not capture"), contextlib.ExitStack() as graphs:
            return _CudaGraph(self, result_of(self._driver.cuGraphInstantiate(self._recorded(graphs), 0)))

    def capture_loop(self, begin: Enqueue, step: Enqueue, progress: int) -> "_CudaGraph":
        """Put what `step` launches into the body of a `while` node behind what `begin` launches; since CUDA 12.4.

        Both are captured by themselves and copied: a capture that fails inside a body crashes the driver when it is
        ended (cuda.core's issue 2918). It also leaves engines the one stream they know. What a body may not hold, such
        as memory, calls of the host and cooperative kernels, the driver refuses here.
        """
        driver = self._driver
        with self._speaking("cannot capture a loop"), contextlib.ExitStack() as graphs:
            self.launch(more_steps(progress, 0))  # loads the code, which is forbidden while capturing
            self.synchronise()
            whole = result_of(driver.cuGraphCreate(0))
            graphs.callback(driver.cuGraphDestroy, whole)
            node = driver.CUgraphNodeParams()
            node.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
            loop = node.conditional
            loop.type, loop.size = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE, 1
            loop.ctx = context = self._stream.context.handle
            default = 1, driver.CU_GRAPH_COND_ASSIGN_DEFAULT  # what the condition is at the start of every launch
            loop.handle = condition = result_of(driver.cuGraphConditionalHandleCreate(whole, context, *default))
            self.begin_capture()
            begin()
            first = self._recorded(graphs)
            self.begin_capture()
            step()
            self.launch(more_steps(progress, int(condition)))
            again = self._recorded(graphs)
            before = result_of(driver.cuGraphAddChildGraphNode(whole, None, 0, first))
            result_of(driver.cuGraphAddNode(whole, [before], None, 1, node))
            result_of(driver.cuGraphAddChildGraphNode(loop.phGraph_out[0], None, 0, again))
            executable = result_of(driver.cuGraphInstantiate(whole, 0))
            # Kept, because nobody says whether a condition outlives the graph it was made for.
            return _CudaGraph(self, executable, graphs.pop_all())

    def abandon_capture(self) -> None:
        """End the capture and clear the error that one has left with the CUDA runtime, which TensorRT would find."""
        if self._capturing:
            with contextlib.suppress(Exception), contextlib.ExitStack() as graphs:
                self._recorded(graphs)
        with contextlib.suppress(Exception):
            from cuda.bindings import runtime

            runtime.cudaGetLastError()

    def close(self) -> None:
        """Free everything that was allocated, and the stream."""
        with contextlib.suppress(Exception):
            self.enter()
            self._stream.sync()
        while self._buffers:
            with contextlib.suppress(Exception):
                self._buffers.popitem()[1].close()
        for stream in (self._stream, self._beside):
            with contextlib.suppress(Exception):
                stream.close()

    @contextlib.contextmanager
    def _speaking(self, what: str) -> Iterator[None]:
        """Translate cuda.core's errors, which have no public base class, into ours."""
        try:
            yield
        except (DiffiqaError, MemoryError):
            raise
        except KernelError as exc:
            raise BackendError(f"{self.name}: {exc}") from exc
        except Exception as exc:
            text = f"{self.name} {what}: {first_line(exc)}"
            if "OUT_OF_MEMORY" in str(exc):
                raise DeviceMemoryError(text) from exc
            raise BackendError(text) from exc

    def _recorded(self, graphs: contextlib.ExitStack) -> Any:
        """End the capture and return its graph, which is destroyed with `graphs`."""
        self._capturing = False
        graph = result_of(self._driver.cuStreamEndCapture(self._stream.handle))
        graphs.callback(self._driver.cuGraphDestroy, graph)
        return graph


class _CudaGraph:
    """An instantiated graph; the memory it works on is kept alive by its executor, not by it."""

    def __init__(self, layer: CudaLayer, executable: Any, kept: contextlib.ExitStack | None = None) -> None:
        self._layer, self._executable, self._kept = layer, executable, kept or contextlib.ExitStack()

    def launch(self) -> None:
        """Run it on the layer's stream."""
        with self._layer._speaking("does not launch a graph"):
            result_of(self._layer._driver.cuGraphLaunch(self._executable, self._layer._stream.handle))

    def close(self) -> None:
        """Free it."""
        self._layer._driver.cuGraphExecDestroy(self._executable)
        self._kept.close()


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
        heard = len(log.entries)
        self._runtime = api.Runtime(log.logger)
        if library.traits.tells_validity:
            verdict, _ = self._runtime.get_engine_validity(data)
            if verdict == api.EngineValidity.INVALID:
                raise EngineError(f"{library.library} says that {built.name}.engine is not for {layer.name}; {remedy}")
        self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise said(log, heard, f"{library.library} cannot load {built.name}.engine; {remedy}")
        listed = {spec.name: spec for spec in (*built.inputs, *built.outputs)}
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        if set(names) != set(listed) or any(not self._agrees(listed[name]) for name in names):
            raise EngineError(f"{built.name}.engine has other tensors than the manifest says; {remedy}")

    def bind(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> "_Context":
        """Return a context of its own: a graph captured of one whose shapes change later is not valid."""
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
        """Let go of the engine; the bindings free it with its last reference. The first to go saves what all share."""
        if self._cache:
            self._cache.save()
        self.engine = self._runtime = None

    def _agrees(self, spec: TensorSpec) -> bool:
        """Whether the engine's tensor has the item size and dimensions the manifest lists."""
        shape = tuple(-1 if isinstance(n, str) else n for n in spec.shape)
        size = self.engine.get_tensor_bytes_per_component(spec.name)
        dtype = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}.get(
            self.engine.get_tensor_dtype(spec.name).name
        )
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
        heard = len(self._log.entries)
        self._context = stage.create_context()
        done = self._context is not None and self._context.set_optimization_profile_async(profile, layer.stream)
        done = done and all(self._context.set_input_shape(name, tuple(shape)) for name, shape in shapes.items())
        done = done and not self._context.infer_shapes()
        done = done and all(self._context.set_tensor_address(name, address) for name, address in addresses.items())
        if not done:
            raise said(self._log, heard, f"{layer.name}: engine {self._name} does not take {dict(shapes)}")
        # Of the whole profile, not of these shapes: the shared memory then grows once per profile, not per image.
        self.activation_bytes = int(stage.engine.get_device_memory_size_for_profile_v2(profile))

    def use_activation(self, address: int, size: int) -> None:
        """Set the scratch memory."""
        self._context.set_device_memory(address, size)

    def enqueue(self) -> None:
        """Enqueue, and look at the answer: False is how TensorRT reports a failure, in a capture too."""
        heard = len(self._log.entries)
        if not self._context.execute_async_v3(self._layer.stream):
            raise said(self._log, heard, f"{self._layer.name}: engine {self._name} failed")

    def capture_problem(self) -> str | None:
        """Ask the library, where it can tell."""
        if self._asks_capturable and not self._context.is_stream_capturable(self._layer.stream):
            return f"engine {self._name} says that it cannot be captured"
        return None

    def close(self) -> None:
        """Let go of the context; the bindings free it with its last reference."""
        self._context = None


def said(log: Any, heard: int, what: str) -> Exception:
    """Return the error for a failure of the library, with its own words from entry `heard` of its log on."""
    messages = log.errors(since=heard)
    text = f"{what}: {messages[0]}" if messages else what
    if any("out of memory" in message.lower() or "outofmemory" in message.lower() for message in messages):
        return DeviceMemoryError(text)
    return BackendError(text)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"

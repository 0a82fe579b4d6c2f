"""The GPU through cuda.core and the driver: the one real `Layer`."""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...errors import BackendError, DiffiqaError, first_line
from ...kernels.compile import KernelError
from ...kernels.launch import Launch
from ..arrays import result_of
from .layer import Array, Bytes, DeviceMemoryError
from .tensorrt import gpu_capability


class CudaLayer:
    """A GPU through cuda.core, for one thread at a time, after `enter`; what goes `beside` may run in another."""

    def __init__(self, ordinal: int) -> None:
        gpu_capability(ordinal)  # raises saying what is missing
        from cuda.bindings import driver
        from cuda.core import Device, LegacyPinnedMemoryResource

        from ...kernels.load import compiled, device_arch, with_cuda_core

        self.name = f"GPU {ordinal}"
        self._driver, self._ordinal = driver, ordinal
        self._buffers: dict[int, Any] = {}
        self._graphs: set[_CudaGraph] = set()  # that are open
        self._pinned_beside: set[int] = set()  # addresses
        with self.translate_errors("cannot be used"):
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
        with self.translate_errors("cannot be used"):
            self._device.set_current()

    def allocate(self, size: int, *, beside: bool = False) -> int:
        """Return the address of new device memory; its stream may use it from now on."""
        with self.translate_errors(f"has no {_mebibytes(size)} left"):
            buffer = self._device.allocate(size, stream=self._beside if beside else self._stream)
        address = int(buffer.handle)
        self._buffers[address] = buffer
        return address

    def bring(self, address: int, values: Array) -> None:
        """Copy host to device on the second stream and wait, while another thread uses the first."""
        with self.translate_errors("does not take data"):
            stream = self._beside
            result_of(self._driver.cuMemcpyHtoDAsync(address, values.ctypes.data, values.nbytes, stream.handle))
            stream.sync()

    def free(self, address: int) -> None:
        """Give back device memory, in order of the stream it was allocated on."""
        with self.translate_errors("does not free memory"):
            self._buffers.pop(address).close()

    def trim(self) -> None:
        """Return freed memory to the driver: cuda.core's pool keeps all of it for its own next allocations."""
        with self.translate_errors("does not give memory back"):
            for stream in (self._stream, self._beside):
                stream.sync()  # memory is free when its stream comes to the call that frees it
            if (pool := getattr(self._device.memory_resource, "handle", None)) is not None:
                result_of(self._driver.cuMemPoolTrimTo(pool, 0))

    def allocate_pinned(self, size: int, *, beside: bool = False) -> Bytes:
        """Return page-locked host memory."""
        with self.translate_errors(f"cannot lock {_mebibytes(size)} of host memory"):
            buffer = self._pinned.allocate(size)
        address = int(buffer.handle)
        self._buffers[address] = buffer
        if beside:
            self._pinned_beside.add(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, memory: Bytes) -> None:
        """Give back page-locked memory, after what its own stream has to do; cuda.core would wait for another."""
        address = memory.ctypes.data
        stream = self._beside if address in self._pinned_beside else self._stream
        self._pinned_beside.discard(address)
        with self.translate_errors("does not free memory"):
            self._buffers.pop(address).close(stream)

    def upload(self, address: int, values: Array) -> None:
        """Copy host to device. The driver's manual: from pageable memory it returns once it has read the values."""
        with self.translate_errors("does not take data"):
            result_of(self._driver.cuMemcpyHtoDAsync(address, values.ctypes.data, values.nbytes, self._stream.handle))

    def download(self, values: Array, address: int) -> None:
        """Copy device to host."""
        with self.translate_errors("does not give data"):
            result_of(self._driver.cuMemcpyDtoHAsync(values.ctypes.data, address, values.nbytes, self._stream.handle))

    def launch(self, launch: Launch) -> None:
        """Launch one of our kernels."""
        with self.translate_errors(f"does not run {launch.kernel}"):
            self._enqueue(launch, self._stream)

    def synchronise(self) -> None:
        """Wait for the stream, and raise the errors of what ran on it."""
        with self.translate_errors("failed"):
            self._stream.sync()

    def mark(self) -> Any:
        """Record an event with a time."""
        from cuda.core import EventOptions

        with self.translate_errors("does not time"):
            return self._stream.record(options=EventOptions(timing_enabled=True))

    def seconds_between(self, first: Any, last: Any) -> float:
        """Return the time between two events, which the driver gives in milliseconds."""
        with self.translate_errors("does not time"):
            return float(last - first) / 1e3

    def begin_capture(self) -> None:
        """Capture this stream. Thread-local mode forbids unsafe calls to this thread alone: others may allocate.

        Through the driver, not cuda.core's GraphBuilder: after a capture that failed it destroys what the driver has
        destroyed already, and crashes (its issue 2834, in 1.2). A capture that TensorRT spoils must cost a note alone.
        """
        with self.translate_errors("cannot capture"):
            mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            result_of(self._driver.cuStreamBeginCapture(self._stream.handle, mode))

    def end_capture(self) -> "_CudaGraph":
        """Instantiate what was captured."""
        with self.translate_errors("could not capture"), self._recorded() as graph:
            return _CudaGraph(self, graph)

    def abandon_capture(self) -> None:
        """End the capture, if the stream is in one: only the driver knows, after an interruption."""
        with contextlib.suppress(Exception):
            if result_of(self._driver.cuStreamIsCapturing(self._stream.handle)):
                with self._recorded():
                    pass

    def close(self) -> None:
        """Free everything that was allocated, and the streams."""
        with contextlib.suppress(Exception):
            self.enter()
        for stream in (self._stream, self._beside):
            with contextlib.suppress(Exception):
                stream.sync()  # pinned memory may be in a copy
        while self._graphs:
            self._graphs.pop().close()
        while self._buffers:
            with contextlib.suppress(Exception):
                self._buffers.popitem()[1].close()
        for stream in (self._stream, self._beside):
            with contextlib.suppress(Exception):
                stream.close()

    @contextlib.contextmanager
    def translate_errors(self, what: str) -> Iterator[None]:
        """Raise our errors for those of cuda.core, which have no public base class: "GPU 0 does not …: its words"."""
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

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[Any]:
        """End the capture; its graph is there inside, and destroyed behind."""
        graph = None
        try:
            graph = result_of(self._driver.cuStreamEndCapture(self._stream.handle))
            yield graph
        finally:
            if graph is not None:
                self._driver.cuGraphDestroy(graph)


class _CudaGraph:
    """An instantiated graph. Its executor keeps the memory alive that it works on."""

    _executable = None

    def __init__(self, layer: CudaLayer, captured: Any) -> None:
        self._layer = layer
        layer._graphs.add(self)  # which frees what nobody else does
        self._executable = result_of(layer._driver.cuGraphInstantiate(captured, 0))

    def launch(self) -> None:
        with self._layer.translate_errors("does not launch a graph"):
            result_of(self._layer._driver.cuGraphLaunch(self._executable, self._layer._stream.handle))

    def close(self) -> None:
        """Free it; a second time does nothing."""
        self._layer._graphs.discard(self)
        executable, self._executable = self._executable, None
        if executable is not None:
            self._layer._driver.cuGraphExecDestroy(executable)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"

"""A device without a GPU: NumPy memory, the kernels' own sources compiled by g++, ONNX Runtime in place of engines.

It is stricter than a GPU, and as late as one may be. What goes on a stream runs when somebody waits for that stream,
not before: copies read and write pinned memory only then. Fresh memory is NaN and lies between guard bands; freed
memory is NaN at once, and work that still wants it fails. Engines look whether the memory they were given is theirs,
and spoil the scratch memory they share. While capturing, launches alone are allowed.
"""

import ctypes
import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffiqa.engine.manifest import BuiltStage, EngineDirectory, FileEntry, Manifest, Precision, Stage, StageName
from diffiqa.errors import BackendError
from diffiqa.export.profiles import stage_profiles
from diffiqa.kernels.launch import SOURCE, Launch
from diffiqa.runtime.builds import choose_profile
from diffiqa.runtime.gpu.layer import Array, Bytes, DeviceMemoryError, LoadedStage, Shapes
from diffiqa.runtime.host.onnx_stage import OnnxRuntime, OnnxStage

from .kernels.devices import Host

BAND = 256  # bytes before and after every piece of memory
NOTHING = FileEntry("", 0, "")


class FakeLayer:
    """A `Layer` whose streams run when waited for. `log` names every launch; `alive` counts what was not freed.

    An `eager` one does all at once, for stages that run in the caller's thread and not on its stream.
    """

    def __init__(self, library: ctypes.CDLL, *, capacity: int = 2**40, eager: bool = False) -> None:
        self.name, self.stream = "fake GPU", 0
        self.capacity = capacity  # bytes of device memory
        self.log: list[str] = []
        self.allocations = 0
        self.peak = 0  # of `held`
        self.kept = 0  # bytes that were freed and not trimmed
        self.graphs: list[FakeGraph] = []
        self.contexts = 0
        self.closed = False
        self.left = 0  # alive when it was closed: a real layer frees that too, but nothing should have to
        self.capture_fails: Callable[[int], bool] = lambda launches: False  # asked with the length of a capture
        self.watch: Callable[[int], None] = lambda launches: None  # called before every launch with their number
        self._kernels, self._eager = Host(library), eager
        self._memory: dict[int, tuple[Bytes, int]] = {}
        self._freed: list[Bytes] = []  # held until the stream has run: nobody gets its addresses again before
        self._pinned: dict[int, Bytes] = {}
        self._beside: set[int] = set()  # addresses of the second stream
        self.brought = 0  # copies on it
        self._queue: deque[Callable[[], None]] = deque()
        self._capture: list[Callable[[], None]] | None = None

    @property
    def alive(self) -> int:
        """Pieces of memory, graphs and contexts that have not been freed."""
        return len(self._memory) + len(self._pinned) + self.contexts + sum(not graph.closed for graph in self.graphs)

    @property
    def held(self) -> int:
        """Bytes of device memory in use."""
        return sum(size for _, size in list(self._memory.values()))

    def enter(self) -> None:
        assert not self.closed

    def allocate(self, size: int, *, beside: bool = False) -> int:
        if not beside:
            self._not_capturing()
        assert size > 0
        if self.held + size > self.capacity:
            raise DeviceMemoryError(f"{self.name} has no {size} bytes left")
        raw = np.full(size + 2 * BAND + 256, 255, np.uint8)
        address = -(-(raw.ctypes.data + BAND) // 256) * 256
        self._memory[address] = raw, size
        self.peak = max(self.peak, self.held)
        self.allocations += 1
        if beside:
            self._beside.add(int(address))
        return int(address)

    def bring(self, address: int, values: Array) -> None:
        assert address in self._beside, "of the second stream"
        self.brought += 1
        self.owned(address, values.nbytes)[:] = as_bytes(values)

    def free(self, address: int) -> None:
        if address in self._beside:
            self._beside.remove(address)
        else:
            self._not_capturing()
        raw, size = self._memory.pop(address)
        start = address - raw.ctypes.data
        assert (raw[:start] == 255).all(), "something wrote before the memory"
        assert (raw[start + size :] == 255).all(), "something wrote past the memory"
        raw[:] = 255
        self._freed.append(raw)
        self.kept += size

    def trim(self) -> None:
        self.synchronise()
        self.kept = 0

    def allocate_pinned(self, size: int, *, beside: bool = False) -> Bytes:
        memory = np.full(size, 255, np.uint8)
        self._pinned[memory.ctypes.data] = memory
        self.allocations += 1
        return memory

    def free_pinned(self, memory: Bytes) -> None:
        """Later than its last copy: that would find it gone."""
        del self._pinned[memory.ctypes.data]
        memory[:] = 255

    def upload(self, address: int, values: Array) -> None:
        self._not_capturing()
        assert values.flags.c_contiguous
        pinned = self._is_pinned(values)
        source = values if pinned else values.copy()

        def copy() -> None:
            assert not pinned or self._is_pinned(values), "pinned memory was freed before the copy from it"
            self.owned(address, source.nbytes)[:] = as_bytes(source)

        self._enqueue(copy)

    def download(self, values: Array, address: int) -> None:
        self._not_capturing()
        assert values.flags.c_contiguous
        pinned = self._is_pinned(values)
        if not self._eager:
            as_bytes(values)[:] = 255  # who reads it before it is there gets NaN

        def copy() -> None:
            assert not pinned or self._is_pinned(values), "pinned memory was freed before the copy to it"
            as_bytes(values)[:] = self.owned(address, values.nbytes)

        self._enqueue(copy)

    def launch(self, launch: Launch) -> None:
        self.do(launch.kernel, lambda: self._run(launch))

    def synchronise(self) -> None:
        self._not_capturing()
        try:
            while self._queue:
                self._queue.popleft()()
        finally:
            self._queue.clear()  # a GPU does nothing more after a failure either
        self._freed.clear()

    def mark(self) -> list[float]:
        """Return a list that will hold the time when the stream came to here."""
        self._not_capturing()
        times: list[float] = []
        self._enqueue(lambda: times.append(time.perf_counter()))
        return times

    def seconds_between(self, first: Any, last: Any) -> float:
        return float(last[0] - first[0])

    def begin_capture(self) -> None:
        self._not_capturing()
        assert not self._queue, "the launches before a capture are waited for: an engine's first may allocate"
        self._capture = []

    def end_capture(self) -> "FakeGraph":
        assert self._capture is not None
        recorded, self._capture = self._capture, None
        if self.capture_fails(len(recorded)):
            raise BackendError("the fake GPU captures nothing today")
        self.graphs.append(FakeGraph(self, recorded))
        return self.graphs[-1]

    def abandon_capture(self) -> None:
        self._capture = None

    def close(self) -> None:
        self.synchronise()
        self.closed = True
        self.left = self.alive
        self._memory.clear()
        self._pinned.clear()

    def do(self, name: str, work: Callable[[], None]) -> None:
        """Put `work` on the stream, or record it if a capture is under way."""
        self.watch(len(self.log))
        if self._capture is not None:
            self._capture.append(work)
            return
        self.log.append(name)
        self._enqueue(work)

    def owned(self, address: int, size: int) -> Bytes:
        """Return the bytes at an address, all of one piece of memory that has not been freed."""
        for start, (raw, held) in list(self._memory.items()):  # another thread may be allocating
            if start <= address and address + size <= start + held:
                return raw[address - raw.ctypes.data :][:size]
        raise AssertionError(f"{size} bytes at {address:#x} are not memory in use")

    def _enqueue(self, work: Callable[[], None]) -> None:
        self._queue.append(work)
        if self._eager:
            self.synchronise()

    def _run(self, launch: Launch) -> None:
        """Run a kernel, if all the memory that it is given is still there."""
        addresses = [int(argument) for argument in launch.arguments if isinstance(argument, np.uint64) and argument]
        if launch.kernel.startswith("gather_crops"):
            table, kinds = addresses[0], int(launch.arguments[4])
            addresses += self.owned(table, kinds * SOURCE.itemsize).view(SOURCE)["address"].tolist()
        for address in addresses:
            self.owned(address, 1)
        self._kernels.run(launch)

    def _is_pinned(self, values: Array) -> bool:
        address = values.ctypes.data
        return any(start <= address < start + memory.nbytes for start, memory in list(self._pinned.items()))

    def _not_capturing(self) -> None:
        assert self._capture is None, "not allowed while capturing"


def as_bytes(values: Array) -> Bytes:
    """Return an array's memory."""
    return values.reshape(-1).view(np.uint8)


class FakeGraph:
    """Recorded launches."""

    def __init__(self, layer: FakeLayer, work: list[Callable[[], None]]) -> None:
        self.layer, self.work, self.closed = layer, work, False

    def launch(self) -> None:
        assert not self.closed
        self.layer.do("graph", self._run)

    def close(self) -> None:
        assert not self.closed
        self.closed = True

    def _run(self) -> None:
        assert not self.closed, "the graph is gone"
        for work in self.work:
            work()


class FakeStage:
    """An ONNX file as an engine with profiles. Types that are not float32 are converted on the way in and out."""

    open_ended = False

    def __init__(self, layer: FakeLayer, path: Path, built: BuiltStage) -> None:
        self.built, self.layer, self.session = built, layer, _session(path)

    def bind(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> "FakeContext":
        assert choose_profile((self.built.profiles[profile],), shapes) == 0, "shapes outside the profile"
        return FakeContext(self, profile, shapes, addresses)

    def close(self) -> None: ...


class FakeContext:
    """A stage on fixed memory."""

    def __init__(self, stage: FakeStage, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> None:
        self._layer, built = stage.layer, stage.built
        self._layer.contexts += 1
        dims = {
            name: size
            for spec in built.inputs
            for name, size in zip(spec.shape, shapes[spec.name], strict=True)
            if isinstance(name, str)
        }
        self._copies: list[tuple[int, npt.NDArray[Any], np.dtype[Any], bool]] = []
        sides: list[dict[str, npt.NDArray[np.float32]]] = []
        for specs, comes_in in ((built.inputs, True), (built.outputs, False)):
            side = {}
            for spec in specs:
                shape = tuple(dims[n] if isinstance(n, str) else n for n in spec.shape)
                side[spec.name] = np.zeros(shape, np.float32)
                self._copies.append((addresses[spec.name], side[spec.name], np.dtype(spec.dtype), comes_in))
            sides.append(side)
        assert set(addresses) == {spec.name for spec in (*built.inputs, *built.outputs)}
        assert all(address % 256 == 0 for address in addresses.values())
        self._call = stage.session.bind(*sides)
        self._name = built.name
        self.activation_bytes = 64 * math.prod(next(iter(built.profiles[profile].values())).maximum)
        self._activation: tuple[int, int] | None = None
        self._closed = False
        self.problem: str | None = None

    def use_activation(self, address: int, size: int) -> None:
        assert self._activation is None, "set once: graphs hold it"
        assert size >= self.activation_bytes
        self._activation = address, size

    def enqueue(self) -> None:
        self._layer.do(self._name, self._run)

    def capture_problem(self) -> str | None:
        return self.problem

    def close(self) -> None:
        assert not self._closed
        self._closed = True
        self._layer.contexts -= 1

    def _run(self) -> None:
        assert not self._closed, "the context is gone"
        assert self._activation is not None
        self._layer.owned(*self._activation)[:] = 255
        for address, array, dtype, comes_in in self._copies:
            memory = self._layer.owned(address, array.size * dtype.itemsize).view(dtype).reshape(array.shape)
            if comes_in:
                array[...] = memory
        self._call()
        for address, array, dtype, comes_in in self._copies:
            if not comes_in:
                memory = self._layer.owned(address, array.size * dtype.itemsize).view(dtype).reshape(array.shape)
                memory[...] = array


@functools.cache  # loading takes longer than running the tiny model; a session holds nothing of a run
def _session(path: Path) -> OnnxStage:
    return OnnxStage(path, OnnxRuntime(threads=1))


def fake_stages(
    layer: FakeLayer,
    directory: EngineDirectory,
    *,
    batches: tuple[str, ...] = ("1:2:4",),
    sizes: tuple[str, ...] = ("32x32", "32x32:64x64:128x128"),
    precision: Precision = Precision.FP32,
    kind: Callable[[Any, Path, BuiltStage], LoadedStage] = FakeStage,
) -> dict[StageName, LoadedStage]:
    """Return every stage of an engine directory as iqa-build would make it with these options."""
    m = directory.manifest
    return {
        stage.name: kind(layer, directory.file(stage.file), _built(m, stage, batches, sizes, precision))
        for stage in m.stages
    }


def _built(
    m: Manifest, stage: Stage, batches: tuple[str, ...], sizes: tuple[str, ...], precision: Precision
) -> BuiltStage:
    low = {"y", "condition", "noise", "image", "images", "maps"} if precision is Precision.FP16 else set()
    inputs, outputs = (
        tuple(dataclasses.replace(s, dtype="float16") if s.name in low else s for s in specs)
        for specs in (stage.inputs, stage.outputs)
    )
    profiles = stage_profiles(m, stage, batches, sizes)
    return BuiltStage(stage.name, stage.file.sha256, NOTHING, inputs, outputs, profiles, ())

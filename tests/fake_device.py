"""The real `CudaLayer` on a driver without a GPU (fakecuda/), and ONNX Runtime in place of engines.

The layer is watched, no more: what it asks of cuda.core, and cuda.core of the driver, is what a GPU would get. Stages
go on its stream and run when their turn comes, as engines do; they work on the driver's memory, which is the host's.
"""

import contextlib
import ctypes
import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffiqa.engine.manifest import (
    BuiltStage,
    EngineDirectory,
    FileEntry,
    Manifest,
    Precision,
    Stage,
    StageName,
    file_sha256,
)
from diffiqa.errors import BackendError
from diffiqa.export.profiles import stage_profiles
from diffiqa.kernels.launch import Launch
from diffiqa.runtime.builds import choose_profile
from diffiqa.runtime.gpu.cuda import CudaLayer
from diffiqa.runtime.gpu.layer import Array, Bytes, Graph, LoadedStage, Shapes
from diffiqa.runtime.host.onnx_stage import OnnxRuntime, OnnxStage

from .fakecuda.driver import Driver, Run

NOTHING = FileEntry("", 0, "")


class FakeLayer(CudaLayer):
    """A `CudaLayer` that keeps accounts: `log` names every launch, `graphs` has all that were captured.

    An `eager` one waits for all that it launches, for stages that run in the caller's thread and not on its stream.
    """

    def __init__(self, driver: Driver, *, capacity: int = 0, eager: bool = False) -> None:
        self.driver, self._eager, self.closed = driver, eager, True
        self.open()
        if capacity:
            driver.capacity = capacity
        self.log: list[str] = []
        self.captured = 0  # launches of the capture under way
        self.graphs: list[FakeGraph] = []
        self._contexts: weakref.WeakSet[FakeContext] = weakref.WeakSet()
        self.beside: set[int] = set()  # addresses of the second stream
        self.brought = 0  # copies on it
        self.left = 0  # alive when it was closed: `close` frees that too, but nothing should have to
        self.capture_fails: Callable[[int], bool] = lambda launches: False  # asked with the length of a capture
        self.watch: Callable[[int], None] = lambda launches: None  # called before every launch with their number

    def open(self) -> "FakeLayer":
        """Return it open, if need be again: a program may open its GPU several times."""
        if self.closed:
            super().__init__(0)
            self.driver.layers.append(self)
            self.closed = False
        return self

    @property
    def allocations(self) -> int:
        """How often memory was allocated."""
        return self.driver.count("device memory", "pinned memory")

    @property
    def alive(self) -> int:
        """Memory, graphs, and contexts of engines that were not given back, by any layer."""
        self._let_go()
        return self.driver.alive + self.contexts

    @property
    def contexts(self) -> int:
        """Contexts of engines that are open; the last reference frees one, as TensorRT's."""
        return sum(not context._closed for context in self._contexts)

    @property
    def held(self) -> int:
        """Bytes of device memory in use."""
        return self.driver.held

    @property
    def capacity(self) -> int:
        """Bytes of device memory."""
        return self.driver.capacity

    @capacity.setter
    def capacity(self, size: int) -> None:
        self.driver.capacity = size

    def enter(self) -> None:
        assert not self.closed
        super().enter()

    def allocate(self, size: int, *, beside: bool = False) -> int:
        address = super().allocate(size, beside=beside)
        assert address % 256 == 0
        if beside:
            self.beside.add(address)
        return address

    def bring(self, address: int, values: Array) -> None:
        assert address in self.beside, "of the second stream"
        self.brought += 1
        super().bring(address, values)

    def free(self, address: int) -> None:
        self.beside.discard(address)
        super().free(address)

    def upload(self, address: int, values: Array) -> None:
        assert values.flags.c_contiguous
        super().upload(address, values)
        self._if_eager()

    def download(self, values: Array, address: int) -> None:
        assert values.flags.c_contiguous
        super().download(values, address)
        self._if_eager()

    def launch(self, launch: Launch) -> None:
        self._launched(launch.kernel)
        super().launch(launch)
        self._if_eager()

    def stage(self, name: str, run: Any, memory: list[tuple[int, int]]) -> None:
        """Put a network on the stream."""
        self._launched(name)
        if status := self.driver.stage(self.stream, run, memory):
            raise BackendError(f"{self.name}: stage {name} failed: {self._driver.CUresult(status)!s}")

    def begin_capture(self) -> None:
        assert not self.driver.pending(self.stream), "an engine's first launch may allocate: wait for it"
        super().begin_capture()
        self.captured = 0

    def end_capture(self) -> Any:
        if self.capture_fails(self.captured):
            raise BackendError("the fake GPU captures nothing today")
        self.graphs.append(FakeGraph(self, super().end_capture(), self.captured))
        return self.graphs[-1]

    def close(self) -> None:
        self.left = self.alive
        super().close()
        self.driver.layers.remove(self)
        self.closed = True

    def _let_go(self) -> None:
        """Let memory be free that was freed in order of a stream."""
        with contextlib.suppress(Exception):  # of cuda.core; the next call raises it again
            for stream in () if self.closed else (self._stream, self._beside):
                stream.sync()

    def _launched(self, name: str) -> None:
        self.watch(len(self.log))
        if self.driver.capturing:
            self.captured += 1
        else:
            self.log.append(name)

    def _if_eager(self) -> None:
        if self._eager and not self.driver.capturing:
            self._stream.sync()


class FakeGraph:
    """A graph of `work` launches."""

    def __init__(self, layer: FakeLayer, graph: Graph, work: int) -> None:
        self.layer, self.graph, self.work, self.closed = layer, graph, work, False

    def launch(self) -> None:
        self.layer._launched("graph")
        self.graph.launch()

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        self.graph.close()


def device_memory(address: int, size: int) -> Bytes:
    """Return the bytes of the fake device's memory. Who touches what was freed ends the process."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class FakeStage:
    """An ONNX file as an engine with profiles. Types that are not float32 are converted on the way in and out."""

    open_ended = False

    def __init__(self, layer: FakeLayer, path: Path, built: BuiltStage) -> None:
        self.built, self.layer = built, layer
        self.session = load_once(OnnxRuntime(threads=1), path, built.name)

    def bind(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> "FakeContext":
        assert choose_profile((self.built.profiles[profile],), shapes) == 0, "shapes outside the profile"
        return FakeContext(self, profile, shapes, addresses)

    def close(self) -> None: ...


class FakeContext:
    """A stage on fixed memory."""

    def __init__(self, stage: FakeStage, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> None:
        self._layer, built = stage.layer, stage.built
        sizes = built.sizes(shapes)
        assert set(addresses) == {spec.name for spec in (*built.inputs, *built.outputs)}
        assert all(address % 256 == 0 for address in addresses.values())
        self._copies: tuple[list[tuple[Array, Array]], ...] = ([], [])  # in, out: (on the device, what the session has)
        self._memory: list[tuple[int, int]] = []
        sides: list[dict[str, npt.NDArray[np.float32]]] = [{}, {}]
        for specs, copies, side in zip((built.inputs, built.outputs), self._copies, sides, strict=True):
            for spec in specs:
                array = side[spec.name] = np.zeros(spec.at(sizes), np.float32)
                dtype = np.dtype(spec.dtype)
                self._memory.append((addresses[spec.name], array.size * dtype.itemsize))
                copies.append((device_memory(*self._memory[-1]).view(dtype).reshape(array.shape), array))
        self._call = stage.session.bind(*sides)
        self._run_on_stream = Run(self._run)  # the driver keeps no reference
        self._name = built.name
        self.activation_bytes = 64 * math.prod(next(iter(built.profiles[profile].values())).maximum)
        self._activation: tuple[int, int] | None = None
        self._closed = False
        self._layer._contexts.add(self)
        self.problem: str | None = None

    def use_activation(self, address: int, size: int) -> None:
        assert self._activation is None, "set once: graphs hold it"
        assert size >= self.activation_bytes
        self._activation = address, size

    def enqueue(self) -> None:
        assert self._activation
        self._layer.stage(self._name, self._run_on_stream, [*self._memory, self._activation])

    def capture_problem(self) -> str | None:
        return self.problem

    def close(self) -> None:
        assert not self._closed
        self._closed = True
        _gone.append(self._run_on_stream)

    def _run(self) -> int:
        """Run on the stream; say 0 if all is well. Its memory is there: the driver has looked."""
        try:
            assert not self._closed, "the context is gone"
            assert self._activation
            device_memory(*self._activation)[:] = 255
            into, out = self._copies
            for memory, array in into:
                array[...] = memory
            self._call()
            for memory, array in out:
                memory[...] = array
        except BaseException as exc:  # there is nobody above to raise it to
            self._layer.driver.tell(f"{self._name}: {exc!r}")
            return 1
        return 0


_gone: list[Any] = []  # what a stream could still come to, if somebody forgot to wait for it


load_anew = OnnxRuntime.load_stage
_loaded: dict[tuple[str, str, str], OnnxStage] = {}  # by what is in a file, and the settings


def load_once(settings: OnnxRuntime, path: Path, name: StageName) -> OnnxStage:
    """Load a stage as its backend does, but once: that takes longer than the tiny model runs, and holds nothing of it.

    Most tests have a copy of the same four files. On a GPU a session belongs to a stream, and is loaded again.
    """
    if settings.provider_names != ["CPUExecutionProvider"]:
        return load_anew(settings, path, name)
    key = file_sha256(path), path.name, repr(settings)
    if key not in _loaded:
        _loaded[key] = load_anew(settings, path, name)
    return _loaded[key]


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
    loop = m.flow.loop
    images = {"y", "condition", "noise", "image", "images", "crop", "maps", loop.start, loop.share, loop.result}
    low = images if precision is Precision.FP16 else set()
    inputs, outputs = (
        tuple(dataclasses.replace(s, dtype="float16") if s.name in low else s for s in specs)
        for specs in (stage.inputs, stage.outputs)
    )
    profiles = stage_profiles(m, stage, batches, sizes)
    return BuiltStage(stage.name, stage.file.sha256, NOTHING, inputs, outputs, profiles, ())

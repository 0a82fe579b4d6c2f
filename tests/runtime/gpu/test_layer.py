"""What `CudaLayer` asks of the driver for CUDA graphs: whatever fails, each is destroyed once and no capture stays.

The driver here keeps accounts, no more. What a real one makes of these calls is for test_device_gpu.py.
"""

# ruff: noqa: N802, N815 — the names are the driver's

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffiqa.errors import BackendError
from diffiqa.runtime.gpu.cuda import CudaLayer

cuda = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed", exc_type=ImportError)

OK, REFUSED = cuda.CUresult.CUDA_SUCCESS, cuda.CUresult.CUDA_ERROR_NOT_SUPPORTED


class Driver:
    """Structures and constants are the real ones. `refused` names a call that fails; `spoilt` captures end so."""

    def __init__(self, refused: str = "") -> None:
        self.refused, self.spoilt, self.capturing = refused, False, False
        self.alive: list[int] = []  # graphs and executable graphs
        self.made = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda, name)

    def cuStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any]:
        assert not self.capturing
        assert mode == cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.capturing = self.refused != "cuStreamBeginCapture"
        return (OK if self.capturing else REFUSED,)

    def cuStreamEndCapture(self, stream: Any) -> tuple[Any, Any]:
        spoilt, self.spoilt = self.spoilt or not self.capturing, False
        self.capturing = False
        return (REFUSED, None) if spoilt else self._make("cuStreamEndCapture", cuda.CUgraph)

    def cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, Any]:
        assert int(graph) in self.alive
        return self._make("cuGraphInstantiate", cuda.CUgraphExec)

    def cuGraphDestroy(self, graph: Any) -> tuple[Any]:
        self.alive.remove(int(graph))
        return (OK,)

    cuGraphExecDestroy = cuGraphDestroy

    def _make(self, name: str, kind: Any) -> tuple[Any, Any]:
        if name == self.refused:
            return REFUSED, None
        self.made += 1
        self.alive.append(self.made)
        return OK, kind(self.made)


class Stream:
    handle = cuda.CUstream(1)

    def sync(self) -> None: ...


def layer_on(driver: Driver) -> CudaLayer:
    """Return a layer without what needs a GPU."""
    layer = object.__new__(CudaLayer)
    layer.name, layer._capturing = "GPU", False
    layer._driver, layer._stream = driver, Stream()
    return layer


class Piece:
    """A buffer of cuda.core's that notes on which stream it is freed."""

    def __init__(self) -> None:
        self.memory = np.zeros(16, np.uint8)
        self.handle = self.memory.ctypes.data
        self.freed: list[Any] = []

    def close(self, stream: Any = None) -> None:
        self.freed.append(stream)


@pytest.mark.parametrize("beside", [False, True])
def test_pinned_memory_is_freed_after_the_copies_of_its_own_stream(beside: bool) -> None:
    layer, piece = layer_on(Driver()), Piece()
    layer._beside, layer._buffers, layer._pinned_beside = Stream(), {}, set()
    layer._pinned = SimpleNamespace(allocate=lambda size: piece)
    memory = layer.allocate_pinned(16, beside=beside)
    layer.free_pinned(memory)
    assert piece.freed == [layer._beside if beside else layer._stream]
    assert (layer._buffers, layer._pinned_beside) == ({}, set())


def test_memory_is_given_back_once_both_streams_have_freed_it() -> None:
    driver, done = Driver(), list[Any]()
    layer = layer_on(driver)
    for name in ("_stream", "_beside"):
        setattr(layer, name, SimpleNamespace(sync=lambda name=name: done.append(name)))
    layer._device = SimpleNamespace(memory_resource=SimpleNamespace(handle=5))

    def trim(pool: int, keep: int) -> tuple[Any]:
        done.append((pool, keep))
        return (OK,)

    driver.cuMemPoolTrimTo = trim  # type: ignore[attr-defined]
    layer.trim()
    assert done == ["_stream", "_beside", (5, 0)]


def test_a_captured_graph_is_one_executable_until_it_is_closed() -> None:
    driver = Driver()
    layer = layer_on(driver)
    layer.begin_capture()
    graph = layer.end_capture()
    assert driver.alive == [2]
    graph.close()
    assert driver.alive == []


@pytest.mark.parametrize("refused", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_a_capture_that_is_refused_leaves_nothing_behind(refused: str) -> None:
    driver = Driver(refused)
    layer = layer_on(driver)

    def capture() -> None:
        layer.begin_capture()
        layer.end_capture()

    with pytest.raises(BackendError, match=r"GPU (cannot|could not) capture"):
        capture()
    layer.abandon_capture()
    assert driver.alive == []
    assert not driver.capturing


@pytest.mark.parametrize("spoilt", [False, True], ids=["the capture holds", "the capture is spoilt"])
def test_an_abandoned_capture_leaves_nothing_behind(spoilt: bool) -> None:
    driver = Driver()
    layer = layer_on(driver)
    layer.begin_capture()
    driver.spoilt = spoilt
    layer.abandon_capture()
    assert driver.alive == []
    assert not driver.capturing
    layer.begin_capture()
    layer.end_capture().close()
    assert driver.alive == []

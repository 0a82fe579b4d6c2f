"""What `CudaLayer` asks of the driver: whatever fails, nothing is left behind; what is freed is freed in order."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from diffiqa.errors import BackendError
from diffiqa.kernels import load
from diffiqa.runtime.gpu.layer import DeviceMemoryError

from ...fake_device import FakeLayer, device_memory
from ...fakecuda.driver import NOT_SUPPORTED, Driver, compiled


@pytest.mark.parametrize("beside", [False, True])
def test_pinned_memory_is_freed_after_the_copies_of_its_own_stream(
    layer: FakeLayer, driver: Driver, beside: bool
) -> None:
    """And waits for no other: that one may be capturing in another thread, or have seconds of work."""
    address = layer.allocate(16, beside=beside)
    pinned = layer.allocate_pinned(16, beside=beside)
    pinned[:] = 7
    here, other = (layer._beside, layer._stream) if beside else (layer._stream, layer._beside)
    driver_calls = layer._driver
    for stream in (here, other):
        driver_calls.cuMemcpyHtoDAsync(address, pinned.ctypes.data, 16, stream.handle)
    layer.free_pinned(pinned)
    assert (driver.pending(int(here.handle)), driver.pending(int(other.handle))) == (0, 1)
    assert set(device_memory(address, 16)) == {7}
    driver.close()  # the other copy has lost its memory: that was the point


def test_memory_is_given_back_once_both_streams_have_freed_it(layer: FakeLayer, driver: Driver) -> None:
    for beside in (False, True):
        layer.free(layer.allocate(1000, beside=beside))
    assert driver.kept == 2000
    layer.trim()
    assert driver.kept == 0
    assert not driver.pending(layer.stream)
    assert layer.alive == 0


@pytest.mark.parametrize("what", ["device memory", "pinned memory"])
def test_memory_that_is_not_there_is_told(layer: FakeLayer, driver: Driver, what: str) -> None:
    allocate: Callable[[int], Any] = layer.allocate if what == "device memory" else layer.allocate_pinned
    driver.fail(what, 1)
    with pytest.raises(DeviceMemoryError, match=r"fake GPU (has no|cannot lock) 2\.0 MiB"):
        allocate(2**21)
    assert layer.alive == 0


def test_a_captured_graph_is_one_executable_until_it_is_closed(layer: FakeLayer, driver: Driver) -> None:
    layer.begin_capture()
    graph = layer.end_capture()
    assert driver.alive == 1
    graph.close()
    assert driver.alive == 0


@pytest.mark.parametrize("refused", ["cuStreamBeginCapture", "capture", "cuGraphInstantiateWithFlags"])
def test_a_capture_that_is_refused_leaves_nothing_behind(layer: FakeLayer, driver: Driver, refused: str) -> None:
    def capture() -> None:
        layer.begin_capture()
        layer.end_capture().close()

    driver.fail(refused, 1, NOT_SUPPORTED)
    with pytest.raises(BackendError, match=r"fake GPU (cannot|could not) capture"):
        capture()
    layer.abandon_capture()
    assert layer.alive == 0
    capture()


@pytest.mark.parametrize("spoilt", [False, True], ids=["the capture holds", "the capture is spoilt"])
def test_an_abandoned_capture_leaves_nothing_behind(layer: FakeLayer, driver: Driver, spoilt: bool) -> None:
    address = layer.allocate(16)
    layer.begin_capture()
    if spoilt:
        with pytest.raises(BackendError, match="CAPTURE_UNSUPPORTED"):
            layer.synchronise()
    layer.abandon_capture()
    assert driver.alive == 1
    layer.upload(address, np.zeros(16, np.uint8))
    layer.synchronise()
    layer.begin_capture()
    layer.end_capture().close()
    assert driver.alive == 1


def test_kernels_are_compiled_for_the_gpu_that_is_here(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def note(arch: str) -> Any:
        asked.append(arch)
        return compiled(arch)

    monkeypatch.setattr(load, "compiled", note)
    FakeLayer(driver).close()
    assert asked == [load.device_arch()] == ["sm_90"]

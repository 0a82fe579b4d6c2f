"""The fake driver itself: what works by luck alone on a GPU does not work on it, and the tests for a GPU pass on it."""

import contextlib
import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffiqa.errors import BackendError
from diffiqa.kernels.launch import Launch, Storage, normalise_pad
from diffiqa.runtime.gpu.tensorrt import gpu_capability

from ..fake_device import FakeLayer, device_memory
from .driver import ILLEGAL_ADDRESS, Driver, environment

ROOT = Path(__file__).parents[2]
# All of the layer, and of the executor what moves memory, runs out of it, captures and blends.
CHOSEN = "test_layer or (host and (test_graph_of_one_shape or test_memory_that_runs_out or test_modes))"


def test_layer_and_executor_pass_the_tests_for_a_gpu(fake_libcuda: ctypes.CDLL, tiny_engine: Path) -> None:
    file, options = "tests/runtime/gpu/test_on_gpu.py", ["-q", "-s", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-k", CHOSEN, *options],
        cwd=ROOT,
        env=environment(fake_libcuda) | {"TINY_ENGINE": str(tiny_engine)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[fake driver]" not in done.stdout + done.stderr
    assert "skipped" not in done.stdout, "the driver was not found"


def test_without_a_gpu_in_it_a_process_has_none(fake_libcuda: ctypes.CDLL) -> None:
    with pytest.raises(BackendError, match="no NVIDIA GPU"):
        gpu_capability(0)


# ------------------------------------------------------------------------------------------------ as late as may be


def test_work_runs_when_somebody_waits_for_its_stream(layer: FakeLayer) -> None:
    address, pinned = layer.allocate(16), layer.allocate_pinned(16)
    pinned[:] = 1
    layer.upload(address, pinned)
    pinned[:] = 2  # too early: the stream has not come to the copy
    assert set(device_memory(address, 16)) == {255}
    layer.synchronise()
    assert set(device_memory(address, 16)) == {2}
    layer.download(pinned, address)
    assert set(pinned) == {255}
    layer.synchronise()
    assert set(pinned) == {2}


def test_values_that_are_not_pinned_are_taken_at_once_and_waited_for(layer: FakeLayer) -> None:
    address, values = layer.allocate(16), np.full(16, 1, np.uint8)
    layer.upload(address, values)
    values[:] = 2
    layer.download(values, address)
    assert set(values) == {1}


# ------------------------------------------------------------------------------------------------ as strict as can be


def normalise(layer: FakeLayer) -> tuple[int, Launch]:
    """Return the address of an image, and a launch that reads it."""
    image = layer.allocate(3 * 32 * 32)
    plane = layer.allocate(4 * 3 * 32 * 32)
    return image, normalise_pad(image, (32, 32), 96, plane, (32, 32), Storage.F32)


def test_who_touches_memory_that_was_freed_loses_the_context(layer: FakeLayer, driver: Driver) -> None:
    image, launch = normalise(layer)
    layer.free(image)
    layer.launch(launch)
    for call in (layer.synchronise, lambda: layer.allocate(16)):
        with pytest.raises(BackendError, match="ILLEGAL_ADDRESS"):
            call()
    assert driver.problems() == ["normalise_pad_f32 touches memory that is not in use"]


def test_who_writes_past_the_end_of_memory_is_found(layer: FakeLayer, driver: Driver) -> None:
    address = layer.allocate(100)
    device_memory(address, 101)[100] = 0
    layer.free(address)
    layer.synchronise()
    assert driver.problems() == ["something wrote past a piece"]


@pytest.mark.parametrize(
    ("during", "problem"),
    [
        (lambda layer, address, launch: layer.launch(launch), "a call that waits or allocates while"),
        (lambda layer, address, launch: layer.allocate_pinned(16), "a call that waits or allocates while"),
        (lambda layer, address, launch: layer.upload(address, np.zeros(4)), "a copy from pageable memory"),
        (lambda layer, address, launch: layer.free(address), "a call that frees memory"),
    ],
    ids=["loads code", "locks memory", "copies what may be gone", "frees"],
)
def test_a_capture_that_holds_what_it_must_not_is_found(
    layer: FakeLayer, driver: Driver, during: Callable[..., object], problem: str
) -> None:
    address, launch = normalise(layer)
    layer.begin_capture()
    with contextlib.suppress(BackendError):
        during(layer, address, launch)
    layer.abandon_capture()
    (found,) = driver.problems()
    assert problem in found


def test_a_call_that_is_to_fail_fails_once(layer: FakeLayer, driver: Driver) -> None:
    driver.fail("cuMemcpyHtoDAsync", 2, ILLEGAL_ADDRESS)
    address = layer.allocate(16)
    failed = []
    for _ in range(3):
        try:
            layer.upload(address, np.zeros(16, np.uint8))
        except BackendError as exc:
            failed.append(str(exc))
    assert len(failed) == 1
    assert driver.count("upload") == 2

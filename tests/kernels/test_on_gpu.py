"""What only a GPU can show. Never run where it was written (no GPU there): the first run on one is its real test.

`pytest -m gpu tests/kernels` also runs test_noise.py, test_sampler.py and test_images.py on the GPU. Read failures from
the bottom layer up:

1. the toolchain: test_cubins_load_…
2. arithmetic: test_noise.py (Philox, normals, half conversion), then test_…_bit_for_bit_as_the_host_build
3. indexing and memory: test_sampler.py, test_images.py
4. concurrency: test_step_counter_…
5. capture: test_graph_…
6. the guest: test_pycuda_…
"""

import gc
from typing import Any

import numpy as np
import pytest

from diffiqa.engine.schedule import Schedule
from diffiqa.kernels.launch import Launch, Storage, Window, normalise_pad
from diffiqa.kernels.load import with_cuda_core, with_pycuda

from .devices import Array, Device, Gpu, Host
from .loop import Loop

pytestmark = pytest.mark.gpu

both = pytest.mark.parametrize("storage", Storage)


def finished(loop: Loop) -> list[bytes]:
    """Everything a loop leaves behind."""
    names = ("state", "y", "taps", "noise_level", "progress")
    return [loop.device.get(getattr(loop.buffers, name)).tobytes() for name in names]


def some_loop(device: Device, storage: Storage, steps: int = 50) -> Loop:
    size = (224, 224)
    windows = [Window(seed, (512, 384), top=100, left=52, lane=seed) for seed in range(3)]
    loop = Loop(device, storage, windows, size, Schedule(steps=steps), taps=tuple(sorted({0, steps // 10, steps // 5})))
    loop.predict(np.random.default_rng(0).normal(size=loop.shape))
    return loop


@pytest.mark.parametrize("name", ["noise_init", "sampler_step", "normalise_pad", "gather_crops"])
@both
def test_cubins_load_and_take_our_arguments(gpu: Gpu, name: str, storage: Storage) -> None:
    from cuda.core import ObjectCode

    source = "sampler.cu" if name in {"noise_init", "sampler_step"} else "images.cu"
    kernel = ObjectCode.from_cubin(gpu.cubins[source]).get_kernel(f"{name}_{storage}")
    assert kernel.num_arguments == {"noise_init": 16, "sampler_step": 15, "normalise_pad": 7, "gather_crops": 9}[name]


@both
def test_loop_is_bit_for_bit_as_the_host_build(gpu: Gpu, host: Host, storage: Storage) -> None:
    """The claim of device.h: contraction off and no libm, so a C++ compiler gives the GPU's bits."""
    results = []
    for device in (host, gpu):
        loop = some_loop(device, storage, steps=4)
        loop.begin()
        start = loop.state
        for _ in range(4):
            loop.step()
        results.append((start, finished(loop)))
    np.testing.assert_array_equal(results[1][0], results[0][0], err_msg="starting noise")
    assert results[1][1] == results[0][1]


@pytest.mark.parametrize("batch", [1, 64])
def test_step_counter_moves_once_per_launch_whatever_the_blocks_do(gpu: Gpu, batch: int) -> None:
    """Thousands of blocks race for the last ticket; no host emulation shows that."""
    steps = 1000
    windows = [Window(seed, (224, 224)) for seed in range(batch)]
    loop = Loop(gpu, Storage.F16, windows, (224, 224), Schedule(steps=steps))
    loop.predict(np.zeros(loop.shape))
    levels = loop.schedule.coefficients.noise_level
    loop.begin()
    launch = loop.buffers.step()
    for i in range(steps - 1, -1, -1):
        assert loop.progress == (i, 0)
        assert np.all(gpu.get(loop.buffers.noise_level) == levels[i])
        gpu.run(launch)
    assert loop.progress == (-1, 0)


def plain(gpu: Gpu, loop: Loop) -> list[bytes]:
    """All launches one by one, without waiting in between."""
    gpu.enqueue(loop.buffers.begin(), gpu.stream)
    for _ in range(loop.schedule.steps):
        gpu.enqueue(loop.buffers.step(), gpu.stream)
    gpu.stream.sync()
    return finished(loop)


def captured(gpu: Gpu, launches: list[Launch]) -> Any:
    """Return an executable graph of `launches`."""
    builder = gpu.stream.create_graph_builder()
    builder.begin_building("thread_local")
    for launch in launches:
        gpu.enqueue(launch, builder)
    return builder.end_building().complete()


@both
def test_graph_of_one_step_replayed_is_the_plain_loop_bit_for_bit(gpu: Gpu, storage: Storage) -> None:
    loop = some_loop(gpu, storage)
    expected = plain(gpu, loop)
    begin, step = captured(gpu, [loop.buffers.begin()]), captured(gpu, [loop.buffers.step()])
    for _ in range(3):  # the second replay starts from what the first left behind
        begin.launch(gpu.stream)
        for _ in range(loop.schedule.steps):
            step.launch(gpu.stream)
        gpu.stream.sync()
        assert finished(loop) == expected
    begin.close()
    step.close()


@both
def test_graph_of_the_whole_loop_is_the_plain_loop_bit_for_bit(gpu: Gpu, storage: Storage) -> None:
    loop = some_loop(gpu, storage)
    expected = plain(gpu, loop)
    whole = captured(gpu, [loop.buffers.begin(), *[loop.buffers.step()] * loop.schedule.steps])
    for _ in range(2):
        whole.launch(gpu.stream)
        gpu.stream.sync()
        assert finished(loop) == expected
    whole.close()


def test_enqueue_keeps_the_loaded_code_alive(gpu: Gpu) -> None:
    enqueue = with_cuda_core(gpu.cubins)
    gc.collect()
    loop = some_loop(gpu, Storage.F32, steps=2)
    enqueue(loop.buffers.begin(), gpu.stream)
    gpu.stream.sync()
    assert loop.progress == (1, 0)


def test_large_image_is_filled_to_its_last_pixel(gpu: Gpu) -> None:
    """Planes with four times as many quads as the grid has threads, and a few more."""
    size = (2056, 2064)
    windows = [Window(7, size)]
    loop = Loop(gpu, Storage.F32, windows, size, Schedule(steps=2), in_place=True)
    loop.begin()
    state = loop.state
    tail = Loop(gpu, Storage.F32, [Window(7, size, top=size[0] - 4, left=size[1] - 16)], (4, 16), Schedule(steps=2))
    tail.begin()
    np.testing.assert_array_equal(state[:, :, -4:, -16:], tail.state)
    assert not np.isnan(state).any()


@both
def test_pycuda_runs_the_same_cubin_to_the_same_bits(gpu: Gpu, storage: Storage) -> None:
    pytest.importorskip("pycuda.driver", reason="PyCUDA is not installed", exc_type=ImportError)
    from pycuda import driver

    loop = some_loop(gpu, storage)
    expected = plain(gpu, loop)
    driver.init()
    # The primary context is the one cuda.core works in: the same addresses are valid in both.
    driver.Device(gpu.cuda.device_id).retain_primary_context().push()
    try:
        enqueue, stream = with_pycuda(gpu.cubins), driver.Stream()
        gpu.set(loop.buffers.state, np.zeros(loop.shape, np.float32))
        enqueue(loop.buffers.begin(), stream)
        for _ in range(loop.schedule.steps):
            enqueue(loop.buffers.step(), stream)
        stream.synchronize()
    finally:
        driver.Context.pop()
    assert finished(loop) == expected


def test_pycuda_array_is_an_image_without_a_copy(gpu: Gpu) -> None:
    pytest.importorskip("pycuda.driver", reason="PyCUDA is not installed", exc_type=ImportError)
    from pycuda import driver, gpuarray

    image: Array = np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)
    driver.init()
    driver.Device(gpu.cuda.device_id).retain_primary_context().push()
    try:
        guest = gpuarray.to_gpu(image)
        planes = [gpu.like((3, 48, 64), np.float32) for _ in range(2)]
        for address, plane in zip((int(guest.gpudata), gpu.put(image)), planes, strict=True):
            gpu.run(normalise_pad(address, (37, 50), 150, plane, (48, 64), Storage.F32))
    finally:
        driver.Context.pop()
    np.testing.assert_array_equal(gpu.get(planes[0]), gpu.get(planes[1]))

"""Our CUDA kernels on a GPU: bytes read and written per second, beside a copy in the same run.

`scripts/gpu-check` runs this as its step `rates`. Every figure is of a graph of many launches, so the time between
launches does not count. The launches use many sets of buffers in turn, so that no cache holds a set until its next
turn. The goal is the sampler step at 80 % of the copy, from 512×384×8 up.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from diffiqa.bench.ceilings import DEVICE_CALLS, DEVICE_COPY_BYTES, device_copy
from diffiqa.kernels.launch import (
    COEFFICIENTS,
    PROGRESS,
    STEP,
    WINDOW,
    Launch,
    SamplerBuffers,
    Storage,
    Window,
    crop_table,
    gather_crops,
    normalise_pad,
    source_table,
    step_table,
    window_table,
)
from diffiqa.runtime.gpu.cuda import CudaLayer
from diffiqa.runtime.gpu.layer import Layer

# Batch, height, width: from a crop to what a batch of large images needs.
SIZES = ((1, 224, 224), (8, 224, 224), (8, 384, 512), (8, 512, 512), (1, 1024, 1024), (1, 4096, 4096))
LAUNCHES = 20  # in a graph, at least
TOUCHED = 256 * 2**20  # bytes, before a launch meets its buffers again: an H100 caches 50 MB
ROUNDS = 10
CROP = 224

Take = Callable[[int], int]  # bytes to the address of memory for them


def rates(device: int) -> dict[str, Any]:
    """Return the GPU's name, the rates of a copy, and a row per kernel, size and storage type."""
    layer = CudaLayer(device)
    layer.enter()
    copy = device_copy(device, DEVICE_COPY_BYTES)
    copies, rows = [], []
    for size in SIZES:
        start = time.perf_counter()
        copy()
        copies.append(DEVICE_CALLS * 2 * DEVICE_COPY_BYTES / (time.perf_counter() - start) / 1e9)
        rows += measure(layer, *size, crop=CROP)
    peak = statistics.median(copies[1:])  # the first one warms up
    for row in rows:
        row["share_of_copy"] = row["gb_per_second"] / peak
    found = {"gpu": layer.name, "copy_gb_per_second": copies, "kernels": rows}
    layer.close()
    return found


def measure(
    layer: Layer, batch: int, height: int, width: int, *, crop: int, touched: int = TOUCHED
) -> list[dict[str, Any]]:
    """Return a row per kernel and storage type, for images of one size."""
    rows = []
    for storage in Storage:
        held: list[int] = []

        def take(size: int, held: list[int] = held) -> int:
            held.append(layer.allocate(size))
            return held[-1]

        for name, moved, sets, before in launches(layer, take, storage, (batch, height, width), crop, touched):
            seconds = time_graph(layer, sets, before)
            rate = moved / statistics.median(seconds) / 1e9
            rows.append(
                {
                    "kernel": name,
                    "size": [batch, height, width],
                    "bytes": moved,
                    "seconds": seconds,
                    "gb_per_second": rate,
                }
            )
        layer.synchronise()
        for address in held:
            layer.free(address)
    return rows


def launches(
    layer: Layer, take: Take, storage: Storage, size: tuple[int, int, int], crop: int, touched: int
) -> Iterator[tuple[str, int, list[Launch], list[Launch]]]:
    """Yield name, bytes read and written, the launch on each set of buffers, and what precedes a graph of them."""
    batch, height, width = size
    pixels, item = 3 * math.prod(size), storage.dtype.itemsize
    zeros = np.zeros(item * pixels, np.uint8)
    # The state, and y where that is another.
    written = pixels * (4 + (item if storage is Storage.F16 else 0))
    moved = pixels * (4 + item) + written
    steps = passes(sets_for(moved, touched)) + 1
    samplers = [sampler(layer, take, storage, size, steps, zeros) for _ in range(sets_for(written, touched))]
    begins = [buffers.begin() for buffers in samplers]
    yield begins[0].kernel, written, begins, []
    taken = [buffers.step() for buffers in samplers[: sets_for(moved, touched)]]
    yield taken[0].kernel, moved, taken, begins[: len(taken)]

    moved = pixels // batch * (1 + item)
    normalised = []
    for _ in range(sets_for(moved, touched)):
        image, plane = take(pixels // batch), take(item * pixels // batch)
        layer.upload(image, zeros[: pixels // batch])
        normalised.append(normalise_pad(image, (height, width), 3 * width, plane, (height, width), storage))
    yield normalised[0].kernel, moved, normalised, []

    moved = batch * 3 * crop**2 * (4 + item)
    sets = sets_for(moved, touched)
    # Other crops in every set, all of as few images as have them: of large images, one a set would fill the memory.
    corners = list(product(range(0, height - crop + 1, crop), range(0, width - crop + 1, crop)))
    images = -(-sets * batch // len(corners))
    places = list(product(range(images), corners))
    source, sources = take(images * 12 * height * width), take(256)
    layer.upload(sources, source_table([(source, Storage.F32)]))
    gathered = []
    for first in range(0, sets * batch, batch):
        crops = [(image, *corner) for image, corner in places[first : first + batch]]
        rows = crop_table(crops, images, (height, width), (crop, crop))
        table, out = take(rows.nbytes), take(item * batch * 3 * crop**2)
        layer.upload(table, rows)
        gathered.append(gather_crops(sources, 1, (height, width), table, batch, out, (crop, crop), storage))
    yield gathered[0].kernel, moved, gathered, []


def sampler(
    layer: Layer, take: Take, storage: Storage, size: tuple[int, int, int], steps: int, zeros: npt.NDArray[np.uint8]
) -> SamplerBuffers:
    """Return memory of its own for a loop of so many steps."""
    batch, height, width = size
    state = take(4 * 3 * math.prod(size))
    buffers = SamplerBuffers(
        storage,
        *(batch, height, width, steps, steps),
        state=state,
        y=state if storage is Storage.F32 else take(zeros.nbytes),
        noise=take(zeros.nbytes),
        noise_level=take(4 * batch),
        taps=0,
        windows=take(batch * WINDOW.itemsize),
        table=take(steps * STEP.itemsize),
        progress=take(PROGRESS.itemsize),
    )
    half = np.full(steps, 0.5, np.float32)
    layer.upload(buffers.table, step_table(dict.fromkeys(COEFFICIENTS, half), [], range(steps)))
    windows = [Window(seed, (height, width)) for seed in range(batch)]
    layer.upload(buffers.windows, window_table(windows, (height, width)))
    layer.upload(buffers.noise, zeros)
    return buffers


def sets_for(moved: int, touched: int) -> int:
    """Return how many sets of buffers are needed until so many bytes are touched."""
    return max(1, -(-touched // moved))


def passes(sets: int) -> int:
    """Return how often a graph goes through all sets."""
    return -(-LAUNCHES // sets)


def time_graph(layer: Layer, sets: list[Launch], before: list[Launch]) -> list[float]:
    """Return the seconds of one launch, measured as a graph of many, on each set of buffers in turn."""
    for launch in (*before[:1], sets[0]):  # loads their code, which is forbidden while capturing
        layer.launch(launch)
    layer.synchronise()
    layer.begin_capture()
    for launch in sets * passes(len(sets)):
        layer.launch(launch)
    graph = layer.end_capture()
    marks = []
    for _ in range(ROUNDS + 1):
        for launch in before:
            layer.launch(launch)
        first = layer.mark()
        graph.launch()
        marks.append((first, layer.mark()))
    layer.synchronise()
    graph.close()
    return [layer.seconds_between(*pair) / (len(sets) * passes(len(sets))) for pair in marks[1:]]

"""Our CUDA kernels on a GPU: bytes read and written per second, beside a copy in the same run.

    python benchmarks/kernel_rates.py [--device N]

Writes results/kernel-rates.json, with the GPU's name. Every figure is of a graph of many launches, so that the time
between launches does not count. The goal is the sampler step at 80 % of the copy from 512×384×8 up. Never run yet.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from record import write

from diffiqa.bench.ceilings import DEVICE_CALLS, DEVICE_COPY_BYTES, device_copy
from diffiqa.errors import DiffiqaError
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
from diffiqa.runtime.device_layer import CudaLayer, Layer

# Batch, height, width: from a crop to what a batch of large images needs.
SIZES = ((1, 224, 224), (8, 224, 224), (8, 384, 512), (8, 512, 512), (1, 1024, 1024), (1, 4096, 4096))
LAUNCHES = 20  # in a graph
ROUNDS = 10
CROP = 224

Take = Callable[[int], int]  # bytes to the address of memory for them


def main() -> None:
    """Measure all kernels; exits with 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=int, default=0)
    given = parser.parse_args()
    try:
        layer = CudaLayer(given.device)
        layer.enter()
        copy = device_copy(given.device, DEVICE_COPY_BYTES)
    except DiffiqaError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(2)
    copies, rows = [], []
    for size in SIZES:
        start = time.perf_counter()
        copy()
        copies.append(DEVICE_CALLS * 2 * DEVICE_COPY_BYTES / (time.perf_counter() - start) / 1e9)
        rows += measure(layer, *size, crop=CROP)
    peak = statistics.median(copies[1:])  # the first one warms up
    for row in rows:
        row["share_of_copy"] = row["gb_per_second"] / peak
    write("kernel-rates", {"gpu": layer.name, "copy_gb_per_second": copies, "kernels": rows})
    layer.close()


def measure(layer: Layer, batch: int, height: int, width: int, *, crop: int) -> list[dict[str, Any]]:
    """Return a row per kernel and storage type, for images of one size."""
    rows = []
    for storage in Storage:
        held: list[int] = []

        def take(size: int, held: list[int] = held) -> int:
            held.append(layer.allocate(size))
            return held[-1]

        for name, moved, launch, before in launches(layer, take, storage, (batch, height, width), crop):
            seconds = time_graph(layer, launch, before)
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
    layer: Layer, take: Take, storage: Storage, size: tuple[int, int, int], crop: int
) -> Iterator[tuple[str, int, Launch, Launch | None]]:
    """Yield name, bytes read and written, the launch, and what must be launched before a graph of many of them."""
    batch, height, width = size
    pixels, item = 3 * math.prod(size), storage.dtype.itemsize
    steps = LAUNCHES + 1
    state = take(4 * pixels)
    buffers = SamplerBuffers(
        storage,
        *(batch, height, width, steps),
        state=state,
        y=state if storage is Storage.F32 else take(item * pixels),
        noise=take(item * pixels),
        noise_level=take(4 * batch),
        taps=0,
        windows=take(batch * WINDOW.itemsize),
        table=take(steps * STEP.itemsize),
        progress=take(PROGRESS.itemsize),
    )
    half = np.full(steps, 0.5, np.float32)
    layer.upload(buffers.table, step_table(dict.fromkeys(COEFFICIENTS, half), []))
    windows = [Window(seed, (height, width)) for seed in range(batch)]
    layer.upload(buffers.windows, window_table(windows, (height, width)))
    zeros = np.zeros(item * pixels, np.uint8)
    layer.upload(buffers.noise, zeros)
    written = pixels * (4 + (item if storage is Storage.F16 else 0))  # the state, and y where that is another
    begin, step = buffers.begin(), buffers.step()
    yield begin.kernel, written, begin, None
    yield step.kernel, pixels * (4 + item) + written, step, begin

    image, plane = take(pixels // batch), take(item * pixels // batch)
    layer.upload(image, zeros[: pixels // batch])
    normalise = normalise_pad(image, (height, width), 3 * width, plane, (height, width), storage)
    yield normalise.kernel, pixels // batch * (1 + item), normalise, None

    rows = crop_table([(i, height - crop, width - crop) for i in range(batch)], batch, (height, width), (crop, crop))
    sources, places = take(256), take(rows.nbytes)
    layer.upload(sources, source_table([(state, Storage.F32)]))
    layer.upload(places, rows)
    out = take(item * batch * 3 * crop**2)
    gather = gather_crops(sources, 1, (height, width), places, batch, out, (crop, crop), storage)
    yield gather.kernel, batch * 3 * crop**2 * (4 + item), gather, None


def time_graph(layer: Layer, launch: Launch, before: Launch | None) -> list[float]:
    """Return the seconds of one launch, measured as a graph of many."""
    for _ in range(2 if before is None else 1):  # loads its code, which is forbidden while capturing
        layer.launch(before or launch)
    layer.launch(launch)
    layer.synchronise()
    layer.begin_capture()
    for _ in range(LAUNCHES):
        layer.launch(launch)
    graph = layer.end_capture()
    marks = []
    for _ in range(ROUNDS + 1):
        if before:
            layer.launch(before)
        first = layer.mark()
        graph.launch()
        marks.append((first, layer.mark()))
    layer.synchronise()
    graph.close()
    return [layer.seconds_between(*pair) / LAUNCHES for pair in marks[1:]]


if __name__ == "__main__":
    main()

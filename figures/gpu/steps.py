"""What every step of `scripts/gpu-check` does: a function of its name, given a place and notes."""

import copy
import csv
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree as ET

import numpy as np
import torch
from torch import Tensor, nn

from ...bench.ceilings import DEVICE_CALLS, DEVICE_COPY_BYTES, device_copy
from ...bench.gpu import GpuWatch
from ...bench.torch_loop import TorchScorer, Way, lowered_unet
from ...engine.manifest import Manifest, StageName
from ...export.stages import fold_unet
from ...model.checkpoint import Loaded, load
from ...model.config import preset
from ...model.network import build
from ...model.unet import ResidualBlock, UNet
from ...runtime import plan as plan_module
from ...runtime.gpu.cuda import CudaLayer
from ...runtime.gpu.graphs import Form
from ...runtime.plan import make_plan
from ...runtime.results import Mode, Options, Score
from ...tests.tiny import TINY, perturbed, photo
from .check import Notes, Place
from .networks import HALF, Networks, TorchOnGpu, channels_last

PAPER_GFLOP = 2 * 143.56  # of one full-size U-Net step at 224×224, by the count in the engine's manifest
SIDE = 224  # of a crop of the full-size model
TINY_SIDE = 32


def facts(place: Place, notes: Notes) -> None:
    """What the card is and reaches at most, and what NVML answers."""
    card, watch = torch.cuda.get_device_properties(0), GpuWatch(0)
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call, unused-ignore]
    notes.add(cuda=torch.version.cuda, cudnn=cudnn, multiprocessors=card.multi_processor_count)
    for name, dtype in (("fp16", HALF), ("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        allow_tf32(name == "tf32")
        notes.attempt(f"{name}_tflops", matmul_tflops, place, dtype)
    watch.glance()

    def copy_rate() -> float:
        run = device_copy(0, DEVICE_COPY_BYTES)
        seconds = [seconds_of(run) for _ in range(6)][1:]
        return DEVICE_CALLS * 2 * DEVICE_COPY_BYTES / statistics.median(seconds) / 1e9

    if not place.dry:  # the fake driver copies nothing within the device
        notes.attempt("copy_gb_per_second", copy_rate)
    notes.add(gpu=asdict(watch.found(card.name)), refused=watch.refused)


def kernels(place: Place, notes: Notes) -> None:
    """Our kernels' own tests. The large image moves 0.8 GB; PyCUDA is a guest."""
    few = " and (crops_of_all_kinds or last_step_adds or steps_are_numpys) and not seed1" if place.dry else ""
    run_tests(place, notes, ["tests/kernels"], f"not large_image and not pycuda{few}")


def layer(place: Place, notes: Notes) -> None:
    """The tests of our layer over cuda.core; of events, NVML and arrays of other libraries, where they can be."""
    files = ["tests/runtime/gpu/test_on_gpu.py", "tests/bench/test_on_gpu.py", "tests/runtime/test_arrays.py"]
    which = "test_layer" if place.dry else "test_layer or (host and not thousand) or events or nvml or copy or array"
    run_tests(place, notes, files, which)


def run_tests(place: Place, notes: Notes, files: Sequence[str], which: str, under: Sequence[str] = ()) -> None:
    """Run tests of the project that need a GPU, and note how many passed and what the others said."""
    report = place.folder / f"{len(list(place.folder.iterdir()))}.xml"
    command = [*under, sys.executable, "-P", "-m", "pytest", "-v", "-m", "gpu", "-k", which, "-p", "no:cacheprovider"]
    # A test that hangs says where before the step's limit ends it.
    command += ["-W", "default", "--tb=short", "-o", "faulthandler_timeout=30", f"--junitxml={report}"]
    # pytest sees the package under its right name from inside the link to it.
    inside = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0]) / "diffiqa"
    code = subprocess.run([*command, *files], cwd=inside, check=False).returncode
    counts, bad = {"passed": 0, "failed": 0, "skipped": 0}, {}
    skipped: dict[str, int] = {}
    for case in ET.parse(report).iter("testcase") if report.exists() else ():  # noqa: S314 — our pytest wrote it
        part = next((part for part in case if part.tag in {"failure", "error", "skipped"}), None)
        kind = "passed" if part is None else "skipped" if part.tag == "skipped" else "failed"
        counts[kind] += 1
        said = str(part.get("message"))[:500] if part is not None else ""
        if kind == "failed":
            bad[f"{case.get('classname')}::{case.get('name')}"] = said
        elif kind == "skipped":
            skipped[said] = skipped.get(said, 0) + 1
    notes.add(**{key: notes.figures.get(key, 0) + count for key, count in counts.items()})
    notes.add(skipped_because=notes.figures.get("skipped_because", {}) | skipped)
    name = Path(under[0]).name if under else "tests"
    notes.check(f"{name}: some passed", counts["passed"] > 0, counts)
    notes.check(f"{name}: none failed", not bad and not code, bad or code)


# ------------------------------------------------------------------------------------------------- the executor, `mini`


def executor(place: Place, notes: Notes) -> None:
    """The device executor with PyTorch's networks: scores as the host's, the same bits in every form, memory flat."""
    allow_tf32(False)
    torch.backends.cudnn.deterministic = True  # bits are compared
    networks = Networks(tiny() if place.dry else load(place.root / "models" / "mini" / "model.safetensors"))
    size = networks.manifest.crop.size
    plan_module.TILE, plan_module.OVERLAP = size + 32, 32  # tiles at a size that the CPU can afford
    shapes = ((Mode.WHOLE, 0, 0, 1), (Mode.WHOLE, 16, 46, 3), (Mode.CROP, 9, 16, 2), (Mode.TILE, 36, 70, 3))
    jobs = [
        (photo(seed, size + down, size + right), Options(crops=crops, mode=mode, seed=seed))
        for seed, (mode, down, right, crops) in enumerate(shapes[1::2] if place.dry else shapes)
    ]
    expected = [networks.host().score(*job).score for job in jobs]
    notes.add(host_scores=expected)
    for half in (False, True):
        kind, plain = "fp16" if half else "fp32", list[bytes]()
        backend = TorchOnGpu(place, networks, sizes_of(networks, jobs), half=half)
        for form in Form:
            scorer, device = backend.scorer(form)
            with scorer:
                found = [scorer.score(*job, pictures=True) for _ in range(3) for job in jobs]
                captured = device.graphs.captures > 0
            plain = plain or [bits(score) for score in found[: len(jobs)]]
            remarks = [note for score in found for note in score.notes]
            notes.check(f"{kind} {form}: graphs are captured", captured == (form != "none") and not remarks, remarks)
            same = [bits(score) == plain[i % len(jobs)] for i, score in enumerate(found)]
            notes.check(f"{kind} {form}: every run has the bits of the first without a graph", all(same), same)
        apart = [abs(score.score - host) for score, host in zip(found, expected, strict=False)]
        notes.add(**{f"{kind}_worst_score": max(apart)})
        notes.check(f"{kind}: scores are the host's", max(apart) < (2e-2 if half else 1e-3), apart)
        four: list[Any] = [photo(seed, size, size) for seed in range(4)]
        with backend.scorer(Form.LOOP, 4)[0] as scorer:
            alone = [bits(scorer.score(pixels, jobs[0][1])) for pixels in four]
            together = [bits(score) for _ in range(2) for score in scorer.score(four, jobs[0][1])]
        notes.check(f"{kind}: four together have the bits of each alone", together == 2 * alone)
    images, early = 15 if place.dry else 200, 0
    with backend.scorer(Form.LOOP)[0] as scorer:
        for number in range(images):
            scorer.score(photo(number % 7, size, size), jobs[0][1])
            early = early if number > 9 else memory_used()
        grown = memory_used() - early
    notes.check(f"memory is flat over {images} images", grown <= 2**21, {"grown_bytes": grown})


def bits(score: Score) -> bytes:
    """Return all that a score holds of its crops, and its maps if there are any."""
    maps = (score.pictures.score_map, score.pictures.weight_map) if score.pictures else ()
    return b"".join([repr(score.crops).encode(), *(plane.tobytes() for plane in maps)])


def sizes_of(networks: Networks, jobs: Iterable[tuple[Any, Options]]) -> list[str]:
    """Return the sizes that the U-Net meets, as `iqa-build --sizes` takes them."""
    plans = [make_plan(found.shape[0], found.shape[1], networks.manifest, how) for found, how in jobs]
    sizes = {(window.height, window.width) for plan in plans for window in plan.windows}
    return [f"{height}x{width}" for height, width in sorted(sizes | {(networks.manifest.crop.size,) * 2})]


def tiny() -> Loaded:
    """Return the tests' model."""
    return Loaded(perturbed(build(TINY, seed=1), seed=2), (), ())


def memory_used() -> int:
    """Return the bytes of the card's memory that are in use."""
    from cuda.bindings import driver

    _, free, whole = driver.cuMemGetInfo()
    return int(whole) - int(free)


# -------------------------------------------------------------------------------------------- a U-Net step, full size


class Rates:
    """Times of one U-Net step, beside a matrix product in the same process."""

    def __init__(self, place: Place, notes: Notes) -> None:
        self._place, self._notes = place, notes
        torch.backends.cudnn.benchmark = True
        allow_tf32(False)
        self._peak = matmul_tflops(place, HALF if place.device == "cuda" else torch.float32)
        notes.add(matmul_fp16_tflops=self._peak)

    def note(self, name: str, batch: int, milliseconds: float) -> None:
        """Note a time, and the rate that it is."""
        tflops = PAPER_GFLOP * batch / milliseconds
        row = {"ms": milliseconds, "ms_per_crop": milliseconds / batch, "tflops": tflops}
        self._notes.add(**{f"{name}_b{batch}": row | {"share_of_matmul": tflops / self._peak}})


def unet(place: Place, notes: Notes) -> None:
    """float32, TF32 and fp16, for one crop and for eight; the figures that decide come first."""
    rates, exact = Rates(place, notes), full_unet(place)
    last = channels_last(copy.deepcopy(exact), place)
    half = lowered(place, copy.deepcopy(last))

    @torch.inference_mode()
    def timed(name: str, module: nn.Module, batch: int, dtype: torch.dtype, *, graph: bool, tf32: bool) -> None:
        allow_tf32(tf32)
        run = partial(module, *unet_inputs(place, batch, dtype))
        rates.note(name, batch, median_ms(graph_of(run) if graph else run))

    for name, module, dtype in (
        ("fp16", half, low(place)),
        ("tf32", last, torch.float32),
        ("fp32", exact, torch.float32),
    ):
        for batch in (1, 8):
            for graph in (True, False):
                label = f"{name}_{'graph' if graph else 'eager'}"
                work = partial(timed, label, module, batch, dtype, graph=graph, tf32=name == "tf32")
                notes.attempt(f"{label}_b{batch}", work)
    notes.attempt("fp16_difference_from_fp32", difference, place, exact, half)


def compile(place: Place, notes: Notes, mode: str = "default") -> None:  # noqa: A001 — a step's name
    """Inductor in a mode: seconds to compile, and rates with a CUDA graph and without."""
    rates, exact = Rates(place, notes), full_unet(place)
    half = lowered(place, channels_last(copy.deepcopy(exact), place))
    how: dict[str, Any] = {"backend": "eager"} if place.dry else {"mode": mode}
    for batch in (1,) if place.dry else (1, 8):
        torch.compiler.reset()
        fast = cast(nn.Module, torch.compile(half, dynamic=False, fullgraph=True, **how))
        run = partial(fast, *unet_inputs(place, batch, low(place)))
        with torch.inference_mode():
            notes.add(**{f"compile_seconds_b{batch}": seconds_of(run)})
            rates.note("plain", batch, median_ms(run))
            rates.note("graph", batch, median_ms(graph_of(run)))
        if batch == 1:
            notes.attempt("difference_from_fp32", difference, place, exact, fast)


def autotune(place: Place, notes: Notes) -> None:
    """Inductor's best, at minutes of compilation."""
    compile(place, notes, "max-autotune-no-cudagraphs")


def embedding(place: Place, notes: Notes) -> None:
    """A step with what depends on the step alone computed, and looked up in a table."""
    torch.backends.cudnn.benchmark = True
    half = lowered(place, channels_last(full_unet(place), place))
    for batch in (1, 8):
        inputs = unet_inputs(place, batch, low(place))
        with torch.inference_mode():
            other = tabulated(half, inputs[2])
            gap = float((other(*inputs) - half(*inputs)).norm() / half(*inputs).norm())
            notes.check(f"{batch} at a time: the table gives the same noise", gap < 1e-2, gap)
            # Ten calls in a graph: what a launch costs does not count.
            times = [median_ms(graph_of(partial(module, *inputs), 10)) / 10 for module in (half, other)]
        notes.add(**{f"b{batch}": {"ms": times[0], "ms_with_table": times[1], "saved": 1 - times[1] / times[0]}})


class Row(nn.Module):
    """A row of a table, for the number of a step that is on the device, in the place of the noise embedding."""

    def __init__(self, table: Tensor, step: Tensor) -> None:
        super().__init__()
        self.table, self.step = table, step

    def forward(self, _noise_level: Tensor) -> Tensor:
        """Return a row for every image."""
        return self.table.index_select(0, self.step)


class AddPart(nn.Module):
    """A block's part of the row, added to every pixel."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.part = slice(start, stop)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        """Shift (B, C, H, W)."""
        return x + row[:, self.part, None, None]


def tabulated(unet: nn.Module, level: Tensor) -> nn.Module:
    """Return a copy of a U-Net in which all that depends on the noise level is a table of 50 rows."""
    other: Any = copy.deepcopy(unet)
    blocks: list[Any] = [part for part in other.modules() if isinstance(part, ResidualBlock)]
    embedding = other.noise_level_mlp(level[:1])
    pieces = [block.noise_func.noise_func(embedding) for block in blocks]
    stops = np.cumsum([piece.shape[1] for piece in pieces]).tolist()
    for block, start, stop in zip(blocks, [0, *stops], stops, strict=False):
        block.noise_func = AddPart(start, stop)
    step = torch.full((len(level),), 7, device=level.device)
    other.noise_level_mlp = Row(torch.cat(pieces, dim=1).repeat(50, 1), step)
    return cast(nn.Module, other)


def full_unet(place: Place) -> nn.Module:
    """Return the deployed U-Net of `paper` with seeded weights, in float32."""
    torch.manual_seed(0)
    with torch.device(place.device):
        unet = UNet(TINY.unet if place.dry and TINY.unet else preset("paper").unet)  # type: ignore[arg-type]  # it has one
    return fold_unet(unet.eval()).to(place.device)


def low(place: Place) -> torch.dtype:
    """Return what tensor cores multiply; a CPU stays at float32."""
    return HALF if place.device == "cuda" else torch.float32


def lowered(place: Place, unet: nn.Module) -> nn.Module:
    """Return the U-Net in that precision."""
    return lowered_unet(cast(UNet, unet), low(place))


def unet_inputs(place: Place, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return state, image and noise level: random, because zeros are faster."""
    side = TINY_SIDE if place.dry else SIDE
    y, condition = (torch.randn(batch, 3, side, side, device=place.device).to(dtype) for _ in "yc")
    return y, condition, torch.full((batch, 1), 0.6, device=place.device)


@torch.inference_mode()
def difference(place: Place, exact: nn.Module, other: nn.Module) -> float:
    """Return how far another form of a network is from float32: norm of the difference over norm of the result."""
    allow_tf32(False)
    y, condition, level = unet_inputs(place, 1, torch.float32)
    wanted, found = exact(y, condition, level), other(y.to(low(place)), condition.to(low(place)), level).float()
    return float((found - wanted).norm() / wanted.norm())


def matmul_tflops(place: Place, dtype: torch.dtype) -> float:
    """Return the rate of a product of two square matrices of random numbers."""
    side = 64 if place.dry else 8192 if place.device == "cuda" else 1024
    a, b = (torch.randn(side, side, device=place.device).to(dtype) for _ in "ab")
    out = torch.empty_like(a)
    return 2 * side**3 / median_ms(lambda: torch.matmul(a, b, out=out), repeats=10) / 1e9


def allow_tf32(allowed: bool) -> None:
    """Let float32 products be computed in TF32, or not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def seconds_of(call: Callable[[], object]) -> float:
    """Return the time of a call by the host's clock, the device's work included."""
    begun = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def median_ms(call: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time of a call on the device, after three to warm up."""
    for _ in range(3):
        call()
    if seconds_of(call) > 1:
        repeats = 3  # on a CPU
    event = partial(torch.cuda.Event, enable_timing=True)
    pairs = [(event(), event()) for _ in range(repeats)]
    for first, last in pairs:
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(float(first.elapsed_time(last)) for first, last in pairs)


def graph_of(call: Callable[[], object], times: int = 1) -> Callable[[], object]:
    """Return what replays a CUDA graph of so many calls; without a card, replaying does nothing."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay


# ------------------------------------------------------------------------------------------------ a score, full size


def score(place: Place, notes: Notes) -> None:
    """The whole full-size score through our executor, timed as `iqa-bench` does, and PyTorch's own loop beside it."""
    from ...bench.running import DeviceRuntime

    torch.backends.cudnn.benchmark = True
    allow_tf32(False)
    networks = Networks(tiny() if place.dry else load(None, preset="paper", seed=0))
    manifest, size = networks.manifest, networks.manifest.crop.size
    one, wide = photo(0, size, size), photo(1, size + size // 7, size + 3 * size // 7)
    cases = {
        "one crop": ([one], Options(crops=1)),
        "8 crops, restored as one image": ([wide], Options(crops=8)),
        "8 crops, each restored": ([wide], Options(crops=8, mode=Mode.CROP)),
        "8 images of one crop": ([photo(seed, size, size) for seed in range(8)], Options(crops=1)),
    }
    backend = TorchOnGpu(place, networks, sizes_of(networks, [(found[0], how) for found, how in cases.values()]))
    with torch.inference_mode():
        for batch in (1, 8):
            run = partial(backend.modules[StageName.UNET], *unet_inputs(place, batch, low(place)))
            notes.add(**{f"step_ms_b{batch}": median_ms(graph_of(run))})
    runtime = DeviceRuntime(backend.directory, cast(Any, backend))
    runtime.form = Form.LOOP
    for name, (pixels, options) in cases.items():
        notes.attempt(name, timed_case, notes, runtime, manifest, name, pixels, options)
    runtime.close()

    def peer(way: Way) -> dict[str, float]:
        scorer = TorchScorer(networks.model, torch.device(place.device), low(place), way)
        found = [scorer.score(one, manifest, Options(crops=1)) for _ in range(2)]
        seconds = [seconds_of(lambda: scorer.score(one, manifest, Options(crops=1))) for _ in range(5)]
        return {"seconds_per_image": statistics.median(seconds), "score": found[-1]}

    for way in (Way.EAGER, Way.GRAPH):
        notes.attempt(f"peer: PyTorch, {way}", peer, way)
    names = [name for name in ("one crop", f"peer: PyTorch, {Way.EAGER}") if name in notes.figures]
    found = [notes.figures[name]["score"] for name in names]
    notes.check("PyTorch's own loop gives our score", len(found) == 2 and abs(found[0] - found[1]) < 2e-2, found)


def timed_case(
    notes: Notes, runtime: Any, manifest: Manifest, name: str, pixels: list[Any], options: Options
) -> dict[str, Any]:
    """Score the same images again and again; return times, launches and energy per image."""
    batch = len(pixels)
    case = runtime.case(manifest, batch, time.perf_counter)
    warm = [seconds_of(lambda: case.scorer.score(pixels, options)) for _ in range(3)]  # plain, captured, replayed
    found, plain = (scorer.score(pixels, options) for scorer in (case.scorer, case.plain_scorer))
    good = all(a.score == b.score and math.isfinite(a.score) and not a.notes for a, b in zip(found, plain, strict=True))
    notes.check(f"{name}: a graph, without remarks, gives the score of none", good, [repr(found[0]), repr(plain[0])])
    samples = [case.take(pixels, options) for _ in range(3)]
    middle = {key: statistics.median(sample.device[key] for sample in samples) for key in samples[0].device}
    case.layer.marking = True
    case.layer.reset()
    case.scorer.score(pixels, options)
    case.layer.marking = False
    graphs = [1e3 * seconds for seconds in case.layer.spans()["graph"]]  # every window's loop, then the heads
    row = {
        "score": found[0].score,
        "seconds_per_image": statistics.median(sample.seconds for sample in samples),
        "first_seconds": warm,
        "seconds_per_image_without_graph": middle["plain"],
        "host_launching_seconds": middle["enqueue"],
        "host_launching_seconds_without_graph": middle["enqueue_plain"],
        "idle": 1 - middle["busy"] / middle["wall"],
        "calls": case.timed_calls,
        "graphs_ms": graphs,
    }
    if pixels[0].shape[:2] == (manifest.crop.size,) * 2:
        row["loop_over_bare_steps"] = graphs[0] / (notes.figures[f"step_ms_b{batch}"] * manifest.schedule.steps)
    images, begun, before = 0, time.perf_counter(), runtime.watch.joules()
    while before is not None and time.perf_counter() - begun < 2:  # the counter is slow
        case.scorer.score(pixels, options)
        images += batch
    after = runtime.watch.joules()
    case.close()
    return row | ({"joules_per_image": (after - before) / images} if after is not None and before is not None else {})


# ---------------------------------------------------------------------------------------------------- single answers


def rates(place: Place, notes: Notes) -> None:
    """Bytes per second of our kernels; the goal is the sampler step at 0.8 of a copy from 8×384×512 on."""
    from .. import kernel_rates

    if place.dry:
        rows, copies = kernel_rates.measure(CudaLayer(0), 1, 40, 48, crop=32, touched=0), [1.0]
    else:
        found = kernel_rates.rates(0)
        rows, copies = found["kernels"], found["copy_gb_per_second"]
    notes.add(copy_gb_per_second=copies)
    notes.add(kernels=[{key: value for key, value in row.items() if key != "seconds"} for row in rows])
    steps = [
        row for row in rows if row["kernel"].startswith("sampler_step") and math.prod(row["size"]) >= 8 * 384 * 512
    ]
    notes.add(sampler_step_worst_share=min((row["share_of_copy"] for row in steps), default=None))


def pool(place: Place, notes: Notes) -> None:
    """Fill much of the card through our layer, free it, and see whether PyTorch gets it: at once, and after `trim`."""
    device, used = CudaLayer(0), dict[str, float]()
    torch.empty(1, device=place.device)
    size = 2**24 if place.dry else int(0.6 * torch.cuda.mem_get_info()[0])

    def note(name: str) -> None:
        device.synchronise()
        used[name] = memory_used() / 2**20

    def torch_gets_it() -> bool:
        try:
            torch.empty(size, dtype=torch.uint8, device=place.device)
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    note("before")
    address = device.allocate(size)
    note("held")
    device.free(address)
    note("freed")
    freely = torch_gets_it()
    device.trim()
    note("trimmed")
    notes.add(used_mib=used, torch_gets_freed_memory=freely, torch_gets_trimmed_memory=torch_gets_it())
    notes.check("trimming gives the memory back", used["trimmed"] - used["before"] < 64, used)
    device.close()


def sanitizer(place: Place, notes: Notes) -> None:
    """memcheck and racecheck of NVIDIA's compute-sanitizer on a few kernel tests."""
    nvcc = Path(shutil.which("nvcc") or "nvcc").resolve().parent
    program = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], str(nvcc)]))
    if place.dry:  # a program that finds nothing
        stand_in = place.folder / "compute-sanitizer"
        stand_in.write_text('#!/bin/sh\necho "= ERROR SUMMARY: 0 errors" >"$6"\nshift 6\nexec "$@"\n', encoding="utf-8")
        stand_in.chmod(0o755)
        program = str(stand_in)
    if program is None:
        notes.check("compute-sanitizer is there", ok=False)
        return
    few = "rows_may_be_apart or looked_at_twice or tap_buffer_alone or last_step_adds"
    for tool, which in (("memcheck", few), ("racecheck", "shape_of_the_launch or tap_buffer_alone")):
        log = place.folder / tool
        under = [program, "--tool", tool, "--target-processes", "all", "--log-file", str(log)]
        begun = time.perf_counter()
        run_tests(place, notes, ["tests/kernels/test_images.py", "tests/kernels/test_sampler.py"], which, under)
        text = log.read_text(errors="replace") if log.exists() else ""
        said = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
        notes.add(**{tool: {"summary": said, "seconds": time.perf_counter() - begun}})
        clean = bool(said) and all(" 0 errors" in line or " 0 hazards" in line for line in said)
        notes.check(f"{tool} finds nothing", clean, said or text.splitlines()[-3:])


def training(place: Place, notes: Notes) -> None:
    """`iqa-train restore` by the recipe that made `mini`, on the card and on the CPU, and of the full-size U-Net."""
    notes.attempt("mini", trained, place, "mini", place.device, 1 if place.dry else 30, batch=2 if place.dry else 16)
    if place.device == "cuda":
        notes.attempt("mini on the CPU", trained, place, "mini", "cpu", 15, batch=16)
        notes.attempt("paper", trained, place, "paper", place.device, 20, batch=16)
    for name, run in notes.figures.items():
        first, last = run["losses"][0], statistics.fmean(run["losses"][-3:])
        down = place.dry or "CPU" in name or last < 0.8 * first
        notes.check(f"{name}: the loss goes down", math.isfinite(last) and down, [first, last])


def trained(place: Place, name: str, device: str, seconds: float, *, batch: int) -> dict[str, Any]:
    """Train for so long from its first step on, interrupt it, and return its pace and losses from its own log."""
    text = (place.root / "training" / "recipes" / "mini-restore.toml").read_text(encoding="utf-8")
    every = 1 if device == "cpu" else 10
    for key, value in {"preset": f'"{name}"', "steps": 10**6, "batch": batch, "log_every": every}.items():
        text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
    folder = place.folder / f"{name}-{device}"
    recipe, log = folder.with_suffix(".toml"), folder / "log.csv"
    recipe.write_text(text, encoding="utf-8")
    command = [
        sys.executable,
        "-P",
        "-m",
        "diffiqa.cli",
        "train",
        "restore",
        "--config",
        str(recipe),
        "-o",
        str(folder),
    ]
    command += [
        "--data",
        str(place.root / "samples"),
        "--device",
        device,
        "--threads",
        str(min(16, os.cpu_count() or 2)),
    ]
    process, first = subprocess.Popen(command), math.inf
    while process.poll() is None and time.monotonic() - first < seconds:
        time.sleep(0.1)
        first = min(first, time.monotonic()) if log.exists() else first
    process.send_signal(signal.SIGINT)
    process.wait(30)
    rows = list(csv.DictReader(log.read_text().splitlines()))
    pace = statistics.median(float(row["seconds"]) for row in rows[len(rows) // 3 :])
    losses = [float(row["loss"]) for row in rows]
    return {
        "steps_per_second": 1 / pace,
        "crops_per_second": batch / pace,
        "steps": int(rows[-1]["step"]),
        "losses": losses,
    }

"""What the steps of `scripts/gpu-check` do, but for those on the U-Net alone: a function of a step's name for each."""

import csv
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree as ET

import torch
from onnxruntime import get_available_providers
from PIL import Image

from ...bench.ceilings import DEVICE_CALLS, DEVICE_COPY_BYTES, device_copy
from ...bench.gpu import GpuWatch
from ...bench.running import DeviceRuntime
from ...bench.torch_loop import TorchScorer, Way
from ...cli import main
from ...engine.manifest import Manifest, StageName, open_engine
from ...export.api import export
from ...model.checkpoint import Loaded, load
from ...model.network import build
from ...model.pfd.checkpoint import load as load_pfd
from ...runtime import plan as plan_module
from ...runtime.backends import BACKENDS
from ...runtime.gpu.cuda import CudaLayer
from ...runtime.gpu.graphs import Form
from ...runtime.plan import make_plan
from ...runtime.results import Mode, Options, Score
from ...tests.model.pfd.small import random_small
from ...tests.tiny import TINY, perturbed, photo
from . import kernel_rates
from .check import Notes, Place
from .networks import HALF, Networks, TorchOnGpu
from .unet import CROPS, Rates, allow_tf32, graph_of, inputs_of, low, matmul_tflops, median_ms, seconds_of

ONNX_ON_GPU = "CUDAExecutionProvider" in get_available_providers()


def facts(place: Place, notes: Notes) -> None:
    """What the card is and reaches at most, and what NVML answers."""
    card, watch = torch.cuda.get_device_properties(0), GpuWatch(0)
    notes.add(CUDA=torch.version.cuda, multiprocessors=card.multi_processor_count)
    notes.add(cuDNN=torch.backends.cudnn.version())  # type: ignore[no-untyped-call, unused-ignore]
    for name, dtype in (("fp16", HALF), ("bf16", torch.bfloat16), ("TF32", torch.float32), ("float32", torch.float32)):
        allow_tf32(name == "TF32")
        notes.attempt(f"product of 8192×8192 in {name}, TFLOP/s", matmul_tflops, place, dtype)
    watch.glance()

    def copy_rate() -> float:
        run = device_copy(0, DEVICE_COPY_BYTES)
        seconds = [seconds_of(run) for _ in range(6)][1:]
        return DEVICE_CALLS * 2 * DEVICE_COPY_BYTES / statistics.median(seconds) / 1e9

    if not place.dry:  # the fake driver copies nothing within the device
        notes.attempt("copy within its memory, GB/s", copy_rate)
    found = watch.found(card.name)
    notes.add(gpu=[f"{name}: {value}" for name, value in {**vars(found), **vars(found.load)}.items()])
    notes.add(refused=[f"{what}: {why}" for what, why in watch.refused.items()])


def kernels(place: Place, notes: Notes) -> None:
    """Our kernels' own tests; PyCUDA is a guest."""
    few = " and (crops_of_all_kinds or last_step_adds or steps_are_numpys) and not seed1" if place.dry else ""
    run_tests(place, notes, ["tests/kernels"], f"not pycuda{few}")


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
    skipped: list[str] = notes.figures.get("skipped because", [])
    for case in ET.parse(report).iter("testcase") if report.exists() else ():  # noqa: S314 — our pytest wrote it
        part = next((part for part in case if part.tag in {"failure", "error", "skipped"}), None)
        kind = "passed" if part is None else "skipped" if part.tag == "skipped" else "failed"
        counts[kind] += 1
        said = str(part.get("message"))[:500] if part is not None else ""
        if kind == "failed":
            bad[f"{case.get('classname')}::{case.get('name')}"] = said
        elif kind == "skipped":
            skipped.append(said)
    notes.add(**{f"tests {key}": notes.figures.get(f"tests {key}", 0) + count for key, count in counts.items()})
    notes.add(**{"skipped because": sorted(set(skipped))})
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
    backend = every_form(place, notes, networks, jobs)
    images, early = 15 if place.dry else 200, 0
    with backend.scorer(Form.LOOP)[0] as scorer:
        for number in range(images):
            scorer.score(photo(number % 7, size, size), jobs[0][1])
            early = early if number > 9 else memory_used()
        grown = memory_used() - early
    notes.check(f"memory is flat over {images} images", grown <= 2**21, {"grown_bytes": grown})


def pfd(place: Place, notes: Notes) -> None:
    """The same of PFD-IQA, whose loop runs over a state of each crop."""
    allow_tf32(False)
    torch.backends.cudnn.deterministic = True
    model = random_small() if place.dry else load_pfd(place.root / "models" / "pfd-mini" / "model.safetensors")
    networks = Networks(model)
    size = networks.manifest.crop.size
    ways = (Options(crops=1), Options(crops=4, seed=1), Options(crops=11, seed=2))
    jobs = [(photo(seed, size + 30 * seed, size + 70 * seed), how) for seed, how in enumerate(ways)]
    backend = every_form(place, notes, networks, jobs[1:] if place.dry else jobs)
    if place.dry:
        return
    with backend.scorer(Form.LOOP, 8)[0] as scorer:
        eight: list[Any] = [photo(seed, 2 * size, 2 * size) for seed in range(8)]
        for kind, pixels in (("one image", eight[:1]), ("8 images", eight)):
            run = partial(scorer.score, pixels, Options(crops=4))
            notes.add(**{f"{kind} of 4 crops, ms": 1e3 * statistics.median([seconds_of(run) for _ in range(12)][2:])})


def every_form(place: Place, notes: Notes, networks: Networks, jobs: Sequence[tuple[Any, Options]]) -> TorchOnGpu:
    """Score in fp32 and fp16, in every form of graph, alone and four together; return the backend in fp16."""
    size = networks.manifest.crop.size
    expected = [networks.host().score(*job).score for job in jobs]
    notes.add(**{"scores on the host": expected})
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
        notes.add(**{f"{kind}: largest difference of a score from the host": max(apart)})
        notes.check(f"{kind}: scores are the host's", max(apart) < (2e-2 if half else 1e-3), apart)
        four: list[Any] = [photo(seed, size, size) for seed in range(4)]
        with backend.scorer(Form.LOOP, 4)[0] as scorer:
            alone = [bits(scorer.score(pixels, jobs[0][1])) for pixels in four]
            together = [bits(score) for _ in range(2) for score in scorer.score(four, jobs[0][1])]
        notes.check(f"{kind}: four together have the bits of each alone", together == 2 * alone)
    return backend


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


# ------------------------------------------------------------------------------------------------ a score, full size


def score(place: Place, notes: Notes) -> None:
    """The whole full-size score through our executor, timed as `iqa-bench` does, and PyTorch's own loop beside it."""
    torch.backends.cudnn.benchmark = True
    allow_tf32(False)
    loaded = tiny() if place.dry else load(None, preset="paper", seed=0)
    networks = Networks(loaded)
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
        for batch, crops in CROPS.items():
            run = partial(backend.modules[StageName.UNET], *inputs_of(place, batch, low(place)))
            notes.add(**{f"bare U-Net step of {crops}, ms": median_ms(graph_of(run))})
    runtime = DeviceRuntime(backend.directory, cast(Any, backend))
    for name, (pixels, options) in cases.items():
        notes.attempt(name, timed_case, notes, runtime, manifest, name, pixels, options)
    runtime.close()

    for way in (Way.EAGER, Way.GRAPH):

        def peer(way: Way = way) -> dict[str, float]:
            scorer = TorchScorer(loaded.model, torch.device(place.device), low(place), way)
            score = partial(scorer.score, one, manifest, Options(crops=1))
            found = [score() for _ in range(3)][-1]
            return {"ms per image": 1e3 * statistics.median(seconds_of(score) for _ in range(5)), "score": found}

        notes.attempt(f"peer: PyTorch, {way}", peer)
    names = [name for name in ("one crop", f"peer: PyTorch, {Way.EAGER}") if name in notes.figures]
    found = [notes.figures[name]["score"] for name in names]
    notes.check("PyTorch's own loop gives our score", len(found) == 2 and abs(found[0] - found[1]) < 2e-2, found)


def timed_case(
    notes: Notes, runtime: Any, manifest: Manifest, name: str, pixels: list[Any], options: Options
) -> dict[str, Any]:
    """Score the same images again and again; return times, launches and energy per image."""
    case = runtime.case(manifest, len(pixels), time.perf_counter)
    first, second, _ = (seconds_of(lambda: case.scorer.score(pixels, options)) for _ in "abc")  # the second captures
    found, plain = (scorer.score(pixels, options) for scorer in (case.scorer, case.plain_scorer))
    good = all(a.score == b.score and math.isfinite(a.score) and not a.notes for a, b in zip(found, plain, strict=True))
    notes.check(f"{name}: a graph, without remarks, gives the score of none", good, [repr(found[0]), repr(plain[0])])
    samples = [case.take(pixels, options) for _ in range(3)]
    middle = {key: 1e3 * statistics.median(sample.device[key] for sample in samples) for key in samples[0].device}
    row = {
        "ms per image": 1e3 * statistics.median(sample.seconds for sample in samples),
        "ms without a graph": middle["plain"],
        "host launching, ms": middle["enqueue"],
        "launching without a graph, ms": middle["enqueue_plain"],
        "share of time idle": 1 - middle["busy"] / middle["wall"],
        "first, s": first,
        "second, with the capture, s": second,
        "score": found[0].score,
    }
    case.layer.marking = True
    case.layer.reset()
    case.scorer.score(pixels, options)
    case.layer.marking = False
    if graphs := case.layer.spans().get("graph"):  # the loops of all windows, then the heads
        row["loop, ms"] = 1e3 * graphs[0]
        bare = notes.figures.get(f"bare U-Net step of {CROPS[len(pixels)]}, ms")
        if bare and pixels[0].shape[:2] == (manifest.crop.size,) * 2:
            row["loop over bare steps"] = row["loop, ms"] / (bare * manifest.schedule.steps)
    images, begun, before = 0, time.perf_counter(), runtime.watch.joules()
    while before is not None and time.perf_counter() - begun < 2:  # the counter is slow
        case.scorer.score(pixels, options)
        images += len(pixels)
    after = runtime.watch.joules()
    case.close()
    return row | ({"J per image": (after - before) / images} if after is not None and before is not None else {})


def inductor(place: Place, notes: Notes) -> None:
    """`mini` built by PyTorch's compiler."""
    through(place, notes, "mini", "inductor")


def onnxruntime(place: Place, notes: Notes) -> None:
    """`mini` built for ONNX Runtime."""
    if place.device == "cuda" and not ONNX_ON_GPU:
        notes.add(**{"left out": "onnxruntime-gpu is not installed"})
    else:
        through(place, notes, "mini", "onnxruntime")


def full_size(place: Place, notes: Notes) -> None:
    """The full-size model built by both, as far as they are here."""
    for library in ("inductor", *["onnxruntime"] * (ONNX_ON_GPU or place.dry)):
        notes.attempt(library, through, place, notes, "paper", library)


def through(place: Place, notes: Notes, preset: str, library: str) -> None:
    """Build an engine with a library, score with it by command as a user would, and time it."""
    on_card = place.device == "cuda"
    engine, crop = engine_of(place, preset), TINY.crop if place.dry else 224
    backend = f"{library}-gpu" if on_card else library
    size = f"{crop}x{crop}"
    what = ["--precision", "fp16"] if on_card or library == "onnxruntime" else ["--precision", "fp32"]
    # ONNX Runtime's files take all sizes.
    what += ["--batch", "1,8" if on_card else "1", "--sizes", size] if library == "inductor" else []
    run: list[str | Path] = ["run", "--engine", engine, "--mode", "crop", "--crops", "2"]
    # A dry run compiles nothing, as tests of builds do, and scores once.
    seconds = seconds_of(lambda: iqa("build", "--engine", engine, "--target", library, *what, parse=place.dry))
    notes.add(**{f"{preset}, {library}: seconds to build": seconds})
    if place.dry and (library, preset) != ("onnxruntime", "mini"):
        iqa(*run, "image.png", "-o", "scores.csv", "--backend", backend, parse=True)
        return
    image, found = place.folder / f"{preset}-{library}.png", list[list[float]]()
    Image.fromarray(photo(0, crop, crop)).save(image)
    images = image if place.dry or preset == "paper" else place.root / "samples"
    for name in ("onnxruntime", backend):
        scores = image.with_suffix(f".{len(found)}.csv")
        iqa(*run, images, "-o", scores, "--backend", name)
        found.append([float(row["score"]) for row in csv.DictReader(scores.read_text().splitlines())])
    apart = [abs(a - b) for a, b in zip(*found, strict=True)]
    notes.check(f"{preset}, {library}: scores are those of the CPU in float32", max(apart) < 2e-2, found)
    notes.add(**{f"{preset}, {library}: largest difference of a score from the CPU": max(apart)})
    if on_card or place.dry:
        directory, rates = open_engine(engine), Rates(place, notes)
        chosen = TorchOnGpu(place, Networks(tiny()), [size]) if place.dry else BACKENDS[backend]()
        runtime = DeviceRuntime(directory, cast(Any, chosen))
        for batch in CROPS:
            pixels, name = [photo(seed, crop, crop) for seed in range(batch)], f"{preset}, {backend}, {batch} at a time"
            notes.attempt(name, timed_case, notes, runtime, directory.manifest, name, pixels, Options(crops=1))
            loop = notes.figures.get(name, {}).get("loop, ms")
            if loop and (preset == "paper" or place.dry):
                rates.note(f"**diffiqa, {backend}**, fp16", batch, loop / directory.manifest.schedule.steps)
        runtime.close()


def engine_of(place: Place, preset: str) -> Path:
    """Return an engine that may be changed: the one of --pack, or an export that all steps of this run share."""
    folder = place.folder.parent / "engines" / preset
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        if place.packed and (preset == "mini" or place.dry):
            shutil.copytree(place.packed / "mini", folder)
        elif place.dry:
            export(tiny(), folder, target="none")
        else:
            weights = place.root / "models" / "mini" / "model.safetensors"
            given = ["--ckpt", weights] if preset == "mini" else ["--preset", preset, "--seed", "0"]
            iqa("export", *given, "-o", folder, "--target", "none", "-q")
    return folder


def iqa(*words: str | Path, parse: bool = False) -> None:
    """Run a command of diffiqa; with `parse`, only see that it would take these words."""
    command, *given = map(str, words)
    if parse:
        main.commands[command].make_context(command, given)
    else:
        subprocess.run([sys.executable, "-P", "-m", "diffiqa.cli", command, *given], check=True)


# ---------------------------------------------------------------------------------------------------- single answers


def rates(place: Place, notes: Notes) -> None:
    """Bytes per second of our kernels; the goal is the sampler step at 0.8 of a copy from 8×384×512 on."""
    if place.dry:
        found: dict[str, Any] = {"copy_gb_per_second": [1.0]}
        rows = kernel_rates.measure(CudaLayer(0), 1, 40, 48, crop=32, touched=0)
    else:
        found = kernel_rates.rates(0)
        rows = found["kernels"]
    notes.add(**{"copy, GB/s": statistics.median(found["copy_gb_per_second"])})
    for row in rows:
        name = f"{row['kernel']}, {'×'.join(map(str, row['size']))}"
        notes.add(**{name: {"GB/s": row["gb_per_second"], "share of a copy": row.get("share_of_copy")}})


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
    notes.add(**{"MiB of the card in use": used, "PyTorch gets what was freed": freely})
    notes.add(**{"PyTorch gets it after trimming": torch_gets_it()})
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
        notes.add(**{"left out": "compute-sanitizer is not there"})
        return
    few = "rows_may_be_apart or looked_at_twice or tap_buffer_alone or last_step_adds"
    for tool, which in (("memcheck", few), ("racecheck", "shape_of_the_launch or tap_buffer_alone")):
        log = place.folder / tool
        under = [program, "--tool", tool, "--target-processes", "all", "--log-file", str(log)]
        run_tests(place, notes, ["tests/kernels/test_images.py", "tests/kernels/test_sampler.py"], which, under)
        text = log.read_text(errors="replace") if log.exists() else ""
        said = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
        notes.add(**{tool: "; ".join(said)})
        clean = bool(said) and all(" 0 errors" in line or " 0 hazards" in line for line in said)
        notes.check(f"{tool} finds nothing", clean, said or text.splitlines()[-3:])


def training(place: Place, notes: Notes) -> None:
    """`iqa-train restore` by the recipe that made `mini`, on the card and on the CPU, and of the full-size U-Net."""
    runs = [("mini", place.device, 1 if place.dry else 20)]
    runs += [] if place.dry else [("mini", "cpu", 10), ("paper", place.device, 15)]
    for preset, device, seconds in runs:
        where = "CPU" if device == "cpu" else "card"
        notes.attempt(f"{preset} on the {where}", trained, place, notes, preset, device, seconds)


def trained(place: Place, notes: Notes, preset: str, device: str, seconds: float) -> dict[str, Any]:
    """Train for so long from its first step on, end it, and return its pace and losses from its own log."""
    text = (place.root / "training" / "recipes" / "mini-restore.toml").read_text(encoding="utf-8")
    batch, every = 2 if place.dry else 16, 1 if device == "cpu" else 10
    for key, value in {"preset": f'"{preset}"', "steps": 10**6, "batch": batch, "log_every": every}.items():
        text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
    folder = place.folder / f"{preset}-{device}"
    recipe, log = folder.with_suffix(".toml"), folder / "log.csv"
    recipe.write_text(text, encoding="utf-8")
    options = f"--config {recipe} --data {place.root}/samples -o {folder} --device {device} --threads {os.cpu_count()}"
    command = [sys.executable, "-P", "-m", "diffiqa.cli", "train", "restore", *options.split()]
    process, begun = subprocess.Popen(command), math.inf
    while process.poll() is None and time.monotonic() - begun < seconds:
        time.sleep(0.1)
        begun = min(begun, time.monotonic()) if log.exists() else begun
    process.kill()
    process.wait()
    rows = list(csv.DictReader(log.read_text().splitlines()))
    losses = [float(row["loss"]) for row in rows]
    pace, last = (
        statistics.median(float(row["seconds"]) for row in rows[len(rows) // 3 :]),
        statistics.fmean(losses[-3:]),
    )
    notes.check(f"{preset} on {device}: the loss goes down", device == "cpu" or last < 0.8 * losses[0], losses)
    steps = int(rows[-1]["step"])
    return {"steps/s": 1 / pace, "crops/s": batch / pace, "steps": steps, "first loss": losses[0], "last loss": last}

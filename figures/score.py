"""Scoring on the CPU: the loop's overhead, start-up, busy waiting, memory, a 24-megapixel JPEG, one full-size image.

    python figures/score.py overhead startup spin memory tables large full full-memory

Each named part writes results/score-PART.json. Engines are exported as needed: the `mini` that ships; with
seeded weights, the full-size `paper`.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from PIL import Image
from record import ROOT, run_apart, seconds_in_turn, write

from diffiqa.bench.machine import resident_mib
from diffiqa.bench.timing import timed_stages
from diffiqa.engine.manifest import open_engine
from diffiqa.export.engine import export_engine
from diffiqa.model.checkpoint import load as load_checkpoint
from diffiqa.runtime.host.onnx_stage import OnnxRuntime, OnnxStage
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.images import synthetic as photo
from diffiqa.runtime.results import Options, Score
from diffiqa.runtime.scorer import Scorer, load

STARTUP = """
import time; start = time.perf_counter()
import sys, diffiqa, numpy as np
with diffiqa.load(sys.argv[1]) as scorer:
    loaded = time.perf_counter()
    scorer.score(np.load(sys.argv[2]))
    print(loaded - start, time.perf_counter() - start)
"""

# Exporting would leave its own, higher peak behind: what is measured runs in a process that only scores.
PEAKS = """
import sys, diffiqa, numpy as np
from diffiqa.bench.machine import peak_mib
options = diffiqa.Options(crops=int(sys.argv[2]) or None)
with diffiqa.load(sys.argv[1]) as scorer:
    for image in sys.argv[3:]:
        result = scorer.score(np.load(image) if image.endswith(".npy") else image, options)
        print(peak_mib(), result.mode, result.seconds)
"""


def shipped(folder: Path) -> Path:
    """Export the model that ships."""
    export_engine(load_checkpoint(ROOT / "models" / "mini" / "model.safetensors"), folder / "mini")
    return folder / "mini"


def full_size(folder: Path) -> Path:
    """Export the paper's networks with seeded weights."""
    export_engine(load_checkpoint(None, preset="paper", seed=0), folder / "paper")
    return folder / "paper"


def overhead(engine: Path, sizes: list[tuple[int, int]], rounds: int) -> dict[str, object]:
    """Return the share of time that is not ONNX Runtime's, over warm runs on images of several sizes."""
    directory = open_engine(engine)
    stages = timed_stages(load_stages(directory, OnnxRuntime()), time.perf_counter)
    scorer = Scorer(directory.manifest, stages, backend="timed")
    samples = []
    for height, width in sizes:
        picture = photo(height, height, width)
        for index in range(rounds + 1):
            for stage in stages.values():
                stage.spent.clear()
            start = time.perf_counter()
            scorer.score(picture)
            total = time.perf_counter() - start
            spent = sum(sum(stage.spent) for stage in stages.values())
            if index:  # the first run of a size binds and warms up
                samples.append({"size": [height, width], "seconds": total, "in_onnxruntime": spent})
    shares = [1 - s["in_onnxruntime"] / s["seconds"] for s in samples]  # type: ignore[operator]
    return {"overhead_percent_median": round(100 * float(np.median(shares)), 2), "samples": samples}


def part_overhead(folder: Path) -> dict[str, object]:
    """Everything but the ONNX Runtime calls: decoding from an array, noise, sampler, crops, reduction."""
    return overhead(shipped(folder), [(224, 224), (384, 320)], 5)


def part_startup(folder: Path) -> dict[str, object]:
    """Fresh processes: import, load and check the engine, first score of a 224×224 image."""
    engine, array = shipped(folder), folder / "image.npy"
    np.save(array, photo(1, 224, 224))
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        out = run_apart(STARTUP, engine, array)
        runs.append({"loaded": float(out[0]), "first_score": float(out[1]), "process": time.perf_counter() - start})
    return {"first_score_seconds_median": round(float(np.median([r["first_score"] for r in runs])), 2), "runs": runs}


def part_memory(folder: Path) -> dict[str, object]:
    """Resident memory over 1,000 images of five sizes, in 3 steps."""
    sizes = [(224, 224), (240, 320), (256, 256), (224, 400), (333, 250)]
    pictures = [photo(i, *size) for i, size in enumerate(sizes)]
    resident = []
    with load(shipped(folder)) as scorer:
        stream = (pictures[i % len(pictures)] for i in range(1000))
        for index, result in enumerate(scorer.stream(stream, Options(crops=4, steps=3))):
            assert isinstance(result, Score)
            if index >= 100 and index % 50 == 49:
                resident.append(resident_mib() or 0.0)
    drift = 100 * (max(resident) / resident[0] - 1)
    return {"images": 1000, "resident_mib": resident, "growth_percent_after_image_150": round(drift, 2)}


def part_tables(folder: Path) -> dict[str, object]:
    """What precomputing everything that depends on the step alone could save: the noise level as a constant."""
    path = shipped(folder) / "onnx" / "unet.onnx"
    model = onnx.load(path)
    model.graph.input.remove(next(v for v in model.graph.input if v.name == "noise_level"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full((1, 1), 0.4, np.float32), "noise_level"))
    onnx.save(model, folder / "constant.onnx")
    rows = np.random.default_rng(0).standard_normal((3, 1, 3, 224, 224)).astype(np.float32)
    images, level = {"y": rows[0], "condition": rows[1]}, {"noise_level": np.full((1, 1), 0.4, np.float32)}
    calls = {
        "base": OnnxStage(path, OnnxRuntime()).bind({**images, **level}, {"noise": rows[2]}),
        "constant": OnnxStage(folder / "constant.onnx", OnnxRuntime()).bind(images, {"noise": rows[2]}),
    }
    wall, _ = seconds_in_turn(calls, rounds=55)
    ratios = np.divide(wall["base"], wall["constant"]).tolist()
    return {"seconds_per_step_base_over_constant_median": round(float(np.median(ratios)), 4), "ratios": ratios}


def part_spin(folder: Path) -> dict[str, object]:
    """Busy waiting (`--spin`) beside none, a step of `mini`'s U-Net: alone, and beside a process that never waits."""
    path = shipped(folder) / "onnx" / "unet.onnx"
    found = []
    for side in (112, 224):
        rows = np.random.default_rng(0).standard_normal((3, 1, 3, side, side)).astype(np.float32)
        inputs = {"y": rows[0], "condition": rows[1], "noise_level": np.full((1, 1), 0.4, np.float32)}
        calls = {
            name: OnnxStage(path, OnnxRuntime(spinning=spin)).bind(inputs, {"noise": rows[2]})
            for name, spin in (("waiting", False), ("spinning", True))
        }
        alone, _ = seconds_in_turn(calls, rounds=25, repeats=5)  # five in a row, as the loop makes them
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
            beside, _ = seconds_in_turn(calls, rounds=25, repeats=5)
            busy.kill()
        for condition, spent in (("alone", alone), ("beside a busy process", beside)):
            waiting, spinning = spent["waiting"], spent["spinning"]
            ratio = float(np.median(np.divide(spinning, waiting)))
            found.append({"side": side, "condition": condition, "ratio": ratio, "seconds": [waiting, spinning]})
    return {"cases": found}


def part_large(folder: Path) -> dict[str, object]:
    """A 24-megapixel JPEG, four crops, in a process that scored a 224×224 image before: peaks of both."""
    photograph, small = folder / "large.jpg", folder / "small.npy"
    Image.fromarray(photo(3, 4000, 6000)).save(photograph, "JPEG", quality=90)
    np.save(small, np.zeros((224, 224, 3), np.uint8))
    before, _, _, peak, mode, seconds = run_apart(PEAKS, shipped(folder), "4", small, photograph)
    return {
        "pixels": [6000, 4000],
        "mode": mode,
        "crops": 4,
        "seconds": round(float(seconds), 1),
        "peak_mib_small": round(float(before)),
        "peak_mib_above_a_small_image": round(float(peak) - float(before)),
    }


def part_full(folder: Path) -> dict[str, object]:
    """One 224×224 image through all 50 steps of the full-size network, after a first one, and the loop's overhead."""
    return overhead(full_size(folder), [(224, 224)], 1)


def part_full_memory(folder: Path) -> dict[str, object]:
    """Peak memory of a process that scores one 224×224 image with the full-size engine."""
    engine, array = full_size(folder), folder / "image.npy"
    np.save(array, np.random.default_rng(1).integers(0, 256, (224, 224, 3)).astype(np.uint8))
    peak, _, seconds = run_apart(PEAKS, engine, "0", array)
    size = sum(file.stat().st_size for file in engine.rglob("*.onnx")) / 2**20
    return {"peak_mib": round(float(peak)), "engine_mib": round(size), "seconds": round(float(seconds), 1)}


PARTS: dict[str, Callable[[Path], dict[str, object]]] = {
    name.removeprefix("part_").replace("_", "-"): function
    for name, function in list(globals().items())
    if name.startswith("part_")
}


def main() -> None:
    """Run the parts named on the command line, all by default."""
    for name in sys.argv[1:] or list(PARTS):
        with tempfile.TemporaryDirectory() as folder:
            write(f"score-{name}", PARTS[name](Path(folder)))


if __name__ == "__main__":
    main()

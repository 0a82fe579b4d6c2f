"""Precisions of the trained `mini`: how far scores of held-out pictures move, how large, how fast on the CPU.

    python figures/precision.py scores --labels BIQ2021/ --dataset biq2021 --split split.json [--images 200]
    python figures/precision.py sizes
    python figures/precision.py engines
    python figures/precision.py verify --labels BIQ2021/ --dataset biq2021 --split split.json

`scores` (results/precision.json) takes pictures of the part "test" of a split, calibrates on 16 of the part "train",
and scores each picture in all precisions in turn: one crop, restored by itself. int8 is of all stages,
mixed of those that `--precision mixed` takes. fp16, bf16 and fp8 are emulated, every result rounded as the plan of
`iqa-build` says (fp8: of all stages, the rest in fp16), because no CPU computes in them as TensorRT does: their scores
count, their times do not. `sizes` (results/precision-sizes.json) has those of all full-size stages.
`engines` (results/precision-engines.json) builds `mini` with TensorRT-RTX, and has what its engines weigh.
`verify` (results/precision-verify.json) is how long iqa-verify takes over 20 of the pictures.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from record import ROOT, write

from diffiqa.calibration.mixed import Trial, choose_stages
from diffiqa.calibration.pictures import draw
from diffiqa.calibration.quantise import Recipe, quantise_engine, quantise_stage
from diffiqa.calibration.statistics import StageStatistics, collect, watched
from diffiqa.data.datasets import Item, read_labels
from diffiqa.data.splits import Split
from diffiqa.engine.agreement import plcc, srcc
from diffiqa.engine.manifest import EngineDirectory, Library, Precision, StageName, open_engine
from diffiqa.errors import DiffiqaError
from diffiqa.export.builds import BuildOptions, build_engines
from diffiqa.export.engine import export_engine, one_image
from diffiqa.export.macs import macs_by_node
from diffiqa.model.checkpoint import load as load_checkpoint
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.results import Mode, Options
from diffiqa.runtime.scorer import Scorer
from diffiqa.verify.api import load_emulated

CALIBRATION_IMAGES = 16
VERIFIED_IMAGES = 20
# The emulation of each takes as long as that of fp16, and nobody builds for them by default.
FEWER_IMAGES = 25
FEWER = {"bf16", "fp8"}
OPTIONS = Options(crops=1, mode=Mode.CROP)
SEED = 11


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--ckpt", type=Path, default=ROOT / "models" / "mini" / "model.safetensors")
    pictures = argparse.ArgumentParser(add_help=False, parents=[model])
    add_pictures(pictures)
    scores = commands.add_parser("scores", parents=[pictures])
    scores.set_defaults(measure=measure_scores)
    scores.add_argument("--images", type=int, default=200)
    scores.add_argument("--no-int8", action="store_true", help="Leave 8 bits out, and with them the calibration.")
    verify = commands.add_parser("verify", parents=[pictures])
    verify.set_defaults(measure=measure_verify)
    commands.add_parser("sizes").set_defaults(measure=measure_sizes)
    commands.add_parser("engines", parents=[model]).set_defaults(measure=measure_engines)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given.measure(given, Path(folder))


def add_pictures(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which pictures are taken, and how people rated them."""
    parser.add_argument("--labels", type=Path, required=True, help="A CSV file, or the folder of --dataset.")
    parser.add_argument("--dataset")
    parser.add_argument("--split", type=Path, required=True)


def measure_scores(given: argparse.Namespace, folder: Path) -> None:
    """Score the same pictures in each precision."""
    labels, split = read_labels(given.labels, given.dataset), Split.read(given.split)
    chosen = drawn(split.items(labels, "test"), given.images)
    export_engine(load_checkpoint(given.ckpt), folder / "fp32")
    trials: list[Trial] = []
    taken: dict[str, list[StageName]] = {}
    if not given.no_int8:
        items = drawn(split.items(labels, "train"), CALIBRATION_IMAGES)
        trials, taken = quantise_all(folder, [item.path for item in items])
    written = {name: open_engine(folder / name) for name in ("fp32", *taken)}
    engines = {name: engine for name, engine in written.items() if name != "fp8"}  # which is emulated
    settings = OnnxRuntime()
    scorers = {name: Scorer(e.manifest, load_stages(e, settings), backend=name) for name, e in engines.items()}
    shares: dict[str, dict[str, float]] = {}
    for precision in (Precision.FP16, Precision.BF16):
        scorers[precision], plan = load_emulated(engines["fp32"].path, precision=precision)
        nodes = {stage.name: {kept.node for kept in stage.float32} for stage in plan.stages}
        shares[precision] = share_of_macs(engines["fp32"], nodes)
    if "fp8" in written:
        scorers["fp8"], _ = load_emulated(written["fp8"].path, precision=Precision.FP16)
    found: dict[str, list[float]] = {name: [] for name in scorers}
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for number, item in enumerate(chosen):
        for name, scorer in scorers.items():
            if name in FEWER and number >= FEWER_IMAGES:
                continue
            start = time.perf_counter()
            found[name].append(scorer.score(item.path, OPTIONS).score)
            seconds[name].append(time.perf_counter() - start)
    rows: dict[str, Any] = {}
    for name, scores in found.items():
        rows[name] = beside(found["fp32"][: len(scores)], scores, [item.quality for item in chosen[: len(scores)]])
        if name in shares:
            rows[name]["share_of_macs_in_float32"] = shares[name]
        if name in written:
            rows[name]["bytes"] = {s.name: s.file.bytes for s in written[name].manifest.stages}
        if name in engines:
            rows[name]["seconds_median"] = statistics.median(seconds[name])
    for name, stages in taken.items():
        rows[name]["stages_in_8_bits"] = stages
        if name in engines:
            rows[name]["speed_over_fp32"] = ratio(seconds["fp32"], seconds[name])
    figures = {
        "model": engines["fp32"].manifest.engine_id,
        "images": len(chosen),
        "pictures": [f"{item.path.parent.name}/{item.path.name}" for item in chosen],
        "crops": 1,
        "mode": OPTIONS.mode,
        "calibration_images": 0 if given.no_int8 else CALIBRATION_IMAGES,
        "mixed_trials": [
            {
                "stage": trial.stage,
                "drift": trial.change if math.isfinite(trial.change) else None,
                "taken": trial.taken,
                "why": trial.why,
            }
            for trial in trials
        ],
        "precisions": rows,
    }
    write("precision", figures)


def quantise_all(folder: Path, images: list[Path]) -> tuple[list[Trial], dict[str, list[StageName]]]:
    """Write 8-bit forms of the engine fp32; return the trials for `mixed`, and the stages of each form written."""
    collect(folder / "fp32", images, folder)
    trials = choose_stages(folder / "fp32", folder, images, Recipe.of("int8"))
    mixed = [trial.stage for trial in trials if trial.taken]
    written = {}
    for name, stages in (("int8", list(StageName)), ("mixed", mixed), ("fp8", list(StageName))):
        try:
            quantise_engine(folder / "fp32", folder / name, folder, Recipe.of(name), only=stages)
            written[name] = stages
        except DiffiqaError as exc:
            print(f"{name} is left out: {exc}")
    return trials, written


def beside(reference: list[float], scores: list[float], truth: list[float]) -> dict[str, Any]:
    """Compare scores with those in float32, and with labels."""
    drift = np.abs(np.subtract(scores, reference))
    return {
        "images": len(scores),
        "mean_drift": float(drift.mean()),
        "p99_drift": float(np.quantile(drift, 0.99)),
        "max_drift": float(drift.max()),
        "srcc_with_fp32": srcc(scores, reference),
        "plcc_with_fp32": plcc(scores, reference),
        "srcc_with_labels": srcc(scores, truth),
        "scores": [round(score, 7) for score in scores],
    }


def measure_sizes(given: argparse.Namespace, folder: Path) -> None:
    """Quantise all stages of the full-size network, by no ranges at all: sizes do not depend on them."""
    export_engine(load_checkpoint(None, preset="paper", seed=SEED), folder / "fp32")
    directory = open_engine(folder / "fp32")
    sizes = {}
    for stage in directory.manifest.stages:
        model = onnx.load(directory.file(stage.file))
        nothing = StageStatistics.empty(watched(model), directory.manifest.schedule.steps)
        made, _ = quantise_stage(model, stage, nothing, Recipe.of("int8"))
        sizes[stage.name.value] = {"fp32": stage.file.bytes, "int8": made.ByteSize()}
    write("precision-sizes", {"preset": "paper", "bytes": sizes})


def measure_engines(given: argparse.Namespace, folder: Path) -> None:
    """Build `mini` with TensorRT-RTX in each precision, portable, for one crop, and add up its engines."""
    (folder / "pictures").mkdir()
    export_engine(load_checkpoint(given.ckpt), folder / "fp32")
    directory = open_engine(folder / "fp32")
    draw(folder / "pictures", directory.manifest.crop.size)
    collect(folder / "fp32", sorted((folder / "pictures").iterdir()), folder)
    builds = [(str(precision), "fp32", precision) for precision in Precision]
    for number in ("int8", "fp8"):
        quantise_engine(folder / "fp32", folder / number, folder, Recipe.of(number, "tensorrt"))
        builds.append((number, number, Precision.FP16))
    size = f"{directory.manifest.crop.size}x{directory.manifest.crop.size}"
    found, version = {}, ""
    for name, engine, precision in builds:
        options = BuildOptions(Library.TENSORRT_RTX, precision, batches=("1",), sizes=(size,))
        build, _ = build_engines(folder / engine, options)
        found[name] = {stage.name.value: stage.file.bytes for stage in build.stages}
        version = build.version
    write("precision-engines", {"library": f"TensorRT-RTX {version}", "size": size, "bytes": found})


def measure_verify(given: argparse.Namespace, folder: Path) -> None:
    """Verify the fp16 plan, emulated, with the command as a user would."""
    chosen = drawn(Split.read(given.split).items(read_labels(given.labels, given.dataset), "test"), VERIFIED_IMAGES)
    export_engine(load_checkpoint(given.ckpt), folder / "fp32")
    command = ["-m", "diffiqa.cli", "verify", "--engine", str(folder / "fp32"), "--precision", "fp16"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command, "--json", str(folder / "found.json"), *(str(item.path) for item in chosen)],
        check=False,
    )
    seconds = time.perf_counter() - start
    # Checks name pictures: as the labels do, not by where they lie on this machine.
    found = (folder / "found.json").read_text(encoding="utf-8").replace(f"{given.labels.parent}/", "")
    figures = {
        "images": len(chosen),
        "precision": "fp16",
        "seconds": seconds,
        "exit_code": done.returncode,
        "checks": json.loads(found)["checks"],
    }
    write("precision-verify", figures)


def drawn(items: Sequence[Item], count: int) -> list[Item]:
    """Return some of the items, of all photographs alike; the same ones every time."""
    order = np.random.default_rng(SEED).permutation(len(items))[:count]
    return [items[index] for index in sorted(order)]


def share_of_macs(directory: EngineDirectory, kept: Mapping[StageName, Collection[str]]) -> dict[str, float]:
    """Return which share of each stage's MACs, for one crop, is done by these nodes."""
    crop, shares = directory.manifest.crop.size, {}
    for stage in directory.manifest.stages:
        shapes = one_image(stage.inputs, crop)
        model = onnx.load(directory.file(stage.file))
        macs = macs_by_node(model, shapes)
        heavy = {node.name for node in model.graph.node if node.op_type in {"Conv", "MatMul", "Gemm"}}
        assert heavy <= macs.keys(), "folding shapes has renamed nodes, which would count as nothing"
        shares[stage.name.value] = sum(macs[node] for node in kept[stage.name]) / sum(macs.values())
    return shares


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of pairwise ratios: both ran in turn, so what slows the machine slows both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()

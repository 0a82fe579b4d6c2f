"""Precision × steps × backend on the CPU: how fast, and how far scores and restorations move.

    python figures/cpu.py scores --labels BIQ2021/ --dataset biq2021 --split split.json [--images 200]
    python figures/cpu.py full [--rounds 10]

`scores` (results/cpu.json) takes pictures of the part "test" of a split, calibrates the trained `mini` on 16 of the
part "train", and scores each picture in every way in turn: one crop, restored by itself. Changes are against float32
by ONNX Runtime in all steps, before and after a correction that is fitted on the other half of the pictures. `full`
(results/cpu-full.json) runs the full-size U-Net on seeded weights, calibrated on eight levels: rounds of one step in
every way in turn, beside ONNX Runtime's defaults and NNCF, if that is installed; then, with --restore, how far the
restored picture is from that of float32 in all steps. It says nothing about scores.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from precision import CALIBRATION_IMAGES, OPTIONS, SEED, add_pictures, drawn, ratio
from record import ROOT, psnr, seconds_in_turn, write

from diffiqa.bench.contenders import DefaultStage, nncf_stage, unet_inputs
from diffiqa.calibration.quantise import Recipe, quantise_engine, quantise_stage
from diffiqa.calibration.statistics import Recorder, StageStatistics, collect, watched
from diffiqa.calibration.steps import compare
from diffiqa.data.datasets import read_labels
from diffiqa.data.splits import Split
from diffiqa.engine.agreement import srcc
from diffiqa.engine.codec import encode
from diffiqa.engine.manifest import StageName, open_engine
from diffiqa.engine.noise import NoiseField
from diffiqa.engine.pixels import to_plane
from diffiqa.engine.sampling import Sampling, choose_sampling
from diffiqa.engine.schedule import Kind
from diffiqa.export.engine import export_engine
from diffiqa.model.checkpoint import load as load_checkpoint
from diffiqa.runtime.executor import StageRunner
from diffiqa.runtime.host.executor import BoundDenoiser
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.host.openvino_stage import OpenVino
from diffiqa.runtime.host.sampler import restore
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.images import read_image
from diffiqa.runtime.results import Options
from diffiqa.runtime.scorer import Scorer

# By what the tables call them: whose form of the engine, and what runs it.
WAYS: dict[str, tuple[str, OnnxRuntime | OpenVino]] = {
    "ONNX Runtime, float32": ("fp32", OnnxRuntime()),
    "ONNX Runtime, int8": ("onnxruntime", OnnxRuntime()),
    "OpenVINO, float32": ("fp32", OpenVino()),
    "OpenVINO, bf16": ("fp32", OpenVino(precision="bf16")),
    "OpenVINO, int8": ("openvino", OpenVino()),
    "OpenVINO, int8 and bf16": ("openvino", OpenVino(precision="bf16")),
}
FEWER: tuple[tuple[int | None, str | None], ...] = ((None, None), (1, "image+ddim"))  # steps of `mini`, and how
FEWER_OF_FULL_SIZE = (10, 5)
_WRITTEN_EVERY = 8  # pictures: a run that is cut off has so many


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    scores = commands.add_parser("scores")
    scores.set_defaults(measure=measure_scores)
    scores.add_argument("--ckpt", type=Path, default=ROOT / "models" / "mini" / "model.safetensors")
    add_pictures(scores)
    scores.add_argument("--images", type=int, default=200)
    full = commands.add_parser("full")
    full.set_defaults(measure=measure_full)
    full.add_argument("--rounds", type=int, default=10)
    full.add_argument("--restore", action="store_true", help="Also restore a picture in every way.")
    full.add_argument("--preset", default="paper")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given.measure(given, Path(folder))


def measure_scores(given: argparse.Namespace, folder: Path) -> None:
    """Score the same pictures in every way."""
    labels, split = read_labels(given.labels, given.dataset), Split.read(given.split)
    chosen = drawn(split.items(labels, "test"), given.images)
    export_engine(load_checkpoint(given.ckpt), folder / "fp32")
    calibration = [item.path for item in drawn(split.items(labels, "train"), CALIBRATION_IMAGES)]
    collect(folder / "fp32", calibration, folder)
    for target in ("onnxruntime", "openvino"):
        quantise_engine(folder / "fp32", folder / target, folder, Recipe.of("int8", target))
    m = open_engine(folder / "fp32").manifest
    scorers = {}
    for name, (form, backend) in WAYS.items():
        engine = open_engine(folder / form)
        scorers[name] = Scorer(engine.manifest, load_stages(engine, backend), backend=name)
    cases = [(name, choose_sampling(m.schedule, m.taps, m.kinds, *fewer)) for fewer in FEWER for name in WAYS]
    found: dict[tuple[str, Sampling], list[float]] = {case: [] for case in cases}
    seconds: dict[tuple[str, Sampling], list[float]] = {case: [] for case in cases}
    seeds: list[float] = []
    for number, item in enumerate(chosen, start=1):
        for name, sampling in cases:
            options = Options(crops=1, mode=OPTIONS.mode, steps=len(sampling.steps), sampler=sampling.name)
            start = time.perf_counter()
            found[name, sampling].append(scorers[name].score(item.path, options).score)
            seconds[name, sampling].append(time.perf_counter() - start)
        seeds.append(scorers[cases[0][0]].score(item.path, Options(crops=1, mode=OPTIONS.mode, seed=1)).score)
        if number >= 4 and (number % _WRITTEN_EVERY == 0 or number == len(chosen)):
            first, quality = cases[0], [item.quality for item in chosen[:number]]
            rows = []
            for name, sampling in cases:
                case, speed = (name, sampling), ratio(seconds[first], seconds[name, sampling])
                row = encode(compare(sampling, found[case], found[first], speed))
                row |= {"way": name, "count": len(sampling.steps), "seconds_median": statistics.median(seconds[case])}
                rows.append(row | {"srcc_with_labels": srcc(found[case], quality), "seconds": seconds[case]})
            spread = float(np.abs(np.subtract(seeds, found[first])).mean())
            write("cpu", {"model": m.engine_id, "images": number, "another_seed": spread, "rows": rows})


def measure_full(given: argparse.Namespace, folder: Path) -> None:
    """Time a step of the full-size U-Net in every way, and compare what they restore."""
    export_engine(load_checkpoint(None, preset=given.preset, seed=SEED), folder / "fp32")
    directory = open_engine(folder / "fp32")
    m = directory.manifest
    stage = m.stage(StageName.UNET)
    assert stage is not None
    size = (m.crop.size, m.crop.size)
    files = {"fp32": directory.file(stage.file)}
    model = onnx.load(files["fp32"])
    ranges = StageStatistics.empty(watched(model), m.schedule.steps)
    recorder = Recorder(directory, StageName.UNET, ranges)
    for inputs in unet_inputs(m)[::2]:
        recorder.bind(inputs, {"noise": np.empty((1, 3, *size), np.float32)})()
    del recorder
    for target in ("onnxruntime", "openvino"):
        files[target] = folder / f"{target}.onnx"
        onnx.save_model(quantise_stage(model, stage, ranges, Recipe.of("int8", target))[0], files[target])
    del model
    stages: dict[str, StageRunner] = {"ONNX Runtime's defaults": DefaultStage(files["fp32"])}
    for name, (form, backend) in WAYS.items():
        stages[name] = backend.load_stage(files[form], StageName.UNET)
    if importlib.util.find_spec("nncf"):
        stages["OpenVINO, NNCF's int8 and bf16"] = nncf_stage(directory, OpenVino())
    denoisers = {name: BoundDenoiser(stage, *size) for name, stage in stages.items()}
    pixels = read_image(ROOT / "samples" / "jpeg-strong.jpg", min_side=size[0]).pixels[: size[0], : size[1]]
    for denoiser in denoisers.values():
        denoiser.condition[:] = to_plane(pixels)
    steps = {name: partial(denoiser, 0.5) for name, denoiser in denoisers.items()}
    seconds, used = seconds_in_turn(steps, given.rounds, pause=0.1)  # threads that wait busily give up meanwhile
    first = next(iter(stages))
    rows: dict[str, Any] = {}
    for name in stages:
        pairs = sorted(a / b for a, b in zip(seconds[first], seconds[name], strict=True))
        rows[name] = {
            "speed": statistics.median(pairs),
            "middle_half": [float(np.quantile(pairs, share)) for share in (0.25, 0.75)],
            "cpu_time": ratio(used[first], used[name]),
            "seconds": seconds[name],
            "cpu_seconds": used[name],
        }
    found = {"preset": given.preset, "weights": "seeded", "size": size, "all_steps": m.schedule.steps, "ways": rows}
    write("cpu-full", found)
    planes: dict[Kind, Any] = {}
    for count in (m.schedule.steps, *FEWER_OF_FULL_SIZE) if given.restore else ():
        sampling = choose_sampling(m.schedule, m.taps, m.kinds, count, None)
        for name, denoiser in denoisers.items():
            restored = restore(denoiser, NoiseField(SEED, size), sampling.rows(m.schedule, m.taps, m.kinds))
            planes = planes or restored
            distance = {kind: psnr(planes[kind], plane) for kind, plane in restored.items()}
            rows[name].setdefault("psnr_to_float32_in_all_steps", {})[count] = distance
            write("cpu-full", found)
        if count == m.schedule.steps:
            again = restore(denoisers[first], NoiseField(SEED + 1, size), sampling.rows(m.schedule, m.taps, m.kinds))
            found["psnr_of_another_seed"] = {kind: psnr(planes[kind], plane) for kind, plane in again.items()}


if __name__ == "__main__":
    main()

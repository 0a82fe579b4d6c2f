"""Fewer steps: how far scores of held-out pictures move, and how much sooner they come.

    python figures/steps.py scores --engine engine/ --labels BIQ2021/ --dataset biq2021 --split split.json
    python figures/steps.py full

`scores` (results/steps.json) is of an engine of the trained `mini`, on pictures of the part "test" of a split: one
crop, restored by itself, each way in turn with all steps. Corrections are fitted on one half of the pictures and judged
on the other. `full` (results/steps-full.json) runs the full-size U-Net on seeded weights over one picture of 224×224:
how far the restored picture is from that of all steps, and how long it takes; nothing about scores.
"""

import argparse
import dataclasses
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from precision import SEED, add_pictures, drawn, ratio
from record import ROOT, write

from diffiqa.calibration.steps import compare
from diffiqa.data.datasets import read_labels
from diffiqa.data.splits import Split
from diffiqa.engine.agreement import srcc
from diffiqa.engine.codec import encode
from diffiqa.engine.manifest import StageName, open_engine
from diffiqa.engine.monotone import Monotone
from diffiqa.engine.noise import NoiseField
from diffiqa.engine.pixels import to_plane
from diffiqa.engine.sampling import Fast, Sampling, choose_sampling, spread
from diffiqa.engine.schedule import Kind
from diffiqa.export.graph import export_graph
from diffiqa.export.stages import stage_plans
from diffiqa.model.checkpoint import load as load_checkpoint
from diffiqa.runtime.host.executor import BoundDenoiser
from diffiqa.runtime.host.onnx_stage import OnnxRuntime, OnnxStage
from diffiqa.runtime.host.sampler import restore
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.images import read_image
from diffiqa.runtime.results import Mode, Options
from diffiqa.runtime.scorer import Scorer

ANCESTRAL = ((5, 1.0), (5, 0.9), (4, 0.9), (3, 1.0), (3, 0.9), (3, 0.8))  # steps, and where in the schedule they start
DDIM = 5
_AS_IT_IS = Monotone((0.0,), (0.0,), slope_beyond=1)
_WRITTEN_EVERY = 8  # pictures: a run that is cut off has so many


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    scores = commands.add_parser("scores")
    scores.set_defaults(measure=measure_scores)
    scores.add_argument("--engine", type=Path, required=True)
    add_pictures(scores)
    scores.add_argument("--images", type=int, default=200)
    commands.add_parser("full").set_defaults(measure=measure_full)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given.measure(given, Path(folder))


def measure_scores(given: argparse.Namespace, folder: Path) -> None:
    """Score the same pictures in every way."""
    del folder
    labels, split, directory = (
        read_labels(given.labels, given.dataset),
        Split.read(given.split),
        open_engine(given.engine),
    )
    chosen = drawn(split.items(labels, "test"), given.images)
    m, stages = directory.manifest, load_stages(directory, OnnxRuntime())
    own = Sampling.trained(m.schedule)
    needed = {m.taps.step_of(kind) - 1 for kind in m.kinds[1:]} - {-1}
    ways = {"all": own, "all, another seed": own}
    for count, share in ANCESTRAL:
        start = round(share * (own.steps[-1]))
        ways[f"ancestral, {count} from {start}"] = Sampling(spread({*needed, start}, count))
    ways[f"ddim, {DDIM}"] = choose_sampling(m.schedule, m.taps, m.kinds, DDIM, "ddim")
    scorers = {
        name: Scorer(dataclasses.replace(m, fast=Fast(sampling, _AS_IT_IS, 0)), stages, backend=name)
        for name, sampling in ways.items()
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number, item in enumerate(chosen, start=1):
        for name, scorer in scorers.items():
            seed = SEED + (name == "all, another seed")
            score = scorer.score(item.path, Options(crops=1, seed=seed, mode=Mode.CROP, fast=True))
            found[name].append(score.score)
            seconds[name].append(score.seconds)
        if number % _WRITTEN_EVERY == 0 or number == len(chosen):
            quality = [item.quality for item in chosen[:number]]
            rows = {
                name: encode(compare(sampling, found[name], found["all"], ratio(seconds["all"], seconds[name])))
                | {"srcc_with_labels": srcc(found[name], quality)}
                for name, sampling in ways.items()
            }
            figures = {
                "model": m.engine_id,
                "all_steps": m.schedule.steps,
                "images": number,
                "pictures": [item.path.name for item in chosen[:number]],
                "ways": rows,
                "scores": found,
                "seconds": seconds,
            }
            write("steps", figures)


def measure_full(given: argparse.Namespace, folder: Path) -> None:
    """Restore a picture by the full-size U-Net, in 50, 10 and 5 steps."""
    del given
    model = load_checkpoint(None, preset="paper", seed=SEED).model
    config, path = model.config, folder / "unet.onnx"
    (plan,) = (plan for plan in stage_plans(model) if plan.name is StageName.UNET)
    assert config.unet is not None
    export_graph(plan, path, config.unet.alignment)
    del model
    denoiser = BoundDenoiser(OnnxStage(path, OnnxRuntime()), 224, 224)
    pixels = read_image(ROOT / "samples" / "jpeg-strong.jpg", min_side=224).pixels[:224, :224]
    denoiser.condition[:] = to_plane(pixels)
    denoiser(0.5)  # warms up
    ways = {"50": (50, 0), "10": (10, 0), "5": (5, 0), "50, another seed": (50, 1)}  # steps, added to the seed
    figures: dict[str, Any] = {"preset": "paper", "weights": "seeded", "size": [224, 224], "ways": {}}
    planes: dict[Kind, Any] = {}
    for way, (count, seed) in ways.items():
        sampling = choose_sampling(config.schedule, config.taps, config.kinds, count, None)
        rows = sampling.rows(config.schedule, config.taps, config.kinds)
        start = time.perf_counter()
        restored = restore(denoiser, NoiseField(SEED + seed, (224, 224)), rows)
        figures["ways"][way] = {"seconds": time.perf_counter() - start}
        planes = planes or restored
        if restored is not planes:
            figures["ways"][way]["psnr_to_50"] = {kind: psnr(planes[kind], plane) for kind, plane in restored.items()}
            write("steps-full", figures)


def psnr(want: Any, have: Any) -> float:
    """Return the PSNR of images in [-1, 1], in dB."""
    error = float(np.square(want - have, dtype=np.float64).mean())
    return 10 * math.log10(4 / error) if error else math.inf


if __name__ == "__main__":
    main()

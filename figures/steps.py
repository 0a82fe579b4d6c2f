"""Fewer steps: how far scores of held-out pictures move, and how much sooner they come.

    python figures/steps.py --engine engine/ --labels BIQ2021/ --dataset biq2021 --split split.json

results/steps.json is of an engine of the trained `mini`, on pictures of the part "test" of a split: one crop, restored
by itself, each way in turn with all steps. Corrections are fitted on one half of the pictures and judged on the other.
How near restored pictures are to those of all steps is of the middles of the first few. With --damaged each picture
gets one of the distortions first, in turn, at level 3 to 5 (results/steps-damaged.json).
"""

import argparse
import dataclasses
import math
import statistics
from pathlib import Path

import numpy as np
from precision import SEED, add_pictures, drawn, ratio
from record import psnr, write

from diffiqa.calibration.steps import compare
from diffiqa.data.datasets import read_labels
from diffiqa.data.distortions import DISTORTIONS, compose
from diffiqa.data.splits import Split
from diffiqa.engine.agreement import srcc
from diffiqa.engine.codec import encode
from diffiqa.engine.manifest import Manifest, StageName, open_engine
from diffiqa.engine.monotone import Monotone
from diffiqa.engine.noise import NoiseField
from diffiqa.engine.pixels import to_plane
from diffiqa.engine.sampling import Fast, Sampler, Sampling, TapRule, spread
from diffiqa.engine.schedule import Kind
from diffiqa.runtime.executor import StageRunner
from diffiqa.runtime.host.executor import BoundDenoiser
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.host.sampler import restore
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.images import read_image
from diffiqa.runtime.results import Mode, Options
from diffiqa.runtime.scorer import Scorer

# How many steps, from which on, and whether they start from the image.
ANCESTRAL = ((5, 9, False), (3, 8, False), (3, 4, True))
DDIM = ((5, 9, False), (1, 7, False), (2, 4, True), (1, 4, True), (1, 2, True))
RESEEDED = "all, another seed"
_RESTORED = 8  # pictures
_AS_IT_IS = Monotone((0.0,), (0.0,), slope_beyond=1)
_WRITTEN_EVERY = 8  # pictures: a run that is cut off has so many


def main() -> None:
    """Score the same pictures in every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    add_pictures(parser)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--damaged", action="store_true")
    given = parser.parse_args()
    labels, split, directory = (
        read_labels(given.labels, given.dataset),
        Split.read(given.split),
        open_engine(given.engine),
    )
    chosen = drawn(split.items(labels, "test"), given.images)
    m, stages = directory.manifest, load_stages(directory, OnnxRuntime())
    own = Sampling.trained(m.schedule)
    needed = {m.taps.step_of(kind) - 1 for kind in m.kinds[1:]} - {-1}
    ways = {"all": own, RESEEDED: own}
    samplings = [Sampling(spread({*needed, start}, count), from_image=image) for count, start, image in ANCESTRAL]
    for count, start, image in DDIM:
        samplings.append(Sampling(spread({start}, count), Sampler.DDIM, 0, TapRule.RENOISED, image))
    ways |= {f"{way.name}, {len(way.steps)} from {way.steps[-1]}": way for way in samplings}
    scorers = {
        name: Scorer(dataclasses.replace(m, fast=Fast(sampling, _AS_IT_IS, 0)), stages, backend=name)
        for name, sampling in ways.items()
    }
    near = nearness(m, stages[StageName.UNET], [item.path for item in chosen[:_RESTORED]], ways)
    found: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    kinds, random = list(DISTORTIONS), np.random.default_rng(SEED)
    for number, item in enumerate(chosen, start=1):
        picture = read_image(item.path).pixels
        if given.damaged:
            done = (kinds[number % len(kinds)], int(random.integers(3, 6)))
            damaged = compose(picture.astype(np.float32) / np.float32(255), (done,), random)
            picture = np.rint(damaged * 255).astype(np.uint8)
        for name, scorer in scorers.items():
            seed = SEED + (name == RESEEDED)
            score = scorer.score(picture, Options(crops=1, seed=seed, mode=Mode.CROP, fast=True))
            found[name].append(score.score)
            seconds[name].append(score.seconds)
        if number % _WRITTEN_EVERY == 0 or number == len(chosen):
            quality = [item.quality for item in chosen[:number]]
            rows = {
                name: encode(compare(sampling, found[name], found["all"], ratio(seconds["all"], seconds[name])))
                | {"srcc_with_labels": srcc(found[name], quality), "psnr_to_all_steps": near[name]}
                for name, sampling in ways.items()
            }
            figures = {
                "model": m.engine_id,
                "psnr_of_the_pictures_themselves": near["the pictures themselves"],
                "all_steps": m.schedule.steps,
                "images": number,
                "pictures": [item.path.name for item in chosen[:number]],
                "ways": rows,
                "scores": found,
                "seconds": seconds,
            }
            write("steps-damaged" if given.damaged else "steps", figures)


def nearness(
    m: Manifest, unet: StageRunner, pictures: list[Path], ways: dict[str, Sampling]
) -> dict[str, float | None]:
    """Return how near what each way restores is to what the first restores: mean PSNR in dB, None if it is the same."""
    side, none = m.crop.size, "the pictures themselves"
    denoiser = BoundDenoiser(unet, side, side)
    found: dict[str, list[float]] = {name: [] for name in (*ways, none)}
    for path in pictures:
        pixels = read_image(path, min_side=side).pixels
        top, left = ((length - side) // 2 for length in pixels.shape[:2])
        denoiser.condition[:] = to_plane(np.ascontiguousarray(pixels[top : top + side, left : left + side]))
        planes = {none: denoiser.condition.copy()}
        for name, sampling in ways.items():
            noise = NoiseField(SEED + (name == RESEEDED), (side, side))
            rows = sampling.rows(m.schedule, m.taps, m.kinds)
            start = (denoiser.condition, *rows.image) if rows.image else None
            planes[name] = restore(denoiser, noise, rows, start)[Kind.Y0].clip(-1, 1)
        for name, plane in planes.items():
            found[name].append(psnr(planes["all"], plane))
    return {name: None if math.inf in near else statistics.fmean(near) for name, near in found.items()}


if __name__ == "__main__":
    main()

"""Fewer steps: how far scores of held-out pictures move, and how much sooner they come.

    python figures/steps.py --engine engine/ --labels BIQ2021/ --dataset biq2021 --split split.json

results/steps.json is of an engine of the trained `mini`, on pictures of the part "test" of a split: one crop, restored
by itself, each way in turn with all steps. Corrections are fitted on one half of the pictures and judged on the other.
"""

import argparse
import dataclasses
from pathlib import Path

from precision import SEED, add_pictures, drawn, ratio
from record import write

from diffiqa.calibration.steps import compare
from diffiqa.data.datasets import read_labels
from diffiqa.data.splits import Split
from diffiqa.engine.agreement import srcc
from diffiqa.engine.codec import encode
from diffiqa.engine.manifest import open_engine
from diffiqa.engine.monotone import Monotone
from diffiqa.engine.sampling import Fast, Sampler, Sampling, TapRule, spread
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.results import Mode, Options
from diffiqa.runtime.scorer import Scorer

# How many steps, and from which on.
ANCESTRAL = ((5, 9), (4, 8), (3, 8), (3, 7))
DDIM = ((5, 9), (2, 8), (1, 8), (1, 7), (1, 6), (1, 4))
_AS_IT_IS = Monotone((0.0,), (0.0,), slope_beyond=1)
_WRITTEN_EVERY = 8  # pictures: a run that is cut off has so many


def main() -> None:
    """Score the same pictures in every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    add_pictures(parser)
    parser.add_argument("--images", type=int, default=200)
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
    ways = {"all": own, "all, another seed": own}
    for count, start in ANCESTRAL:
        ways[f"ancestral, {count} from {start}"] = Sampling(spread({*needed, start}, count))
    for count, start in DDIM:
        ways[f"ddim, {count} from {start}"] = Sampling(spread({start}, count), Sampler.DDIM, taps=TapRule.RENOISED)
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


if __name__ == "__main__":
    main()

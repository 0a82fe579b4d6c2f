"""Whether `iqa-verify --against` names the right cause: `python figures/against.py`, half an hour on one core.

The user's program is `models/mini` in PyTorch, as it was trained. Each case is an engine of it that was exported with a
wrong option. A case is right if the first cause brings the right option. The program draws the engine's noise, or
noise of its own, as another program does.
"""

import csv
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from record import ROOT, write

from diffiqa.engine.pixels import to_plane
from diffiqa.export.api import export
from diffiqa.model.checkpoint import load
from diffiqa.runtime.images import read_image
from diffiqa.runtime.results import Options
from diffiqa.verify.scores import ScoresFound, compare_scores

MINI = ROOT / "models" / "mini" / "model.safetensors"
SIZE = 300, 260  # pixels: larger than a crop, so that crops differ, and no multiples of 16
# What the engine was exported with, and what the first cause must bring.
CASES = {
    "": "",
    "--branch-weights 0,1": "--branch-weights 0.2,0.8",
    "--tap-form png8": "--tap-form float",
    "--sides resized": "--sides padded",
    "--crop-count 1": "--crop-count 9 --crop-places grid",
    "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225": "--mean 0.5,0.5,0.5 --std 0.5,0.5,0.5",
    "--tap-form png8 --image-form squashed": "--image-form as-is",
}
NUMBER = re.compile(r"[0-9.]+")
NOISES = {"its own": (1, 3), "the engine's": (0, 1)}  # the program's seed, and how many the spread is measured with


def outcome(found: ScoresFound, option: str) -> str:
    """Say what a comparison came to, where `option` is what it should name."""
    if found.within:
        return "agrees"
    enough = [one for one in found.explanations if one.enough]
    if not enough:
        return "nothing named"
    named = [one.option for one in enough]
    right = [_is_near(one, option) for one in named]
    if right[0]:
        return "named" if len(named) == 1 else "named first"
    return "named later" if any(right) else "another cause named"


def _is_near(option: str, wanted: str) -> bool:
    """Return whether an option is the wanted one, up to a tenth of the numbers that were fitted to noisy scores."""
    words, others = (re.split(r"[ ,]", text) for text in (option, wanted))
    if len(words) != len(others):
        return False
    return all(
        abs(float(a) - float(b)) <= 0.1 * abs(float(b)) if NUMBER.fullmatch(b) and NUMBER.fullmatch(a) else a == b
        for a, b in zip(words, others, strict=True)
    )


def main() -> None:
    """Compare case by case, and write figures/results/against.json."""
    torch.set_num_threads(1)
    model, cases = load(MINI).model, list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        images, table = [], Path(folder, "program.csv")
        for sample in sorted((ROOT / "samples").glob("*.??g")):
            images.append(Path(folder, sample.stem + ".png"))
            Image.open(sample).convert("RGB").resize(SIZE).save(images[-1])
        planes = [torch.from_numpy(to_plane(read_image(image).pixels))[None] for image in images]
        scores = {noise: [float(model.score(x, seed).total) for x in planes] for noise, (seed, _) in NOISES.items()}
        for wrong, option in CASES.items():
            words, engine = wrong.split(), Path(folder, "engine")
            options = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
            export(MINI, engine, options=options, target="none", force=True)
            for noise, (_, seeds) in NOISES.items():
                with table.open("w", newline="") as stream:
                    rows = zip([image.name for image in images], scores[noise], strict=True)
                    csv.writer(stream).writerows([["name", "score"], *rows])
                found = compare_scores(engine, images, table, options=Options(seeds=seeds), threads=1)
                causes = [
                    {"what": one.what, "option": one.option, "left": one.left, "enough": one.enough}
                    for one in found.explanations[:4]
                ]
                distance = {"root": found.distance.root, "allowed": found.allowed, "spread": found.spread}
                case = {"wrong": wrong, "noise": noise, "expected": option, "outcome": outcome(found, option)}
                cases.append({**case, **distance, "causes": causes})
                write("against", {"images": len(images), "pixels": SIZE, "cases": cases})
                if not found.within:
                    break  # its noise hides nothing


if __name__ == "__main__":
    main()

"""Whether `iqa-verify --against` names the right cause: `python figures/against.py ENGINE`, made from `models/mini`.

The user's program is `mini` in PyTorch. It scores pictures as the model was trained, and otherwise: each way is a case.
A case is right if the program's scores agree as they should, or if the first cause is what was changed.
"""

import csv
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from record import ROOT, write

from diffiqa.engine.pixels import TapForm, to_plane
from diffiqa.model.checkpoint import load
from diffiqa.model.config import ModelConfig, Pixels
from diffiqa.model.network import DiffV2IQA, Scores
from diffiqa.runtime.images import read_image
from diffiqa.runtime.results import Options
from diffiqa.verify.scores import IMAGENET, compare_scores

SIZE = 288, 256  # pixels: larger than a crop, so that crops differ
TRIALS = 64


def program(model: DiffV2IQA, images: list[Path], config: ModelConfig, crops: int) -> list[Scores]:
    """Score with the weights of a model, in PyTorch, under a configuration."""
    other = DiffV2IQA(config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        return [other.score(torch.from_numpy(to_plane(read_image(i).pixels))[None], 0, crops) for i in images]


def main() -> None:
    """Compare case by case, and write figures/results/against.json."""
    torch.set_num_threads(1)
    engine, cases = Path(sys.argv[1]), {}
    model = load(ROOT / "models" / "mini" / "model.safetensors").model
    config = model.config
    other_pixels = Pixels() if config.pixels == IMAGENET else IMAGENET
    mean, std = (",".join(map(str, values)) for values in (other_pixels.mean, other_pixels.std))
    with tempfile.TemporaryDirectory() as folder:
        images = []
        for sample in sorted((ROOT / "samples").glob("*.??g")):
            images.append(Path(folder, sample.stem + ".png"))
            Image.open(sample).convert("RGB").resize(SIZE).save(images[-1])

        def compare(case: str, option: str, scores: list[float]) -> None:
            with Path(folder, "program.csv").open("w", newline="") as stream:
                csv.writer(stream).writerows([["name", "score"], *zip([i.name for i in images], scores, strict=True)])
            found = compare_scores(
                engine, images, Path(folder, "program.csv"), options=Options(seeds=2), trials=TRIALS, threads=1
            )
            first: Any = found.explanations[0] if found.explanations else None
            causes = [{"what": one.what, "left": one.left, "enough": one.enough} for one in found.explanations[:3]]
            right = (bool(first) and first.option.startswith(option) and first.enough) if option else found.within
            distance = {"root": found.distance.root, "allowed": found.allowed, "within": found.within}
            cases[case] = {"right": bool(right), "expected": option or "agrees", **distance, "causes": causes}
            write("against", {"images": len(images), "pixels": SIZE, "cases": cases})

        same = program(model, images, config, config.crop_count)
        vcg, vda = ([float(getattr(one, name)) for one in same] for name in ("vcg", "vda"))
        total = [float(one.total) for one in same]
        compare("as trained", "", total)
        compare("VDA alone", "--branch-weights 0,1", vda)
        sums = [a + 5 * b for a, b in zip(vcg, vda, strict=True)]
        compare("VCG + 5·VDA", "--branch-weights 1,5", sums)
        tapped = program(model, images, replace(config, tap_form=TapForm.PNG8), config.crop_count)
        compare("taps as png8", "--tap-form png8", [float(one.total) for one in tapped])
        middle = program(model, images, config, 1)
        compare("one crop", "--crop-count 1", [float(one.total) for one in middle])
        seen = program(model, images, replace(config, pixels=other_pixels), config.crop_count)
        compare("other pixels", f"--mean {mean} --std {std}", [float(one.total) for one in seen])


if __name__ == "__main__":
    main()

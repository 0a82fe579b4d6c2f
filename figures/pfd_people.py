"""How far `pfd-mini` agrees with people, and how often it names damage right.

    python figures/pfd_people.py --model models/pfd-mini/model.safetensors --biq2021 BIQ2021/ \
        --clive ChallengeDB_release/ --cache cache/ -o models/pfd-mini/people.json

Crops and noise are those of scoring, and so are the figures up to rounding: what frozen blocks see is kept as
float16. Each set is judged with the loop and without it. Damage is drawn as in training, on good pictures of BIQ2021's
part "test", at levels 3 to 5.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from diffiqa.data.datasets import read_labels
from diffiqa.data.splits import split_by_content
from diffiqa.model.pfd.checkpoint import load
from diffiqa.training.loop import Machine
from diffiqa.training.pfd import SEVERE, damaged, judge, lite_of
from diffiqa.training.pfd_ablate import naming, opinions
from diffiqa.training.pfd_features import Picture, SeenPictures
from diffiqa.training.score import lot

SEED, CROPS = 1, 4  # of the recipe
VALIDATION, TEST, DAMAGED = 400, 600, 440


def main() -> None:
    """Judge a bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "biq2021", "cache", "output"):
        parser.add_argument(f"--{name}", *(("-o",) if name == "output" else ()), type=Path, required=True)
    parser.add_argument("--clive", type=Path, help="To be looked at once, at the end.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, machine = load(given.model).model, Machine(torch.device("cpu"))
    biq = read_labels(given.biq2021, "biq2021")
    split = split_by_content(biq, SEED)
    sets = {name: [Picture(i.path, i.quality) for i in split.items(biq, name)] for name in ("validation", "test")}
    harmed = damaged(sets["test"], DAMAGED, SEED, SEVERE)
    sets = {"validation": lot(sets["validation"], VALIDATION), "test": lot(sets["test"], TEST)}
    if given.clive:
        sets["clive"] = [Picture(i.path, i.quality) for i in read_labels(given.clive, "clive").items]
    seen = SeenPictures(lite_of(model).lite, model.config, given.cache, crops=CROPS, seed=SEED)
    found: dict[str, Any] = json.loads(given.output.read_text()) if given.output.exists() else {}
    for name, pictures in sets.items():
        usable = seen.fill(pictures, print)
        without = judge(model, seen, usable, machine, denoised=False)
        found[name] = {
            "loop": opinions(judge(model, seen, usable, machine), usable, without),
            "without": opinions(without, usable),
        }
    usable = seen.fill(harmed, print)
    found["damage"] = naming(model, judge(model, seen, usable, machine), usable)
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

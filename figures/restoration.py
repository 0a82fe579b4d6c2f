"""What a model's U-Net does to pictures of a rated set: PSNR before and after, by distortion and level, as CSV.

    python figures/restoration.py --model models/mini/model.safetensors --rated rated/ --cache cache/ -o gains.csv

`rated/` is what `iqa-train rate` makes. Pictures are compared with the undistorted window they come from; those that
their distortion leaves as they are have no `before_db`. The first row is of the undistorted windows themselves.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from diffiqa.data.datasets import load_csv
from diffiqa.data.pictures import Pictures
from diffiqa.data.rate import LABELS, SPLIT
from diffiqa.data.splits import Split
from diffiqa.engine.pixels import to_pixels
from diffiqa.model.checkpoint import load
from diffiqa.training.loop import Machine
from diffiqa.training.score import Restorations


def psnr_db(image: np.ndarray, original: np.ndarray) -> float:
    """Return the PSNR of 8-bit pictures: infinite where equal."""
    mean_square = np.square(image.astype(float) - original.astype(float)).mean() / 255**2
    return float(-10 * np.log10(mean_square)) if mean_square else float("inf")


def main() -> None:
    """Restore, compare, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "rated", "cache", "output"):
        parser.add_argument(f"--{name}", *(("-o",) if name == "output" else ()), type=Path, required=True)
    parser.add_argument("--part", default="validation")
    parser.add_argument("--split", type=Path, help="Default: that of RATED.")
    parser.add_argument("--only", action="append", help="This distortion, and undistorted windows (repeatable).")
    given = parser.parse_args()
    items = Split.read(given.split or given.rated / SPLIT).items(load_csv(given.rated / LABELS), given.part)
    if given.only:
        items = tuple(item for item in items if not item.distortion or item.distortion in given.only)
    pictures = Pictures([item.path for item in items], given.cache / "pictures", min_side=1)
    restorations = Restorations(load(given.model).model, 0, given.cache / "restored")
    restorations.fill(pictures, Machine(torch.device("cpu")), lambda done, total: print(f"{done} of {total}"))
    # One window of each photograph in the held-out parts, so a reference has one original.
    originals = {item.reference: index for index, item in enumerate(items) if not item.distortion}
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for index, item in enumerate(items):
        plane = np.load(restorations.file(pictures, index))[0].astype(np.float32)
        restored = to_pixels(plane)
        original = pictures[originals[item.reference]]
        found[item.distortion or "", item.level or 0].append(
            (psnr_db(pictures[index], original), psnr_db(restored, original))
        )
    with given.output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["distortion", "level", "pictures", "before_db", "after_db", "gain_db"])
        for (distortion, level), pairs in sorted(found.items()):
            before, after = np.mean(pairs, axis=0)
            figures = (
                ["", f"{after:.2f}", ""] if np.isinf(before) else [f"{v:.2f}" for v in (before, after, after - before)]
            )
            writer.writerow([distortion or "none", level or "", len(pairs), *figures])


if __name__ == "__main__":
    main()

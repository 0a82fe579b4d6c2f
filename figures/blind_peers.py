"""What scores without a reference that others publish say of rated images: BRISQUE and PIQE, as their packages are.

    python3 -m venv peers && peers/bin/pip install brisque==0.2.0 pypiqe==1.2 opencv-python-headless "numpy<2.3"
    peers/bin/python figures/blind_peers.py --labels clive.csv --peer brisque -o brisque.csv
    python figures/people.py agree --scores brisque.csv --labels clive.csv --on clive --who BRISQUE -o people.json

It needs nothing of diffiqa, so it runs in an environment of its own. Both call a lower score better. The file has
scores with the other sign, so that higher is better.
"""

import argparse
import csv
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def brisque() -> Callable[[np.ndarray], float]:
    """Return BRISQUE with the weights of its package."""
    model = importlib.import_module("brisque").BRISQUE(url=False)
    return lambda pixels: float(model.score(pixels))


def piqe() -> Callable[[np.ndarray], float]:
    """Return PIQE, which has no weights. It takes blue first, as OpenCV does."""
    score: Any = importlib.import_module("pypiqe").piqe
    return lambda pixels: float(score(np.ascontiguousarray(pixels[..., ::-1]))[0])


PEERS = {"brisque": brisque, "piqe": piqe}


def main() -> None:
    """Score every image of the label file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True, help="A CSV with a column image.")
    parser.add_argument("--peer", choices=list(PEERS), required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    score = PEERS[given.peer]()
    with given.labels.open(newline="") as file:
        images = [row["image"] for row in csv.DictReader(file)]
    with given.output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "score"])
        for image in images:
            pixels = np.asarray(Image.open(given.labels.parent / image).convert("RGB"))
            found = -score(pixels)
            writer.writerow([image, found if math.isfinite(found) else ""])  # BRISQUE has none for a flat picture


if __name__ == "__main__":
    main()

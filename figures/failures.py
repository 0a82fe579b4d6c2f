"""Where a score is furthest from people's opinions: names, and the pictures on one sheet.

    python figures/failures.py --scores results/scores.jsonl --labels clive.csv --count 6 -o failures.jpg

The first row of the sheet has pictures that the score ranks too high, the second those that it ranks too low. The sheet
shows other people's pictures: look at it, and do not pass it on.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from scipy.stats import rankdata

from diffiqa.data.datasets import read_labels
from diffiqa.evaluation.scores import pictures_of, read_branches

SIDE, TEXT = 240, 30  # of a picture and of the lines below it, pixels


def main() -> None:
    """Rank, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("scores", "labels", "output"):
        parser.add_argument(f"--{name}", *(("-o",) if name == "output" else ()), type=Path, required=True)
    parser.add_argument("--dataset")
    parser.add_argument("--count", type=int, default=6, help="Pictures in a row.")
    given = parser.parse_args()
    items = read_labels(given.labels, given.dataset).items
    scores = read_branches(given.scores, pictures_of(items))["score"]
    items = tuple(item for item in items if item.image in scores)
    ranks = [
        100 * rankdata(values) / len(items) for values in ([scores[i.image] for i in items], [i.quality for i in items])
    ]
    order = np.argsort(ranks[0] - ranks[1])
    sheet = Image.new("RGB", (given.count * SIDE, 2 * (SIDE + TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, places in enumerate((order[::-1][: given.count], order[: given.count])):
        for column, place in enumerate(places.tolist()):
            item, left, top = items[place], column * SIDE, row * (SIDE + TEXT)
            with Image.open(item.path) as picture:
                sheet.paste(ImageOps.contain(picture.convert("RGB"), (SIDE, SIDE)), (left, top))
            text = f"score {ranks[0][place]:.0f} %, people {ranks[1][place]:.0f} %"
            draw.text((left + 4, top + SIDE + 2), f"{item.path.name}\n{text}", "black")
            print(f"{'too low' if row else 'too high'}: {item.path.name}, {text}")
    sheet.save(given.output)


if __name__ == "__main__":
    main()

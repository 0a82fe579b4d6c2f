"""All 125 distortions of one picture on one sheet: `python -m diffiqa.data.contact_sheet PICTURE SHEET`."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .distortions import DISTORTIONS, LEVELS, distort

_CAPTION = 14  # pixels of height above each picture


def contact_sheet(picture: Image.Image, numbers: list[int], seed: int) -> Image.Image:
    """A row for each distortion, a column for each level; every picture gets the same random draws."""
    image = np.asarray(picture.convert("RGB"), np.float32) / np.float32(255)
    height, width, _ = image.shape
    sheet = Image.new("RGB", (width * len(LEVELS), (height + _CAPTION) * len(numbers)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, number in enumerate(numbers):
        kind = DISTORTIONS[number]
        for column, level in enumerate(LEVELS):
            distorted = distort(image, number, level, np.random.default_rng(seed))
            place = (column * width, row * (height + _CAPTION))
            caption = f"{number} {kind.name} {kind.levels[level - 1]:g}"
            draw.text((place[0] + 2, place[1] + 1), caption, fill="black")
            sheet.paste(Image.fromarray(np.rint(distorted * 255).astype(np.uint8)), (place[0], place[1] + _CAPTION))
    return sheet


def main(source: Path, target: Path) -> None:
    """Write the sheet of the picture in `source` to `target`."""
    with Image.open(source) as picture:
        contact_sheet(picture, list(DISTORTIONS), seed=1).save(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Write fullref_goldens.json: what piq, another implementation of the metrics, says of the synthetic pictures.

Needs `pip install piq==0.8.0` (with torchvision), which the project does not. Run as: python make_fullref_goldens.py
"""

import json
from pathlib import Path

import numpy as np
import piq
import torch
from synthetic import DISTORTIONS, SIZES, Picture, picture


def tensor(planes: Picture) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(planes.astype(np.float64), -1, 0)[None].copy())


def main() -> None:
    goldens: dict[str, dict[str, float]] = {}
    for size, (height, width) in SIZES.items():
        for distortion, apply in DISTORTIONS.items():
            pair = [tensor(image) for image in (picture(height, width), apply(picture(height, width)))]
            luma = [0.299 * image[:, :1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:] for image in pair]
            values = {  # all but MDSI are symmetric; piq takes the distorted picture first
                "haarpsi": piq.haarpsi(*pair),
                "mdsi": piq.mdsi(pair[1], pair[0]),
                "gmsd": piq.gmsd(*pair),
                "ms_ssim": piq.multi_scale_ssim(*luma),
            }
            if size == "odd":  # piq repeats the first row where an odd side is halved, we the last
                del values["ms_ssim"]
            goldens[f"{size}, {distortion}"] = {name: round(value.item(), 6) for name, value in values.items()}
    Path(__file__).with_name("fullref_goldens.json").write_text(json.dumps(goldens, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

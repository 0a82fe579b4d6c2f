"""Made-up pictures to calibrate on where there are no photographs: each as drawn, blurred, noisy and compressed."""

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter

from ..runtime.images import synthetic

COUNT = 16  # a quarter of each


def draw(folder: Path, side: int) -> None:
    """Write `COUNT` different pictures of side×side."""
    for seed in range(COUNT // 4):
        pixels = synthetic(seed, side, side)
        picture = PIL.Image.fromarray(pixels)
        noisy = pixels + np.random.default_rng(seed).normal(0, 25, pixels.shape)
        picture.save(folder / f"made-{seed}.png")
        picture.filter(PIL.ImageFilter.GaussianBlur(2)).save(folder / f"made-{seed}-blurred.png")
        PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"made-{seed}-noisy.png")
        picture.save(folder / f"made-{seed}-compressed.jpg", quality=10)

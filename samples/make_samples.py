"""Make the degraded sample images from `pristine.png`, which stands beside this script."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

HERE = Path(__file__).parent
SEED = 11


def main() -> None:
    """Write two strengths each of blur, noise and JPEG."""
    pristine = Image.open(HERE / "pristine.png").convert("RGB")
    generator = np.random.default_rng(SEED)
    for strength, radius, deviation, quality in (("mild", 1.0, 8.0, 30), ("strong", 3.0, 30.0, 6)):
        pristine.filter(ImageFilter.GaussianBlur(radius)).save(HERE / f"blur-{strength}.png", optimize=True)
        noisy = np.asarray(pristine, np.float64) + generator.normal(0, deviation, (*pristine.size[::-1], 3))
        noisy_pixels = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
        Image.fromarray(noisy_pixels).save(HERE / f"noise-{strength}.png", optimize=True)
        pristine.save(HERE / f"jpeg-{strength}.jpg", quality=quality)


if __name__ == "__main__":
    main()

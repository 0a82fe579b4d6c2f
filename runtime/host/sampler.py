"""The restoration loop on the host: noise, steps through a U-Net, taps. NumPy holds the state.

It is the reference for all other implementations of the loop. It allocates no arrays between steps.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...engine.noise import NoiseField
from ...engine.sampling import Rows
from ...engine.schedule import Coefficients, Kind

FloatArray = npt.NDArray[np.float32]


class Denoiser(Protocol):
    """A U-Net bound to one condition image; it owns its buffers, all (3, H, W) float32."""

    y: FloatArray  # the state: read by a call
    noise: FloatArray  # the prediction: written by a call

    def __call__(self, noise_level: float) -> None:
        """Predict the noise in `y` at `noise_level` (√ᾱ) into `noise`."""


def restore(denoiser: Denoiser, field: NoiseField, rows: Rows) -> dict[Kind, FloatArray]:
    """Walk all rows and return a copy of the result for every kind that they tap, each (3, H, W)."""
    factors, y = rows.factors, denoiser.y
    z, scratch = np.empty_like(y), np.empty_like(y)
    tapped = {row: np.empty_like(y) for row in rows.taps.values()}
    field.fill(rows.start, y)
    with ThreadPoolExecutor(1, "diffiqa-noise") as pool:
        for row in reversed(range(len(rows.steps))):
            # Noise is computed while the network runs: the cores have idle time between its layers.
            noise = pool.submit(field.fill, rows.steps[row], z) if factors.sigma[row] else None
            if level := float(factors.noise_level[row]):
                denoiser(level)
                result = y
            else:
                result = tapped[row]
                np.copyto(result, y)
            if noise:
                noise.result()
            step(factors, row, result, denoiser.noise, z, scratch)
            if row in tapped and result is y:
                np.copyto(tapped[row], y)
    return {kind: tapped[row] for kind, row in rows.taps.items()}


def step(c: Coefficients, i: int, y: FloatArray, noise: FloatArray, z: FloatArray, x0: FloatArray) -> None:
    """Advance `y` in place past row `i`. `noise` and `z` are overwritten; `x0` holds the scaled estimate.

    `x0 = clip(y·y_to_x0 − ε·noise_to_x0, −1, 1)`; `y ← x0·x0_to_mean + y·y_to_mean [+ z·sigma]`, where every product
    and every sum is rounded to float32 in this order; where sigma is 0 no noise is added, nor read.
    """
    np.multiply(y, c.y_to_x0[i], out=x0)
    noise *= c.noise_to_x0[i]
    x0 -= noise
    np.clip(x0, -1, 1, out=x0)
    x0 *= c.x0_to_mean[i]
    y *= c.y_to_mean[i]
    y += x0
    if c.sigma[i]:
        z *= c.sigma[i]
        y += z

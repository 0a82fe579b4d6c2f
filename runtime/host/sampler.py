"""The restoration loop on the host: noise, T steps through a U-Net, taps. NumPy holds the state.

It is the reference for all other implementations of the loop. It allocates no arrays between steps.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...engine.noise import NoiseField
from ...engine.schedule import Coefficients, Kind, Schedule, Taps

FloatArray = npt.NDArray[np.float32]


class Denoiser(Protocol):
    """A U-Net bound to one condition image; it owns its buffers, all (3, H, W) float32."""

    y: FloatArray  # the state: read by a call
    noise: FloatArray  # the prediction: written by a call

    def __call__(self, noise_level: float) -> None:
        """Predict the noise in `y` at `noise_level` (√ᾱ) into `noise`."""


def restore(
    denoiser: Denoiser, field: NoiseField, schedule: Schedule, taps: Taps, kinds: tuple[Kind, ...]
) -> dict[Kind, FloatArray]:
    """Run the whole loop and return a copy of the state for every restored kind in `kinds`, each (3, H, W)."""
    table, y = schedule.coefficients, denoiser.y
    z, scratch = np.empty_like(y), np.empty_like(y)
    tapped = {taps.step_of(kind): np.empty_like(y) for kind in kinds if kind is not Kind.DIS}
    field.fill(schedule.steps, y)
    with ThreadPoolExecutor(1, "diffiqa-noise") as pool:
        for i in reversed(range(schedule.steps)):
            # Noise is computed while the network runs: the cores have idle time between its layers.
            noise = pool.submit(field.fill, i, z) if i > 0 else None
            denoiser(float(table.noise_level[i]))
            if noise:
                noise.result()
            step(table, i, y, denoiser.noise, z, scratch)
            if i in tapped:
                np.copyto(tapped[i], y)
    return {kind: tapped[taps.step_of(kind)] for kind in kinds if kind is not Kind.DIS}


def step(c: Coefficients, i: int, y: FloatArray, noise: FloatArray, z: FloatArray, x0: FloatArray) -> None:
    """Advance `y` in place past step index `i`. `noise` and `z` are overwritten; `x0` holds the scaled estimate.

    `x0 = clip(y·y_to_x0 − ε·noise_to_x0, −1, 1)`; `y ← x0·x0_to_mean + y·y_to_mean [+ z·sigma]`, where every product
    and every sum is rounded to float32 in this order; the last step (i = 0) adds no noise.
    """
    np.multiply(y, c.y_to_x0[i], out=x0)
    noise *= c.noise_to_x0[i]
    x0 -= noise
    np.clip(x0, -1, 1, out=x0)
    x0 *= c.x0_to_mean[i]
    y *= c.y_to_mean[i]
    y += x0
    if i > 0:
        z *= c.sigma[i]
        y += z

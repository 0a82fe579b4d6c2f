"""The loop on the host: noise, steps through a network, taps. NumPy holds the state, of whatever shape.

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
    """A network bound to what it reads besides the state. It owns both buffers, which have one shape, float32."""

    y: FloatArray  # the state: read by a call
    noise: FloatArray  # the prediction: written by a call

    def __call__(self, scalar: float, /) -> None:
        """Predict the noise in `y` at a step, told by its noise level (√ᾱ) or timestep, into `noise`."""


def restore(
    denoiser: Denoiser,
    field: NoiseField,
    rows: Rows,
    start: tuple[FloatArray, FloatArray | float, FloatArray | float] | None = None,
) -> dict[Kind, FloatArray]:
    """Walk all rows, leave the result in the state, and return a copy of it for every kind that they tap.

    The state begins as noise; with a `start` (like the state), its share and that of noise, as their sum.
    """
    factors, y = rows.factors, denoiser.y
    z, scratch = np.empty_like(y), np.empty_like(y)
    tapped = {row: np.empty_like(y) for row in rows.tapped}
    field.fill(rows.start, y)
    if start:
        given, share, rest = start
        y *= rest
        y += given * share
    with ThreadPoolExecutor(1, "diffiqa-noise") as pool:
        for row in reversed(range(len(rows.steps))):
            # Noise is computed while the network runs: the cores have idle time between its layers.
            noise = pool.submit(field.fill, rows.steps[row], z) if factors.sigma[row] else None
            if row >= rows.silent:
                denoiser(float(factors.noise_level[row]))
                result = y
            else:
                result = tapped[row]
                np.copyto(result, y)
            if noise:
                noise.result()
            step(factors, row, result, denoiser.noise, z, scratch, clip=rows.clip)
            if row in tapped and result is y:
                np.copyto(tapped[row], y)
    return {kind: tapped[row] for kind, row in rows.taps.items()}


def step(
    c: Coefficients, i: int, y: FloatArray, noise: FloatArray, z: FloatArray, x0: FloatArray, *, clip: bool = True
) -> None:
    """Advance `y` in place past row `i`. `noise` and `z` are overwritten; `x0` holds the scaled estimate.

    `x0 = clip(y·y_to_x0 − ε·noise_to_x0, −1, 1)`; `y ← x0·x0_to_mean + y·y_to_mean [+ z·sigma]`, where every product
    and every sum is rounded to float32 in this order; where sigma is 0 no noise is added, nor read. Without `clip`
    the estimate x0 stays as it is.
    """
    np.multiply(y, c.y_to_x0[i], out=x0)
    noise *= c.noise_to_x0[i]
    x0 -= noise
    if clip:
        np.clip(x0, -1, 1, out=x0)
    x0 *= c.x0_to_mean[i]
    y *= c.y_to_mean[i]
    y += x0
    if c.sigma[i]:
        z *= c.sigma[i]
        y += z

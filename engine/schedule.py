"""The diffusion schedule: noise level and sampling coefficients of every step, and the steps that are tapped.

Symbols: β_i `beta`, ᾱ_i `alpha_bar` (product of 1 − β up to i), T `steps`. A step index `i` counts down from
T − 1 to 0.
"""

import enum
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


class Kind(enum.StrEnum):
    """The four images the heads may look at. The order is the order of every array over kinds."""

    DIS = "dis"  # the image as given
    Y0 = "y0"  # restored
    T1 = "t1"  # tapped with a little noise left
    T2 = "t2"  # tapped earlier, noisier


@dataclass(frozen=True)
class Taps:
    """The step index after which the state is copied out for each restored kind."""

    y0: int = 0
    t1: int = 5
    t2: int = 10

    def step_of(self, kind: Kind) -> int:
        """Return the step index whose result is `kind`; `Kind.DIS` has none."""
        return {Kind.Y0: self.y0, Kind.T1: self.t1, Kind.T2: self.t2}[kind]


@dataclass(frozen=True)
class Coefficients:
    """The factors of a sampling step: float32, one entry per step index.

    `x0 = clip(y·y_to_x0 − ε·noise_to_x0, −1, 1)`, then `y ← x0·x0_to_mean + y·y_to_mean + z·sigma`.
    """

    noise_level: FloatArray
    y_to_x0: FloatArray
    noise_to_x0: FloatArray
    x0_to_mean: FloatArray
    y_to_mean: FloatArray
    sigma: FloatArray


@dataclass(frozen=True)
class Schedule:
    """SR3's cosine schedule with `steps` steps."""

    steps: int = 50
    offset: float = 0.008
    max_beta: float = 0.999

    @cached_property
    def alpha_bar(self) -> npt.NDArray[np.float64]:
        """ᾱ of every step, float64, decreasing from almost 1 to almost 0."""
        u = np.arange(self.steps + 1, dtype=np.float64) / self.steps + self.offset
        f = np.cos(u / (1 + self.offset) * np.pi / 2) ** 2
        f /= f[0]
        return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], self.max_beta))

    @cached_property
    def coefficients(self) -> Coefficients:
        """The sampling table, computed in float64 and rounded once."""
        bar = self.alpha_bar
        before = np.concatenate([[1.0], bar[:-1]])
        alpha = bar / before
        beta = 1 - alpha
        sigma = np.sqrt(np.maximum(beta * (1 - before) / (1 - bar), 1e-20))
        sigma[0] = 0.0  # the last step adds no noise
        columns = (
            np.sqrt(bar),
            np.sqrt(1 / bar),
            np.sqrt(1 / bar - 1),
            beta * np.sqrt(before) / (1 - bar),
            (1 - before) * np.sqrt(alpha) / (1 - bar),
            sigma,
        )
        return Coefficients(*(column.astype(np.float32) for column in columns))

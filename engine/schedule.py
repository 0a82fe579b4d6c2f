"""The diffusion schedules: noise level and sampling coefficients of every step, and the steps that are tapped.

Symbols: β_i `beta`, ᾱ_i `alpha_bar` (product of 1 − β up to i), T `steps`. A step index `i` counts down from
T − 1 to 0.
"""

import enum
import itertools
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .codec import LATER

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
    """The factors of a sampling step: float32, one entry per step.

    `x0 = clip(y·y_to_x0 − ε·noise_to_x0, −1, 1)`, then `y ← x0·x0_to_mean + y·y_to_mean + z·sigma`.
    """

    noise_level: FloatArray
    y_to_x0: FloatArray
    noise_to_x0: FloatArray
    x0_to_mean: FloatArray
    y_to_mean: FloatArray
    sigma: FloatArray


@dataclass(frozen=True)
class Ddim:
    """Timesteps of DDIM without noise, noisiest first, out of `train_steps` whose β rise along a straight line."""

    timesteps: tuple[int, ...] = (400, 300, 200, 100, 0)
    train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    @cached_property
    def alpha_bar(self) -> npt.NDArray[np.float64]:
        """ᾱ of every timestep of training, float64, decreasing."""
        beta = np.linspace(self.beta_start, self.beta_end, self.train_steps)
        return np.cumprod(1 - beta, dtype=np.float64)

    @property
    def rules(self) -> dict[str, bool]:
        """What timesteps from a file must be, and whether they are."""
        steps = self.timesteps
        return {
            "train_steps must be between 1 and 10000": 1 <= self.train_steps <= 10000,
            "betas must rise between 0 and 1": 0 < self.beta_start <= self.beta_end < 1,
            "timesteps must fall, from below train_steps to 0 or more": (
                all(a > b for a, b in itertools.pairwise(steps)) and all(0 <= t < self.train_steps for t in steps)
            ),
        }

    @cached_property
    def coefficients(self) -> Coefficients:
        """The sampling table, computed in float64 and rounded once. Nothing is clipped, and σ is 0.

        Rows are in the order of step indices, which count down to 0: the last row is the first step. In place of a
        noise level a row has its timestep.
        """
        steps = list(self.timesteps[::-1])
        return replace(ddim(self.alpha_bar[steps], 0.0), noise_level=np.array(steps, np.float32))


@dataclass(frozen=True)
class Schedule:
    """SR3's cosine schedule with `steps` steps; or the timesteps of a linear one, and nothing of the cosine."""

    steps: int = 50
    offset: float = 0.008
    max_beta: float = 0.999
    linear: Ddim | None = field(default=None, metadata=LATER)  # it has as many timesteps as there are steps
    clip: bool = field(default=True, metadata=LATER)  # an estimate of the result is kept in [-1, 1], as pictures are

    @cached_property
    def alpha_bar(self) -> npt.NDArray[np.float64]:
        """ᾱ of every step, float64, decreasing from almost 1 to almost 0."""
        if self.linear:
            return self.linear.alpha_bar[list(self.linear.timesteps[::-1])]
        u = np.arange(self.steps + 1, dtype=np.float64) / self.steps + self.offset
        f = np.cos(u / (1 + self.offset) * np.pi / 2) ** 2
        f /= f[0]
        return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], self.max_beta))

    @cached_property
    def coefficients(self) -> Coefficients:
        """The sampling table, computed in float64 and rounded once."""
        return self.linear.coefficients if self.linear else ancestral(self.alpha_bar)


def ancestral(alpha_bar: npt.NDArray[np.float64]) -> Coefficients:
    """Return the factors that walk down these levels (ᾱ, decreasing), each step to the level before it, the last to 1.

    With few of a schedule's levels it is the same chain with larger steps.
    """
    bar = alpha_bar
    before = np.concatenate([[1.0], bar[:-1]])
    alpha = bar / before
    beta = 1 - alpha
    sigma = np.sqrt(np.maximum(beta * (1 - before) / (1 - bar), 1e-20))
    sigma[0] = 0.0  # the last step adds no noise
    return _rounded(
        np.sqrt(bar),
        np.sqrt(1 / bar),
        np.sqrt(1 / bar - 1),
        beta * np.sqrt(before) / (1 - bar),
        (1 - before) * np.sqrt(alpha) / (1 - bar),
        sigma,
    )


def ddim(alpha_bar: npt.NDArray[np.float64], eta: float) -> Coefficients:
    """Return the factors of DDIM over these levels; the noise is that of the clipped estimate.

    It adds `eta` of the noise that `ancestral` adds: with 1 both are the same, with 0 nothing but the start is random.
    """
    bar = alpha_bar
    before = np.concatenate([[1.0], bar[:-1]])
    sigma = eta * np.sqrt((1 - before) / (1 - bar) * (1 - bar / before))
    y_to_mean = np.sqrt(np.maximum(1 - before - sigma**2, 0) / (1 - bar))
    return _rounded(
        np.sqrt(bar),
        np.sqrt(1 / bar),
        np.sqrt(1 / bar - 1),
        np.sqrt(before) - np.sqrt(bar) * y_to_mean,
        y_to_mean,
        sigma,
    )


def _rounded(*columns: npt.NDArray[np.float64]) -> Coefficients:
    return Coefficients(*(column.astype(np.float32) for column in columns))

"""DDIM without noise (η = 0) on a linear β schedule: the timesteps that are sampled, and the factors of each step.

Symbols: β_t `beta`, ᾱ_t `alpha_bar` (product of 1 − β up to t), s = √(1 − ᾱ). A prime marks the step that comes next.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .schedule import Coefficients


@dataclass(frozen=True)
class Ddim:
    """The timesteps a state goes through, noisiest first, out of `train_steps` whose β rise along a straight line."""

    timesteps: tuple[int, ...] = (400, 300, 200, 100, 0)
    train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    @cached_property
    def alpha_bar(self) -> npt.NDArray[np.float64]:
        """ᾱ of every timestep of training, float64, decreasing."""
        beta = np.linspace(self.beta_start, self.beta_end, self.train_steps)
        return np.cumprod(1 - beta, dtype=np.float64)

    @cached_property
    def coefficients(self) -> Coefficients:
        """The sampling table, computed in float64 and rounded once. Nothing is clipped, and σ is 0.

        Rows are in the order of step indices, which count down to 0: the last row is the first step. In place of a
        noise level a row has its timestep.
        """
        steps = np.array(self.timesteps[::-1], np.int64)
        bar = self.alpha_bar[steps]
        before = np.concatenate([[1.0], bar[:-1]])[: bar.size]  # of the step that comes next; after the last ᾱ is 1
        ratio = np.sqrt((1 - before) / (1 - bar))
        columns = (
            steps,
            np.sqrt(1 / bar),
            np.sqrt(1 / bar - 1),
            np.sqrt(before) - np.sqrt(bar) * ratio,
            ratio,
            np.zeros_like(bar),
        )
        return Coefficients(*(column.astype(np.float32) for column in columns))

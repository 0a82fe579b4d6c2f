"""A map that never falls, as straight lines between knots: a score onto another scale, or without its bias."""

from dataclasses import dataclass

import numpy as np

from .agreement import Values


@dataclass(frozen=True)
class Monotone:
    """Straight lines through the knots (inputs[i], outputs[i]). Beyond the ends it goes on with a slope of 0 or 1."""

    inputs: tuple[float, ...]
    outputs: tuple[float, ...]
    slope_beyond: int = 0  # 0 for a scale that ends; 1 to shift what lies outside like the end itself

    @property
    def problem(self) -> str | None:
        """What keeps this from being such a map, or None. Values from a file are checked with it."""
        rules = {
            "needs as many outputs as inputs, one at least": 0 < len(self.inputs) == len(self.outputs),
            "has inputs that do not rise": bool(np.all(np.diff(self.inputs) > 0)),
            "has outputs that fall": bool(np.all(np.diff(self.outputs) >= 0)),
            "goes on with a slope that is neither 0 nor 1": self.slope_beyond in {0, 1},
        }
        return next((text for text, holds in rules.items() if not holds), None)

    def __call__(self, value: float) -> float:
        """Return the map at a value."""
        inside = min(max(value, self.inputs[0]), self.inputs[-1])
        return float(np.interp(inside, self.inputs, self.outputs)) + self.slope_beyond * (value - inside)


def fit_monotone(inputs: Values, outputs: Values, knots: int, slope_beyond: int = 0) -> Monotone:
    """Fit a map by least squares over the means of `knots` groups of neighbouring inputs, as large as each other.

    Groups whose means would fall are pooled (isotonic regression), so a map has as many knots at most.
    """
    order = np.argsort(np.asarray(inputs, np.float64), kind="stable")
    if not 1 <= knots <= len(order) == len(outputs):
        raise ValueError(f"{knots} knots want as many pairs at least, not {len(order)}")
    x, y = np.asarray(inputs, np.float64)[order], np.asarray(outputs, np.float64)[order]
    pooled: list[tuple[int, float, float]] = []  # how many pairs, their mean input, their mean output
    for part in np.array_split(np.arange(len(x)), knots):
        pooled.append((len(part), float(x[part].mean()), float(y[part].mean())))
        while len(pooled) > 1 and (pooled[-2][2] > pooled[-1][2] or pooled[-2][1] >= pooled[-1][1]):
            (n, x0, y0), (m, x1, y1) = pooled[-2:]
            pooled[-2:] = [(n + m, (n * x0 + m * x1) / (n + m), (n * y0 + m * y1) / (n + m))]
    return Monotone(tuple(p[1] for p in pooled), tuple(p[2] for p in pooled), slope_beyond)

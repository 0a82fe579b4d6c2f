"""Samplers as data: which steps of the trained schedule are taken, how, and the table of rows that a loop walks.

A tap is defined by its noise level. The trained loop taps the state after step `s`; that state has the level of step
s − 1. So with fewer steps, step s − 1 must be among those taken (`TapRule.STATE`), or the tap is made of the result:
√ᾱ·y₀ + √(1 − ᾱ)·z, with the noise that the trained loop adds at step `s` (`TapRule.RENOISED`).

The trained loop starts from noise. A few steps lead further if they start from the image with the noise of their first
level, √ᾱ·image + √(1 − ᾱ)·z: they only have to find what the image lacks.
"""

import enum
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from ..errors import UsageError
from .codec import LATER, encode
from .monotone import Monotone
from .schedule import Coefficients, Kind, Schedule, Taps, ancestral, ddim

FROM_IMAGE = "image+"  # before the name of a sampler


class Sampler(enum.StrEnum):
    """How a step leads to the next level."""

    ANCESTRAL = "ancestral"  # as trained: it adds the noise that the posterior has
    DDIM = "ddim"  # adds the share eta of it


class TapRule(enum.StrEnum):
    """What a tap is."""

    STATE = "state"  # the state at its noise level
    RENOISED = "renoised"  # the restored image with noise of its level


@dataclass(frozen=True, eq=False)
class Rows:
    """The table of a loop, walked from the last row to the first.

    The first `silent` rows ask no network. They leave the state alone, and make their taps of it.
    """

    start: int  # the step index whose noise the loop starts from
    steps: tuple[int, ...]  # the step index whose noise a row adds
    factors: Coefficients
    taps: Mapping[Kind, int]  # the row whose result is a kind, in order of kinds
    silent: int = 0
    clip: bool = True
    image: tuple[float, float] | None = None  # shares of the image and of the noise at the start; None: noise alone

    @property
    def tapped(self) -> list[int]:
        """The rows whose results are kinds, each once, rising."""
        return sorted(set(self.taps.values()))

    @property
    def calls(self) -> int:
        """How many rows ask the network."""
        return len(self.steps) - self.silent


@dataclass(frozen=True)
class Sampling:
    """A sampler on some steps of the trained schedule."""

    steps: tuple[int, ...]  # the step indices taken, rising
    sampler: Sampler = Sampler.ANCESTRAL
    eta: float = 0.0  # for ddim
    taps: TapRule = TapRule.STATE
    from_image: bool = field(default=False, metadata=LATER)  # with the noise of its first step; else from noise alone

    @classmethod
    def trained(cls, schedule: Schedule) -> Self:
        """Return the engine's own sampling: all steps, as trained."""
        return cls(tuple(range(schedule.steps)), Sampler.DDIM if schedule.linear else Sampler.ANCESTRAL)

    @property
    def name(self) -> str:
        """The sampler as options spell it."""
        named = f"{self.sampler}:{self.eta}" if self.eta else str(self.sampler)
        return FROM_IMAGE + named if self.from_image else named

    def problem(self, schedule: Schedule, taps: Taps, kinds: tuple[Kind, ...]) -> str | None:
        """Return why a model cannot be sampled so, or None. Values from a file are checked with it."""
        last = schedule.steps - 1
        rising = all(a < b for a, b in zip(self.steps, self.steps[1:], strict=False))
        if not self.steps or not rising or self.steps[0] < 0 or self.steps[-1] > last:
            return f"the steps of a sampling must rise, within 0 to {last}"
        if not 0 <= self.eta <= 1 or (self.eta and self.sampler is not Sampler.DDIM):
            return "eta must lie between 0 and 1, and is for ddim"
        if self.from_image and schedule.linear:
            return "a loop over features does not start from an image"
        for kind, level in _tap_levels(taps, kinds).items():
            if self.taps is TapRule.STATE and (level not in self.steps or level == self.steps[-1]):
                return f"the tap {kind} needs step {level}, and one above it, among the steps {list(self.steps)}"
        return None

    @functools.cache  # noqa: B019 — few samplings, and small
    def rows(self, schedule: Schedule, taps: Taps, kinds: tuple[Kind, ...]) -> Rows:
        """Return the table for a model that looks at these kinds."""
        bar = schedule.alpha_bar[list(self.steps)]
        walk = ancestral(bar) if self.sampler is Sampler.ANCESTRAL else ddim(bar, self.eta)
        walk = replace(walk, noise_level=schedule.coefficients.noise_level[list(self.steps)])
        levels, first = _tap_levels(taps, kinds), bar[-1]
        image = (float(np.sqrt(first)), float(np.sqrt(1 - first))) if self.from_image else None
        if self.taps is TapRule.STATE:
            row_of = {kind: self.steps.index(level) + 1 for kind, level in levels.items()}
            return Rows(schedule.steps, self.steps, walk, _in_order(kinds, row_of, end=0), 0, schedule.clip, image)
        above = sorted(set(levels.values()))
        bars = schedule.alpha_bar[above]
        none = np.zeros_like(bars)
        renoise = Coefficients(
            *(c.astype(np.float32) for c in (none, none + 1, none, np.sqrt(bars), none, np.sqrt(1 - bars)))
        )
        factors = {name: np.concatenate([column, vars(walk)[name]]) for name, column in vars(renoise).items()}
        steps = (*(level + 1 for level in above), *self.steps)
        row_of = {kind: above.index(level) for kind, level in levels.items()}
        silent = len(above)
        tapped = _in_order(kinds, row_of, end=silent)
        return Rows(schedule.steps, steps, Coefficients(**factors), tapped, silent, image=image)


@dataclass(frozen=True)
class Fast:
    """The fast sampling of an engine, with what takes out the bias that fewer steps give a score."""

    sampling: Sampling
    correction: Monotone  # a score with `sampling` → the score with all steps
    images: int  # that it was chosen and fitted on

    @property
    def key(self) -> str:
        """Eight hex digits that change with everything a score depends on."""
        text = json.dumps(encode((self.sampling, self.correction)), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def problem(self, schedule: Schedule, taps: Taps, kinds: tuple[Kind, ...]) -> str | None:
        """Return what is wrong with one that a file holds, or None."""
        if wrong := self.correction.problem:
            return f"the correction {wrong}"
        return self.sampling.problem(schedule, taps, kinds)


def parse_sampler(text: str) -> tuple[Sampler, float, bool]:
    """Read `ancestral`, `ddim` or `ddim:ETA`, and whether `image+` stands before it. Raises UsageError."""
    name, colon, eta = text.removeprefix(FROM_IMAGE).partition(":")
    try:
        sampler, share = Sampler(name), float(eta) if colon else 0.0
    except ValueError:
        raise UsageError(
            f"a sampler is ancestral, ddim or ddim:ETA, such as ddim:0.5; not {text!r}. With {FROM_IMAGE} before it, "
            "it starts from the image"
        ) from None
    if colon and sampler is Sampler.ANCESTRAL:
        raise UsageError("ancestral takes no eta; ddim:1 is the same sampler")
    if not 0 <= share <= 1:
        raise UsageError(f"eta must lie between 0 and 1, not {eta}")
    return sampler, share, text.startswith(FROM_IMAGE)


def fewest_steps(schedule: Schedule, taps: Taps, kinds: tuple[Kind, ...]) -> int | None:
    """Return the fewest steps that the sampler of the training can take; None if nothing is restored."""
    return (
        None
        if kinds == (Kind.DIS,) and not schedule.linear
        else len({schedule.steps - 1, *_tap_levels(taps, kinds).values()})
    )


def choose_sampling(
    schedule: Schedule, taps: Taps, kinds: tuple[Kind, ...], steps: int | None, sampler: str | None
) -> Sampling:
    """Return a sampler on so many steps, spread evenly and with the levels of the taps. Raises UsageError.

    What adds noise at every step taps its states. DDIM without noise (eta 0) re-noises its result: its states still
    carry the noise that it started from. What starts from the image starts halfway, or where the steps have room.
    """
    trained = Sampling.trained(schedule)
    if kinds == (Kind.DIS,) and not schedule.linear and (steps or sampler):
        raise UsageError("this engine restores nothing, so it has no steps to choose")
    kind, eta, from_image = parse_sampler(sampler or trained.sampler)
    if schedule.linear and (kind, eta, from_image) != (trained.sampler, trained.eta, False):
        raise UsageError(f"the steps of this engine are those of {trained.name}: leave out --sampler {sampler}")
    count = steps or schedule.steps
    if count > schedule.steps:
        raise UsageError(f"{count} steps are more than the {schedule.steps} that this engine was trained with")
    rule = TapRule.STATE if kind is trained.sampler or eta else TapRule.RENOISED
    levels = set(_tap_levels(taps, kinds).values()) if rule is TapRule.STATE else set()
    start = schedule.steps - 1
    if from_image:
        start = min(start, max(start // 2, max(levels, default=-1) + 1, count - 1))
    needed = {start, *levels}
    if count < len(needed):
        raise UsageError(
            f"{count} of {schedule.steps} steps cannot hold the noise levels that this engine taps: take "
            f"{len(needed)} at least, or the sampler ddim, which makes its taps of the result"
        )
    taken = tuple(range(count)) if count == schedule.steps else spread(needed, count)
    return Sampling(taken, kind, eta, rule, from_image)


def spread(needed: set[int], count: int) -> tuple[int, ...]:
    """Return `count` step indices with those needed, the others spread evenly between them and down to the end."""
    bounds = [-1, *sorted(needed)]  # -1 is the end of the loop
    inside = [0] * (len(bounds) - 1)
    for _ in range(count - len(needed)):
        gaps = [(high - low) / (n + 1) for low, high, n in zip(bounds, bounds[1:], inside, strict=False)]
        inside[gaps.index(max(gaps))] += 1
    between = (
        low + (high - low) * (i + 1) // (n + 1)
        for low, high, n in zip(bounds, bounds[1:], inside, strict=False)
        for i in range(n)
    )
    return tuple(sorted({*needed, *between}))


def _tap_levels(taps: Taps, kinds: tuple[Kind, ...]) -> dict[Kind, int]:
    """Return the step index whose noise level the state of a tapped kind has; y₀ has none."""
    return {kind: step - 1 for kind in kinds if kind is not Kind.DIS and (step := taps.step_of(kind))}


def _in_order(kinds: tuple[Kind, ...], row_of: Mapping[Kind, int], end: int) -> dict[Kind, int]:
    return {kind: row_of.get(kind, end) for kind in kinds if kind is not Kind.DIS}

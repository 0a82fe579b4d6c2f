"""Stages on the host that time each of their calls."""

import time
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from ..engine.manifest import StageName
from ..runtime.executor import Call, StageRunner

FloatArray = npt.NDArray[np.float32]
Clock = Callable[[], float]

SETTLE = 0.05  # seconds before another is measured: idle threads may spin for milliseconds after their work


class TimedStage:
    """A stage whose calls append their seconds to `spent`."""

    def __init__(self, stage: StageRunner, clock: Clock) -> None:
        self._stage, self._clock = stage, clock
        self.spent: list[float] = []

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        """Bind the stage, and return its call with a clock around it."""
        call, clock, spent = self._stage.bind(inputs, outputs), self._clock, self.spent

        def timed() -> None:
            start = clock()
            call()
            spent.append(clock() - start)

        return timed


def timed_stages(stages: Mapping[StageName, StageRunner], clock: Clock) -> dict[StageName, TimedStage]:
    """Wrap every stage."""
    return {name: TimedStage(stage, clock) for name, stage in stages.items()}


def clock_cost() -> float:
    """Return the seconds that timing one call adds to it."""

    class Nothing:
        def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
            return lambda: None

    nothing, calls = TimedStage(Nothing(), time.perf_counter).bind({}, {}), 10_000
    start = time.perf_counter()
    for _ in range(calls):
        nothing()
    return (time.perf_counter() - start) / calls

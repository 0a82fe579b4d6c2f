"""A device layer that times the host's launches, and on request the device's work.

It stands between an executor and the real layer, and passes every call on. It times nothing while a graph is captured:
that work is recorded, not run.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from ..engine.manifest import StageName
from ..kernels.launch import Launch
from ..runtime.gpu.layer import Array, BoundStage, Graph, Layer, LoadedStage, Shapes
from .timing import Clock

T = TypeVar("T")

UPLOAD, KERNELS, DOWNLOAD, GRAPH = "H2D", "kernels", "D2H", "graph"


class TimedLayer:
    """The layer of one executor. Calls that are not timed go to the real layer unchanged.

    `close()` leaves the real layer open for others. `peak` is the most memory that this executor has held, in bytes.
    """

    def __init__(self, layer: Layer, clock: Clock) -> None:
        self._layer, self._clock = layer, clock
        self.marking = False  # whether events stand around every call
        self.enqueue = 0.0  # seconds in calls that launch and copy
        self.calls = 0  # that launch and copy
        self.brought = 0.0  # seconds in copies on the second stream, for which the host waits
        self.peak = self.allocations = 0
        self._spans: list[tuple[str, object, object]] = []
        self._sizes: dict[int, int] = {}
        self._lock = threading.Lock()  # other threads allocate memory for pixels
        self._capturing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def allocate(self, size: int, *, beside: bool = False) -> int:
        """Count it, except memory `beside`: an image gets that when it first has to wait, perhaps after the warm-up."""
        address = self._layer.allocate(size, beside=beside)
        with self._lock:
            self._sizes[address] = size
            self.allocations += not beside
            self.peak = max(self.peak, sum(self._sizes.values()))
        return address

    def free(self, address: int) -> None:
        """Count it; pinned memory is freed elsewhere."""
        with self._lock:  # before it is freed: then the address may be in use again
            del self._sizes[address]
        self._layer.free(address)

    def bring(self, address: int, values: Array) -> None:
        """Time it by the host's clock: it returns when the copy is done."""
        start = self._clock()
        self._layer.bring(address, values)
        self.brought += self._clock() - start

    def upload(self, address: int, values: Array) -> None:
        """Time it."""
        self.timed(UPLOAD, lambda: self._layer.upload(address, values))

    def download(self, values: Array, address: int) -> None:
        """Time it."""
        self.timed(DOWNLOAD, lambda: self._layer.download(values, address))

    def launch(self, launch: Launch) -> None:
        """Time it."""
        self.timed(KERNELS, lambda: self._layer.launch(launch))

    def begin_capture(self) -> None:
        """Time nothing from now on."""
        self._layer.begin_capture()
        self._capturing = True

    def end_capture(self) -> Graph:
        """Return a graph whose launches are timed."""
        self._capturing = False
        graph = self._layer.end_capture()
        return cast(Graph, Replaced(graph, launch=lambda: self.timed(GRAPH, graph.launch)))

    def abandon_capture(self) -> None:
        """Time again."""
        self._capturing = False
        self._layer.abandon_capture()

    def close(self) -> None:
        """Leave the layer as it is: other cases use it."""

    def timed(self, name: str, call: Callable[[], None]) -> None:
        """Make a call that launches, and time it under this name."""
        if self._capturing:
            call()
            return
        first = self._layer.mark() if self.marking else None
        start = self._clock()
        call()
        self.enqueue += self._clock() - start
        self.calls += 1
        if self.marking:
            self._spans.append((name, first, self._layer.mark()))

    def reset(self) -> None:
        """Forget what was timed."""
        self.enqueue, self.brought, self.calls = 0.0, 0.0, 0
        self._spans.clear()

    def spans(self) -> dict[str, list[float]]:
        """Return the seconds of every call on the device since `reset`, by stage or kind; after `synchronise`."""
        self._layer.enter()  # the launches may have come from another thread
        found: defaultdict[str, list[float]] = defaultdict(list)
        for name, first, last in self._spans:
            found[name].append(self._layer.seconds_between(first, last))
        return found


class Replaced:
    """An object with other functions in the place of some of its own."""

    def __init__(self, whole: object, **others: Callable[..., object]) -> None:
        self._whole = whole
        vars(self).update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


class _TimedStage:
    """A stage that other cases use too."""

    def __init__(self, stage: LoadedStage, layer: TimedLayer) -> None:
        self._stage: LoadedStage | None = stage
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def bind(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> BoundStage:
        assert self._stage is not None  # noqa: S101 — closed by the executor that binds
        bound, name = self._stage.bind(profile, shapes, addresses), self._stage.built.name
        return cast(BoundStage, Replaced(bound, enqueue=lambda: self._layer.timed(name, bound.enqueue)))

    def close(self) -> None:
        self._stage = None  # drop the reference, so that the session can end


def timed_stages(stages: Mapping[StageName, LoadedStage], layer: TimedLayer) -> dict[StageName, LoadedStage]:
    """Wrap every stage; closing what is returned leaves the stages as they are."""
    return {name: cast(LoadedStage, _TimedStage(stage, layer)) for name, stage in stages.items()}

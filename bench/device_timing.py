"""A device layer that notes how long the host takes to launch, and on request for how long the device runs what.

It stands between an executor and the layer, and does the same. Nothing is timed while a graph is captured: that is
recorded, not run.
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
    """All that an executor does through it is counted here; what is not listed goes to the layer as it is.

    One executor's: `close()` leaves the layer to others, and `peak` is the most memory this one has held, in bytes.
    """

    def __init__(self, layer: Layer, clock: Clock) -> None:
        self._layer, self._clock = layer, clock
        self.marking = False  # whether events stand around every call
        self.enqueue = 0.0  # seconds in calls that launch and copy
        self.calls = 0  # of these
        self.brought = 0.0  # seconds in copies beside the stream, which the host waits for
        self.peak = self.allocations = 0
        self._spans: list[tuple[str, object, object]] = []
        self._sizes: dict[int, int] = {}
        self._lock = threading.Lock()  # memory for pixels is asked for beside the executor's own
        self._capturing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def allocate(self, size: int, *, beside: bool = False) -> int:
        """Count it; images that wait get memory when they first do, which is not when cases are warm."""
        address = self._layer.allocate(size, beside=beside)
        with self._lock:
            self._sizes[address] = size
            self.allocations += not beside
            self.peak = max(self.peak, sum(self._sizes.values()))
        return address

    def free(self, address: int) -> None:
        """Count it; pinned memory goes another way."""
        with self._lock:  # first: freed, its address may be another's
            del self._sizes[address]
        self._layer.free(address)

    def bring(self, address: int, values: Array) -> None:
        """Time it by the host's clock, as it returns when it is done."""
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
        return cast(Graph, _TimedGraph(self._layer.end_capture(), self))

    def abandon_capture(self) -> None:
        """Time again."""
        self._capturing = False
        self._layer.abandon_capture()

    def close(self) -> None:
        """Leave the layer as it is: other cases use it."""

    def timed(self, name: str, call: Callable[[], None]) -> None:
        """Do something that launches."""
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
        self._layer.enter()  # a thread of the scorer's may have launched
        found: defaultdict[str, list[float]] = defaultdict(list)
        for name, first, last in self._spans:
            found[name].append(self._layer.seconds_between(first, last))
        return found


class _TimedGraph:
    def __init__(self, graph: Graph, layer: TimedLayer) -> None:
        self._graph, self._layer = graph, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)

    def launch(self) -> None:
        self._layer.timed(GRAPH, self._graph.launch)


class _TimedStage:
    """A stage that other cases use too."""

    def __init__(self, stage: LoadedStage, layer: TimedLayer) -> None:
        self._stage: LoadedStage | None = stage
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def bind(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> BoundStage:
        assert self._stage is not None  # noqa: S101 — closed by the executor that binds
        bound = self._stage.bind(profile, shapes, addresses)
        return cast(BoundStage, _TimedBound(bound, self._stage.built.name, self._layer))

    def close(self) -> None:
        self._stage = None  # a session lives as long as anything holds it


class _TimedBound:
    def __init__(self, bound: BoundStage, name: StageName, layer: TimedLayer) -> None:
        self._bound, self._name, self._layer = bound, name, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bound, name)

    def enqueue(self) -> None:
        self._layer.timed(self._name, self._bound.enqueue)


def timed_stages(stages: Mapping[StageName, LoadedStage], layer: TimedLayer) -> dict[StageName, LoadedStage]:
    """Wrap every stage; closing what is returned leaves the stages as they are."""
    return {name: cast(LoadedStage, _TimedStage(stage, layer)) for name, stage in stages.items()}

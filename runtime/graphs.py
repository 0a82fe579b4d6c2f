"""CUDA graphs of what is launched again and again: when they are captured, when they hold, what happens if they fail.

NVIDIA's order: shapes and addresses are set, everything is launched once without a graph and waited for (the first
enqueue of an engine may allocate), then it is captured, and from then on replayed. The launch without a graph is the
first image of its shape, so a shape seen once pays for no capture.

A graph holds addresses and the state of an execution context, not their lifetime: whoever frees or changes either
calls `forget` or `clear` first. A capture that fails costs a note in every result that was to use it, not the result.
"""

import enum
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ..errors import BackendError, first_line
from .host import Cancelled

if TYPE_CHECKING:
    from .device_layer import Layer

# One graph of all steps holds a node for every kernel of every step: beyond this many steps, one of a single step is
# replayed instead. Not measured: no GPU was at hand.
MAX_LOOP_STEPS = 128

Enqueue = Callable[[], None]


class Form(enum.StrEnum):
    """What one graph holds. All forms launch the same kernels in the same order and give the same bits."""

    NONE = "none"
    STEP = "step"  # one step: its counter is in device memory, so that every step is the same graph
    LOOP = "loop"  # the beginning and all steps


class Graph(Protocol):
    """A captured sequence of launches, ready to run."""

    def launch(self) -> None:
        """Run it on the layer's stream."""

    def close(self) -> None:
        """Free it."""


@dataclass(frozen=True)
class Work:
    """Something that is launched often: `begin`, if there is one, then `steps` times `step`.

    `key` says all that a graph of it depends on and that is not told by `forget`: shapes, steps and taps.
    """

    key: Hashable
    step: Enqueue
    steps: int = 1
    begin: Enqueue | None = None
    problem: Callable[[], str | None] = lambda: None  # why it cannot be captured, if that is known beforehand

    def enqueue(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Launch all of it; raises Cancelled between two steps once nobody wants the result."""
        if self.begin:
            self.begin()
        for _ in range(self.steps):
            if cancelled():
                raise Cancelled
            self.step()


@dataclass
class _Entry:
    """What is known of one key after its first run."""

    loop: Graph | None = None
    step: Graph | None = None
    note: str | None = None
    tried: bool = False

    @property
    def graphs(self) -> list[Graph]:
        return [graph for graph in (self.loop, self.step) if graph]


@dataclass
class Graphs:
    """The graphs of one device layer, by key. Not thread-safe: its executor runs one image at a time."""

    layer: "Layer"
    form: Form = Form.LOOP
    captures: int = 0  # graphs made so far
    _entries: dict[Hashable, _Entry] = field(default_factory=dict)

    def run(self, work: Work, cancelled: Callable[[], bool]) -> str | None:
        """Launch `work` by its graph where there is one; return what the result should say of a graph that failed."""
        if cancelled():
            raise Cancelled
        entry = self._entries.get(work.key)
        if self.form is Form.NONE or entry is None:
            work.enqueue(cancelled)
            self._entries.setdefault(work.key, _Entry())
            return None
        if not entry.tried:
            self._capture(entry, work)
            entry.tried = True  # not before: an interrupted capture is no failed one
        if entry.loop:
            entry.loop.launch()
        elif entry.step:
            Work(work.key, entry.step.launch, work.steps, work.begin).enqueue(cancelled)
        else:
            work.enqueue(cancelled)
        return entry.note

    def forget(self, key: Hashable) -> None:
        """Free the graphs of a key whose context is about to go."""
        for graph in self._entries.pop(key, _Entry()).graphs:
            graph.close()

    def clear(self) -> None:
        """Free all graphs: addresses have changed."""
        for key in list(self._entries):
            self.forget(key)

    def _capture(self, entry: _Entry, work: Work) -> None:
        """Make the graph of `work`: of all of it, or of one step, or none; say what was wanted and did not come."""
        if problem := work.problem():
            entry.note = f"ran without a CUDA graph: {problem}"
            return
        if self.form is Form.LOOP and work.steps <= MAX_LOOP_STEPS:
            try:
                entry.loop = self._captured(work.enqueue)
            except (BackendError, MemoryError) as exc:
                entry.note = f"ran with a CUDA graph of one step, not of all: {first_line(exc)}"
            else:
                return
        try:
            entry.step = self._captured(work.step)
        except (BackendError, MemoryError) as exc:
            entry.note = f"ran without a CUDA graph: {first_line(exc)}"

    def _captured(self, enqueue: Enqueue) -> Graph:
        self.layer.synchronise()
        self.layer.begin_capture()
        try:
            enqueue()
            graph = self.layer.end_capture()
        except BaseException:
            self.layer.abandon_capture()
            raise
        self.captures += 1
        return graph

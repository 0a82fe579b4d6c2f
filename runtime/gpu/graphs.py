"""CUDA graphs of work that is launched again and again: when to capture, how long a graph holds, what if it fails.

NVIDIA's order: set shapes and addresses; launch everything once without a graph and wait for it, as an engine's first
enqueue may allocate; capture; replay. The launch without a graph is the first image of its shape, so a shape that is
seen once costs no capture.

A graph holds addresses and the state of an execution context; it does not keep either alive. Call `forget` or `clear`
before you free or change one. A capture that fails costs no result: it puts a note in those that should have used it.
"""

import enum
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from ...errors import BackendError, first_line
from ..executor import Cancelled
from .layer import Enqueue, Graph, Layer


class Form(enum.StrEnum):
    """What one graph holds. All forms launch the same kernels in the same order, so they give the same bits."""

    NONE = "none"
    STEP = "step"  # one step: its counter is in device memory, so that every step is the same graph
    LOOP = "loop"  # the beginning, all steps and the end


@dataclass(frozen=True)
class Work:
    """Work that is launched often: `begin`, if there is one, then `steps` times `step`, then `end` if there is one.

    `key` names all that a graph of it depends on (shapes, steps, taps), but for addresses and contexts: see `forget`.
    """

    key: Hashable
    step: Enqueue
    steps: int = 1
    begin: Enqueue | None = None
    end: Enqueue | None = None
    problem: Callable[[], str | None] = lambda: None  # why it cannot be captured, where that is known

    def enqueue(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Launch all of it; raises Cancelled between two steps once nobody wants the result."""
        if self.begin:
            self.begin()
        for _ in range(self.steps):
            if cancelled():
                raise Cancelled
            self.step()
        if self.end:
            self.end()


@dataclass
class _Entry:
    """What is known of a key once its work has run."""

    graph: Graph | None = None
    form: Form = Form.NONE  # of the graph
    note: str | None = None
    tried: bool = False


@dataclass
class Graphs:
    """The graphs of one device layer, by key. Not thread-safe: its executor runs one image at a time."""

    layer: Layer
    form: Form = Form.LOOP
    captures: int = 0  # graphs made so far
    _entries: dict[Hashable, _Entry] = field(default_factory=dict)

    def run(self, work: Work, cancelled: Callable[[], bool], form: Form | None = None) -> str | None:
        """Launch `work`, by its graph where there is one; return a note for the result if a graph failed.

        `form` replaces that of all runs for this one: Form.NONE launches plainly and keeps the graph for later.
        """
        if cancelled():
            raise Cancelled
        form, entry = form or self.form, self._entries.get(work.key)
        if form is Form.NONE or entry is None:
            work.enqueue(cancelled)
            self._entries.setdefault(work.key, _Entry())
            return None
        if not entry.tried:
            self._capture(entry, work, form)
            entry.tried = True  # only now: a capture that was interrupted has not failed
        if entry.graph is None:
            work.enqueue(cancelled)
        elif entry.form is Form.LOOP:
            entry.graph.launch()
        else:
            Work(work.key, entry.graph.launch, work.steps, work.begin, work.end).enqueue(cancelled)
        return entry.note

    def forget(self, key: Hashable) -> None:
        """Free the graphs of a key; call it before its context goes."""
        if graph := self._entries.pop(key, _Entry()).graph:
            graph.close()

    def clear(self) -> None:
        """Free all graphs: addresses have changed."""
        for key in list(self._entries):
            self.forget(key)

    def _capture(self, entry: _Entry, work: Work, wanted: Form) -> None:
        """Make the best graph of `work` that the device captures; where that is not the one wanted, note it."""
        if problem := work.problem():
            entry.note = f"ran without a CUDA graph: {problem}"
            return
        ways: dict[Form, Enqueue] = {Form.LOOP: work.enqueue} if wanted is Form.LOOP else {}  # the best first
        ways[Form.STEP] = work.step
        failures: list[str] = []
        for form, enqueue in ways.items():
            try:
                entry.graph, entry.form = self._captured(enqueue), form
            except (BackendError, MemoryError) as exc:
                failures.append(first_line(exc))
                continue
            if failures:
                entry.note = f"ran with a CUDA graph of one step, not of all steps: {failures[0]}"
            return
        entry.note = f"ran without a CUDA graph: {'; '.join(dict.fromkeys(failures))}"

    def _captured(self, enqueue: Enqueue) -> Graph:
        self.layer.synchronise()
        try:
            self.layer.begin_capture()
            enqueue()
            graph = self.layer.end_capture()
        except BaseException:
            self.layer.abandon_capture()
            raise
        self.captures += 1
        return graph

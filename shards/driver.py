"""The run: gives shards to workers, notes what is done, and replaces workers that die.

A worker that dies tells nobody on which image. So its shard is then scored image by image, until the image that kills
workers is known. It becomes a failure, and the rest of the shard has its scores.
"""

import collections
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..engine.codec import encode
from ..errors import BackendError, DiffiqaError, OutputError
from ..runtime.command.records import Record
from .part import Shard, place_of, read_side
from .plan import Plan
from .store import Store

PROGRESS = "progress.json"
DEATHS = 3  # of workers on one image
_DEATHS_IN_VAIN = 6  # of each worker, while none does anything
_PROGRESS_SECONDS = 5.0
_READERS = 16
_AT_ONCE = 10_000  # shards that are looked for


class Died:
    """A worker is gone, and what it was asked will not be answered."""


@dataclass(frozen=True)
class Ready:
    """A worker has loaded its engine."""

    backend: str


Answer = Ready | Shard | Record | DiffiqaError | Died | int  # an int: so many images of the shard are done


class Crew(Protocol):
    """Workers, each in a slot of its own, wherever they run."""

    slots: int

    def start(self, slot: int) -> None:
        """Put a new worker in a slot. It answers Ready."""

    def ask(self, slot: int, method: str, *arguments: Any) -> None:
        """Have the worker call a method of `Worker`."""

    def answers(self, seconds: float) -> Iterable[tuple[int, Answer]]:
        """Return answers with their slots, as soon as there are any, and none after so many seconds."""

    def stop(self) -> None:
        """End all workers at once."""


@dataclass(frozen=True)
class Progress:
    """How far a run is, for those who ask without disturbing it."""

    total: int
    done: int
    failed: int
    rate: float  # images a second, in this run
    deaths: int  # of workers, in this run
    host: str
    pid: int
    at: float  # since 1970


@dataclass
class _Task:
    index: int
    attempt: int = 0
    keep: Shard | None = None
    records: list[Record] | None = None  # of its first images, once they are scored one by one
    deaths: int = 0  # on the next image
    told: int = 0  # how many images its worker says are done
    begun: float = field(default_factory=time.monotonic)


Watch = Callable[[Progress], None]


class Driver:
    """One run of a plan. `shards` grows until it has all of them."""

    def __init__(self, store: Store, crew: Crew, *, watch: Watch, max_failure_rate: float = 1.0) -> None:
        self.shards: dict[int, Shard] = {}
        self._store, self._crew, self._watch, self._max_failure_rate = store, crew, watch, max_failure_rate
        self._idle: set[int] = set()
        self._busy: dict[int, _Task] = {}
        self._again: collections.deque[_Task] = collections.deque()
        self._backend = ""
        self._done = self._failed = self._deaths = self._in_vain = self._before = 0
        self._begun = time.monotonic()
        self._written = 0.0

    def start(self) -> None:
        """Start the workers."""
        for slot in range(self._crew.slots):
            self._crew.start(slot)

    def backend(self) -> str:
        """Wait for the first worker and return what it runs."""
        while not self._backend:
            self._listen()
        return self._backend

    def run(self, plan: Plan, found: Mapping[int, Shard], attempts: Mapping[int, int], *, retry_failed: bool) -> None:
        """Do all shards of a plan, but for those found done. Raises OutputError once too many images failed."""
        self._plan, self._backend = plan, plan.backend
        new = (
            _Task(index, attempts.get(index, 0), found.get(index))
            for index in range(plan.names.shards)
            if index not in found or (retry_failed and found[index].failed)
        )
        for index, shard in found.items():
            if not (retry_failed and shard.failed):
                self._note(index, shard)
        self._before, self._begun = self._done, time.monotonic()
        while True:
            while self._idle and (task := self._again.popleft() if self._again else next(new, None)):
                self._ask(self._idle.pop(), task)
            if not (self._busy or self._again) and (self._idle or len(self.shards) == plan.names.shards):
                break
            self._listen()
            self._tell()
        self._tell(last=True)

    def _listen(self) -> None:
        for slot, answer in self._crew.answers(1.0):
            self._take(slot, answer)

    def _take(self, slot: int, answer: Answer) -> None:
        match answer:
            case DiffiqaError():
                raise answer
            case Died():
                self._bury(slot)
            case Ready(backend):
                if self._backend not in {"", backend}:
                    raise BackendError(
                        f"a worker runs {backend}, but the plan was begun with {self._backend}, whose scores have "
                        f"other last digits: use that again, or another place"
                    )
                self._backend = backend
                self._idle.add(slot)
            case int():
                self._busy[slot].told = answer
            case Record():
                self._in_vain = 0
                task = self._busy[slot]
                assert task.records is not None  # noqa: S101 — only then it was asked for a record
                task.records.append(answer)
                task.deaths, task.told = 0, len(task.records)
                self._ask(slot, task)
            case Shard():
                self._in_vain = 0
                self._note(self._busy.pop(slot).index, answer)
                self._idle.add(slot)

    def _ask(self, slot: int, task: _Task) -> None:
        self._busy[slot] = task
        here, records = (task.index, task.attempt), task.records
        if records is None:
            self._crew.ask(slot, "shard", *here, task.keep)
        elif len(records) == self._plan.names.in_shard(task.index):
            self._crew.ask(slot, "commit", *here, records, time.monotonic() - task.begun)
        elif task.deaths >= DEATHS:
            self._crew.ask(slot, "give_up", task.index, len(records), f"{DEATHS} workers died while they scored it")
        else:
            self._crew.ask(slot, "one", task.index, len(records), task.keep)

    def _bury(self, slot: int) -> None:
        self._idle.discard(slot)
        self._deaths += 1
        self._in_vain += 1
        if self._in_vain >= _DEATHS_IN_VAIN * self._crew.slots:
            raise BackendError(
                f"{self._in_vain} workers died one after the other; what they wrote above may say why. Is there too "
                f'little memory for so many? A script of yours needs `if __name__ == "__main__":` around the call.'
            )
        if task := self._busy.pop(slot, None):
            if task.records is None:
                task.records = []
            else:
                task.deaths += 1
            self._again.append(task)
        self._crew.start(slot)

    def _note(self, index: int, shard: Shard) -> None:
        self.shards[index] = shard
        self._done += shard.records
        self._failed += shard.failed
        total = self._plan.names.count
        if self._failed > self._max_failure_rate * total:
            raise OutputError(
                f"{self._failed} of {total} images failed, more than --max-failure-rate {self._max_failure_rate:g} "
                f"allows; {self._store}/{shard.file} says why some did; mend that, then add --retry-failed"
            )

    def _tell(self, *, last: bool = False) -> None:
        done = self._done + sum(task.told for task in self._busy.values())
        rate = (done - self._before) / max(time.monotonic() - self._begun, 1e-9)
        who = socket.gethostname(), os.getpid()
        now = Progress(self._plan.names.count, done, self._failed, rate, self._deaths, *who, time.time())
        self._watch(now)
        if last or time.monotonic() - self._written > _PROGRESS_SECONDS:
            self._written = time.monotonic()
            self._store.write(PROGRESS, json.dumps(encode(now)).encode())


def find_done(store: Store, plan: Plan, say: Callable[[str], None]) -> tuple[dict[int, Shard], dict[int, int]]:
    """Return the shards of a plan that are whole, and for each shard the number of the attempt to come."""
    attempts: dict[int, int] = {}
    files: dict[int, list[tuple[int, str]]] = {}
    for name in store.names():
        if (place := place_of(name)) and place[0] < plan.names.shards:
            index, attempt = place
            files.setdefault(index, []).append((attempt, name))
            attempts[index] = max(attempts.get(index, 0), attempt + 1)
    with ThreadPoolExecutor(_READERS, "diffiqa-find") as pool:  # in a bucket each shard takes two requests
        done: dict[int, Shard] = {}
        found = list(files.items())
        for start in range(0, len(found), _AT_ONCE):  # a million futures would take a gigabyte
            some = dict(found[start : start + _AT_ONCE])
            shards = pool.map(lambda of_one: next(_whole(store, plan, of_one, say), None), some.values())
            done |= {index: shard for index, shard in zip(some, shards, strict=True) if shard}
        return done, attempts


def _whole(store: Store, plan: Plan, files: list[tuple[int, str]], say: Callable[[str], None]) -> Iterator[Shard]:
    """Yield the attempts at a shard that are as they were written, the last first."""
    for _, file in sorted(files, reverse=True):
        side = read_side(store, file)
        if side is None or side.plan != plan.digest or side.shard.file != file:
            say(f"{file} is of another plan, or nothing says what it is: not used")
        elif hashlib.sha256(store.read(file) or b"").hexdigest() != side.shard.sha256:
            say(f"{file} was changed since it was written: not used")
        else:
            yield side.shard

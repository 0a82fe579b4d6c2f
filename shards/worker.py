"""What a worker does, wherever it runs: score the images of a shard, and commit them."""

import collections
import functools
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from ..errors import ImageError, OutputError
from ..runtime.command.records import Record, RunSettings, Status
from ..runtime.images import Source
from ..runtime.results import Failure, Options, Score
from ..runtime.scorer import Scorer
from .part import Shard, Side, commit, file_of, read_shard
from .plan import Entry, Plan, read_entries, read_plan
from .sources import Http, read_ahead
from .store import Store


def _ignore(_: int) -> None:
    pass


@dataclass(frozen=True)
class Work:
    """All that workers of a run are told. It can be sent to another process or machine."""

    store: Store
    open: Callable[[], AbstractContextManager[Scorer]]
    options: Options
    settings: RunSettings
    http: Http = Http.NEVER


class Worker:
    """An engine that scores shards of one plan; `tell` hears how many images of a shard are done.

    If `keep` is an earlier attempt at a shard, its scores are taken over, and only its failures are tried again.
    """

    def __init__(self, work: Work, tell: Callable[[int], None] = _ignore) -> None:
        self._work, self._tell = work, tell
        self._opened = work.open()  # it closes the scorer when nobody holds it any more
        self._scorer = self._opened.__enter__()
        self.backend = self._scorer.info.backend

    def shard(self, index: int, attempt: int, keep: Shard | None = None) -> Shard:
        """Score a shard and commit it."""
        start = time.monotonic()
        entries, kept = self._entries(index, keep)
        todo = [place for place in range(len(entries)) if place not in kept]
        records = kept | dict(zip(todo, self._score([entries[place] for place in todo]), strict=True))
        return self.commit(index, attempt, [records[place] for place in range(len(entries))], time.monotonic() - start)

    def one(self, index: int, place: int, keep: Shard | None = None) -> Record:
        """Score one image of a shard, and nothing beside it."""
        entries, kept = self._entries(index, keep)
        return kept[place] if place in kept else self._score([entries[place]])[0]

    def give_up(self, index: int, place: int, why: str) -> Record:
        """Return the record of an image that nobody will score."""
        entry = self._entries(index, None)[0][place]
        return self._record(entry, Failure(entry.name, f"{entry.name}: {why}"))

    def commit(self, index: int, attempt: int, records: Sequence[Record], seconds: float) -> Shard:
        """Write a shard."""

        def side(shard: Shard) -> Side:
            return Side(shard, self._plan.digest, socket.gethostname(), self.backend, seconds, time.time())

        return commit(self._work.store, file_of(index, attempt, self._plan.form), records, side)

    @functools.cached_property
    def _plan(self) -> Plan:
        if (plan := read_plan(self._work.store)) is None:
            raise OutputError(f"{self._work.store} has no plan")
        return plan

    @functools.lru_cache(1)  # noqa: B019 — a worker lives as long as its process
    def _entries(self, index: int, keep: Shard | None) -> tuple[list[Entry], dict[int, Record]]:
        """Return what a shard has to score, and the records that are kept, by their places."""
        before = read_shard(self._work.store, keep) if keep else []
        kept = {place: record for place, record in enumerate(before) if record.status is Status.OK}
        return read_entries(self._work.store, self._plan, index), kept

    def _score(self, entries: Sequence[Entry]) -> list[Record]:
        sources = read_ahead(entries, self._work.http)
        results = score_each(self._scorer, sources, self._work.options, self._tell)
        return [self._record(entry, result) for entry, result in zip(entries, results, strict=True)]

    def _record(self, entry: Entry, result: Score | Failure) -> Record:
        if isinstance(result, Failure):  # of bytes the scorer does not know the name
            result = Failure(entry.name, result.error.replace("bytes: ", f"{entry.name}: ", 1))
        return replace(Record.of(result, self._work.settings), image=entry.name, seconds=None, backend=None)


def score_each(
    scorer: Scorer, sources: Iterable[Source | ImageError], options: Options, tell: Callable[[int], None] = _ignore
) -> list[Score | Failure]:
    """Return a result for each source, in order; one that could not be read is a failure."""
    results: dict[int, Score | Failure] = {}
    given = collections.deque[int]()  # the places of what the scorer has taken and not returned

    def readable() -> Iterator[Source]:
        for place, source in enumerate(sources):
            if isinstance(source, ImageError):
                results[place] = Failure("", str(source))
            else:
                given.append(place)
                yield source

    for result in scorer.stream(readable(), options):
        results[given.popleft()] = result
        tell(len(results))
    return [results[place] for place in range(len(results))]

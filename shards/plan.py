"""The plan of a run, written once: which names, cut into which shards, scored by what.

`names.jsonl` has one entry a line, each name once, and `plan.json` says at which byte each shard begins. Nothing here
holds all names in memory: duplicates are found in buckets of hashes on disk, each small enough to be sorted.
"""

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..engine.codec import decode, encode
from ..errors import OutputError
from .part import Form
from .store import Store

PLAN, NAMES = "plan.json", "names.jsonl"
VERSION = 1
_BUCKETS = 64  # for 10⁸ names 38 MB each
_HASHED = np.dtype([("low", "<u8"), ("high", "<u8"), ("place", "<u8")])


class Entry(NamedTuple):
    """One image to score: its name and, in an archive, where its bytes lie (in a table: its row group, its row)."""

    name: str
    start: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Names:
    """The names of a plan, in their file."""

    count: int
    duplicates: int  # names that came again and were left out
    shard_size: int
    sha256: str  # of the file
    starts: tuple[int, ...]  # the byte at which each shard begins, and the end of the last

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return len(self.starts) - 1

    def in_shard(self, index: int) -> int:
        """Return how many names a shard has."""
        return min(self.shard_size, self.count - index * self.shard_size)


@dataclass(frozen=True)
class Plan:
    """What a run does. Two runs with equal plans write equal shards."""

    version: int
    engine: str
    settings: str
    max_pixels: int | None
    form: Form
    backend: str  # what the first worker ran: last bits differ between backends, builds and their versions
    names: Names

    @property
    def digest(self) -> str:
        """What tells this plan from all others."""
        return hashlib.sha256(json.dumps(encode(self)).encode()).hexdigest()

    def difference(self, other: "Plan") -> str:
        """Return what another plan has that is not as here; empty if nothing."""
        parts = []
        for f in fields(self):
            ours, theirs = getattr(self, f.name), getattr(other, f.name)
            if ours != theirs and f.name == "names":
                sizes = ours.shard_size, theirs.shard_size
                if sizes[0] != sizes[1]:
                    parts.append("shards of {}, now of {}".format(*sizes))
                else:
                    parts.append(f"{ours.count} names, now {theirs.count} (or others)")
            elif ours != theirs:
                parts.append(f"{f.name.replace('_', ' ')} {ours!s}, now {theirs!s}")
        return "; ".join(parts)


def read_plan(store: Store) -> Plan | None:
    """Return the plan in a store; None if none was written yet."""
    data = store.read(PLAN)
    if data is None:
        return None

    def damaged(message: str) -> OutputError:
        return OutputError(f"{store}/{PLAN} is no plan of this version ({message}); use another place")

    try:
        return decode(Plan, json.loads(data), "plan", damaged)
    except (ValueError, RecursionError) as exc:
        raise damaged(str(exc)) from exc


def write_plan(store: Store, plan: Plan) -> None:
    """Write a plan. Its names must be there."""
    store.write(PLAN, json.dumps(encode(plan)).encode())


def read_entries(store: Store, plan: Plan, shard: int) -> list[Entry]:
    """Return the entries of a shard."""
    start, end = plan.names.starts[shard : shard + 2]
    lines = (store.read(NAMES, start, end) or b"").splitlines()
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        entries = [Entry(*found) if isinstance(found := json.loads(line), list) else Entry(found) for line in lines]
        if len(entries) == plan.names.in_shard(shard) and all(map(_is_whole, entries)):
            return entries
    raise OutputError(f"{store}/{NAMES} was changed or is damaged (shard {shard}); start over in another place")


def _is_whole(entry: Entry) -> bool:
    place = (entry.start, entry.size)
    return isinstance(entry.name, str) and (place == (None, None) or all(type(n) is int and n >= 0 for n in place))


def cut(entries: Iterable[Entry], shard_size: int, scratch: Path) -> tuple[Names, Path]:
    """Write each entry once to a file in `scratch`, and return what a plan says of it."""
    given = scratch / "given"
    count = 0
    with contextlib.ExitStack() as stack:
        buckets = [stack.enter_context((scratch / f"{i}").open("wb")) for i in range(_BUCKETS)]
        stream = stack.enter_context(given.open("wb"))
        for count, entry in enumerate(entries, 1):
            text = json.dumps(entry.name if entry.start is None else entry)
            stream.write(text.encode() + b"\n")
            name = entry.name.encode("utf-8", "surrogatepass")
            hashed = hashlib.blake2b(name, digest_size=16).digest()
            buckets[hashed[0] % _BUCKETS].write(hashed + (count - 1).to_bytes(8, "little"))
    duplicates = _duplicates(scratch / f"{i}" for i in range(_BUCKETS))
    return _write(given, scratch / NAMES, duplicates, shard_size)


def _duplicates(buckets: Iterable[Path]) -> Sequence[int]:
    """Return the places of names that came before, sorted. Two names with one hash of 128 bits do not happen."""
    found = [np.empty(0, np.uint64)]
    for bucket in buckets:
        hashed = np.fromfile(bucket, _HASHED)
        bucket.unlink()
        hashed = hashed[np.lexsort((hashed["place"], hashed["low"], hashed["high"]))]
        low, high = hashed["low"], hashed["high"]
        again = (low[1:] == low[:-1]) & (high[1:] == high[:-1])
        found.append(hashed["place"][1:][again])
    return array("Q", np.sort(np.concatenate(found)).tobytes())


def _write(given: Path, path: Path, duplicates: Sequence[int], shard_size: int) -> tuple[Names, Path]:
    digest, starts, count, position = hashlib.sha256(), [0], 0, 0
    with given.open("rb") as source, path.open("wb") as target:
        for line in _without(source, duplicates):
            target.write(line)
            digest.update(line)
            position += len(line)
            count += 1
            if count % shard_size == 0:
                starts.append(position)
    if count % shard_size:
        starts.append(position)
    given.unlink()
    return Names(count, len(duplicates), shard_size, digest.hexdigest(), tuple(starts)), path


def _without(lines: Iterable[bytes], places: Sequence[int]) -> Iterator[bytes]:
    """Yield the lines that stand at none of these places."""
    left_out = iter(places)
    next_out = next(left_out, -1)
    for place, line in enumerate(lines):
        if place == next_out:
            next_out = next(left_out, -1)
        else:
            yield line

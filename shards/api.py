"""`run_shards`, `read_scores` and `status`: a run over any number of images, its results, and how far it is.

>>> import diffiqa
>>> done = diffiqa.run_shards("engine/", "photos/", "scores/")
>>> for record in diffiqa.read_scores("scores/"):
...     print(record.image, record.score)
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..engine.codec import decode, encode
from ..engine.manifest import read_manifest
from ..errors import OutputError, UsageError, member
from ..runtime.backends import Backend
from ..runtime.command.records import Record, RunSettings
from ..runtime.images import DEFAULT_MAX_PIXELS
from ..runtime.inputs import Images
from ..runtime.results import Options
from ..runtime.selftest import load_tested
from .driver import PROGRESS, Crew, Driver, Progress, Watch, find_done
from .part import Form, Shard, read_shard
from .plan import NAMES, VERSION, Entry, Plan, cut, read_plan, write_plan
from .processes import Processes, gpus
from .sources import Http, entries
from .store import Store, open_store
from .worker import Work

MANIFEST = "manifest.json"
SHARD_SIZE = 1000


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Manifest:
    """What a run came to. Readers trust it alone: other files may be left from attempts that came late."""

    plan: str  # its digest
    engine: str
    settings: str
    backend: str
    records: int
    failed: int
    duplicates: int  # names that were given again, and scored once
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Status:
    """How far a run is."""

    total: int
    done: int
    failed: int
    finished: bool  # there is a manifest, and all can be read
    progress: Progress | None  # as the driver wrote it last

    @property
    def left(self) -> int:
        """How many images are to be scored."""
        return self.total - self.done


def run_shards(
    engine: str | Path,
    images: Images,
    out: str | Path,
    backend: Backend | Sequence[Backend] | None = None,
    *,
    options: Options | None = None,
    shard_size: int = SHARD_SIZE,
    workers: int | None = None,
    form: str = Form.JSONL,
    max_failure_rate: float = 1.0,
    retry_failed: bool = False,
    http: str = Http.NEVER,
    ray: str | None = None,
    max_pixels: int | None = DEFAULT_MAX_PIXELS,
    self_test: bool = True,
    watch: Watch = _ignore,
    say: Callable[[str], None] = _ignore,
) -> Manifest:
    """Score images into shards of `out`, a folder or a bucket, by several workers; go on where an earlier run ended.

        done = diffiqa.run_shards("engine/", "photos/", "scores/", workers=2)
        print(done.records, done.failed)

    `images` may be any iterable, and is gone through once: names, folders, patterns, lists, archives, URIs. `workers`
    is by default the number of GPUs, or 1; `ray` places them on a cluster ("local", or its address). Each worker first
    tests the engine, unless its machine remembers that it passed, or `self_test` is false. The options are those of
    `iqa-run --shards`. Raises DiffiqaError if nothing can be scored, or too many images fail.
    """
    wanted, chosen = options or Options(), member(Http, http)
    if shard_size < 1 or (workers is not None and workers < 1) or not 0 <= max_failure_rate <= 1:
        raise UsageError("shards and workers must be at least 1, a rate of failures between 0 and 1")
    place = Path(engine).absolute()
    settings = RunSettings.of(read_manifest(place), wanted)
    store = open_store(out)
    opened = functools.partial(load_tested, place, backend, max_pixels=max_pixels, wanted=self_test)
    work = Work(store, opened, wanted, settings, chosen)
    some = (backend,) if isinstance(backend, Backend) else backend
    count = workers or (len(gpus()) if some is None or any(one.on_gpu for one in some) else 1) or 1
    if ray is not None:
        from .on_ray import Actors

        crew: Crew = Actors(work, workers, ray)
    else:
        crew = Processes(work, count)
    named = [images] if isinstance(images, str | os.PathLike) else images
    return carry_out(
        work,
        entries((os.fspath(name) for name in named), chosen),
        crew,
        shard_size=shard_size,
        form=member(Form, form),
        max_pixels=max_pixels,
        max_failure_rate=max_failure_rate,
        retry_failed=retry_failed,
        watch=watch,
        say=say,
    )


def carry_out(
    work: Work,
    given: Iterable[Entry],
    crew: Crew,
    *,
    shard_size: int,
    form: Form = Form.JSONL,
    max_pixels: int | None = None,
    max_failure_rate: float = 1.0,
    retry_failed: bool = False,
    watch: Watch = _ignore,
    say: Callable[[str], None] = _ignore,
) -> Manifest:
    """Plan, have the crew do all shards, and commit the manifest."""
    store, settings = work.store, work.settings
    driver = Driver(store, crew, watch=watch, max_failure_rate=max_failure_rate)
    with store.held(), contextlib.ExitStack() as stack:
        stack.callback(crew.stop)
        if (before := read_plan(store)) is None:
            driver.start()  # and find the names meanwhile
        with store.scratch() as scratch:
            names, file = cut(given, shard_size, scratch)
            if not names.count:
                raise UsageError("no images found; give files, folders, patterns, lists or archives")
            same = settings.engine, str(settings), max_pixels, form
            plan = Plan(VERSION, *same, before.backend if before else driver.backend(), names)
            if before is None:
                store.take(NAMES, file)
                write_plan(store, plan)
            elif different := before.difference(plan):
                raise OutputError(f"{store} was begun with {different}; use those again, or another place")
        if names.duplicates:
            say(f"{names.duplicates} names were given more than once: each is scored once")
        found, attempts = find_done(store, plan, say)
        todo = any(retry_failed and shard.failed for shard in found.values()) or len(found) < names.shards
        if before and todo:
            driver.start()
        driver.run(plan, found, attempts, retry_failed=retry_failed)
        manifest = manifest_of(plan, driver.shards)
        data = json.dumps(encode(manifest)).encode()
        if store.read(MANIFEST) != data:
            store.write(MANIFEST, data)
    return manifest


def manifest_of(plan: Plan, shards: Mapping[int, Shard]) -> Manifest:
    """Return the manifest of a plan whose shards are all done."""
    ordered = tuple(shards[index] for index in range(plan.names.shards))
    failed = sum(shard.failed for shard in ordered)
    same = plan.digest, plan.engine, plan.settings, plan.backend
    return Manifest(*same, plan.names.count, failed, plan.names.duplicates, ordered)


def read_scores(out: str | Path) -> Iterator[Record]:
    """Return the records of a finished run one by one, in the order of its names, by its manifest alone.

    Raises OutputError if the run has not finished, or where a shard is not as it was written.
    """
    store = open_store(out)
    manifest = _read_manifest(store)
    if manifest is None:
        raise OutputError(
            f"{store} has no {MANIFEST}: the run is not finished; give its command again, or iqa-status {store}"
        )
    records = (record for shard in manifest.shards for record in read_shard(store, shard))
    return (replace(record, backend=manifest.backend) if record.score is not None else record for record in records)


def status(out: str | Path) -> Status:
    """Return how far a run is. It reads three files and disturbs nobody. Raises OutputError where there is no plan."""
    store = open_store(out)
    plan = read_plan(store)
    if plan is None:
        raise OutputError(f"{store} has no plan: no run has begun here, or it is still looking for names")
    manifest, progress = _read_manifest(store), None
    if data := store.read(PROGRESS):
        with contextlib.suppress(ValueError, RecursionError):
            progress = decode(Progress, json.loads(data), "progress", ValueError)
    if manifest:
        return Status(plan.names.count, manifest.records, manifest.failed, True, progress)
    done, failed = (progress.done, progress.failed) if progress else (0, 0)
    return Status(plan.names.count, done, failed, False, progress)


def _read_manifest(store: Store) -> Manifest | None:
    data = store.read(MANIFEST)
    try:
        return None if data is None else decode(Manifest, json.loads(data), "manifest", ValueError)
    except (ValueError, RecursionError) as exc:
        raise OutputError(f"{store}/{MANIFEST} is no manifest of this version ({exc}); give the command again") from exc

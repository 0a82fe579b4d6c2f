"""The queue in front of the engines: images are decoded and scored in the order they came. Nothing of HTTP.

    submit ─▶ waiting ─ decoders ─▶ decoded ─ workers ─▶ Job.result

Images wait as bytes; few are held decoded. On a GPU with a batch, a worker takes images of one engine, one size and the
same options together, and waits up to `BATCH_WAIT` for them. The runtime pads batches to one size: so a score never
depends on what shared its batch.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path

from ..engine.manifest import read_manifest
from ..errors import BackendError, EngineError, ImageError, UsageError
from ..runtime.executor import Cancelled, Show
from ..runtime.images import Image, Source, synthetic
from ..runtime.plan import make_plan
from ..runtime.results import Failure, Options, Score
from ..runtime.scorer import Scorer
from .limits import MOST_HELD, Limits, Refusal
from .metrics import Metrics

BATCH_WAIT = 0.005  # seconds that an image on a GPU waits for others to share its batch
_DECODERS = 2
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One image on its way. Cancel `result` when nobody wants it any more: scoring then ends at its next step."""

    engine: str
    source: Source
    name: str
    options: Options
    client: str = ""
    show: Show | None = None  # somebody looks on, and wants pictures
    result: "Future[Score | Failure]" = field(default_factory=Future)
    image: Image | None = None
    since: float = 0.0  # when it was decoded
    steps: int = 0  # of all windows, crops and seeds; 0 before it is scored
    done: int = 0  # of those

    def shares_with(self, other: "Job") -> bool:
        """Whether both may stand in one batch."""
        return (
            (self.engine, self.options, self.show is None) == (other.engine, other.options, other.show is None)
            and self.image is not None
            and other.image is not None
            and self.image.size == other.image.size
        )


class Service:
    """Loaded engines by name, the first being the default, and the images that wait for them.

    It does not own the scorers. `directories` are where the engines were loaded from.
    """

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        limits: Limits | None = None,
        *,
        workers: int = 1,
        directories: Mapping[str, Path] | None = None,
    ) -> None:
        if workers < 1 or not scorers:
            raise UsageError("a service needs an engine and at least one worker")
        self.scorers, self.limits, self.metrics, self.workers = dict(scorers), limits or Limits(), Metrics(), workers
        self._directories = dict(directories or {})
        self.ready = False  # after a score of every engine
        self._pace = 1.0  # seconds of an image, lately
        self._held = 0  # bytes of bodies
        self._open: set[Job] = set()
        self._waiting: dict[Job, None] = {}  # in order
        self._decoded: dict[Job, None] = {}
        self._decoding = 0
        self._closed = False
        self._lock = threading.RLock()  # of all above; whoever wakes threads wakes only those that have work now
        self._to_decode, self._to_score = threading.Condition(self._lock), threading.Condition(self._lock)
        self._forming = threading.Lock()  # one worker at a time gathers a batch
        busy = workers + max(scorer.queue_depth for scorer in scorers.values())
        self._ahead = 1 + max(scorer.group_size(Options()) for scorer in scorers.values())
        loops = [self._decode] * _DECODERS + [self._work] * busy
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put the images of a request at the end of the queue, all or none. Raises Refusal if there is no room."""
        most = self.limits.per_client
        with self._lock:
            self.refuse_if_busy(len(jobs))
            if most and sum(job.client == jobs[0].client for job in self._open) + len(jobs) > most:
                why = f"this client has too many images in the queue; at most {most} may wait: send fewer at a time"
                raise Refusal(429, why, retry_after=self._retry_after(most))
            self._enter(jobs)

    def refuse_if_busy(self, images: int = 1) -> None:
        """Raise Refusal if there is no room for so many images."""
        if self._closed:
            raise Refusal(503, "the service is shutting down; try again in a while", retry_after=5)
        waiting = len(self._open)
        if waiting + images > self.limits.queue:
            when = self._retry_after(waiting)
            raise Refusal(503, f"the queue is full: {waiting} images wait; try again in {when} s", retry_after=when)

    def warm_up(self) -> None:
        """Score a picture with every engine, and be ready. Raises BackendError if one cannot."""
        sides = {name: scorer.info.crop_size for name, scorer in self.scorers.items()}
        jobs = [Job(name, synthetic(0, side, side), "warm-up", Options()) for name, side in sides.items()]
        self._enter(jobs)
        if self._closed:  # before it had anything to cancel
            return
        with contextlib.suppress(CancelledError):
            for job in jobs:
                if isinstance(result := job.result.result(), Failure):
                    raise BackendError(f"engine {job.engine} cannot score: {result.error}")
            self.ready = not self._closed

    def swapped(self, name: str) -> str | None:
        """Return what is wrong with an engine's folder now, if it is not the engine that was loaded from it."""
        if name not in self._directories:
            return None
        try:
            now = read_manifest(self._directories[name]).engine_id
        except EngineError as exc:
            now = str(exc)
        if now == (loaded := self.scorers[name].info.engine):
            return None
        return f"scores are by {loaded}, but its folder has changed ({now}): restart to load it"

    def hold(self, size: int) -> None:
        """Count bytes of a body; a negative number gives them back. Raises Refusal if too many are held already."""
        if size > 0 and self._held + size > MOST_HELD * self.limits.body_bytes:
            when = self._retry_after(1)
            raise Refusal(503, f"too much is being sent at once; try again in {when} s", retry_after=when)
        self._held += size

    def gauges(self) -> dict[str, float]:
        """Return what stands where now."""
        return {"queue_images": len(self._open), "body_bytes": self._held, "ready": self.ready}

    def stop(self) -> None:
        """Take no more images, and drop those that have no score yet."""
        with self._lock:
            self._closed, self.ready = True, False
            left = list(self._open)
            self._to_decode.notify_all()
            self._to_score.notify_all()
        for job in left:
            job.result.cancel()

    def close(self) -> None:
        """Stop, and wait for the threads: the scorers are free then."""
        self.stop()
        for thread in self._threads:
            thread.join()

    def _retry_after(self, images: int) -> int:
        return min(60, max(1, math.ceil(images * self._pace / self.workers)))

    def _enter(self, jobs: Sequence[Job]) -> None:
        with self._lock:
            self._open.update(jobs)
            self._waiting.update(dict.fromkeys(jobs))
            self._to_decode.notify(len(jobs))
            for job in jobs:
                job.result.add_done_callback(lambda _, job=job: self._leave(job))  # type: ignore[misc]

    def _leave(self, job: Job) -> None:
        """Take a job out that has a result, or that nobody waits for any more."""
        with self._lock:
            self._open.discard(job)
            self._waiting.pop(job, None)
            self._take([job])

    def _take(self, jobs: Sequence[Job]) -> None:
        """Take jobs out of those that are decoded; others may be decoded then."""
        for job in jobs:
            if job in self._decoded:
                del self._decoded[job]
                self._to_decode.notify()

    def _decode(self) -> None:
        def turn() -> bool:
            return self._closed or bool(self._waiting and len(self._decoded) + self._decoding < self._ahead)

        while True:
            with self._lock:
                self._to_decode.wait_for(turn)
                if self._closed:
                    return
                job = next(iter(self._waiting))
                del self._waiting[job]
                self._decoding += 1
            try:
                job.image, job.since = self.scorers[job.engine].read(job.source), time.monotonic()
            except Exception as exc:
                self._fail([job], exc)
            job.source = b""
            with self._lock:
                self._decoding -= 1
                if not job.result.done():
                    self._decoded[job] = None
                    self._to_score.notify()

    def _work(self) -> None:
        while group := self._next_group():
            self._score(group)

    def _next_group(self) -> list[Job]:
        """Wait for an image, and on a GPU a little for others like it. Returns none once the service is closed."""
        with self._forming, self._lock:
            self._to_score.wait_for(lambda: self._decoded or self._closed)
            if self._closed:
                return []
            first = next(iter(self._decoded))
            most = self.scorers[first.engine].group_size(first.options)

            def alike() -> list[Job]:
                return [job for job in self._decoded if job is first or job.shares_with(first)][:most]

            if most > 1:
                left = first.since + BATCH_WAIT - time.monotonic()
                self._to_score.wait_for(lambda: len(alike()) == most or self._closed, timeout=max(0.0, left))
            group = alike() or [first]
            self._take(group)
        return group

    def _score(self, group: list[Job]) -> None:
        scorer, options, show = self.scorers[group[0].engine], group[0].options, group[0].show

        def cancelled() -> bool:
            for job in group:
                job.done += 1
            return all(job.result.cancelled() for job in group)

        try:
            read = [(job.image, job.name) for job in group if job.image]
            steps = _steps(scorer, read[0][0], options)
            for job in group:
                job.steps, job.done = steps, 0
            start = time.monotonic()
            scores = scorer.score_read(read, options, show is not None, cancelled, show)
            self._pace += 0.2 * ((time.monotonic() - start) / len(group) - self._pace)
        except Cancelled:
            return
        except Exception as exc:
            if isinstance(exc, ImageError) and len(group) > 1:  # one by one they may fit in memory
                for job in group:
                    self._score([job])
            else:
                self._fail(group, exc)
            return
        self.metrics.observe("batch_images", len(group), engine=group[0].engine)
        for job, score in zip(group, scores, strict=True):
            self.metrics.observe("scoring_seconds", score.seconds, engine=job.engine)
            _give(job, score)

    def _fail(self, group: list[Job], exc: Exception) -> None:
        """Give a group the reason why it has no score; what we did not expect goes to the log too."""
        for job in group:
            self.metrics.count("failed_images", engine=job.engine)
            if isinstance(exc, ImageError):
                _give(job, Failure(job.name, named(job.name, str(exc))))
            else:
                log.error("cannot score an image", exc_info=exc)
                with contextlib.suppress(InvalidStateError, CancelledError):
                    job.result.set_exception(exc)


def named(name: str, why: str) -> str:
    """Return why an image has no score, with its name: the reader calls all bytes `bytes`."""
    return why if why.startswith(f"{name}: ") else f"{name}: {why.removeprefix('bytes: ')}"


def _give(job: Job, result: Score | Failure) -> None:
    with contextlib.suppress(InvalidStateError, CancelledError):  # nobody waits for it any more
        job.result.set_result(result)


def _steps(scorer: Scorer, image: Image, options: Options) -> int:
    """Return how often an executor on the host asks whether it is cancelled: at each step, window and crop."""
    plan = make_plan(*image.size, scorer.manifest, options)
    loop, steps, crops = scorer.manifest.flow.loop, len(plan.sampling.steps), len(plan.crops)
    states = crops * steps if loop.result else len(plan.windows) * (steps + 1)
    return (crops + (states if scorer.manifest.stage(loop.stage) else 0)) * options.seeds

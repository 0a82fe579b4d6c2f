"""The comparison with peers: each has its own process and scores the same images in turn. Scores are compared first."""

import contextlib
import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from ..engine.manifest import read_manifest
from ..errors import BackendError, first_line
from ..runtime.plan import make_plan
from ..runtime.results import Mode, Options
from .contenders import Contender, Ground, Make, Missing, place_of
from .machine import peak_mib
from .results import Peer, PeerCase
from .timing import SETTLE
from .workload import Workload

EXACT = 1e-4  # mean difference of scores near 1 that another order of sums may cause
SEEDS = 3  # of ours: reduced precision may change a score by no more than their spread

Ask = tuple[Path, Options]  # an image to score, and how
_UNTILED = "it cannot restore images in tiles"


@dataclass(frozen=True)
class Ready:
    """The contender can be asked."""

    version: str


@dataclass(frozen=True)
class Refused:
    """The contender cannot start, or could not answer."""

    reason: str
    missing: bool = False


@dataclass(frozen=True)
class Answer:
    """A score, and how long it took from file to score."""

    score: float
    seconds: float
    peak_mib: float | None


def serve(pipe: "Connection[Ready | Refused | Answer, Ask]", make: Make, ground: Ground, log: Path) -> None:
    """Make the contender and answer until the other end closes. Output of libraries goes into `log`."""
    # The parent handles Ctrl-C: it writes its results, then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        score, version = make(ground)
        pipe.send(Ready(version))
        while True:
            image, options = pipe.recv()
            start = time.perf_counter()
            pipe.send(Answer(score(image, options), time.perf_counter() - start, peak_mib()))
    except Exception as exc:  # a peer may fail in any way: the others go on
        missing = isinstance(exc, Missing)
        reason = first_line(exc) if missing else f"{type(exc).__name__}: {first_line(exc)}"
        with contextlib.suppress(OSError):  # the other end was closed: that is how a process ends that is asked no more
            pipe.send(Refused(reason, missing))


class Out(Exception):  # noqa: N818 — not an error: the results say that the contender is out
    """Raised when a contender cannot go on."""


@dataclass
class _CaseSoFar:
    case: str
    scores: list[float] = field(default_factory=list)  # of each image, before timing
    spread: list[float] = field(default_factory=list)  # of each image, over seeds
    seconds: list[float] = field(default_factory=list)
    drift: float | None = None
    allowed: float | None = None


class Entrant:
    """A contender, its process, and what it has shown so far."""

    def __init__(self, contender: Contender, log: Path, timeout: float) -> None:
        self.contender, self.timeout = contender, timeout  # seconds
        self.problem: str | None = None
        self.skipped = self.gone = False
        self.samples: list[_CaseSoFar] = []
        self._version: str | None = None
        self._ready: float | None = None
        self._peak: float | None = None
        self._log = log
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection[Ask, Ready | Refused | Answer] | None = None

    def start(self, ground: Ground) -> None:
        """Start the process and wait until it can be asked."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, self.contender.make, ground, self._log)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        start = time.perf_counter()
        with _ignoring_interrupts():  # until the process has said so itself
            self._process.start()
        theirs.close()
        answer = self._receive()
        assert isinstance(answer, Ready)  # noqa: S101 — what a process says first
        self._ready, self._version = time.perf_counter() - start, answer.version

    def ask(self, image: Path, options: Options) -> Answer:
        """Have an image scored."""
        assert self._pipe  # noqa: S101 — started
        try:
            self._pipe.send((image, options))
        except OSError:
            raise Out(self._died()) from None
        answer = self._receive()
        assert isinstance(answer, Answer)  # noqa: S101
        self._peak = answer.peak_mib
        return answer

    def leave(self, problem: str | None = None) -> None:
        """End the process; `problem` says why its times do not count."""
        self.problem = self.problem or problem
        self.gone = True
        if self._pipe:
            self._pipe.close()
        if self._process and self._process.pid:
            self._process.join(1)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    @property
    def found(self) -> Peer:
        """What became of it."""
        return Peer(
            name=self.contender.name,
            precision=self.contender.precision,
            version=self._version,
            problem=self.problem,
            skipped=self.skipped,
            ready_seconds=self._ready,
            peak_mib=self._peak,
            cases=tuple(PeerCase(s.case, tuple(s.seconds), s.drift, s.allowed) for s in self.samples),
        )

    def _receive(self) -> Ready | Answer:
        assert self._pipe  # noqa: S101 — started
        try:
            if not self._pipe.poll(self.timeout):
                raise Out(f"no answer within {self.timeout:g} seconds")
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise Out(self._died()) from None
        if isinstance(answer, Refused):
            self.skipped = answer.missing
            raise Out(answer.reason)
        return answer

    def _died(self) -> str:
        assert self._process  # noqa: S101 — started
        self._process.join(5)
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n") if self._log.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"its process died with exit code {self._process.exitcode}{f': {last[:200]}' if last else ''}"


class Contest:
    """Contenders on the same cases. The others are compared with the first."""

    def __init__(
        self,
        contenders: Sequence[Contender],
        ground: Ground,
        workloads: Sequence[tuple[str, Workload]],  # with the name of the case
        *,
        rounds: int,
        timeout: float,
        progress: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._contenders, self._ground, self._settings = contenders, ground, workloads
        self._rounds, self._timeout, self._progress = rounds, timeout, progress
        self._entrants: list[Entrant] = []

    def run(self) -> None:
        """Start every contender and measure every case. Raises BackendError if the first fails."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                for index, contender in enumerate(self._contenders):
                    self._entrants.append(Entrant(contender, Path(folder, f"{index}.log"), self._timeout))
                for entrant in self._entrants:  # one by one, as compilers would slow each other down
                    if not any(self._takes(entrant, workload) for _name, workload in self._settings):
                        entrant.skipped = True
                        entrant.leave(f"{_UNTILED}, as ours does all of these")
                        continue
                    self._progress(f"starting {entrant.contender.name}")
                    self._try(entrant, partial(entrant.start, self._ground))
                for name, workload in self._settings:
                    self._case(name, workload)
            finally:
                for entrant in self._entrants:
                    entrant.leave()

    @property
    def found(self) -> tuple[Peer, ...]:
        """What became of every contender so far."""
        return tuple(entrant.found for entrant in self._entrants)

    def _case(self, name: str, workload: Workload) -> None:
        taking = []
        for entrant in _running(self._entrants):
            if not self._takes(entrant, workload):  # it misses only this case
                self._progress(f"{name}: {entrant.contender.name} is left out: {_UNTILED}, as ours does these")
                continue
            taking.append(entrant)
            entrant.samples.append(_CaseSoFar(name))
            self._progress(f"{name}: {entrant.contender.name} scores")
            self._try(entrant, partial(self._score, entrant, workload))
        first = self._entrants[0].samples[-1]
        for entrant in _running(taking):
            self._compare(entrant, first)
        for turn in range(self._rounds):
            self._progress(f"{name}: peers, round {turn + 1} of {self._rounds}")
            for index, image in enumerate(workload.images):
                running = _running(taking)
                # They take turns to go first, so that nobody always follows the same neighbour.
                for entrant in running[turn % len(running) :] + running[: turn % len(running)]:
                    time.sleep(SETTLE)
                    self._try(entrant, partial(self._time, entrant, workload, index, image))

    def _score(self, entrant: Entrant, workload: Workload) -> None:
        """Score every image once; ours also with other seeds, for the spread."""
        samples = entrant.samples[-1]
        # One more score than needed: compilers may compile again at the second call of a shape.
        entrant.ask(workload.images[0], workload.options)
        seeds = SEEDS if entrant is self._entrants[0] and not all(c.exact for c in self._contenders) else 1
        reseeded = [replace(workload.options, seed=workload.options.seed + more) for more in range(seeds)]
        for image in workload.images:
            scores = [entrant.ask(image, options).score for options in reseeded]
            samples.scores.append(scores[0])
            samples.spread.append(statistics.stdev(scores) if seeds > 1 else 0.0)

    def _compare(self, entrant: Entrant, ours: _CaseSoFar) -> None:
        samples = entrant.samples[-1]
        samples.drift = statistics.fmean(abs(a - b) for a, b in zip(samples.scores, ours.scores, strict=True))
        scale = max(1.0, *map(abs, ours.scores))
        exact = entrant.contender.exact and self._contenders[0].exact
        samples.allowed = EXACT * scale if exact else statistics.fmean(ours.spread)
        if not samples.drift <= samples.allowed:  # NaN differs too
            entrant.problem = f"its scores differ from ours by {samples.drift:.1e}, {samples.allowed:.1e} is allowed"
            # Reduced precision is timed all the same, for users who would accept such scores.
            if exact:
                hint = "; is --ckpt what the engine was exported from?" if entrant.contender.weights else ""
                entrant.leave()
                entrant.problem += hint

    def _time(self, entrant: Entrant, workload: Workload, index: int, image: Path) -> None:
        samples = entrant.samples[-1]
        answer = entrant.ask(image, workload.options)
        apart = abs(answer.score - samples.scores[index])
        if not apart <= EXACT * max(1.0, abs(answer.score)):
            raise Out(f"it scored {image.name} twice, {apart:.1e} apart")
        samples.seconds.append(answer.seconds)

    def _takes(self, entrant: Entrant, workload: Workload) -> bool:
        place = place_of(self._ground.backend)
        if all(entrant.contender.takes(mode, place) for mode in Mode):
            return True
        manifest = read_manifest(self._ground.engine)
        return entrant.contender.takes(
            make_plan(workload.height, workload.width, manifest, workload.options).mode, place
        )

    def _try(self, entrant: Entrant, action: Callable[[], None]) -> None:
        try:
            action()
        except Out as exc:
            entrant.leave(str(exc))
            if entrant is self._entrants[0]:
                raise BackendError(f"there is nothing to compare peers with: {exc}") from None


def _running(entrants: Sequence[Entrant]) -> list[Entrant]:
    return [entrant for entrant in entrants if not entrant.gone]


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

"""`iqa-bench --recommend`: what scores soonest on this machine, and how far scores move with it.

ONNX Runtime in float32 is the reference. Everything else that is installed takes turns with it, each in a process of
its own. The fastest that moves scores no more than another seed does is tried with the engine's fast sampling, too.
"""

import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..engine.manifest import Manifest, read_manifest, weights_id
from ..engine.sampling import fewest_steps
from ..errors import BackendError, DiffiqaError, UsageError
from ..runtime.backends import BACKENDS, Backend, GpuBackend, OnnxRuntime, OpenVino
from ..runtime.host.onnx_stage import available_cpus
from ..runtime.inputs import Images, find_images, names_of
from ..runtime.results import Options
from .contenders import Contender, Ground, Missing, Score, ours
from .peers import EXACT, Entrant, Out
from .workload import generate, sort_by_size

PICTURES = 2
TURNS = 4
LEAST = 2  # pairs of measurements, however long they take
TIMEOUT = 900.0  # seconds without an answer


@dataclass(frozen=True)
class Way:
    """One way to score."""

    engine: Path
    backend: Backend
    fast: bool = False

    @property
    def line(self) -> str:
        """The command that scores so."""
        words = ["iqa-run", "--engine", str(self.engine), "--backend", self.backend.key]
        if isinstance(self.backend, OpenVino) and self.backend.precision != "fp32":
            words += ["--cpu-precision", self.backend.precision]
        if threads := getattr(self.backend, "threads", None):
            words += ["--threads", str(threads)]
        return shlex.join(words + ["--fast"] * self.fast) + " IMAGES"


@dataclass(frozen=True)
class Trial:
    """What was found about a way."""

    way: Way
    seconds: float | None = None  # of an image, in the median
    speed: float | None = None  # over the reference: the median of pairs that were measured one after the other
    spread: tuple[float, float] | None = None  # the quartiles of these pairs
    drift: float | None = None  # mean change of scores against the reference; None: not measured
    problem: str | None = None  # why there are no figures

    def keeps(self, allowed: float) -> bool:
        """Whether it runs and keeps scores. What was not measured here, iqa-calibrate has measured."""
        return self.speed is not None and (self.drift is None or self.drift <= allowed)


@dataclass(frozen=True)
class Recommendation:
    """All trials, the reference first, and which of them is best."""

    trials: tuple[Trial, ...]
    best: Trial
    allowed: float  # how far another seed moves the reference's scores
    steps: int  # that every trial took, but those with fast sampling
    all_steps: int


def recommend(
    engine: str | Path,
    images: Images = (),
    *,
    quantised: Sequence[str | Path] = (),
    seconds: float = 60,
    seed: int = 0,
    say: Callable[[str], None] = lambda _text: None,
) -> Recommendation:
    """Find what scores soonest on this machine: backend, precision, threads, sampling.

        found = diffiqa.recommend("engine/", quantised=["engine-int8/"])
        print(found.best.way.line)

    `engine` is the reference, in float32 by ONNX Runtime. `quantised` are 8-bit forms of it. It scores the first two
    `images`, or two pictures of its own. It takes about `seconds`, or longer where two scores of each way do. Where all
    steps would take too long, it compares in as few as the taps allow.
    """
    engine = Path(engine)
    m = read_manifest(engine)
    forms = [engine, *map(Path, quantised)]
    for form in forms[1:]:
        other, sources = read_manifest(form), m.provenance.sources
        same = weights_id(other.provenance.sources[: len(sources)]) == weights_id(sources)
        if not same or other.model != m.model:
            raise UsageError(f"{form} is of other weights than {engine}: name forms of one engine")
    names = names_of(images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = max(224, m.crop.size)
        found = sort_by_size(find_images(names), m) if names else generate(folder, [(size, size)], PICTURES, seed)
        pictures = [path for paths in found.by_size.values() for path in paths][:PICTURES]
        return _Contest(m, pictures, Options(crops=1, seed=seed), folder, say, seconds).run(forms)


@dataclass
class _Contest:
    manifest: Manifest
    pictures: Sequence[Path]
    options: Options
    folder: Path  # of logs
    say: Callable[[str], None]
    seconds: float
    steps: int = 0  # that all take
    share: float = 0.0  # seconds for each way

    def run(self, forms: Sequence[Path]) -> Recommendation:
        """Try everything. Raises BackendError if the reference does not run."""
        reference, first = Way(forms[0], OnnxRuntime()), None
        try:
            first = self._start(reference)
            self._choose_steps(first)
            reseeded = replace(self.options, seed=self.options.seed + 1)
            own = [first.ask(picture, self.options) for picture in self.pictures]
            other = [first.ask(picture, reseeded) for picture in self.pictures]
            pairs = list(zip(own, other, strict=True))
            allowed = max(EXACT, statistics.fmean(abs(a.score - b.score) for a, b in pairs))
            took = statistics.median(answer.seconds for answer in (*own, *other))
            trials = [Trial(reference, took, 1.0, (1.0, 1.0), 0.0)]
            kinds: list[Backend] = [kind() for kind in BACKENDS.values()]
            kinds.insert(kinds.index(OpenVino()), OpenVino(precision="bf16"))
            ways = [way for form in forms for kind in kinds if (way := Way(form, kind)) != reference]
            self.share = self.seconds / len(ways)
            trials += [self._try(way, first) for way in ways]
            cpus, best = available_cpus(), _fastest(trials, allowed).way
            if cpus > 2 and not isinstance(best.backend, GpuBackend):
                fewer = replace(best.backend, threads=cpus // 2)
                trials.append(self._try(replace(best, backend=fewer), first))
            if with_fast := [t for t in trials if t.keeps(allowed) and read_manifest(t.way.engine).fast]:
                trials.append(self._try(replace(_fastest(with_fast, allowed).way, fast=True), first))
        except Out as exc:
            raise BackendError(f"there is nothing to compare with: {exc}") from None
        finally:
            if first:
                first.leave()
        return Recommendation(tuple(trials), _fastest(trials, allowed), allowed, self.steps, self._all_steps)

    @property
    def _all_steps(self) -> int:
        return self.manifest.schedule.steps

    def _choose_steps(self, first: Entrant) -> None:
        """Take all steps, or as few as the taps allow if all of them would take most of the time."""
        m, self.steps = self.manifest, self._all_steps
        if (fewest := fewest_steps(m.schedule, m.taps, m.kinds)) is None:
            return
        few = replace(self.options, steps=fewest)
        for _ in range(2):  # the first warms up
            took = first.ask(self.pictures[0], few).seconds
        if took * self._all_steps / fewest > self.seconds / 20:
            self.steps, self.options = fewest, few

    def _start(self, way: Way) -> Entrant:
        self.say(f"trying {way.line}")
        log = self.folder / f"{time.monotonic_ns()}.log"
        entrant = Entrant(Contender(way.line, "", _ours), log, TIMEOUT)
        try:
            entrant.start(Ground(way.engine, None, way.backend))
        except Out:
            entrant.leave()
            raise
        return entrant

    def _try(self, way: Way, first: Entrant) -> Trial:
        """Let a way take turns with the reference."""
        entrant, until = None, time.monotonic() + self.share
        options = replace(self.options, steps=None, fast=True) if way.fast else self.options
        ratios, took, apart = [], [], []
        try:
            entrant = self._start(way)
            entrant.ask(self.pictures[0], options)  # it may compile
            for turn, picture in enumerate([*self.pictures] * TURNS):
                if turn >= LEAST and time.monotonic() > until:
                    break
                reference = first.ask(picture, self.options)
                answer = entrant.ask(picture, options)
                ratios.append(reference.seconds / answer.seconds)
                took.append(answer.seconds)
                apart.append(abs(reference.score - answer.score))
        except Out as exc:
            return Trial(way, problem=str(exc))
        finally:
            if entrant:
                entrant.leave()
        # Where the reference did not take all steps, fast sampling is another function: only its time counts.
        share = self._all_steps / self.steps if way.fast else 1.0
        low, middle, high = (share * cut for cut in statistics.quantiles(ratios, n=4))
        drift = statistics.fmean(apart) if share == 1 else None
        return Trial(way, statistics.median(took), middle, (low, high), drift)


def _ours(ground: Ground) -> tuple[Score, str]:
    try:
        return ours(ground)
    except DiffiqaError as exc:
        raise Missing(str(exc)) from exc


def _fastest(trials: Sequence[Trial], allowed: float) -> Trial:
    return max((trial for trial in trials if trial.keeps(allowed)), key=lambda trial: trial.speed or 0.0)

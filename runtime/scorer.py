"""The Python API: `load(engine)` returns a `Scorer`, with `score(images)` and `stream(images)`."""

import collections
import itertools
import os
import statistics
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt

from ..engine.manifest import EngineDirectory, Manifest, ScoreMeaning, StageName, open_engine
from ..engine.pixels import MID_GREY, to_pixels, to_plane
from ..engine.sampling import Sampling
from ..engine.schedule import Kind, Taps
from ..engine.score import weighted_sum
from ..errors import BackendError, EngineError, ImageError, UsageError
from .arrays import is_foreign
from .backends import Backend, GpuBackend, best
from .executor import Executor, Outcome, Show, StageRunner, Verdict
from .host.executor import HostExecutor
from .images import DEFAULT_MAX_PIXELS, Image, Source, read_for
from .plan import Plan, make_plan, sampling_of
from .results import CropScore, Failure, Options, Picture, Pictures, Probabilities, Score, WordMap

FloatArray = npt.NDArray[np.float32]
_Decoding = tuple["Future[Image]", str]  # an image, and its name


@dataclass(frozen=True)
class Info:
    """What a scorer runs, and what its scores mean."""

    engine: str
    model: str
    backend: str
    score: ScoreMeaning
    steps: int
    taps: Taps
    kinds: tuple[Kind, ...]
    crop_size: int
    crop_count: int
    reason: str = ""  # why this backend, if nobody asked for it by name
    drift: str = ""  # where the engine differs from PyTorch by more than rounding, if its export accepted that
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # what scores have probabilities of, by kind


class Scorer:
    """A loaded engine. Several threads may use it at once; `close()` (or a `with` block) frees it.

    It runs stages on the host, or an executor, which it closes in the end.
    """

    def __init__(
        self,
        manifest: Manifest,
        stages: Mapping[StageName, StageRunner] | Executor,
        *,
        backend: str,
        reason: str = "",
        max_pixels: int | None = DEFAULT_MAX_PIXELS,
    ) -> None:
        self._manifest, self._backend, self._reason, self._max_pixels = manifest, backend, reason, max_pixels
        self._executor: Executor | None = HostExecutor(manifest, stages) if isinstance(stages, Mapping) else stages

    @property
    def info(self) -> Info:
        """What runs here, and the range and direction of the scores."""
        m = self._manifest
        return Info(
            m.engine_id,
            m.model_name,
            self._backend,
            m.score,
            m.schedule.steps,
            m.taps,
            m.kinds,
            m.crop.size,
            m.crop.count,
            self._reason,
            m.drift,
            {found.output: found.words for found in m.flow.probabilities},
        )

    @property
    def manifest(self) -> Manifest:
        """The engine's whole manifest."""
        return self._manifest

    @overload
    def score(self, images: Source, options: Options | None = None, *, pictures: bool = False) -> Score: ...
    @overload
    def score(
        self, images: list[Source] | tuple[Source, ...], options: Options | None = None, *, pictures: bool = False
    ) -> list[Score]: ...
    def score(
        self,
        images: Source | list[Source] | tuple[Source, ...],
        options: Options | None = None,
        *,
        pictures: bool = False,
    ) -> Score | list[Score]:
        """Score one image (path, bytes, PIL image, HWC array) or a list of them.

        `pictures` keeps what the model saw in `Score.pictures`. Raises ImageError for the first image that cannot be
        scored; `stream` goes on instead.
        """
        chosen = options or Options()
        if not isinstance(images, list | tuple):
            (score,) = self.score_read([(self.read(images), _name(images, 0))], chosen, pictures)
            return score
        read = ((self.read(image), _name(image, index)) for index, image in enumerate(images))
        scores: list[Score] = []
        for _, same in itertools.groupby(read, lambda item: item[0].size):
            while group := list(itertools.islice(same, self.group_size(chosen))):
                scores += self.score_read(group, chosen, pictures)
        return scores

    def stream(
        self,
        images: Iterable[Source],
        options: Options | None = None,
        *,
        pictures: bool = False,
        workers: int = 1,
        ahead: int = 4,
    ) -> Generator[Score | Failure, None, None]:
        """Yield one result per image, in order. A bad image gives a Failure, and the others are scored.

        `workers` images are scored at a time, while threads decode the next `ahead`. The scorer works one result ahead
        of the caller, on a GPU two, and holds no more. Where images share batches, it works batch by batch: neighbours
        of one size form a batch, and images for the next batch are decoded ahead as well.
        """
        if workers < 1 or ahead < 1:
            raise UsageError("workers and ahead must be at least 1")
        if isinstance(images, str | bytes | Path | np.ndarray) or is_foreign(images):
            raise UsageError("stream takes an iterable of images; for a single one use score")
        chosen = options or Options()
        sampling_of(self._manifest, chosen)  # what cannot be sampled is refused before an image is read
        return self._stream(images, chosen, pictures, workers, ahead - 1 + self.group_size(chosen))

    def digest(self, image: Source) -> str:
        """Return the digest that the score of an image would have. Raises ImageError."""
        return self.read(image).digest

    def close(self) -> None:
        """Free the engine. A closed scorer refuses to score."""
        executor, self._executor = self._executor, None
        if executor:
            executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(
        self, images: Iterable[Source], options: Options, pictures: bool, workers: int, ahead: int
    ) -> Generator[Score | Failure, None, None]:
        stop = threading.Event()
        most = self.group_size(options)

        def finish(group: Sequence[_Decoding]) -> Sequence[Score | Failure]:
            try:
                read = [(decoded.result(), name) for decoded, name in group]
                return self.score_read(read, options, pictures, stop.is_set)
            except ImageError as exc:
                if len(group) == 1:
                    return [Failure(group[0][1], str(exc))]
            return [result for member in group for result in finish([member])]  # one by one they may fit in memory

        source = enumerate(images)
        decoding: collections.deque[_Decoding] = collections.deque()
        scoring: collections.deque[Future[Sequence[Score | Failure]]] = collections.deque()
        queued = self.queue_depth
        with (
            ThreadPoolExecutor(min(ahead, 2), "diffiqa-decode") as decoders,
            ThreadPoolExecutor(workers + queued, "diffiqa-score") as scorers,
        ):
            try:
                while True:
                    while len(scoring) <= workers + queued:  # one is queued, so that workers never wait
                        for index, image in itertools.islice(source, ahead - len(decoding)):
                            decoding.append((decoders.submit(self.read, image), _name(image, index)))
                        if not decoding:
                            break
                        scoring.append(scorers.submit(finish, _next_group(decoding, most)))
                    if not scoring:
                        return
                    yield from scoring.popleft().result()
            finally:
                # The caller may stop early, also by Ctrl-C: running scores then end at their next step or graph.
                stop.set()
                for decoded, _ in decoding:
                    decoded.cancel()
                for scored in scoring:
                    scored.cancel()

    @property
    def queue_depth(self) -> int:
        """How many more callers than one keep it busy: their images come in while another's are computed."""
        return self._executor.queue_depth if self._executor else 0

    def group_size(self, options: Options) -> int:
        """Return how many images share a batch; each seed of an image takes a place in it."""
        return max(1, self._executor.together // options.seeds) if self._executor else 1

    def read(self, image: Source) -> Image:
        """Decode and prepare an image for `score_read`. Raises ImageError."""
        return read_for(image, self._manifest, max_pixels=self._max_pixels)

    def score_read(
        self,
        images: Sequence[tuple[Image, str]],
        options: Options,
        pictures: bool,
        cancelled: Callable[[], bool] = lambda: False,
        show: Show | None = None,
    ) -> list[Score]:
        """Score images of one size, each with its name, at most `group_size`. Raises ImageError for all of them.

        `cancelled` is asked before each step, on a GPU before each launch; once it is true, this raises Cancelled.
        `show` is told what goes into pictures, on the CPU, as it comes.
        """
        executor = self._executor
        if executor is None:
            raise UsageError("this scorer is closed; load the engine again")
        m = self._manifest
        height, width = images[0][0].size
        plan = make_plan(height, width, m, options)
        seeds = tuple(range(options.seed, options.seed + options.seeds))
        outcomes: list[Outcome] = []  # of every seed of the first image, then of the second, …
        try:
            arrays = [given(image, pixels=executor.takes_pixels) for image, _ in images]
            tasks = [(array, seed) for array in arrays for seed in seeds]
            for start in range(0, len(tasks), executor.together):
                some = tasks[start : start + executor.together]
                # Pictures show the first seed only.
                wanted = pictures and any((start + i) % len(seeds) == 0 for i in range(len(some)))
                outcomes += executor.run_together(some, plan, cancelled, pictures=wanted, show=show if wanted else None)
        except MemoryError as exc:
            raise ImageError(f"{images[0][1]}: {_too_large(plan)}" + (f" ({exc})" if str(exc) else "")) from exc
        except BackendError as exc:
            # ONNX Runtime has no exception type for too little memory.
            why = _too_large(plan) if "allocat" in str(exc) else exc
            raise ImageError(f"{images[0][1]}: {why}") from exc
        reference = m.score.reference
        caveat = reference.caveat(options.crops or m.crop.count, options.mode) if reference else None
        return [
            self._result(image, name, plan, options, outcomes[i * len(seeds) :][: len(seeds)], pictures, caveat)
            for i, (image, name) in enumerate(images)
        ]

    def _result(
        self,
        image: Image,
        name: str,
        plan: Plan,
        options: Options,
        outcomes: Sequence[Outcome],
        pictures: bool,
        caveat: str | None,
    ) -> Score:
        """Return the score of one image, from the outcomes of its seeds."""
        m, verdicts = self._manifest, [outcome.verdicts for outcome in outcomes]
        per_seed = [statistics.fmean(_total(m, verdict) for verdict in found) for found in verdicts]
        if options.fast and m.fast:
            per_seed = [m.fast.correction(score) for score in per_seed]
        crops = tuple(
            _crop_score(m, plan, index, [found[index] for found in verdicts]) for index in range(len(plan.crops))
        )
        ran = (note for outcome in outcomes for note in outcome.notes)
        notes = (*image.notes, *filter(None, [sampling_note(m, options)]), *ran, *filter(None, [caveat]))
        score = statistics.fmean(per_seed)
        return Score(
            source=name,
            score=score,
            vcg=_mean([crop.vcg for crop in crops]),
            vda=_mean([crop.vda for crop in crops]),
            spread=statistics.stdev(per_seed) if len(per_seed) > 1 else None,
            width=plan.width,
            height=plan.height,
            mode=plan.mode,
            seeds=tuple(range(options.seed, options.seed + options.seeds)),
            crops=crops,
            notes=tuple(dict.fromkeys(notes)),
            digest=image.digest,
            engine=m.engine_id,
            backend=self._backend,
            seconds=sum(outcome.seconds for outcome in outcomes),
            percentile=m.score.percentile(score),
            opinion=m.score.opinion(score),
            opinion_error=m.score.reference.error if m.score.reference else None,
            probabilities=_probabilities(m, list(itertools.chain.from_iterable(verdicts))) or None,
            pictures=_pictures(m, plan, image, outcomes[0]) if pictures else None,
        )


def sampling_note(manifest: Manifest, options: Options) -> str:
    """Return what scores say of steps that are not all of the engine's, as trained; else nothing."""
    sampling, trained = sampling_of(manifest, options), Sampling.trained(manifest.schedule)
    if options.fast:
        return f"fast: {len(sampling.steps)} of {len(trained.steps)} steps, the score corrected for it"
    if sampling == trained:
        return ""
    return f"{len(sampling.steps)} of {len(trained.steps)} steps, {sampling.name}"


def given(image: Image, *, pixels: bool = False) -> Any:
    """Return an image as an executor takes it: a plane, or bytes if it takes `pixels`; a pair if there are two."""

    def form(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array if pixels and array.dtype == np.uint8 else to_plane(array)

    seen = form(image.pixels)
    return seen if image.restored_from is None else (seen, form(image.restored_from))


def _next_group(decoding: "collections.deque[_Decoding]", most: int) -> "list[_Decoding]":
    """Take the first image, and the next ones as long as they have its size."""
    group = [decoding.popleft()]
    if most > 1 and (shape := _shape(group[0])):
        while decoding and len(group) < most and _shape(decoding[0]) == shape:
            group.append(decoding.popleft())
    return group


def _shape(decoding: "_Decoding") -> tuple[int, ...] | None:
    """Wait for an image and return its shape; None if it could not be read."""
    error = decoding[0].exception()
    return None if error else decoding[0].result().size


def load(
    engine: str | Path | EngineDirectory,
    backend: Backend | Sequence[Backend] | None = None,
    *,
    max_pixels: int | None = DEFAULT_MAX_PIXELS,
) -> Scorer:
    """Load an engine directory. Raises EngineError if it is damaged, BackendError if nothing can run it.

    A backend says what runs the engine and how: `OnnxRuntime(threads=2)`, `TensorRt(device=1, batch=8)`. If you give
    one, it runs, or `load` fails. If you give several, the first that opens runs, and `Scorer.info.reason` says why the
    ones before it do not. Without any, `load` tries those of `best()`: a GPU if there is one, else the CPU.

    With a `batch`, a GPU restores so many images of one size, or seeds of one image, at a time. This is faster if many
    images have one size. The last bits of a score then depend on `batch`, but never on the other images of the batch.
    """
    candidates = best() if backend is None else backend if isinstance(backend, list | tuple) else (backend,)
    if not candidates or not all(isinstance(candidate, Backend) for candidate in candidates):
        raise UsageError(f"give a backend such as TensorRt() or OnnxRuntime(threads=2), or several, not {backend!r}")
    directory = engine if isinstance(engine, EngineDirectory) else open_engine(Path(engine))
    refusals: dict[str, str] = {}  # by reason: two backends may lack the same GPU
    for candidate in candidates:
        try:
            opened = candidate.open(directory)
        except (BackendError, EngineError) as exc:
            if len(candidates) == 1:
                raise
            refusals.setdefault(str(exc), candidate.title)
        else:
            reason = _reason(refusals)
            return Scorer(
                directory.manifest, opened.executor, backend=opened.name, reason=reason, max_pixels=max_pixels
            )
    batches = [candidate.batch for candidate in candidates if isinstance(candidate, GpuBackend)]
    if len(batches) == len(candidates) and max(batches) > 1:
        raise BackendError(
            f"a batch of {max(batches)} needs a GPU, and none here can run {directory.path} ({_reason(refusals)}); "
            f"without a batch the CPU runs it"
        )
    raise BackendError(f"nothing here can run {directory.path} ({_reason(refusals)})")


def _reason(refusals: Mapping[str, str]) -> str:
    return "; ".join(f"not {title}: {why}" for why, title in refusals.items())


def _too_large(plan: Plan) -> str:
    return f"not enough memory for {plan.width}×{plan.height} pixels in {plan.mode} mode; lower the pixel budget"


def _name(image: Any, index: int) -> str:
    """Return the name of an image in results: its path, or its place in the list."""
    if isinstance(image, str | os.PathLike):
        return os.fsdecode(image)
    return str(getattr(image, "filename", "") or f"image {index}")


def _total(m: Manifest, verdict: Verdict) -> float:
    if verdict.score is not None:
        return verdict.score
    vcg, vda = (branch.score if branch else None for branch in (verdict.vcg, verdict.vda))
    return float(weighted_sum(m.score, vcg, vda))


def _crop_score(m: Manifest, plan: Plan, index: int, verdicts: list[Verdict]) -> CropScore:
    crop = plan.crops[index]
    return CropScore(
        crop.top,
        crop.left,
        statistics.fmean(_total(m, verdict) for verdict in verdicts),
        _mean([verdict.vcg.score if verdict.vcg else None for verdict in verdicts]),
        _mean([verdict.vda.score if verdict.vda else None for verdict in verdicts]),
        _probabilities(m, verdicts),
    )


def _probabilities(m: Manifest, verdicts: Sequence[Verdict]) -> Probabilities:
    """Return the mean probability of every word the engine knows."""
    means = {}
    for i, found in enumerate(m.flow.probabilities):
        each = np.stack([verdict.probabilities[i] for verdict in verdicts])
        means[found.output] = dict(zip(found.words, each.mean(0, np.float64).tolist(), strict=True))
    return means


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def _pictures(m: Manifest, plan: Plan, image: Image, outcome: Outcome) -> Pictures:
    """Place the restored planes and the heads' maps over the image."""
    size, shape = plan.crop_size, image.pixels.shape[:2]
    seen = image.pixels if image.pixels.dtype == np.uint8 else to_pixels(to_plane(image.pixels))
    planes: dict[Kind, Picture] = {Kind.DIS: seen.astype(np.uint8, copy=False)}
    for row, kind in enumerate(m.kinds[1:], start=1):
        if kind in outcome.planes:
            planes[kind] = to_pixels(outcome.planes[kind])
            continue
        canvas = np.full((*shape, 3), MID_GREY, np.uint8)
        for crop, pixels in zip(plan.crops, outcome.crops, strict=True):
            canvas[crop.top : crop.top + size, crop.left : crop.left + size] = to_pixels(pixels[row])
        planes[kind] = canvas
    score, weight = zip(*(verdict.maps for verdict in outcome.verdicts), strict=True)
    words = {}
    for i, (name, found) in enumerate(_probabilities(m, outcome.verdicts).items()):
        at = int(np.argmax(list(found.values())))
        shown = [verdict.probabilities[i][at].reshape(1, 1) for verdict in outcome.verdicts]
        words[name] = WordMap(list(found)[at], _over(plan, shape, shown))
    return Pictures(planes, _over(plan, shape, score), _over(plan, shape, weight), words)


def _over(plan: Plan, shape: tuple[int, ...], of_crops: Sequence[FloatArray]) -> FloatArray:
    """Lay the maps of all crops, each (grid, grid), over the image: their mean, and NaN where there is none."""
    size = plan.crop_size
    sums, counts = np.zeros((2, *shape), np.float32)
    for crop, values in zip(plan.crops, of_crops, strict=True):
        cell = size // values.shape[0]
        here = np.s_[crop.top : crop.top + size, crop.left : crop.left + size]
        sums[here] += np.kron(values, np.ones((cell, cell), np.float32))
        counts[here] += 1
    mean: FloatArray = sums / np.where(counts > 0, counts, np.nan)
    return mean

"""`score`: everything `iqa-run` does, as one function.

>>> import diffiqa
>>> done = diffiqa.score("engine/", "photos/", output="scores.csv", report="report.html")
>>> done.records[0].image, done.records[0].score
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...engine.manifest import Manifest
from ...errors import ImageError, OutputError, UsageError, member
from ..backends import Backend
from ..images import DEFAULT_MAX_PIXELS
from ..inputs import Images, find_images, names_of
from ..plan import sampling_of
from ..report.intermediates import prepare_folder, save_intermediates
from ..report.writer import ReportWriter
from ..results import Options, Scale, Score
from ..scorer import Scorer
from ..selftest import load_tested
from .order import Sort, arrange
from .recordfile import RecordFile
from .records import Format, Record, RunSettings, Status, choose_format

Watch = Callable[[Record, bool], None]
_COMPARED_AT_A_TIME = 64


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Outputs:
    """Which files a run writes. Raises UsageError for wishes that contradict each other."""

    file: Path | None = None
    form: Format | None = None  # of the file; by default what its name says
    resume: bool = False
    force: bool = False
    sort: Sort | None = None
    descending: bool = False
    report: Path | None = None
    intermediates: Path | None = None
    scale: Scale = Scale.RAW  # that table and report show first

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if self.resume and self.file is None:
            raise UsageError("--resume continues a file: name it with -o")
        if self.descending and not self.sort:
            raise UsageError("--descending needs --sort")

    def order(self, records: list[Record]) -> list[Record]:
        """Return records in the order asked for."""
        return arrange(records, self.sort, descending=self.descending)

    def refuse_scale(self, manifest: Manifest) -> None:
        """Raise UsageError if the engine does not know what is to be shown."""
        if self.scale is not Scale.RAW and manifest.score.reference is None:
            raise UsageError(
                f"engine {manifest.engine_id} has no reference distribution, so its scores have no {self.scale}: leave "
                f"out --scale, or make a reference with iqa-eval --reference"
            )

    def refuse_collisions(self, names: Iterable[str]) -> None:
        """Raise UsageError if an output would overwrite an image or another output, or be scored by the next run."""
        inputs = {os.path.realpath(name) for name in names if "\0" not in name}  # which no file has
        targets = [os.path.realpath(path) for path in (self.file, self.report) if path]
        for target in targets:
            if target in inputs:
                raise UsageError(f"{target} is one of the images; write results elsewhere")
        if len(set(targets)) < len(targets):
            raise UsageError(f"{targets[0]} cannot be both results and report; give two names")
        if self.intermediates:
            folder = os.path.realpath(self.intermediates)
            if any(os.path.dirname(name) == folder for name in inputs):  # noqa: PTH120 — of a resolved name
                raise UsageError(f"{folder} holds images that are scored; choose another folder for the pictures")


@dataclass(frozen=True)
class Scored:
    """What a run came to, and where it was written."""

    records: tuple[Record, ...]  # of every image, those of the earlier run too
    kept: int  # scores of the earlier run, which --resume took over
    changed: int  # pictures scored again because they changed since the earlier run
    seconds: float  # what scoring the others took
    outputs: Outputs

    @property
    def failed(self) -> int:
        """How many images have no score."""
        return sum(record.status is Status.ERROR for record in self.records)


def score(
    engine: str | Path | Scorer,
    images: Images,
    backend: Backend | Sequence[Backend] | None = None,
    *,
    options: Options | None = None,
    output: str | Path | None = None,
    form: str | None = None,
    resume: bool = False,
    force: bool = False,
    sort: str | None = None,
    descending: bool = False,
    report: str | Path | None = None,
    intermediates: str | Path | None = None,
    scale: str = Scale.RAW,
    workers: int = 1,
    max_pixels: int | None = DEFAULT_MAX_PIXELS,
    self_test: bool = True,
    say: Callable[[str], None] = _ignore,
) -> Scored:
    """Score images. One that cannot be scored gets a record that says why, and the others are scored.

        done = diffiqa.score("engine/", "photos/", output="scores.csv", report="report.html")
        print(done.failed, [record.score for record in done.records])

    `engine` is an engine directory, run by `backend` as `load` does it; or a scorer that is loaded already. `images`
    are names, folders and patterns. Without `output`, `report` and `intermediates` no file is written. `form`,
    `sort` and `scale` take the words of `iqa-run --help`. An engine directory is first tested on this machine, once,
    unless `self_test` is false. Raises DiffiqaError if nothing can be scored or a result
    cannot be written.
    """
    names = find_names(images)
    file, page, folder = (Path(path) if path else None for path in (output, report, intermediates))
    written, order = (member(Format, form) if form else None), (member(Sort, sort) if sort else None)
    outputs = Outputs(file, written, resume, force, order, descending, page, folder, member(Scale, scale))
    outputs.refuse_collisions(names)
    with (
        contextlib.nullcontext(engine)
        if isinstance(engine, Scorer)
        else load_tested(engine, backend, max_pixels=max_pixels, wanted=self_test, say=say) as scorer
    ):
        return score_names(scorer, names, options or Options(), outputs, workers=workers, say=say)


def find_names(images: Images) -> list[str]:
    """Return the files that names, folders and patterns stand for. Raises UsageError if there is none."""
    given = names_of(images)
    if not all(given):
        raise UsageError("an image name is empty: an unset variable?")
    names = [str(path) for path in find_images(given)]
    if not names:
        raise UsageError("no images found; give files, folders or glob patterns")
    return names


def score_names(
    scorer: Scorer,
    names: list[str],
    options: Options,
    outputs: Outputs,
    *,
    workers: int = 1,
    watch: Watch = _ignore,
    say: Callable[[str], None] = _ignore,
) -> Scored:
    """Score the files `names` into the outputs.

    `watch` is called with every record once it is safe, and with whether it was kept from an earlier run. Whatever ends
    the run early, records that were written stay, and the report covers what was scored.
    """
    outputs.refuse_scale(scorer.manifest)
    settings = RunSettings.of(scorer.manifest, options)
    form = choose_format(outputs.form, outputs.file, terminal=False) if outputs.file else Format.JSONL
    pictures = outputs.report is not None or outputs.intermediates is not None
    records: list[Record] = []
    place = {name: number for number, name in enumerate(names)}

    def in_order(some: list[Record]) -> list[Record]:
        return outputs.order(some) if outputs.sort else sorted(some, key=lambda record: place.get(record.image, -1))

    with contextlib.ExitStack() as stack:
        # Open the file last: with --force, opening it deletes the old results.
        if outputs.intermediates:
            prepare_folder(outputs.intermediates)
        report = stack.enter_context(_report(outputs.report, scorer, len(names), options, outputs.scale))
        file = None
        if outputs.file:
            file = stack.enter_context(
                RecordFile(outputs.file, form, settings, resume=outputs.resume, force=outputs.force)
            )
        done = {name: file.done[name] for name in names if name in file.done} if file else {}
        changed = set()
        for name, unchanged in _compare(scorer, done):
            if not unchanged:
                changed.add(name)
                continue
            record = _kept(done[name], file, scorer.manifest, settings)
            records.append(record)
            if report:
                report.add(record.result())
            watch(record, True)
        kept = len(records)
        if changed:
            what = "1 picture has" if len(changed) == 1 else f"{len(changed)} pictures have"
            say(f"{what} changed since the earlier run: scored again")
        if others := sorted({record.backend or "" for record in records} - {scorer.info.backend, ""}):
            say(f"the scores of the earlier run are by {'; '.join(others)}, those of this run by {scorer.info.backend}")
        todo = [Path(name) for name in names if name not in done or name in changed]
        results = stack.enter_context(
            contextlib.closing(scorer.stream(todo, options, pictures=pictures, workers=workers))
        )
        start = time.monotonic()
        for result in results:
            if outputs.intermediates and isinstance(result, Score):
                save_intermediates(result, outputs.intermediates)
            if report:
                report.add(result)
            record = Record.of(result, settings)
            if file:
                file.write(record)
            records.append(record)
            watch(record, False)
        seconds = time.monotonic() - start
        if file:
            file.finish(in_order if outputs.sort or kept else None)
    return Scored(tuple(in_order(records)), kept, len(changed), seconds, outputs)


def _kept(record: Record, file: RecordFile | None, manifest: Manifest, settings: RunSettings) -> Record:
    """Return a record of the earlier run, in the file too, with what the engine says of its score now."""
    known = record.known_to(manifest, settings)
    if file and known != record:
        file.write(known)
    return known


def _compare(scorer: Scorer, done: Mapping[str, Record]) -> Iterator[tuple[str, bool]]:
    """Yield for each image whether its pixels are those that were scored. One that cannot be read keeps its score."""

    def unchanged(name: str) -> bool:
        try:
            return scorer.digest(name) == done[name].digest
        except ImageError:  # a share that is away for an hour must not cost the scores of a week
            return True

    names = iter(done)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "diffiqa-compare") as pool:
        while some := list(itertools.islice(names, _COMPARED_AT_A_TIME)):
            yield from zip(some, pool.map(unchanged, some), strict=True)


@contextlib.contextmanager
def _report(
    path: Path | None, scorer: Scorer, expected: int, options: Options, scale: Scale
) -> Iterator[ReportWriter | None]:
    """Yield a report that is completed even when the run is interrupted: what was scored can be looked at."""
    if path is None:
        yield None
        return
    steps = len(sampling_of(scorer.manifest, options).steps)
    writer = ReportWriter(path, scorer.manifest, expected=expected, scale=scale, steps=steps)
    try:
        yield writer
    except OutputError:
        writer.abort()
        raise
    finally:
        writer.close()

"""Scoring many images for a command: results go to every sink as they come, and no bad image ends the run."""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import OutputError
from ..report.intermediates import prepare_folder, save_intermediates
from ..report.writer import ReportWriter
from ..results import Options, Score
from ..scorer import Scorer
from .recordfile import RecordFile
from .records import Format, Record, RecordWriter, RunSettings, Sort, Status, arrange, choose_format, emit
from .table import Progress, show_table, summary_line


@dataclass(frozen=True)
class Outputs:
    """Where results go. Without `file` they go to standard output."""

    form: Format | None = None
    file: Path | None = None
    resume: bool = False
    force: bool = False
    sort: Sort | None = None
    descending: bool = False
    top: int | None = None
    bottom: int | None = None
    report: Path | None = None
    intermediates: Path | None = None
    quiet: bool = False

    @property
    def arranged(self) -> bool:
        """Whether the order of results is only known at the end."""
        return self.sort is not None or self.top is not None or self.bottom is not None

    def order(self, records: list[Record]) -> list[Record]:
        """Return all records in the order asked for; a file keeps them all."""
        return arrange(records, self.sort, descending=self.descending)

    def show(self, records: list[Record]) -> list[Record]:
        """Return records as standard output shows them: in order, cut to the top and bottom asked for."""
        return arrange(records, self.sort, descending=self.descending, top=self.top, bottom=self.bottom)


def run(scorer: Scorer, names: list[str], options: Options, outputs: Outputs, *, workers: int = 1) -> bool:  # noqa: PLR0912 — a branch per output
    """Score `names` into the outputs; return whether all have a score, those of a resumed run included.

    Whatever ends it early, records that were written stay, and the report covers what was scored. Raises OutputError
    if a result cannot be written.
    """
    form = choose_format(outputs.form, outputs.file, terminal=sys.stdout.isatty())
    settings = RunSettings.of(scorer.manifest, options)
    pictures = outputs.report is not None or outputs.intermediates is not None
    with contextlib.ExitStack() as stack:
        # What may fail comes before the file: with --force, opening that gives up the results it held.
        if outputs.intermediates:
            prepare_folder(outputs.intermediates)
        report = stack.enter_context(_report(outputs.report, scorer, len(names)))
        file = None
        if outputs.file:
            file = stack.enter_context(
                RecordFile(outputs.file, form, settings, resume=outputs.resume, force=outputs.force)
            )
        done = file.done if file else {}
        records = [done[name] for name in names if name in done]
        resumed = len(records)
        if report:
            for record in records:
                report.add(record.result())
        streaming = None
        if file is None and form is not Format.TABLE and not outputs.arranged:
            streaming = RecordWriter(_to_stdout, form)
        quiet = outputs.quiet or (streaming is not None and sys.stdout.isatty())
        todo = [Path(name) for name in names if name not in done]
        results = stack.enter_context(
            contextlib.closing(scorer.stream(todo, options, pictures=pictures, workers=workers))
        )
        start = time.monotonic()
        try:
            with Progress(len(names), done=resumed, quiet=quiet) as progress:
                for result in results:
                    if outputs.intermediates and isinstance(result, Score):
                        save_intermediates(result, outputs.intermediates)
                    if report:
                        report.add(result)
                    record = Record.of(result, settings)
                    if file:
                        file.write(record)
                    if streaming:
                        streaming.write(record)
                    records.append(record)
                    progress.advance(record)
            if file:
                file.finish(outputs.order if outputs.sort else None)
        finally:
            # After Ctrl-C too: what was scored is shown, unless nobody reads any more.
            if not isinstance(sys.exception(), BrokenPipeError):
                if streaming:
                    streaming.close()
                summary = summary_line(records, seconds=time.monotonic() - start, resumed=resumed)
                _show(scorer, form, outputs, records, summary)
    return all(record.status is Status.OK for record in records)


@contextlib.contextmanager
def _report(path: Path | None, scorer: Scorer, expected: int) -> Iterator[ReportWriter | None]:
    """Yield a report that is completed even when the run is interrupted: what was scored can be looked at."""
    if path is None:
        yield None
        return
    writer = ReportWriter(path, scorer.manifest, expected=expected)
    try:
        yield writer
    except OutputError:
        writer.abort()
        raise
    except BaseException:
        writer.close()
        raise
    writer.close()


def _to_stdout(data: bytes) -> None:
    emit(sys.stdout.buffer, data)


def _show(scorer: Scorer, form: Format, outputs: Outputs, records: list[Record], summary: str) -> None:
    """Print the table, or the records that waited for their order; with a file, one line on standard error."""
    if outputs.file is None and form is Format.TABLE:
        show_table(outputs.show(records), scorer.info.score, summary, sys.stdout)
        return
    if outputs.file is None and outputs.arranged:
        writer = RecordWriter(_to_stdout, form)
        for record in outputs.show(records):
            writer.write(record)
        writer.close()
    if not outputs.quiet:
        print(summary, file=sys.stderr)  # noqa: T201 — a command's own output
        if not scorer.info.score.trained:
            print(f"UNTRAINED ENGINE: {scorer.info.score.meaning}", file=sys.stderr)  # noqa: T201

"""What a run prints: progress, records as they come or in order, and a summary, after Ctrl-C too."""

import sys
import time

from ...errors import DiffiqaError
from ..results import Options
from ..scorer import Info, Scorer
from .api import Outputs, Scored, score_names
from .order import arrange
from .records import COLUMNS, WITH_WORDS, Format, Record, choose_format, csv_header, document, to_line
from .table import Progress, emit, show_table, summary_line


class Display:
    """Shows a run on standard output and standard error. With a file, standard output stays empty."""

    def __init__(
        self, info: Info, outputs: Outputs, total: int, *, quiet: bool, top: int | None, bottom: int | None
    ) -> None:
        self._info, self._outputs, self._quiet, self._top, self._bottom = info, outputs, quiet, top, bottom
        self._form = choose_format(outputs.form, outputs.file, terminal=sys.stdout.isatty())
        ordered = bool(outputs.sort or top or bottom)
        self._streaming = not outputs.file and not ordered and self._form in {Format.JSONL, Format.CSV}
        self._columns = WITH_WORDS if info.words else COLUMNS
        self._header = csv_header(self._columns) if self._form is Format.CSV else b""
        # Records that stream to a terminal and a bar would write over each other.
        self.progress = Progress(total, quiet=quiet or (self._streaming and sys.stdout.isatty()))
        self.records: list[Record] = []

    def add(self, record: Record, kept: bool) -> None:
        """Show one more record; `kept` ones are of an earlier run."""
        self.records.append(record)
        if self._streaming:
            emit(sys.stdout.buffer, self._header + to_line(record, self._form, self._columns))
            self._header = b""
        self.progress.advance(record, kept=kept)

    def say(self, text: str) -> None:
        """Print a line about the run itself."""
        if not self._quiet:
            print(text, file=sys.stderr)  # noqa: T201 — a command's own output

    def close(self) -> None:
        """Show what waited for the end of the run."""
        seconds = time.monotonic() - self.progress.start
        summary = summary_line(self.records, seconds=seconds, kept=self.progress.kept)
        meaning, wanted = self._info.score, self._outputs
        if self._info.drift:
            self.say(f"ACCEPTED DRIFT: this engine differs from PyTorch in {self._info.drift}")
        if self._streaming:
            emit(sys.stdout.buffer, self._header)
        elif not wanted.file:
            shown = arrange(self.records, wanted.sort, descending=wanted.descending, top=self._top, bottom=self._bottom)
            if self._form is Format.TABLE:
                show_table(shown, meaning, summary, sys.stdout, wanted.scale)
                return
            for piece in document(shown, self._form):
                emit(sys.stdout.buffer, piece)
        self.say(summary)
        if not meaning.trained:
            self.say(f"UNTRAINED ENGINE: {meaning.meaning}")


def run_shown(
    scorer: Scorer,
    names: list[str],
    options: Options,
    outputs: Outputs,
    *,
    workers: int = 1,
    quiet: bool = False,
    top: int | None = None,
    bottom: int | None = None,
) -> Scored:
    """Score the files `names` into the outputs, and show the run."""
    display = Display(scorer.info, outputs, len(names), quiet=quiet, top=top, bottom=bottom)
    try:
        with display.progress:
            return score_names(scorer, names, options, outputs, workers=workers, watch=display.add, say=display.say)
    finally:
        ended = sys.exception()
        refused = isinstance(ended, DiffiqaError) and not display.records  # the run never began
        if not refused and not isinstance(ended, BrokenPipeError):  # with a broken pipe nobody reads any more
            display.close()

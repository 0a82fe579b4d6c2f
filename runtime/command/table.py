"""What people see on a terminal: the table of results with what its numbers mean, and the progress bar."""

import os
import statistics
import sys
import time
from collections.abc import Sequence, Set
from typing import IO, Self, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from ...engine.manifest import ScoreMeaning
from ...engine.reference import opinion_text, percent_text
from ...errors import OutputError
from ..results import WORDS_EXPLAINED, Scale, words_text
from .records import Record

NAME_WIDTH = 24  # least width of names; if there is no room, columns are left out from the right, never the score
SPACING = 2
WORDS = "looks like"


def show_table(
    records: Sequence[Record], meaning: ScoreMeaning, summary: str, stream: TextIO, scale: Scale = Scale.RAW
) -> None:
    """Write records as a table as wide as the terminal; `scale` comes first. No colours in a file or with NO_COLOR."""
    console = _console(stream)
    with console.capture() as capture:
        shown: set[object] = set()  # the heads of the columns that have room
        if scored := [record for record in records if record.score is not None]:
            shared = set.intersection(*(set(record.notes) for record in scored)) if len(scored) > 1 else set()
            table = _table(scored, meaning, scale, console.width, shared)
            shown = {column.header for column in table.columns}
            console.print(table)
            for note in sorted(shared):
                console.print(Text(f"all: {printable(note)}", "dim"))
        for record in records:
            if record.score is None:
                console.print(Text(f"failed: {printable(_error(record))}", "red"))
        direction = "higher is better" if meaning.higher_is_better else "lower is better"
        span = f"{direction} · {meaning.minimum:g} to about {meaning.nominal_maximum:g}"
        if meaning.trained:
            console.print(Text(f"Score: {span} · {printable(meaning.meaning)}"))
        else:
            console.print(Text(f"Score: {span}"))
            console.print(Text(f"UNTRAINED ENGINE · {printable(meaning.meaning)}", "bold yellow"))
        if WORDS in shown:
            console.print(Text(WORDS_EXPLAINED))
        elif any(record.probabilities for record in records):
            console.print(Text(f'The column "{WORDS}" has no room here: take a wider window, or --format csv.'))
        if meaning.reference:
            console.print(Text(" ".join(meaning.reference.explained)))
        console.print(Text(summary))
    # A terminal without `×` shows `?`: a long run must not end with an error.
    encoding = stream.encoding or "utf-8"
    emit(stream.buffer, capture.get().encode(encoding, "replace"))


def emit(stream: IO[bytes], data: bytes) -> None:
    """Write to standard output at once. Raises OutputError, or BrokenPipeError once nobody reads on (`| head`)."""
    try:
        rest = memoryview(data)
        while rest:  # with PYTHONUNBUFFERED the stream is the bare file, which may take a part
            rest = rest[stream.write(rest) :]
        stream.flush()
    except OSError as exc:
        # Nobody will take what is left in the stream's buffer: the interpreter must not fail on it at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        if isinstance(exc, BrokenPipeError):
            raise
        raise OutputError(f"cannot write to standard output: {exc.strerror or exc}") from exc


def summary_line(records: Sequence[Record], *, seconds: float | None = None, kept: int = 0) -> str:
    """Return how many images have a score, how high the scores are, and how fast they came.

    `kept` of the records are from an earlier run; `seconds` is what the others took together.
    """
    scores = [record.score for record in records if record.score is not None]
    failed = len(records) - len(scores)
    parts = [f"{len(scores)} scored" + (f", {failed} failed" if failed else "")]
    if kept:
        parts[0] += f" ({kept} by an earlier run)"
    if scores:
        mean, median = statistics.fmean(scores), statistics.median(scores)
        parts.append(f"mean {mean:.4f}, median {median:.4f}, min {min(scores):.4f}, max {max(scores):.4f}")
    if seconds and len(scores) > kept:
        parts.append(rate_text((len(scores) - kept) / seconds))
    return " · ".join(parts)


def rate_text(images_per_second: float) -> str:
    """Return a speed in the unit that makes it a handy number."""
    if images_per_second >= 1:
        return f"{images_per_second:.1f} images/s"
    return f"{images_per_second * 60:.1f} images/min"


def printable(text: str) -> str:
    """Return text with control characters and the like as escapes: no terminal may take them as a command."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Progress:
    """A bar on standard error with count, speed, time left and failures. Without a terminal, or if `quiet`: nothing."""

    def __init__(self, total: int, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        console = _console(stream or sys.stderr)
        columns = ("{task.fields[pace]}", "[red]{task.fields[failures]}")
        self._bar = Bar(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            *map(TextColumn, columns),
            console=console,
            disable=quiet or not console.is_terminal or console.is_dumb_terminal,
            redirect_stdout=False,  # rich would send standard output to this console, away from its pipe
            refresh_per_second=4,  # next to nothing on the cores that score
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, pace="", failures="")
        self._total = total
        self.kept = self._count = self._failures = 0
        self.start = time.monotonic()  # of scoring: after those that were kept

    def advance(self, record: Record, *, kept: bool = False) -> None:
        """Count one more image; `kept` ones, of an earlier run, say nothing about the speed."""
        if kept:
            self.kept, self.start = self.kept + 1, time.monotonic()
            self._bar.update(self._task, advance=1)
            return
        self._count += 1
        self._failures += record.score is None
        # Over the whole run: rich's own estimate forgets images after 30 s, and one may take minutes.
        self.show(self._count + self.kept, self._failures, self._count / max(time.monotonic() - self.start, 1e-9))

    def show(self, done: int, failures: int, rate: float, total: int | None = None) -> None:
        """Show so many images done, at so many a second; of another total, if it was not known before."""
        self._total = total or self._total
        pace = f"{rate_text(rate)}, {_duration((self._total - done) / rate)} left" if rate else ""
        failed = f"{failures} failed" if failures else ""
        self._bar.update(self._task, completed=done, total=self._total, pace=pace, failures=failed)

    def __enter__(self) -> Self:
        self.start = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:  # a disabled bar still ends with an empty line
            self._bar.stop()


def _console(stream: TextIO) -> Console:
    terminal = stream.isatty()
    plain = not terminal or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    # Without a colour system rich writes no styles at all; its own `no_color` keeps the escapes for bold.
    return Console(file=stream, force_terminal=terminal, color_system=None if plain else "auto", highlight=False)


def _table(records: Sequence[Record], meaning: ScoreMeaning, scale: Scale, width: int, shared: Set[str]) -> Table:
    numbers = {
        name: ["" if (value := getattr(record, name.lower())) is None else f"{value:.4f}" for record in records]
        for name in ("score", "VCG", "VDA", "spread")
    }
    # Of the score, not the record's own: an earlier run's file may lack them.
    scores = [record.score or 0.0 for record in records]
    people = {
        "percentile": [percent_text(meaning.percentile(score)) for score in scores],
        "opinion": [opinion_text(meaning.opinion(score)) for score in scores],
    }
    first = {Scale.RAW: "score", Scale.PERCENTILE: "percentile", Scale.MOS: "opinion"}[scale]
    words = {WORDS: [printable(words_text(record.probabilities)) for record in records]}
    numbers = {first: (numbers | people)[first], "score": numbers["score"]} | people | words | numbers
    numbers["size"] = [f"{record.width}×{record.height}" if record.width else "" for record in records]
    numbers["time"] = [f"{record.seconds:.2f} s" if record.seconds is not None else "" for record in records]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, SPACING, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("image", overflow="fold")
    left = width - NAME_WIDTH - SPACING
    for name, cells in list(numbers.items()):
        needed = max(map(len, [name, *cells])) + SPACING
        if name == first or (any(cells) and needed <= left):
            left -= needed
            table.add_column(name, justify="right", no_wrap=True)
        else:
            del numbers[name]
    for record, *cells in zip(records, *numbers.values(), strict=True):
        image = Text(printable(record.image))
        for note in (note for note in record.notes if note not in shared):
            image.append("\n" + printable(note), "dim")
        table.add_row(image, *cells)
    return table


def _error(record: Record) -> str:
    """Return an error with the name of its image, which most messages have in them."""
    error = record.error or "no score"
    return error if record.image in error else f"{record.image}: {error}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""Curves of training runs and scores over labels as PNG, drawn with Pillow: nothing else has to be installed."""

import csv
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from ..data.datasets import DatasetError
from ..engine.atomic import replacing
from ..errors import OutputError
from ..evaluation.correlation import LOGISTIC_MIN, fit_logistic, plcc, srcc

PLOT_NAME = "plot.png"

FINER = 2  # drawn so many times larger, then reduced: smooth lines
WIDTH, HEIGHT = 640, 400  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 44, 56  # of the axes in it
INK, GREY, GRID = (32, 36, 44), (110, 116, 128), (228, 231, 236)
# Okabe and Ito's colours, which people of any colour vision tell apart; without the yellow, too light on white.
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (90, 90, 90))


@dataclass(frozen=True)
class Line:
    """A curve and what it is called in the legend."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Points:
    """Scores of images and their labels."""

    title: str
    scores: tuple[float, ...]
    labels: tuple[float, ...]
    label_name: str = "label"


@dataclass(frozen=True)
class Axis:
    """A range of values, and where it has ticks. A logarithmic one holds powers of ten."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at the low end and 1 at the high one."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def make_axis(values: Sequence[float], *, logarithmic: bool = False, wanted: int = 6) -> Axis:
    """Return an axis around finite values, of about as many round ticks as wanted; it ends at ticks."""
    low, high = min(values), max(values)
    if logarithmic:
        steps = [
            m * 10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)
        ]
        first = max((step for step in steps if step <= low * (1 + 1e-9)), default=steps[0])
        last = min((step for step in steps if step >= high * (1 - 1e-9)), default=steps[-1])
        inside = [step for step in steps if first <= step <= last] if first < last else [first, first * 10]
        decades = [step for step in inside if math.isclose(math.log10(step) % 1, 0, abs_tol=1e-9)]
        return Axis(inside[0], inside[-1], tuple(inside if len(inside) <= wanted + 2 else decades), logarithmic=True)
    size = max(abs(low), abs(high), 1e-9)
    span = high - low if high - low > 1e-9 * size else 0.2 * size
    raw = span / max(1, wanted - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first_step, last_step = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first_step == last_step:
        first_step, last_step = first_step - 1, last_step + 1
    ticks = tuple(k * step for k in range(first_step, last_step + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """Return a tick with as many digits as its neighbours need."""
    largest = max(map(abs, ticks))
    if value == 0:
        return "0"
    if largest >= 1e6 or largest < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    step = min(b - a for a, b in itertools.pairwise(ticks))
    digits = next((n for n in range(7) if math.isclose(round(step, n), step, rel_tol=1e-6)), 7)
    return f"{value:,.{digits}f}"


def draw_runs(runs: Sequence[Path]) -> PIL.Image.Image:
    """Draw loss, learning rate and all that validation found, one panel each, a line for every run.

    Raises DatasetError for a folder that is no run.
    """
    names = _short_names(runs)
    columns: dict[str, list[Line]] = {"loss": [], "learning rate": []}
    for name, run in zip(names, runs, strict=True):
        log = _read(run / "log.csv")
        if not log:
            raise DatasetError(f"{run} holds no run that has logged a step: it has no rows in log.csv")
        for title, column in (("loss", "loss"), ("learning rate", "learning_rate")):
            columns[title].append(_line(name, log, column))
        validation = _read(run / "validation.csv")
        for column in validation[0] if validation else ():
            if column != "step":
                columns.setdefault(f"validation: {column.replace('_', ' ')}", []).append(
                    _line(name, validation, column)
                )
    panels = [_panel(title, lines) for title, lines in columns.items() if any(line.x for line in lines)]
    legend = draw_legend(names) if len(names) > 1 else None
    top = legend.height if legend else 0
    sheet = PIL.Image.new("RGB", (2 * WIDTH, top - (-len(panels) // 2) * HEIGHT), "white")
    if legend:
        sheet.paste(legend)
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index % 2 * WIDTH, top + index // 2 * HEIGHT))
    return sheet


def draw_scatter(points: Points) -> PIL.Image.Image:
    """Draw labels over scores, and the logistic that lays one on the other where one can be fitted."""
    canvas = Canvas(WIDTH + 160, HEIGHT + 200, points.title, "score", points.label_name)
    x, y = make_axis(points.scores), make_axis(points.labels)
    canvas.axes(x, y)
    count = len(points.scores)
    radius, opacity = (3.5, 170) if count <= 300 else (2.6, 110) if count <= 3000 else (1.8, 60)
    for score, label in zip(points.scores, points.labels, strict=True):
        canvas.dot(x.place(score), y.place(label), COLOURS[0], radius, opacity)
    try:
        figures = f"{count} images, SRCC {srcc(points.scores, points.labels):.3f}"
        figures += f", PLCC raw {plcc(points.scores, points.labels):.3f}"
        if count >= LOGISTIC_MIN:
            curve = fit_logistic(points.scores, points.labels)
            low, high = min(points.scores), max(points.scores)
            along = [low + (high - low) * k / 200 for k in range(201)]
            values = [(a, b) for a, b in zip(along, curve(along).tolist(), strict=True) if y.low <= b <= y.high]
            canvas.line([(x.place(a), y.place(b)) for a, b in values], COLOURS[1], 2.2)
            figures += "; line: fitted logistic"
    except DatasetError:  # without any difference in scores or labels there is nothing to correlate
        figures = f"{count} images"
    canvas.note(figures)
    return canvas.finish()


def save(image: PIL.Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all. Raises OutputError."""
    try:
        with replacing(path) as stream:
            image.save(stream, "PNG")
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}") from exc


class Canvas:
    """One panel. Places in it run from 0 to 1, from the lower left corner of the axes."""

    def __init__(self, width: int, height: int, title: str, x_name: str, y_name: str) -> None:
        self._size = width, height
        self._image = PIL.Image.new("RGB", (width * FINER, height * FINER), "white")
        self._draw = PIL.ImageDraw.Draw(self._image, "RGBA")
        self._inner = width - LEFT - RIGHT, height - TOP - BOTTOM
        self._text((LEFT, TOP - 10), title, INK, 17, "ls")
        self._text((LEFT + self._inner[0] / 2, height - 8), x_name, INK, 14, "ms")
        if y_name:
            self._sideways(y_name)

    def axes(self, x: Axis, y: Axis) -> None:
        """Draw grid, ticks and frame."""
        for tick in x.ticks:
            left, _ = self._at(x.place(tick), 0)
            self._stroke([(left, TOP), (left, TOP + self._inner[1])], GRID, 1)
            self._text((left, TOP + self._inner[1] + 18), tick_text(tick, x.ticks), GREY, 13, "ms")
        for tick in y.ticks:
            _, top = self._at(0, y.place(tick))
            self._stroke([(LEFT, top), (LEFT + self._inner[0], top)], GRID, 1)
            text = f"{tick:g}" if y.logarithmic else tick_text(tick, y.ticks)
            self._text((LEFT - 8, top), text, GREY, 13, "rm")
        corners = [self._at(*corner) for corner in ((0, 1), (0, 0), (1, 0))]
        self._stroke(corners, GREY, 1)

    def line(self, places: Sequence[tuple[float, float]], colour: tuple[int, int, int], width: float) -> None:
        """Draw a line through places."""
        self._stroke([self._at(*place) for place in places], colour, width)

    def dot(self, x: float, y: float, colour: tuple[int, int, int], radius: float, opacity: int = 255) -> None:
        """Draw a disc."""
        left, top = (FINER * value for value in self._at(x, y))
        r = radius * FINER
        self._draw.ellipse((left - r, top - r, left + r, top + r), (*colour, opacity))

    def note(self, text: str) -> None:
        """Write at the right end of the title's line."""
        self._text((LEFT + self._inner[0], TOP - 10), text, GREY, 13, "rs")

    def finish(self) -> PIL.Image.Image:
        """Return the panel at its size."""
        return self._image.resize(self._size, PIL.Image.Resampling.LANCZOS)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return LEFT + x * self._inner[0], TOP + (1 - y) * self._inner[1]

    def _stroke(self, pixels: Sequence[tuple[float, float]], colour: tuple[int, int, int], width: float) -> None:
        scaled = [(FINER * left, FINER * top) for left, top in pixels]
        self._draw.line(scaled, colour, round(FINER * width), joint="curve")

    def _text(
        self, place: tuple[float, float], text: str, colour: tuple[int, int, int], size: int, anchor: str
    ) -> None:
        self._draw.text((FINER * place[0], FINER * place[1]), text, colour, _font(size), anchor)

    def _sideways(self, text: str) -> None:
        font = _font(14)
        width, height = math.ceil(font.getlength(text)), 20 * FINER
        label = PIL.Image.new("RGB", (width, height), "white")
        PIL.ImageDraw.Draw(label).text((0, height // 2), text, INK, font, "lm")
        top = FINER * (TOP + self._inner[1] // 2) - width // 2
        self._image.paste(label.rotate(90, expand=True), (4 * FINER, top))


@functools.cache
def _font(size: int) -> PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont:
    return PIL.ImageFont.load_default(size * FINER)


def draw_legend(names: Sequence[str]) -> PIL.Image.Image:
    """Return a strip that names the colours of runs, in as many rows as they need."""
    rows: list[list[tuple[float, str, tuple[int, int, int]]]] = [[]]
    left = float(LEFT)
    for index, name in enumerate(names):
        width = _font(14).getlength(name) / FINER
        if rows[-1] and left + 30 + width > 2 * WIDTH - RIGHT:
            rows.append([])
            left = LEFT
        rows[-1].append((left, name, COLOURS[index % len(COLOURS)]))
        left += 30 + width + 28
    strip = PIL.Image.new("RGB", (2 * WIDTH * FINER, (14 + 24 * len(rows)) * FINER), "white")
    draw = PIL.ImageDraw.Draw(strip)
    for number, row in enumerate(rows):
        middle = FINER * (24 + 24 * number)
        for left, name, colour in row:
            draw.line([(FINER * left, middle), (FINER * (left + 22), middle)], colour, 3 * FINER)
            draw.text((FINER * (left + 30), middle), name, INK, _font(14), "lm")
    return strip.reduce(FINER)


def _panel(title: str, lines: Sequence[Line]) -> PIL.Image.Image:
    canvas = Canvas(WIDTH, HEIGHT, title, "step", "")
    values = [value for line in lines for value in line.y]
    # A loss that falls to a tenth and less shows nothing of its end on a linear scale.
    logarithmic = title == "loss" and min(values) > 0 and max(values) > 10 * min(values)
    x = make_axis([0, *(step for line in lines for step in line.x)])
    y = make_axis(values, logarithmic=logarithmic)
    canvas.axes(x, y)
    for index, line in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        places = [(x.place(a), y.place(b)) for a, b in zip(line.x, line.y, strict=True)]
        if len(places) > 1:
            canvas.line(places, colour, 1.8)
        for place in places if len(places) <= 40 else ():
            canvas.dot(*place, colour, 3)
    return canvas.finish()


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as exc:
        raise DatasetError(f"{path} cannot be read: {exc}") from exc


def _line(name: str, rows: Sequence[dict[str, str]], column: str) -> Line:
    """Return a column as a line; values that are no finite number (a young network's correlation) are left out."""
    points = []
    for row in rows:
        try:
            point = float(row["step"]), float(row[column])
        except (KeyError, TypeError, ValueError) as exc:
            raise DatasetError(f"the log of run {name} has a row without a number in step or {column}") from exc
        if all(map(math.isfinite, point)):
            points.append(point)
    return Line(name, tuple(x for x, _ in points), tuple(y for _, y in points))


def _short_names(runs: Sequence[Path]) -> list[str]:
    """Return the folders' own names, with those above where two would be called the same."""
    resolved = [run.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in resolved)):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in runs]

"""The report of a run: one self-contained HTML page, collected as results come and put in place at the end."""

import base64
import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image, features

from ...engine.atomic import check_folder_of, replacing
from ...engine.manifest import Manifest
from ...errors import OutputError, UsageError
from ..results import Failure, Picture, Pictures, Scale, Score
from .heatmap import FloatMap, Heatmap, block_mean, to_heatmap
from .intermediates import difference
from .labels import DIFFERENCE, PRODUCT, SCORE_MAP, WEIGHT_MAP
from .markup import Html, join
from .page import Collected, Page

# The longest side of pictures, and for how many images: with the bounds below, 1,000 photographs take about 50 MB.
_SIDES = ((768, 100), (512, 400))
_SMALLEST_SIDE = 352
_PIXELS_PER_BYTE = 20  # a picture may take side² / 20 bytes
_QUALITIES = (80, 60, 40, 20, 5)  # of WebP, tried until a picture is small enough; the last is taken as it comes
_PIXELS_PER_BLOCK = 4  # of a map, in pixels of a picture: maps are stored without loss, so they are coarser
_CELL = 8  # pixels of the image; the heads judge patches of this side, so blocks are whole patches


class ReportWriter:
    """Collects results and writes the page when closed; nothing appears at `path` before.

    A `with` block closes it, or drops everything if it ends in an exception. `expected` is how many images are coming:
    the fewer, the larger the pictures. `steps` is how many were taken, if not all. Pictures wait in an unnamed
    temporary file beside `path`, numbers in memory.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        title: str = "Image quality report",
        expected: int | None = None,
        steps: int | None = None,
        scale: Scale = Scale.RAW,
    ) -> None:
        """Raise OutputError if the page cannot be written there: better now than after an hour of scoring."""
        self._path = Path(os.path.realpath(path))  # a link is followed, not replaced
        self._page = Page(manifest, title, scale, steps)
        self._side = next((side for side, most in _SIDES if expected is not None and expected <= most), _SMALLEST_SIDE)
        self._results: list[Score | Failure] = []
        self._ranges: dict[str, list[tuple[float, float]]] = {}
        self._closed = False
        if not features.check("webp"):
            raise OutputError("this Pillow cannot write WebP, which reports are made of; install Pillow from PyPI")
        if self._path.exists() and not self._path.is_file():
            raise OutputError(f"cannot write the report to {path}: it is not a file; give a name such as report.html")
        check_folder_of(path, "the report to ")
        with self._writing():
            self._cards = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115 — lives until close()

    def add(self, result: Score | Failure) -> None:
        """Add the next result. Raises OutputError if there is no room for it."""
        if self._closed:
            raise UsageError("this report is closed; write another one")
        if isinstance(result, Failure):
            self._results.append(result)
            return
        card: dict[str, Any] = {
            "facts": self._page.facts(result),
            "details": self._page.details(result),
            "photos": "",
            "maps": [],
            "words": {},
        }
        if result.pictures is not None:
            for kind, plane in result.pictures.planes.items():
                webp, *card["size"] = _photo(plane, self._side)
                card["photos"] += self._page.photo(result.source, kind, webp, *card["size"])
            for name, values in _maps(result.pictures, self._side // _PIXELS_PER_BLOCK).items():
                card["maps"].append(_pack(name, to_heatmap(values)))
                self._ranges.setdefault(name, []).append(_usual_range(name, values))
            card["words"] = {name: found.word for name, found in result.pictures.words.items()}
        with self._writing():
            self._cards.write(json.dumps(card).encode() + b"\n")
        # What is left is a few hundred bytes: numbers for the table, the histogram and the ranks.
        self._results.append(replace(result, pictures=None, crops=()))

    def close(self) -> None:
        """Write the page, in one step: a report that was there before stays until the new one is whole."""
        if self._closed:
            return
        try:
            scales = {name: _common_scale(ranges) for name, ranges in self._ranges.items()}
            collected = Collected(tuple(self._results), scales, self._side)
            before, after = self._page.frame(collected)
            with self._writing(), replacing(self._path) as page:
                page.write(before.encode())
                for card in self._rendered(collected):
                    page.write(card.encode())
                page.write(after.encode())
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop everything collected; a report that was there before stays as it is."""
        self._closed = True
        self._results.clear()
        with contextlib.suppress(OSError):  # a full disk was reported when it was met
            self._cards.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _rendered(self, collected: Collected) -> Iterator[Html]:
        """Yield the cards in the order of the results, reading back one at a time."""
        self._cards.seek(0)
        for number, (score, line) in enumerate(zip(collected.scores, self._cards, strict=True), start=1):
            card = json.loads(line)
            maps = []
            for name, *packed in card["maps"]:
                (width, height), word = card["size"], card["words"].get(name)
                scale = collected.scales[name]
                maps.append(self._page.heatmap(score.source, name, _unpack(*packed), scale, width, height, word))
            facts, photos, details = (Html(card[part]) for part in ("facts", "photos", "details"))
            yield self._page.card(number, score, collected, facts, join(photos, *maps), details)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise OutputError(f"cannot write the report {self._path}: {exc.strerror or exc}") from exc


def single_card(page: Page, score: Score, side: int) -> Html:
    """Return the card of one image by itself, each map in the colours of its own range."""
    photos, maps, scales = [], [], {}
    if score.pictures is not None:
        for kind, plane in score.pictures.planes.items():
            webp, width, height = _photo(plane, side)
            photos.append(page.photo(score.source, kind, webp, width, height))
        for name, values in _maps(score.pictures, side // _PIXELS_PER_BLOCK).items():
            heatmap = to_heatmap(values)
            scales[name] = (heatmap.low, heatmap.high)
            word = found.word if (found := score.pictures.words.get(name)) else None
            maps.append(page.heatmap(score.source, name, heatmap, scales[name], width, height, word))
    collected = Collected((score,), scales, side)
    return page.card(1, score, collected, page.facts(score), join(*photos, *maps), page.details(score))


def _photo(plane: Picture, side: int) -> tuple[bytes, int, int]:
    """Reduce a plane to `side` and compress it, more strongly where noise would make it large."""
    image = Image.fromarray(plane)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3)
    data = b""
    for quality in _QUALITIES:
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=quality, method=2)  # twice as fast as 4, a twentieth larger
        data = stream.getvalue()
        if len(data) <= side * side // _PIXELS_PER_BYTE:
            break
    return data, *image.size


def _maps(pictures: Pictures, most: int) -> dict[str, FloatMap]:
    """Return the maps as means over blocks, at most `most` of them along the longest side."""
    longest = max(pictures.score_map.shape)
    fine = -(-longest // most)
    coarse = _CELL * -(-longest // (_CELL * most))
    moved = difference(pictures)
    maps = {} if moved is None else {DIFFERENCE: block_mean(moved, fine)}
    score, weight = pictures.score_map, pictures.weight_map
    whole = {SCORE_MAP: score, WEIGHT_MAP: weight, PRODUCT: score * weight}
    if pictures.words:
        whole = {SCORE_MAP: score, **{name: found.values for name, found in pictures.words.items()}}
    return maps | {name: block_mean(values, coarse) for name, values in whole.items()}


def _usual_range(name: str, values: FloatMap) -> tuple[float, float]:
    """Return between what 98 % of a map's values lie; a difference is measured from nothing."""
    known = values[np.isfinite(values)]
    if not known.size:
        return (np.nan, np.nan)
    low, high = np.percentile(known, [1, 99])
    return (0.0 if name == DIFFERENCE else float(low), float(high))


def _common_scale(ranges: list[tuple[float, float]]) -> tuple[float, float]:
    """Return a range for all images, rounded outwards; one image in fifty may be left out, lest it dim all others."""
    known = np.array([ends for ends in ranges if np.isfinite(ends).all()])
    if not known.size:
        return (0.0, 1.0)
    low = float(np.quantile(known[:, 0], 0.02, method="lower"))
    high = float(np.quantile(known[:, 1], 0.98, method="higher"))
    # A millionth of a step inwards: 0.4 is 0.400000006 as float32, and stays 0.4.
    step = 10.0 ** np.floor(np.log10(max(high - low, 1e-6 * abs(high), 1e-9)) - 1)
    return (float(np.floor(low / step + 1e-6) * step), float(np.ceil(high / step - 1e-6) * step))


def _pack(name: str, heatmap: Heatmap) -> list[Any]:
    index = base64.b64encode(heatmap.index.tobytes()).decode()
    return [name, heatmap.low, heatmap.high, *heatmap.index.shape, index]


def _unpack(low: float, high: float, height: int, width: int, index: str) -> Heatmap:
    return Heatmap(np.frombuffer(base64.b64decode(index), np.uint8).reshape(height, width), low, high)

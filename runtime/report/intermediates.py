"""What the model saw and thought about an image, as PNG files at full size."""

import io
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...engine.atomic import replacing
from ...engine.pixels import MID_GREY
from ...engine.schedule import Kind
from ...errors import OutputError
from ..results import Pictures, Score
from .heatmap import palette, to_heatmap, to_png

FloatMap = npt.NDArray[np.float32]
_STEM_BYTES = 120  # file systems allow 255 for a name: room for the digest and the longest suffix


def prepare_folder(directory: Path) -> None:
    """Make sure that pictures can be written to `directory`. Raises OutputError: better now than after an hour."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as exc:
        raise OutputError(f"cannot write pictures to {directory}: {exc.strerror or exc}") from exc


def save_intermediates(result: Score, directory: Path) -> list[Path]:
    """Write `{stem}.{dis,y0,t1,t2,difference,score_map,weight_map}.png`, as far as the engine has them.

    The stem is the image's file name and the first 8 digits of its digest, so `a/x.png` and `b/x.png` do not meet.
    Maps are palette PNGs: index i means minimum + (maximum − minimum) · i / 254, with both in the file's text chunks;
    transparent places were not looked at. Returns what was written, nothing for a result without pictures.
    Raises OutputError.
    """
    if result.pictures is None:
        return []
    stem = file_stem(result.source, result.digest)
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, png in _pngs(result.pictures):
            path = directory / f"{stem}.{name}.png"
            with replacing(path) as stream:
                stream.write(png)
            written.append(path)
    except OSError as exc:
        raise OutputError(
            f"cannot write the pictures of {result.source} to {directory}: {exc.strerror or exc}"
        ) from exc
    return written


def difference(pictures: Pictures) -> FloatMap | None:
    """Return |dis − y0|, the mean over channels in levels of 255; NaN where nothing was restored."""
    restored = pictures.planes.get(Kind.Y0)
    if restored is None:
        return None
    distance = np.abs(pictures.planes[Kind.DIS].astype(np.int16) - restored).mean(axis=2, dtype=np.float32)
    # Mid-grey alone may be a colour of the image; mid-grey outside every crop is a place that was left out.
    left_out = (restored == MID_GREY).all(axis=2) & np.isnan(pictures.score_map)
    return np.where(left_out, np.float32(np.nan), distance)


def file_stem(source: str, digest: str) -> str:
    """Return a file name without suffix that no source can turn into a path, an option or a hidden file."""
    name = re.split(r"[\\/]", source)[-1]
    name = unicodedata.normalize("NFC", name.rpartition(".")[0] or name)
    name = re.sub(r"[^\w.-]+", "_", name).strip("._-")
    short = name.encode("utf-8", "ignore")[:_STEM_BYTES].decode("utf-8", "ignore")
    return f"{short or 'image'}-{re.sub(r'[^0-9a-zA-Z]', '', digest)[:8]}"


def _pngs(pictures: Pictures) -> Iterator[tuple[str, bytes]]:
    for kind, plane in pictures.planes.items():
        stream = io.BytesIO()
        Image.fromarray(plane).save(stream, "PNG")
        yield str(kind), stream.getvalue()
    maps = {
        "difference": (difference(pictures), "mean of |dis - y0| over the channels, levels of 255"),
        "score_map": (pictures.score_map, "score"),
        "weight_map": (pictures.weight_map, "weight"),
    }
    if pictures.words:
        del maps["weight_map"]  # crops count alike
        maps |= {name: (found.values, f"probability of {found.word}") for name, found in pictures.words.items()}
    for name, (values, unit) in maps.items():
        if values is not None:
            heatmap = to_heatmap(values)
            text = {"minimum": f"{heatmap.low:.9g}", "maximum": f"{heatmap.high:.9g}", "unit": unit}
            yield name, to_png(heatmap, palette(heatmap, heatmap.low, heatmap.high), text)

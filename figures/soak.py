"""Scores many small images of mixed sizes and kinds, 5 % of them bad: `python figures/soak.py ENGINE [IMAGES]`.

Memory, file descriptors and threads are read on the way. The first tenth of the images is warm-up: buffers and compiled
shapes come then. After it, all three must stay flat.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import write

from diffiqa.runtime.backends import OnnxRuntime
from diffiqa.runtime.command.api import Outputs, score_names
from diffiqa.runtime.command.records import Format, Record, Status
from diffiqa.runtime.results import Options
from diffiqa.runtime.scorer import load
from diffiqa.tests.tiny import photo

KINDS = (
    ("png", "RGB"),
    ("png", "L"),
    ("png", "RGBA"),
    ("jpg", "RGB"),
    ("jpg", "CMYK"),
    ("webp", "RGB"),
    ("tif", "I;16"),
)
EVERY = 20  # one image in so many is bad
DIFFERENT = 200  # pictures; each is scored many times


def draw(folder: Path) -> list[str]:
    """Write the pictures and return their names."""
    sizes = np.random.default_rng(0).integers(24, 72, (DIFFERENT, 2))
    names = []
    for number, (height, width) in enumerate(sizes):
        suffix, mode = KINDS[number % len(KINDS)]
        path = folder / f"{number}.{suffix}"
        pixels = photo(number, int(height), int(width))
        deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        (deep if mode == "I;16" else Image.fromarray(pixels).convert(mode)).save(path)
        if number % EVERY == EVERY - 1:  # cut, empty, text, or a header that promises more than there is
            data = path.read_bytes()
            path.write_bytes((data[: len(data) // 2], b"", b"not an image", data[:60])[number // EVERY % 4])
        names.append(str(path))
    return names


def state() -> dict[str, float]:
    """Return what this process holds."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "memory_mib": int(status["VmRSS"].split()[0]) / 1024,
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def main() -> None:
    """Score, and write figures/results/soak.json."""
    engine, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    with tempfile.TemporaryDirectory() as folder:
        different = draw(Path(folder))
        scored, failed, samples = 0, 0, []
        start = time.monotonic()
        with load(engine, OnnxRuntime(threads=1)) as scorer:
            for round_ in range(-(-count // len(different))):
                outputs = Outputs(file=Path(folder, f"{round_}.jsonl"), form=Format.JSONL)
                some = different[: count - round_ * len(different)]
                seen: list[Record] = []

                def watch(record: Record, _kept: bool, seen: list[Record] = seen) -> None:
                    seen.append(record)
                    if len(seen) % 50 == 0:
                        samples.append(state())

                score_names(scorer, some, Options(crops=1), outputs, workers=2, watch=watch)
                written = len(Path(folder, f"{round_}.jsonl").read_bytes().splitlines())
                assert written == len(seen) == len(some)
                scored += sum(record.status is Status.OK for record in seen)
                failed += sum(record.status is Status.ERROR for record in seen)
        seconds = time.monotonic() - start
    warm = samples[max(1, len(samples) // 10) :]
    third = max(1, len(warm) // 3)

    def growth(name: str) -> dict[str, Any]:
        first, last = (statistics.median(one[name] for one in part) for part in (warm[:third], warm[-third:]))
        return {"first": round(first, 1), "last": round(last, 1), "most": round(max(one[name] for one in warm), 1)}

    found: dict[str, Any] = {"images": count, "scored": scored, "failed": failed, "seconds": round(seconds, 1)}
    write("soak", {**found, **{name: growth(name) for name in samples[0]}})


if __name__ == "__main__":
    main()

"""Scores many small images of mixed sizes and kinds, 5 % of them bad: `python figures/soak.py ENGINE IMAGES [WAY…]`.

WAY is run, the function behind `iqa-run`, or serve, a service that is asked over sockets; without it, both. Memory,
file descriptors and threads are read on the way. The first tenth of the images is warm-up: buffers and compiled shapes
come then. After it, all three must stay flat.
"""

import http.client
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import RESULTS, write

from diffiqa.runtime.backends import OnnxRuntime
from diffiqa.runtime.command.api import Outputs, score_names
from diffiqa.runtime.command.records import Format, Record, Status
from diffiqa.runtime.results import Options
from diffiqa.runtime.scorer import Scorer, load
from diffiqa.serve.work import Service
from diffiqa.tests.serve.serving import running
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
CLIENTS = 4
SAMPLE_EVERY = 50  # images
Tell = Callable[[bool], None]  # of each image, whether it has a score


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


def rounds(names: list[str], count: int) -> Iterator[list[str]]:
    """Yield all names, again and again, until there were so many."""
    for start in range(0, count, len(names)):
        yield names[: count - start]


def by_run(scorer: Scorer, names: list[str], count: int, tell: Tell) -> None:
    """Score with the function behind `iqa-run`."""

    def watch(record: Record, _kept: bool) -> None:
        tell(record.status is Status.OK)

    for some in rounds(names, count):
        with tempfile.TemporaryDirectory() as folder:
            outputs = Outputs(file=Path(folder, "scores.jsonl"), form=Format.JSONL)
            score_names(scorer, some, Options(crops=1), outputs, workers=2, watch=watch)
            assert len(Path(folder, "scores.jsonl").read_bytes().splitlines()) == len(some)


def by_serve(scorer: Scorer, names: list[str], count: int, tell: Tell) -> None:
    """Ask a service, each image in a connection of its own."""

    def ask(name: str) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=600)
        connection.request("POST", "/score?crops=1", Path(name).read_bytes())
        answer = connection.getresponse()
        record = json.loads(answer.read())
        connection.close()
        assert (answer.status, record["status"]) in {(200, "ok"), (422, "error")}
        return answer.status == 200

    with running(Service({"tiny": scorer})) as site, ThreadPoolExecutor(CLIENTS) as clients:
        for some in rounds(names, count):
            for scored in clients.map(ask, some):
                tell(scored)


WAYS = {"run": by_run, "serve": by_serve}


def state() -> dict[str, float]:
    """Return what this process holds."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "memory_mib": int(status["VmRSS"].split()[0]) / 1024,
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def soak(way: Callable[[Scorer, list[str], int, Tell], None], engine: Path, count: int) -> dict[str, Any]:
    """Score so many images one way, and return what became of them and of this process."""
    found, start = {True: 0, False: 0}, time.monotonic()
    samples: list[dict[str, float]] = []

    def tell(scored: bool) -> None:
        found[scored] += 1
        if sum(found.values()) % SAMPLE_EVERY == 0:
            samples.append(state())

    with tempfile.TemporaryDirectory() as folder, load(engine, OnnxRuntime(threads=1)) as scorer:
        way(scorer, draw(Path(folder)), count, tell)
    assert sum(found.values()) == count
    warm = samples[max(1, len(samples) // 10) :]
    third = max(1, len(warm) // 3)

    def growth(name: str) -> dict[str, Any]:
        first, last = (statistics.median(one[name] for one in part) for part in (warm[:third], warm[-third:]))
        return {"first": round(first, 1), "last": round(last, 1), "most": round(max(one[name] for one in warm), 1)}

    seconds = round(time.monotonic() - start, 1)
    done = {"images": count, "scored": found[True], "failed": found[False], "seconds": seconds}
    return {**done, **{name: growth(name) for name in samples[0]}}


def main() -> None:
    """Score, and write what was found into figures/results/soak.json, beside what is there of the other way."""
    engine, count, *ways = sys.argv[1:]
    for way in ways or WAYS:
        found = soak(WAYS[way], Path(engine), int(count))
        before = json.loads((RESULTS / "soak.json").read_text(encoding="utf-8"))
        write("soak", {name: before[name] for name in WAYS if name in before} | {way: found})


if __name__ == "__main__":
    main()

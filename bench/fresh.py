"""The start-up, timed in a fresh process.

`python -m diffiqa.bench.fresh '{"engine": …, "image": …, "crops": …, "seed": …, "backend": …, "settings": {…}}'`
prints JSON.
"""

import time

_ENTERED = (time.time(), time.perf_counter())  # before anything else is imported

import dataclasses  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

from .results import Start  # noqa: E402

if TYPE_CHECKING:
    from ..runtime.backends import Backend


def measure_start(engine: Path, image: Path, backend: "Backend", *, crops: int | None, seed: int) -> Start:
    """Start a process that loads the engine and scores an image twice, on a GPU three times."""
    asked: dict[str, object] = {"engine": str(engine), "image": str(image), "crops": crops, "seed": seed}
    asked |= {"backend": backend.key, "settings": dataclasses.asdict(backend)}
    started = time.time()
    command = [sys.executable, "-m", __name__, json.dumps(asked)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 — this very module
    data = json.loads(found.stdout.splitlines()[-1])
    return Start(interpreter=max(0.0, data.pop("entered") - started), **data)


def main(asked: str) -> None:
    """Do what a program with `diffiqa.load` does, and print how long each part took."""
    entered, last = _ENTERED
    parts: dict[str, float | None] = {"entered": entered}

    def done(part: str) -> None:
        nonlocal last
        now = time.perf_counter()
        parts[part] = now - last
        last = now

    from ..engine.manifest import open_engine
    from ..runtime.backends import BACKENDS
    from ..runtime.results import Options
    from ..runtime.scorer import load
    from .machine import peak_mib
    from .running import import_libraries

    given = json.loads(asked)
    settings = given["settings"]
    if "providers" in settings:  # JSON has no tuples, and ONNX Runtime takes nothing else
        settings["providers"] = [tuple(p) if isinstance(p, list) else p for p in settings["providers"]]
    backend = BACKENDS[given["backend"]](**settings)
    import_libraries(backend)
    done("imports")
    directory = open_engine(Path(given["engine"]))
    done("check")
    scorer = load(directory, backend)
    done("load")
    options = Options(crops=given["crops"], seed=given["seed"])
    scorer.score(given["image"], options)
    done("first_score")
    parts["peak_mib"] = peak_mib()
    if backend.on_gpu:
        scorer.score(given["image"], options)
        done("second_score")
    scorer.score(given["image"], options)
    done("later_score")
    print(json.dumps(parts))  # noqa: T201 — the parent reads it


if __name__ == "__main__":
    main(*sys.argv[1:])

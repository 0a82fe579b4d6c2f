"""Start-up in a fresh process.

`python -m diffiqa.bench.fresh ENGINE BACKEND PRECISION THREADS CROPS SEED IMAGE` prints JSON.
"""

import time

_ENTERED = (time.time(), time.perf_counter())  # before anything else is imported

import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from .results import Start  # noqa: E402


def measure_start(
    engine: Path, image: Path, *, backend: str, precision: str, threads: int, crops: int, seed: int
) -> Start:
    """Start a process that loads the engine and scores an image twice."""
    started = time.time()
    command = [sys.executable, "-m", __name__]
    command += [str(engine), backend, precision, str(threads), str(crops), str(seed), str(image)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 — this very module
    data = json.loads(found.stdout.splitlines()[-1])
    return Start(interpreter=max(0.0, data.pop("entered") - started), **data)


def main(engine: str, backend: str, precision: str, threads: str, crops: str, seed: str, image: str) -> None:
    """Do what a program does that uses `diffiqa.load`, and print when each part was done."""
    entered, last = _ENTERED
    parts: dict[str, float | None] = {"entered": entered}

    def done(part: str) -> None:
        nonlocal last
        now = time.perf_counter()
        parts[part] = now - last
        last = now

    from ..runtime.manifest import open_engine
    from ..runtime.results import Options
    from ..runtime.scorer import Scorer, host_name, host_settings, load_stages
    from .machine import peak_mib

    settings = host_settings(backend, int(threads), precision)
    host_name(settings)  # imports what runs the networks; its time is told apart from loading
    done("imports")
    directory = open_engine(Path(engine))
    done("check")
    stages = load_stages(directory, settings)
    scorer = Scorer(directory.manifest, stages, backend="bench")
    done("load")
    options = Options(crops=int(crops), seed=int(seed))
    scorer.score(image, options)
    done("first_score")
    parts["peak_mib"] = peak_mib()
    scorer.score(image, options)
    done("later_score")
    print(json.dumps(parts))  # noqa: T201 — the parent reads it


if __name__ == "__main__":
    main(*sys.argv[1:])

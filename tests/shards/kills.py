"""Runs that are killed again and again.

python -m diffiqa.tests.shards.kills OUT COUNT SECONDS [--ray ADDRESS]
python -m diffiqa.tests.shards.kills OUT --engine ENGINE PHOTOS
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import diffiqa
from diffiqa.shards.api import carry_out
from diffiqa.shards.driver import Crew
from diffiqa.shards.on_ray import Actors
from diffiqa.shards.processes import Processes

from .stub import names, work_in

WORKERS = 2


def drive(out: Path, *rest: str) -> None:
    """Score so many names with the stub, here or on Ray, or photographs with an engine: always by two workers."""
    match rest:
        case "--engine", engine, photos:
            diffiqa.run_shards(engine, photos, out, diffiqa.OnnxRuntime(), shard_size=5, workers=WORKERS)
        case count, seconds, *ray:
            work = work_in(out, seconds=float(seconds))
            crew: Crew = Actors(work, WORKERS, ray[1]) if ray else Processes(work, WORKERS)
            carry_out(work, names(int(count)), crew, shard_size=50)


def kill_at_random(arguments: Sequence[str | Path], kills: int, longest: float, seed: int) -> dict[str, int]:
    """Run to the end what is killed so often on its way, each time after up to `longest` seconds; count whom it hit.

    One in four hits the driver. It is started again, also where it gave up because too many workers died in a row.
    """
    generator = random.Random(seed)  # noqa: S311
    command = [sys.executable, "-m", "diffiqa.tests.shards.kills", *map(str, arguments)]
    hit = {"driver": 0, "worker": 0, "gave_up": 0}
    process = subprocess.Popen(command)
    while hit["driver"] + hit["worker"] < kills:
        time.sleep(generator.uniform(0.05, longest))
        if process.poll() is not None:
            if process.returncode == 0:
                break
            hit["gave_up"] += 1
            process = subprocess.Popen(command)
            continue
        who = "driver" if generator.random() < 0.25 else "worker"
        target = process.pid if who == "driver" else generator.choice(workers_of(process.pid) or [0])
        if not target:
            continue
        os.kill(target, signal.SIGKILL)
        hit[who] += 1
        if who == "driver":
            process.wait()
            process = subprocess.Popen(command)
    if process.wait() != 0:
        raise RuntimeError(f"the run ended with {process.returncode}")
    return hit


def results(out: Path) -> dict[str, bytes]:
    """What a run leaves, without what is true of one attempt only: side files, progress."""
    kept = [path for path in out.iterdir() if path.suffix == ".jsonl" or path.name in {"plan.json", "manifest.json"}]
    return {path.name: path.read_bytes() for path in kept}


def workers_of(driver: int) -> list[int]:
    """Return the processes of a driver's workers."""
    try:
        children = Path(f"/proc/{driver}/task/{driver}/children").read_text().split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:
        return []


if __name__ == "__main__":
    drive(Path(sys.argv[1]), *sys.argv[2:])
